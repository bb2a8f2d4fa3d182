"""Tiny pipelines with adapters of random numbers, for the tests of injection and of file formats.

An adapter straight from injection has B = 0, which any loader passes; `randomise_` fills both factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.adapter.files import reading, storage
from lora_booth.adapter.files.diffusers import scale_from
from lora_booth.adapter.weights import AdapterWeights, AnyWeights, Dense, LowRank, weight_change
from lora_booth.config.settings import AdapterConfig
from lora_booth.errors import ConfigError

PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
MIXED = {
    "targets": "all-linear+conv",
    "rank": 4,
    "alpha": 3.0,
    "rank_pattern": {r"attn1\.to_q": 2, r"attn2\.to_k": 1, "q_proj": 3},
    "alpha_pattern": {r"attn1\.to_v": 5.0, "out_proj": 1.0},
}
"""An adapter on which every shortcut shows: alpha != rank, several ranks (one is 1), several alphas, convolutions."""
FEW = r"regex:(mid_block|down_blocks\.1|up_blocks\.1)\..+(attn1\.to_[qv]|attn2\.to_k|proj_in|ff\.net\.2|conv2|conv)"
"""One of each kind of layer at three levels: PEFT's injection and loading take time per layer."""
RSLORA = {"targets": FEW, "rank": 8, "alpha": 3.0, "rslora": True}


def pipeline(family: str, bases: dict[str, Path]) -> Any:
    """The tiny base of a family, always with the same weights."""
    pipe = PIPELINES[family].from_pretrained(bases[family])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def components(pipe: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def adapted_pipeline(family: str, bases: dict[str, Path], **adapter: Any) -> Any:
    """A pipeline whose UNet and text encoders carry a randomised adapter."""
    pipe = pipeline(family, bases)
    inject.inject_(components(pipe), AdapterConfig(**adapter), seed=1)
    randomise_(components(pipe))
    return pipe


_TRAINED: dict[tuple[str, Path], tuple[AdapterWeights, Tensor]] = {}


def trained_mixed(family: str, bases: dict[str, Path]) -> tuple[AdapterWeights, Tensor]:
    """The weights of a randomised MIXED adapter on every layer, and what its pipeline draws; made once a session."""
    key = (family, bases[family])
    if key not in _TRAINED:
        pipe = adapted_pipeline(family, bases, **MIXED)
        _TRAINED[key] = inject.collect(components(pipe)), draw(pipe)
    return _TRAINED[key]


def randomise_(modules: dict[str, nn.Module], seed: int = 5, std: float = 0.1) -> None:
    """Random numbers in both factors; magnitudes move by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if "lora_magnitude" in name:
                parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.data = std * torch.randn(parameter.shape, generator=generator)


def draw(pipe: Any) -> Tensor:
    """Latents of two steps, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a photo of yql dog", num_inference_steps=2, generator=generator, output_type="latent").images


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""unet/config.json of stable-diffusion-v1-5; the other fields are diffusers' defaults."""
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""unet/config.json of stable-diffusion-xl-base-1.0."""


def full_size_unet(family: str) -> nn.Module:
    """The real UNet without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**{"sd1": SD15_UNET, "sdxl": SDXL_UNET}[family])


def adapter_file(path: Path, seed: int, scale: float = 1.0) -> Path:
    """An adapter on two layers that every tiny SD 1 base has."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"down_blocks.0.attentions.{n}.transformer_blocks.0.attn1.to_q" for n in range(2)]
    layers = {
        n: LowRank(torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator), scale)
        for n in names
    }
    storage.FORMATS["kohya"].write(path, {"unet": layers}, "sd1", torch.float32, {})
    return path


def merged_weight(weight: Tensor, update: LowRank | Dense, strength: float = 1.0) -> Tensor:
    """The layer's weight with the update in it, float32, in the weight's shape: W + strength * change.

    Strength moves a DoRA layer in a straight line from W to W', as in ComfyUI; PEFT scales delta inside the norm, which
    agrees at strength 1 only. Raises ModelError when the shapes differ.
    """
    return weight.float() + strength * weight_change(weight, update)


def set_adapter_scale_(modules: Mapping[str, nn.Module], scale: float) -> None:
    """Multiply every layer's update by the strength `scale`, replacing an earlier strength. 0 is the base, bit for bit.

    For a DoRA layer a strength between 0 and 1 scales the low-rank part and keeps the magnitudes, as diffusers does.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"The strength of an adapter is {scale}; use a finite number, usually 0 to 1.")
    for layer in inject.Injected(modules).layers:
        layer.set_scale(inject.ADAPTER, scale)
        inject._enable_(layer, scale != 0)


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> AnyWeights:
    """The adapter in a file's tensors, float32, whatever their spelling; `metadata` is the header, read for scales.

    Raises ModelError for whatever cannot be read whole.
    """
    return reading.strictly(*reading.gather(tensors, scale_from(metadata or {})))
