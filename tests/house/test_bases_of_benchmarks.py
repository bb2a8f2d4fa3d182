"""Bases with random weights are what loaders take, whole or not there, and quick to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bases
from lora_booth.config.settings import ModelConfig
from lora_booth.models import loading
from lora_booth.run import safetensors


@pytest.mark.parametrize("architecture", ["sd1_tiny", "sd2_v_tiny", "sdxl_tiny"])
def test_a_base_with_random_weights_is_loaded_and_computes_a_sample(architecture: str, tmp_path: Path) -> None:
    base = bases.kept_base(tmp_path / "base", architecture)
    family = loading.load(ModelConfig(base=str(base)), device="cpu", dtype=torch.float32)
    weights = dict(family.denoiser.named_parameters())
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert (weights["conv_norm_out.weight"] == 1).all() and (weights["conv_norm_out.bias"] == 0).all()
    assert 0.01 < float(weights["conv_in.weight"].std()) < 0.03
    assert family.name == architecture.split("_")[0]


def test_tensors_of_any_size_are_the_same_noise_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "NOISE_NUMBERS", 8)
    bases.write_random(tmp_path / "x.safetensors", {"a": (3, 7), "b": (), "norm.bias": (2,), "empty": (0,)})
    found = safetensors.read(tmp_path / "x.safetensors")
    assert [tuple(found[name].shape) for name in ("a", "b", "norm.bias", "empty")] == [(3, 7), (), (2,), (0,)]
    block = found["a"].view(-1)[:8]
    assert torch.equal(found["a"].view(-1)[8:16], block) and len(block.unique()) == 8
    assert found["b"] == found["a"][0, 0] != 0


def test_a_base_that_was_begun_is_made_anew_and_one_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "base.unfinished" / "unet").mkdir(parents=True)
    base = bases.kept_base(tmp_path / "base", "sd1_tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    (base / "mark").touch()
    assert (bases.kept_base(base, "sd1_tiny") / "mark").exists()
