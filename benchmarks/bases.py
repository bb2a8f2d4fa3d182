"""Bases with random weights, of real size or with smaller widths, and pictures of noise: for measuring without
gigabytes to download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.families.components import shipped_tokenizer

_VAE = {"block_out_channels": [32, 64, 128, 128]}
_TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
_NARROW_VAE = {"block_out_channels": [32, 32, 32, 32]}
_NARROW_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
SMALLER: dict[str, dict[str, dict[str, Any]]] = {
    "sd1_quarter": {
        "unet": {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 256},
        "vae": _VAE,
        "text_encoder": _TEXT,
    },
    "sdxl_quarter": {
        "unet": {
            "block_out_channels": [64, 160, 320],
            "cross_attention_dim": 512,
            "projection_class_embeddings_input_dim": 6 * 256 + 256,
        },
        "vae": _VAE,
        "text_encoder": _TEXT,
        "text_encoder_2": _TEXT | {"projection_dim": 256},
    },
    "sd1_narrow": {
        "unet": {"block_out_channels": [64, 64, 64, 64], "cross_attention_dim": 64},
        "vae": _NARROW_VAE,
        "text_encoder": _NARROW_TEXT,
    },
    "sdxl_narrow": {
        "unet": {
            "block_out_channels": [32, 32, 32],
            "attention_head_dim": [2, 2, 2],
            "cross_attention_dim": 128,
            "projection_class_embeddings_input_dim": 6 * 256 + 64,
        },
        "vae": _NARROW_VAE,
        "text_encoder": _NARROW_TEXT,
        "text_encoder_2": _NARROW_TEXT | {"projection_dim": 64},
    },
}
"""Changes to the configs of SD 1.5 and SDXL. A quarter of their widths makes UNets of 35 and 160 million parameters, of
which a CPU core trains a step in seconds. Narrow ones have every layer and hardly any numbers: a step of theirs takes
what starting its operations takes."""
ARCHITECTURE_NAMES = (*SMALLER, "sd1", "sd2_base", "sd2_v", "sdxl")


def random_base(folder: Path, architecture: str) -> Path:
    """A diffusers folder in bf16: a shipped architecture or a smaller one, random weights, CLIP's tokenizer."""
    import diffusers
    import transformers

    changes = SMALLER.get(architecture, {})
    architecture = architecture.removesuffix("_quarter").removesuffix("_narrow")
    shutil.copytree(SHIPPED_CONFIGS / architecture, folder)
    for name, values in changes.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=1), encoding="utf-8")
    classes: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if name.startswith("text_encoder"):
            classes[name] = getattr(transformers, entry[1])
        elif name.startswith("tokenizer"):
            shipped_tokenizer(SHIPPED_CONFIGS / architecture / name).save_pretrained(folder / name)
    for name, cls in classes.items():
        config = json.loads((folder / name / "config.json").read_text())
        with torch.device("meta"):
            module = cls(cls.config_class(**config)) if name.startswith("text") else cls.from_config(config)
        module = module.to_empty(device="cpu").to(torch.bfloat16)
        fill_(module)
        module.save_pretrained(folder / name)
    return folder


def noise_pictures(folder: Path, count: int, side_px: int) -> Path:
    """`count` square pictures of noise, each another, as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = Image.merge("RGB", [Image.effect_noise((side_px, side_px), 40 + i) for _ in "RGB"])
        picture.save(folder / f"{i}.png")
    return folder


def fill_(module: nn.Module) -> None:
    """Weights that keep activations finite: norms are one, everything else is small noise repeated from one block."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "position_ids" in name:
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
            elif "norm" in name:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                flat = tensor.view(-1)
                for start in range(0, flat.numel(), len(noise)):
                    flat[start : start + len(noise)] = noise[: flat.numel() - start]
