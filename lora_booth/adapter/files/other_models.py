"""Which other model an adapter is for, if for none of ours, by its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_booth.adapter.files import kohya
from lora_booth.adapter.files.keys import parse
from lora_booth.models.bases.architectures import is_text

_MODELS = (
    (r"single_transformer_blocks", "Flux"),
    (r"double_blocks\W\d+\W(?:img|txt)_(?:attn_qkv|attn_proj|mlp\W)", "HunyuanVideo"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"(?:double|single)_blocks[._]\d", "Flux, or a model built like it (Chroma, HunyuanVideo)"),
    (r"(?:double|single)_stream_blocks[._]\d", "HiDream"),
    (r"joint_blocks[._]\d", "Stable Diffusion 3"),
    (r"joint_transformer_blocks|double_layers[._]\d", "AuraFlow"),
    (r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)", "Qwen-Image"),
    (r"transformer_blocks[._]\d+[._](?:attn[._]add_|ff_context|norm1_context)", "Stable Diffusion 3 or Flux"),
    (r"Wqkv|pooler[._].*positional|hunyuan_?dit", "HunyuanDiT"),
    (r"(?:noise|context)_refiner", "Z-Image or Lumina 2"),
    (r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn)[._](?:q|k|v|o|norm)|condition_embedder",
     "Wan, or a model built like it"),
    (r"^transformer\.blocks\.\d+\.attn[12]", "Wan, or a model built like it"),
    (r"lora_prior_(?:unet|te)_", "Stable Cascade"),
    (r"motion_modules|temporal_(?:transformer|attentions)", "AnimateDiff or another video model"),
    (r"lora_te3_|text_encoder_3\.|t5xxl", "Stable Diffusion 3 or Flux"),
    (r"^(?:base_model\.model\.)?model\.layers\.\d+\.(?:self_attn|mlp)", "a language model"),
    (r"^(?:lora_)?transformer[._]|^diffusion_model\.(?:transformer_blocks|layers|blocks)\.", "a diffusion transformer"),
)  # fmt: skip
"""A part of a key to the model that has such layers; the first that is found counts. Sources: the module names of
diffusers and of the models' own code, and kohya's names of them."""


def model_of(keys: Iterable[str]) -> str | None:
    """The name of the other model, None where a key is a layer of a denoiser that is known here or nothing is known."""
    keys = list(keys)
    for key in keys:
        found = parse(key)
        if found and not is_text(found.component) and found.spelling != "unknown" and kohya.is_layer(found.path):
            return None
    return next((name for pattern, name in _MODELS if any(re.search(pattern, key) for key in keys)), None)


def refusal(name: str) -> str:
    """What to say of an adapter for the model `name`."""
    return (
        f"It is an adapter for {name}, and only those for Stable Diffusion 1, 2 and XL can be used here: a base of "
        "these has no such layers. Load it in a program for that model."
    )
