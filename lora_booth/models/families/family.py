"""The contract of a family: all that the rest of the house knows about a model architecture.

What lives here: the contract, and what bases with a UNet, a VAE and text encoders do alike. A family is a subclass that
writes only what differs.

Words fixed here, used everywhere:
- *pixels*: float32 `[B, 3, H, W]` in [-1, 1], H and W multiples of the family's bucket step.
- *latents*: `[B, C, H/f, W/f]` after shift and scale, so about unit variance: what the denoiser sees.
- *conditioning*: what the text encoders make of prompts, a dict of tensors with the batch first.
- *geometry*: float32 `[B, 6]`: original height, original width, crop top, crop left, target height, target width, in
  pixels of that very image. Only SDXL reads it.
- *timestep*: `[B]` in [0, 1000), the network's scale; int64 for diffusion, float32 for a rectified flow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_booth.models.bases.architectures import ARCHITECTURES, Architecture
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import Components, compile_unet_, prepare_unet_
from lora_booth.models.families.noise import NoiseSchedule
from lora_booth.models.families.prompts import Tokens
from lora_booth.models.families.quantize import move_frozen_
from lora_booth.models.families.schedules import noise_schedule
from lora_booth.models.families.vae import Vae

Conditioning = dict[str, Tensor]


class Family(ABC):
    """One loaded base: a frozen denoiser, VAE and text encoders, and the only code that knows how they are called."""

    name: str
    """Key in `architectures.ARCHITECTURES`, as "sd1"."""
    fingerprint: str
    """Identity of the base's weights, for cache keys and metadata (`sources.fingerprint`)."""
    native_resolution: int
    """Side in pixels that the base was trained at."""
    bucket_step: int
    """Crop sides must be multiples of this many pixels."""
    schedule: NoiseSchedule
    """Noise levels and prediction type, read from the base's scheduler config."""
    denoiser: nn.Module
    """Denoiser in the compute dtype, frozen, in eval mode."""
    device: torch.device
    """Where all is computed; parts may wait in main memory meanwhile."""
    num_used_text_layers: dict[str, int]
    """Component name of each text encoder to the number of its layers that reach the conditioning."""
    when_read: Callable[[Family, str], None]
    """Told "vae" or "text encoders" as soon as these, having waited, are read."""
    is_shared: bool
    """Whether later runs need it too: then text encoders that are released wait in main memory, and come back."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        self.name = facts.family
        self.native_resolution = facts.native_resolution
        self.bucket_step = facts.bucket_step
        self._solver_config = facts.config("scheduler")
        self.schedule = noise_schedule(self._solver_config, source=facts.path)
        self.denoiser, self.device = parts.denoiser, parts.device
        self._parts_vae, self._encoders, self._tokens = parts.vae, dict(parts.text_encoders), parts.tokens
        self._read_vae, self._read_text_encoders = parts.read_vae, parts.read_text_encoders
        self._vae_config, self.when_read = facts.config("vae"), lambda family, part: None
        self.is_shared, self._waiting = False, dict[str, nn.Module]()

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of `prompts`, on the device, in the compute dtype. Gradients flow if the encoders have adapters.

        A row depends on its prompt alone. What exceeds the encoder's window is cut, and logged once per prompt.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        """The denoiser's output for `noisy` latents, same shape; what it means is `schedule.prediction_type`."""

    @abstractmethod
    def pipeline(self, sampler: str) -> Any:
        """A diffusers pipeline around the very same modules (nothing is copied), with the named solver.

        Text encoders may have been released: then the caller passes `pipeline_inputs(conditioning)`. It follows
        `schedule`, also one that was rescaled to zero terminal SNR after loading.
        """

    @abstractmethod
    def pipeline_inputs(self, prompt: Conditioning, negative: Conditioning) -> dict[str, Any]:
        """Keyword arguments that hand already encoded prompts to the pipeline.

        The empty prompt becomes zeros here, and only here, where the base wants that of a negative.
        """

    @property
    def architecture(self) -> Architecture:
        """The row of its family."""
        return ARCHITECTURES[self.name]

    def text_encoders(self) -> dict[str, nn.Module]:
        """Component name ("text_encoder", "text_encoder_2") to module, for adapters; not once they are released."""
        if self._read_text_encoders is not None:
            read, self._read_text_encoders = self._read_text_encoders, None
            self._encoders = read()
            self.when_read(self, "text encoders")
        for name, encoder in self._waiting.items():
            move_frozen_(encoder, self.device)
            self._encoders[name] = encoder
        self._waiting = {}
        assert self._encoders, "the text encoders were released, or never loaded"
        return dict(self._encoders)

    def tokenizers(self) -> dict[str, Any]:
        """Component name of each text encoder to its tokenizer; they stay when the encoders are released."""
        return {name: tokens.tokenizer for name, tokens in self._tokens.items()}

    def tokens(self, name: str) -> Tokens:
        """How prompts are written for the text encoder `name`."""
        return self._tokens[name]

    @property
    def window(self) -> int:
        """Tokens of a prompt that the text encoder sees, its start and end among them."""
        return int(next(iter(self._tokens.values())).window)

    def words_cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that the text encoder cannot see whole, each with the words that are cut off."""
        return next(iter(self._tokens.values())).cut(prompts)

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """`[C, h, w]` of the latents of a picture of this size."""
        factor = 2 ** (len(self._vae_config.get("block_out_channels", [64])) - 1)  # as AutoencoderKL has it by default
        return self._vae_config.get("latent_channels", 4), height_px // factor, width_px // factor

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled, float32 `[B, C, h, w]` each. The VAE runs in float32."""
        return self._vae.encode(pixels)

    def decode_latents(self, latents: Tensor, *, is_tiled: bool = False) -> Tensor:
        """Pixels `[B, 3, H, W]` float32 in [-1, 1] on the CPU. `is_tiled`: large pictures in overlapping tiles."""
        return self._vae.decode(latents, is_tiled=is_tiled)

    def move_vae(self, device: torch.device | str) -> None:
        """Put the VAE on `device`; it is only needed for caching and pictures."""
        if self._parts_vae is not None:
            self._parts_vae.module.to(device)

    def move_denoiser(self, device: torch.device | str) -> None:
        """Put the denoiser on `device`, but for what is trained in it; VAE and text encoders do without."""
        move_frozen_(self.denoiser, device)

    def release_text_encoders(self) -> None:
        """Drop the text encoders, so that their memory is free. Prompts can no longer be encoded, but where the family
        `is_shared`."""
        if self.is_shared:
            for encoder in self._encoders.values():
                move_frozen_(encoder, "cpu")
            self._waiting |= self._encoders
        else:
            self._read_text_encoders = None
        self._encoders.clear()

    def renew_(self, *, is_denoiser_offloaded: bool) -> None:
        """Put all parts where they are after loading, for the next run that shares the family."""
        self.move_vae(self.device)
        self.denoiser.eval()
        self.move_denoiser("cpu" if is_denoiser_offloaded else self.device)

    def prepare_denoiser_(self, *, gradient_checkpointing: float, attention: str, is_offloading: bool = False) -> None:
        """Switch recomputation of the activations of a share of the blocks, from the first on, whose inputs wait in
        main memory if it `is_offloading`; choose "sdpa" or "xformers" attention (ConfigError if it cannot run)."""
        prepare_unet_(self.denoiser, gradient_checkpointing, attention, is_offloading=is_offloading)

    def compile_denoiser_(self) -> None:
        """Let the repeated blocks be compiled when they next run. ConfigError where there is no compiler."""
        compile_unet_(self.denoiser)

    @property
    def _vae(self) -> Vae:
        if self._read_vae is not None:
            read, self._read_vae = self._read_vae, None
            self._parts_vae = read()
            self.when_read(self, "vae")
        assert self._parts_vae is not None, "the VAE was not loaded"
        return self._parts_vae

    @property
    def _dtype(self) -> torch.dtype:
        """The base's own, by a layer before its blocks: adapters are float32."""
        conv_in: Any = self.denoiser.conv_in
        dtype: torch.dtype = conv_in.weight.dtype
        return dtype
