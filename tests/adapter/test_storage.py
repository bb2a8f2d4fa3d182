"""Every format there and back, whole files only, nothing of a file is trusted."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import AdapterWeights, LowRank, delta
from lora_booth.errors import ConfigError, DiskError, ModelError, NumericError
from tests.support.adapted import relative_difference

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def adapter() -> AdapterWeights:
    generator = torch.Generator().manual_seed(0)

    def low_rank(rank: int, scale: float, tail: tuple[int, ...] = ()) -> LowRank:
        down = torch.randn(rank, 4, *tail, generator=generator)
        return LowRank(down, torch.randn(5, rank, *((1,) * len(tail)), generator=generator), scale)

    return {
        "unet": {LINEAR: low_rank(2, 0.5), CONVOLUTION: low_rank(3, 1.5, (3, 3))},
        "text_encoder": {TEXT: low_rank(1, 1.0)},
    }


@pytest.mark.parametrize("dtype", storage.DTYPES)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("name", storage.FORMATS)
def test_every_format_comes_back_with_the_same_updates(name: str, family: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights = adapter()
    storage.FORMATS[name].write(path, weights, family, storage.DTYPES[dtype], {"note": "é"})
    assert storage.detect(path) == name
    assert storage.read_metadata(path)["note"] == "é"
    back = storage.read(path)
    assert {c: set(layers) for c, layers in back.items()} == {c: set(layers) for c, layers in weights.items()}
    for component, layers in weights.items():
        for module, low_rank in layers.items():
            got = back[component][module]
            assert (got.rank, got.down.dtype, got.down.shape) == (low_rank.rank, torch.float32, low_rank.down.shape)
            # both factors are rounded once; sums of at most 3 products
            tolerance = {"fp32": 1e-6, "fp16": 3e-3, "bf16": 2e-2}[dtype]
            assert relative_difference(delta(got), delta(low_rank)) < tolerance


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    broken = adapter()
    broken["unet"][LINEAR].up[0, 0] = math.nan
    with pytest.raises(NumericError):
        storage.FORMATS["kohya"].write(path, broken, "sd1", torch.float16, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="free some space"):
        storage.FORMATS["kohya"].write(path, adapter(), "sd1", torch.float16, {})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_header_that_comfyui_would_not_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="header of a would take"):
        storage.FORMATS["kohya"].write(tmp_path / "a", adapter(), "sd1", torch.float16, {"x": "y" * (1 << 20)})
    with pytest.raises(ModelError, match="no layers"):
        storage.FORMATS["kohya"].write(tmp_path / "a", {}, "sd1", torch.float16, {})
    assert os.listdir(tmp_path) == []


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_refused_and_not_run(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if zipped:
        torch.save({"x": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    for function in (storage.read, storage.detect, storage.read_metadata):
        with pytest.raises(ModelError, match="pickle, which can run any program"):
            function(path)
    assert not (tmp_path / "exploded").exists()


def good_bytes() -> bytes:
    return save(storage.FORMATS["kohya"].to_tensors(adapter(), "sd1", torch.float16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (good_bytes()[:-10], "not a whole safetensors file"),
        (good_bytes()[:50], "not a whole safetensors file"),
        (b"\xff" * 100, "not a whole safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        (save({}), "holds no tensors"),
        (
            save({"model.diffusion_model.out.weight": torch.ones(2)}),
            "no LoRA in kohya, diffusers, PEFT or ComfyUI naming",
        ),
        (save({"unet.x.lora_A.default.bias": torch.ones(2, 2)}), "no LoRA in kohya"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some_file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"some_file.*{message}"):
        storage.read(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: it is missing"):
        storage.read(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="cannot be read: it is a folder"):
        storage.read(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", storage.FORMATS)
def test_a_file_with_nan_or_infinity_is_refused(name: str, value: float, tmp_path: Path) -> None:
    tensors = storage.FORMATS[name].to_tensors(adapter(), "sd1", torch.float32)
    key = next(key for key in tensors if "weight" in key and "attn1" in key)
    tensors[key][0, 0] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"NaN or infinity in 1 layers, first unet\.mid_block"):
        storage.read(tmp_path / "a.safetensors")


def test_the_hashes_in_the_header_are_those_of_the_final_files_data(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "a.safetensors"
    storage.FORMATS["kohya"].write(path, adapter(), "sd1", torch.float16, {"z": "1", "a": "2"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    fields = json.loads(content[8:start])["__metadata__"]
    assert fields["sshs_model_hash"] == digest
    assert fields["modelspec.hash_sha256"] == "0x" + digest


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    layers = {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": LowRank(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    }
    path = tmp_path / "x.safetensors"
    for padding in range(256):
        storage.FORMATS["diffusers"].write(path, {"unet": layers}, "sd1", torch.float32, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert list(storage.read(path)["unet"]) == list(layers)


@pytest.mark.parametrize(
    ("formats", "dtype", "expected"),
    [
        (["kohya", "a1111"], None, '--format "a1111" is unknown; use diffusers or kohya'),
        ([], None, '--format "" is unknown'),
        (None, "fp8", '--dtype "fp8" is unknown; use one of fp16, bf16, fp32'),
    ],
)
def test_an_unknown_choice_is_told_with_the_known_ones(
    formats: list[str] | None, dtype: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        storage.require_choices(formats, dtype)
    storage.require_choices(None, None)
    storage.require_choices(["diffusers", "kohya"], "bf16")


def test_another_kind_can_be_shown_and_not_trained_on(tmp_path: Path) -> None:
    tensors = {
        f"lora_unet_mid_block_attentions_0_proj_in.hada_w{n}": torch.ones(2, 2) for n in ("1_a", "1_b", "2_a", "2_b")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert storage.read_any(tmp_path / "x.safetensors")["unet"]
    with pytest.raises(
        ModelError, match=r"x\.safetensors is loha at unet\.mid_block.*`lora-booth resize x\.safetensors"
    ):
        storage.read(tmp_path / "x.safetensors")


def test_what_is_wrong_names_the_file_once(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ModelError, match=r"^x\.safetensors: ") as caught:
        storage.read_any(tmp_path / "x.safetensors")
    assert str(caught.value).count("x.safetensors") == 1
