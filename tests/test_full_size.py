"""The main job on real sizes: SD 1.5 and SDXL with random weights, two steps at a small resolution, bf16 on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_booth import export, train
from lora_booth.config import Config
from lora_booth.families.identify import ARCHITECTURES
from tests import tiny

pytestmark = pytest.mark.slow


def random_base(folder: Path, architecture: str) -> Path:
    """A diffusers folder of real size: the shipped configs, weights drawn small in bf16, a small tokenizer."""
    import diffusers
    import transformers

    shutil.copytree(ARCHITECTURES / architecture, folder)
    classes: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if name.startswith("text_encoder"):
            classes[name] = getattr(transformers, entry[1])
    for name, cls in classes.items():
        config = json.loads((folder / name / "config.json").read_text())
        with torch.device("meta"):
            module = cls(cls.config_class(**config)) if name.startswith("text") else cls.from_config(config)
        module = module.to_empty(device="cpu").to(torch.bfloat16)
        fill_(module)
        module.save_pretrained(folder / name)
    for name in [n for n in ("tokenizer", "tokenizer_2") if (folder / n).is_dir() or n == "tokenizer"]:
        tiny.write_tokenizer(folder / name, "<|endoftext|>")
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


@pytest.mark.parametrize(
    ("architecture", "family", "layers"), [("sd1", "sd1", 128), ("sdxl", "sdxl", 560)], ids=["sd15", "sdxl"]
)
def test_the_main_job_runs_end_to_end_on_a_full_size_base(
    architecture: str, family: str, layers: int, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", architecture)
    tiny.tiny_pictures(tmp_path / "pictures", 3, sizes=[(140, 140)])
    config = Config.model_validate(
        {
            "model": {"base": str(base), "precision": "bf16"},
            "subject": {"images": tmp_path / "pictures", "class_noun": "dog"},
            "data": {"resolution": 128},
            "prior": {"num_images": 1, "sampler_steps": 1, "sampler": "ddim"},
            "train": {"steps": 2},
            "preview": {
                "prompts": ["a photo of {class}"],
                "images_per_prompt": 1,
                "sampler_steps": 1,
                "sampler": "ddim",
            },
            "run": {"folder": tmp_path / "run", "cache": tmp_path / "cache"},
        }
    )
    summary = train.train(config)
    for path in summary.files.values():
        weights = export.read(Path(path))["unet"]
        assert len(weights) == layers
        assert max(float(low.up.abs().max()) for low in weights.values()) > 0
    assert summary.num_parameters == {"sd1": 3_188_736, "sdxl": 23_224_320}[family]
