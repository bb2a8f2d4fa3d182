"""A foreign engine draws with our file what it draws with the merged checkpoint: stable-diffusion.cpp, at full size.

Needs `pip install stable-diffusion-cpp-python` (built from source, 20 minutes on two cores) and 6 GB of memory.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.bases import random_base
from lora_booth.adapter.files import storage
from lora_booth.adapter.inject import target_modules
from lora_booth.adapter.programs.verdicts import verdicts_of_file
from lora_booth.adapter.weights import AdapterWeights, LowRank, plain_path
from lora_booth.models.bases.identify import identify
from lora_booth.models.families.components import load_component
from lora_booth.verbs.merge import merge_into_base
from tests.support import tiny

pytestmark = pytest.mark.slow
engine = pytest.importorskip("stable_diffusion_cpp")

RANK = 4
TEXT_LAYERS = r"regex:.*(self_attn\..*_proj|mlp\.fc[12])"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 checkpoint of random weights, fp16, in the original names."""
    folder = tmp_path_factory.mktemp("full_size")
    base = random_base(folder / "base", "sd1")
    path = tiny.tiny_single_file(base, folder / "checkpoint.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    return path


def adapter(checkpoint: Path, targets: str) -> AdapterWeights:
    """Random factors on every target of the UNet and the text encoder; the change is as large as the weights."""
    facts, generator = identify(checkpoint), torch.Generator().manual_seed(0)
    weights: AdapterWeights = {}
    for component in ("unet", "text_encoder"):
        module = load_component(facts, component)
        for path in target_modules(module, targets if component == "unet" else TEXT_LAYERS):
            weight = module.get_submodule(path).get_parameter("weight")
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.1
            up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            weights.setdefault(component, {})[plain_path(path)] = LowRank(down, up, 0.5)
    return weights


def drawn(checkpoint: Path, prompt: str, folder: Path) -> tuple[np.ndarray[Any, Any], str]:
    """Picture, int `[64, 64, 3]`, and what the engine said."""
    said: list[str] = []

    @engine.sd_log_callback
    def listen(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        said.append(text.decode(errors="replace"))

    model = engine.StableDiffusion(model_path=str(checkpoint), lora_model_dir=str(folder), verbose=False)
    engine.sd_set_log_callback(listen, ctypes.c_void_p(0))
    (picture,) = model.generate_image(prompt=prompt, width=64, height=64, sample_steps=2, seed=1, cfg_scale=1.0)
    assert isinstance(picture, Image.Image)
    return np.asarray(picture.convert("RGB")).astype(int), "".join(said)


def test_it_applies_every_layer_and_draws_the_merged_checkpoints_picture(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rex.safetensors"
    weights = adapter(checkpoint, "all-linear")
    storage.FORMATS["kohya"].write(file, weights, "sd1", torch.float16, {})
    base, _ = drawn(checkpoint, "a dog", tmp_path)
    with_file, said = drawn(checkpoint, "a dog<lora:rex:1>", tmp_path)
    merged = merge_into_base(base=str(checkpoint), adapters=[(file, 1.0)], out=tmp_path / "merged.safetensors")
    with_merged, _ = drawn(merged, "a dog", tmp_path)
    count = 3 * sum(map(len, weights.values()))  # down, up, alpha
    assert f"({count} / {count}) LoRA tensors have been applied" in said
    assert np.abs(with_file - with_merged).max() <= 1
    assert np.abs(base - with_merged).mean() > 2


def test_our_table_knows_which_layers_it_leaves_out(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "rex.safetensors"
    storage.FORMATS["kohya"].write(file, adapter(checkpoint, "all-linear+conv"), "sd1", torch.float16, {})
    _, said = drawn(checkpoint, "a dog<lora:rex:1>", tmp_path)
    applied = re.search(r"\((\d+) / (\d+)\) LoRA tensors", said)
    assert applied is not None
    (verdict,) = [v for v in verdicts_of_file(file, "sd1") if v.loader == "stable-diffusion.cpp"]
    assert (3 * verdict.matched, 3 * verdict.total) == (int(applied[1]), int(applied[2]))
