"""Model families: the only rooms that know an architecture. `load` picks the one a base belongs to."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lora_booth.config import ModelConfig
from lora_booth.families import identify, sources

if TYPE_CHECKING:
    import torch

    from lora_booth.families.base import Family

FAMILIES = {
    "sd1": "lora_booth.families.stable_diffusion:StableDiffusion",
    "sd2": "lora_booth.families.stable_diffusion:StableDiffusion",
    "sdxl": "lora_booth.families.sdxl:StableDiffusionXL",
}
"""Family name to module and class; imported when loaded, so that facts about a base cost no torch."""


def facts(config: ModelConfig) -> identify.BaseFacts:
    """What `model.base` is, without reading weights and without torch. A hub id is downloaded.

    Raises ModelError for a base that is missing, unsafe, incomplete or of another kind.
    """
    return identify.identify(sources.resolve(config))


def load(
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    needs_vae: bool = True,
    needs_text_encoders: bool = True,
) -> Family:
    """The base of `config`, frozen, on `device`: VAE in float32, the rest in `dtype`.

    Parts that are not needed are not read; calling for them then is an assertion error.
    """
    import torch

    from lora_booth.families.components import Wanted, load_components

    base = facts(config)
    wanted = Wanted(torch.device(device), dtype, needs_vae=needs_vae, needs_text_encoders=needs_text_encoders)
    module, _, name = FAMILIES[base.family].partition(":")
    family: Family = getattr(import_module(module), name)(base, load_components(base, wanted))
    return family
