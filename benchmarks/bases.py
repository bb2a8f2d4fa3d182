"""Bases with random weights, of real size or with smaller widths, and pictures of noise: for measuring without
gigabytes to download."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.families.components import shipped_tokenizer
from lora_booth.run import disk

_VAE = {"block_out_channels": [32, 64, 128, 128]}
_TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
_TINY_VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_TINY_SD = {
    "unet": {
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    },
    "vae": _TINY_VAE,
    "text_encoder": _TINY_TEXT,
}
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
    "sdxl_half": {
        "unet": {
            "block_out_channels": [160, 320, 640],
            "attention_head_dim": [5, 5, 10],
            "cross_attention_dim": 1024,
            "projection_class_embeddings_input_dim": 6 * 256 + 640,
        },
        "text_encoder": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
        "text_encoder_2": {
            "hidden_size": 640,
            "intermediate_size": 2560,
            "num_attention_heads": 10,
            "projection_dim": 640,
        },
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
    "sd1_tiny": _TINY_SD,
    "sd2_v_tiny": _TINY_SD,
    "sdxl_tiny": {
        "unet": {
            "block_out_channels": [32, 32],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [2, 2],
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 6 * 256 + 32,
        },
        "vae": _TINY_VAE,
        "text_encoder": _TINY_TEXT,
        "text_encoder_2": _TINY_TEXT | {"projection_dim": 32},
    },
}
"""Changes to the configs of SD 1.5 and SDXL. A quarter of their widths makes UNets of 35 and 160 million parameters, of
which a CPU core trains a step in seconds. Half of SDXL's makes 600 million, with 64 numbers a head as it has. Narrow
ones have every layer and hardly any numbers: a step of theirs takes what starting its operations takes. Tiny ones have
two levels, and exist to try a benchmark: a step takes 0.1 s."""
NOISE_NUMBERS = 1 << 22
ARCHITECTURE_NAMES = (*SMALLER, "sd1", "sd2_base", "sd2_v", "sdxl")


def kept_base(folder: Path, architecture: str) -> Path:
    """`random_base` in `folder`, made where it is not there yet: whole or not at all, since benchmarks are killed."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        disk.move(random_base(unfinished, architecture), folder)
    return folder


def random_base(folder: Path, architecture: str) -> Path:
    """A diffusers folder in bf16: a shipped architecture or a smaller one, random weights, CLIP's tokenizer."""
    import diffusers
    import transformers

    changes = SMALLER.get(architecture, {})
    architecture = re.sub("_(quarter|half|narrow|tiny)$", "", architecture)
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
        is_text = name.startswith("text")
        with torch.device("meta"):
            module = cls(cls.config_class(**config)) if is_text else cls.from_config(config)
        file = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        write_random(folder / name / file, {key: tensor.shape for key, tensor in module.state_dict().items()})
    return folder


def noise_pictures(folder: Path, count: int, side_px: int) -> Path:
    """`count` square pictures of noise, each another, as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = Image.merge("RGB", [Image.effect_noise((side_px, side_px), 40 + i) for _ in "RGB"])
        picture.save(folder / f"{i}.png")
    return folder


def write_random(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file of bf16 tensors that keep activations finite: norms are one, everything else is small noise.

    All of the noise is one block again and again, and nothing but that block is in memory: gigabytes take the seconds
    that writing them takes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = _bytes_of(torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02)
    ones, zeros = (_bytes_of(torch.full((NOISE_NUMBERS,), value)) for value in (1.0, 0.0))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            block = noise if "norm" not in name else ones if name.endswith("weight") else zeros
            left = 2 * math.prod(shape)
            while left:
                left -= file.write(block[:left])


def _bytes_of(numbers: Tensor) -> memoryview:
    return numbers.to(torch.bfloat16).view(torch.uint8).numpy().data
