"""Keys of what training keeps in the cache: latents and prompts.

A key holds all that a picture's latents, or a prompt's conditioning, depend on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_booth.data.buckets import Crop
from lora_booth.run.cache import key

if TYPE_CHECKING:
    import torch

LATENTS_VERSION = 2
"""Raise it when the way from a picture's bytes to the pixels that are encoded changes."""


PROMPT_VERSION = 1
"""Raise it when the way from a prompt to its conditioning changes."""


def latent_key(fingerprint: str, picture_sha256: str, crop: Crop, *, is_flipped: bool) -> str:
    """Key of the float32 latents of one picture, cut in one way, under the base with this fingerprint."""
    window = (*crop.geometry, crop.resized_width_px, crop.resized_height_px)
    return key("latents", LATENTS_VERSION, fingerprint, picture_sha256, *window, "torch.float32", is_flipped)


def mask_key(mask_sha256: str, crop: Crop, *, is_alpha: bool, is_flipped: bool) -> str:
    """Name of one mask, cut in one way; masks are not cached."""
    window = (*crop.geometry, crop.resized_width_px, crop.resized_height_px)
    return key("mask", mask_sha256, *window, is_alpha, is_flipped)


def prompt_key(fingerprint: str, prompt: str, *, dtype: torch.dtype) -> str:
    """Key of the conditioning that the base with this fingerprint makes of `prompt`."""
    return key("prompt", PROMPT_VERSION, fingerprint, prompt, str(dtype))
