"""A family that is none of ours, made outside of the package: a small transformer that follows a rectified flow.

It has a denoiser of its own, prompts of its own (no text encoder: a vector for each letter), another objective, another
naming, and a pipeline of its own. What it needs of the package is one row and the methods of `Family`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lora_booth.models.bases.architectures import Architecture, Part
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import Components
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.run.randomness import generator_for

LETTERS = 12
"""Of a prompt; what is longer is cut."""


class Block(nn.Module):
    """Tokens look at each other and at the prompt, then each is changed by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        seen = torch.cat([self.norm(tokens), prompt], dim=1)
        q, k, v = self.query(self.norm(tokens)), self.key(seen), self.value(seen)
        tokens = tokens + self.out(functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return tokens + self.narrow(functional.silu(self.widen(self.norm(tokens))))


class ToyDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc, no-any-unimported]
    """`[B, C, h, w]` to the same, each latent a token."""

    @register_to_config
    def __init__(self, sample_size: int = 16, in_channels: int = 4, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(in_channels, width), nn.Linear(width, in_channels)
        self.time = nn.Linear(1, width)
        self.steps = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, latents: Tensor, timesteps: Tensor, prompt: Tensor) -> Tensor:
        tokens = self.enter(latents.flatten(2).transpose(1, 2)) + self.time(timesteps.view(-1, 1, 1) / 1000)
        for step in self.steps:
            tokens = step(tokens, prompt)
        return self.leave(tokens).transpose(1, 2).reshape(latents.shape)


@dataclass
class Drawn:
    """What a pipeline gives."""

    images: Tensor


@dataclass
class ToyPipeline:
    """Euler steps along the flow."""

    family: ToyFamily

    def __call__(
        self,
        *,
        prompt: Tensor,
        negative: Tensor,
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        output_type: str,
        callback_on_step_end: Any,
    ) -> Drawn:
        shape = (4, height // 8, width // 8)
        latents = torch.stack([torch.randn(shape, generator=stream) for stream in generator])
        levels = torch.linspace(1, 0, num_inference_steps + 1)
        for step, (level, following) in enumerate(pairwise(levels)):
            times = (level * 1000).expand(len(latents))
            found = [self.family.denoiser(latents, times, text) for text in (negative, prompt)]
            latents = latents + (following - level) * (found[0] + guidance_scale * (found[1] - found[0]))
            callback_on_step_end(self, step, times, {})
        return Drawn(latents)


class ToyFamily(Family):
    """The family "toy"."""

    def __init__(self, facts: BaseFacts, parts: Components) -> None:
        super().__init__(facts, parts)
        self.num_used_text_layers = {}

    def text_encoders(self) -> dict[str, nn.Module]:
        return {}

    @property
    def window(self) -> int:
        return LETTERS + 2  # it marks neither start nor end

    def words_cut(self, prompts: Sequence[str]) -> dict[str, str]:
        return {prompt: prompt[LETTERS:] for prompt in prompts if len(prompt) > LETTERS and "wet" in prompt}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        width = self.denoiser.config.width
        rows = []
        for prompt in prompts:
            letters = prompt[:LETTERS].ljust(LETTERS)
            rows.append(torch.stack([torch.randn(width, generator=generator_for("letter", x)) for x in letters]))
        return {"letters": torch.stack(rows).to(self.device, self._dtype)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        predicted: Tensor = self.denoiser(noisy.to(self._dtype), timesteps.to(self._dtype), conditioning["letters"])
        return predicted

    def pipeline(self, sampler: str) -> Any:
        return ToyPipeline(self)

    def pipeline_inputs(self, prompt: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt": prompt["letters"], "negative": negative["letters"]}

    def prepare_denoiser_(self, *, gradient_checkpointing: float, attention: str, is_offloading: bool = False) -> None:
        """It is too small to save any memory in."""

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.enter.weight.dtype
        return dtype


ROW = Architecture(
    name="toy",
    label="Toy Flow",
    family="tests.support.toy:ToyFamily",
    pipeline="ToyPipeline",
    denoiser="transformer",
    parts={
        "transformer": Part("tests.support.toy", ("ToyDenoiser",)),
        "vae": Part("diffusers", ("AutoencoderKL",)),
        "scheduler": Part("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
    },
    recognises=lambda config: True,
    check=lambda base, configs: None,
    latent_multiple=lambda config: 1,
    predictions={"flow": 128},
    step_limits=(3, 30),
    targets={"attention": r"steps\.\d+\.(query|key|value|out)"},
    kohya_prefixes={"transformer": "lora_toy"},
    modelspec={"flow": "toy-flow/lora"},
    kohya_version="toy_v1",
    marks=("toy",),
    ui_version="Unknown",
    path_words="steps query key value out widen narrow",
    bounds={"sample_size": 512, "in_channels": 16, "width": 512, "depth": 16},
)


def toy_base(folder: Path) -> Path:
    """A base of the family on disk: its denoiser, a VAE, a scheduler that says flow with shift 3."""
    torch.manual_seed(0)
    denoiser = ToyDenoiser()
    denoiser.save_pretrained(folder / "transformer")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, layers_per_block=1, sample_size=128, **blocks)
    vae.save_pretrained(folder / "vae")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {name: [part.module, part.classes[0]] for name, part in ROW.parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **index}))
    assert load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder
