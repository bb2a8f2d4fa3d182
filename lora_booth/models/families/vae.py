"""Pictures to latents and back, in float32 always.

Half-precision VAEs overflow on SDXL, and each picture is encoded or decoded only once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_booth.models import at_once

TILE_PX = 768
"""Side of a tile. A picture of SDXL's size has 4 of them, which overlap by a quarter, and decoding one holds 1.7 GiB by
count where the whole picture holds 3.0. Smaller tiles save more and look less alike: each has its own norms."""


class Vae:
    """A frozen float32 AutoencoderKL with its latents' shift and scale. May lie on another device than the denoiser."""

    def __init__(self, module: Any) -> None:
        self.module = module
        _cast_what_is_decoded_(module)
        config = module.config
        channels = config.latent_channels
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self._shift = torch.tensor(mean or [config.get("shift_factor") or 0.0] * channels).view(1, -1, 1, 1)
        self._scale = config.scaling_factor / torch.tensor(std or [1.0] * channels).view(1, -1, 1, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, float32 `[B, C, h, w]`, on the VAE's device."""
        with torch.no_grad():
            posteriors = [
                self.module.encode(p.to(self.device, torch.float32)).latent_dist for p in self._chunks(pixels, 1)
            ]
        mean = torch.cat([posterior.mean for posterior in posteriors]).contiguous()  # as they come from a cache
        std = torch.cat([posterior.std for posterior in posteriors]).contiguous()
        shift, scale = self._shift.to(mean), self._scale.to(mean)
        return (mean - shift) * scale, std * scale

    def decode(self, latents: Tensor, *, is_tiled: bool = False) -> Tensor:
        """Pixels `[B, 3, H, W]` float32 in [-1, 1] on the CPU; those larger than a tile in tiles, if wanted."""
        chunks = self._chunks(latents, self.factor)
        return torch.cat([self.decode_chunk(chunk, is_tiled=is_tiled).cpu() for chunk in chunks])

    @torch.no_grad()
    def decode_chunk(self, latents: Tensor, *, is_tiled: bool) -> Tensor:
        """What `decode` gives of latents that go through the VAE together, on its device."""
        z = latents.to(self.device, torch.float32)
        z = z / self._scale.to(z) + self._shift.to(z)
        self.module.use_tiling = is_tiled  # for decoding alone: tiles would change the latents that are trained on
        self.module.tile_latent_min_size, self.module.tile_sample_min_size = TILE_PX // self.factor, TILE_PX
        pixels: Tensor = self.module.decode(z, return_dict=False)[0].clamp(-1, 1)
        self.module.use_tiling = False
        return pixels

    def _chunks(self, batch: Tensor, pixels_per_cell: int) -> tuple[Tensor, ...]:
        height, width = (cells * pixels_per_cell for cells in batch.shape[-2:])
        chunks: tuple[Tensor, ...] = batch.split(at_once.decoded_at_once(width, height))
        return chunks

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        num_levels: int = len(self.module.config.block_out_channels)
        return int(2 ** (num_levels - 1))


def _cast_what_is_decoded_(module: nn.Module) -> None:
    """Let stock pipelines decode: they hand over latents in the denoiser's type and device, and cast for fp16 alone."""

    def cast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = next(module.parameters())
        return tuple(x.to(weight) if isinstance(x, Tensor) else x for x in inputs)

    first: Any = module.post_quant_conv if module.post_quant_conv is not None else module.decoder
    first.register_forward_pre_hook(cast)
