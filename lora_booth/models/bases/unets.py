"""What configs of Stable Diffusion's UNets say: family, inputs, sizes, targets.

Configs are those of `config.json` in a folder of the base, by component. Nothing is read here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_booth.errors import ModelError

Configs = Mapping[str, Mapping[str, Any]]
WHAT_WORKS = "lora_booth trains Stable Diffusion 1.x, 2.x and SDXL base models"
MAX_LEVELS = 8

ATTENTION = r".+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r".+\.ff\.net\.(0\.proj|2)"
TRANSFORMER = r".+\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\..+)"
RESNETS = r".+\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|.+\.(downsamplers|upsamplers)\.\d+\.conv"
TARGETS = {
    "attention": ATTENTION,
    "attention+conv": f"{ATTENTION}|{RESNETS}",
    "attention+ff": f"{ATTENTION}|{FEED_FORWARD}",
    "attention+ff+conv": f"{ATTENTION}|{FEED_FORWARD}|{RESNETS}",
    "all-linear": TRANSFORMER,
    "all-linear+conv": f"{TRANSFORMER}|{RESNETS}",
}
"""Preset to what matches its module names whole. All stay inside attentions, resnets and samplers, where every loader
has a name for them: conv_in, conv_out and the embeddings are lost by sd-scripts and stable-diffusion.cpp. "+conv" is
everything in the resnets and samplers, as kohya's LoCon, so "all-linear+conv" is the whole portable set."""


def is_sdxl(unet: Mapping[str, Any]) -> bool:
    """Whether it takes sizes and a pooled prompt."""
    return unet.get("addition_embed_type") == "text_time"


def is_sd2(unet: Mapping[str, Any]) -> bool:
    """Stable Diffusion 2 brought linear projections and the 1024-wide OpenCLIP; all else is shaped like 1.x."""
    wide = bool(unet.get("use_linear_projection")) or unet.get("cross_attention_dim") == 1024
    return wide and not is_sdxl(unet)


def is_sd1(unet: Mapping[str, Any]) -> bool:
    """Whether it is neither of the others."""
    return not is_sd2(unet) and not is_sdxl(unet)


def latent_multiple(unet: Mapping[str, Any]) -> int:
    """Latents by which a side must be divisible so that they halve evenly at every level: skip connections must fit."""
    return int(2 ** (len(unet["block_out_channels"]) - 1))


def check(base: Path, configs: Configs) -> None:
    """Raises ModelError for a UNet that wants inputs which training from pictures and prompts does not have."""
    unet, vae = configs["unet"], configs["vae"]
    for name, config in (("unet", unet), ("vae", vae)):
        channels = config.get("block_out_channels")
        if not isinstance(channels, list) or not 1 <= len(channels) <= MAX_LEVELS:
            raise ModelError(f"{base}/{name}/config.json lacks block_out_channels; copy or download the base again.")
    taken, made = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if taken != made:
        raise ModelError(f"{base} takes {reprlib.repr(taken)} input channels{why_channels(taken)}; {WHAT_WORKS}.")
    for key in ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds"):
        if unet.get(key) is not None:
            raise ModelError(f"{base}: its unet has {key} (a distilled, upscaling or unCLIP model); {WHAT_WORKS}.")
    expected = "text_time" if "text_encoder_2" in configs else None
    if unet.get("addition_embed_type") != expected:
        found = unet.get("addition_embed_type")
        raise ModelError(
            f"{base}: its unet has addition_embed_type {reprlib.repr(found)}, not {expected!r}; {WHAT_WORKS}."
        )
    if "text_encoder_2" in configs:
        time_dim, pooled = unet.get("addition_time_embed_dim"), configs["text_encoder_2"].get("projection_dim", 512)
        width = unet.get("projection_class_embeddings_input_dim")
        if not isinstance(time_dim, int) or not isinstance(pooled, int) or width != 6 * time_dim + pooled:
            raise ModelError(f"{base}: its unet does not take 6 sizes and a pooled prompt (a refiner?); {WHAT_WORKS}.")


def why_channels(channels: Any) -> str:
    """What kind of model takes so many input channels, in brackets; "" where that is not known."""
    kinds = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model", 7: "an upscaler"}
    return f" ({kinds[channels]})" if isinstance(channels, int) and channels in kinds else ""
