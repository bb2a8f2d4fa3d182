"""Bases of real size with random weights, for measuring without gigabytes to download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_booth.families.components import shipped_tokenizer
from lora_booth.families.identify import ARCHITECTURES


def random_base(folder: Path, architecture: str) -> Path:
    """A diffusers folder of real size in bf16: a shipped architecture, weights drawn small, CLIP's tokenizer."""
    import diffusers
    import transformers

    shutil.copytree(ARCHITECTURES / architecture, folder)
    classes: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if name.startswith("text_encoder"):
            classes[name] = getattr(transformers, entry[1])
        elif name.startswith("tokenizer"):
            shipped_tokenizer(ARCHITECTURES / architecture / name).save_pretrained(folder / name)
    for name, cls in classes.items():
        config = json.loads((folder / name / "config.json").read_text())
        with torch.device("meta"):
            module = cls(cls.config_class(**config)) if name.startswith("text") else cls.from_config(config)
        module = module.to_empty(device="cpu").to(torch.bfloat16)
        fill_(module)
        module.save_pretrained(folder / name)
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
