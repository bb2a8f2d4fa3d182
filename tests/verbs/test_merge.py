"""merge into a base: every weight against the arithmetic of the file alone, the same pictures, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import Dense, LowRank
from lora_booth.config.settings import ModelConfig
from lora_booth.errors import ConfigError, DiskError, ModelError, NumericError
from lora_booth.models import loading
from lora_booth.models.bases import identify
from lora_booth.run import disk
from lora_booth.run.safetensors import read_layout, rewrite
from lora_booth.verbs.merge import merge_into_base
from tests.adapter.test_kohya import layers_by_kohya_name
from tests.support import adapted, tiny
from tests.support.runs import Recorder

FAMILIES = ("sd1", "sd2", "sdxl")
ARCHITECTURE = {"sd1": "sd1", "sd2": "sd2_v", "sdxl": "sdxl"}
PREDICTION = {"sd1": {}, "sd2": {"modelspec.prediction_type": "v"}, "sdxl": {}}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def kohya_files(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to a float32 kohya file of an adapter on every layer, text encoders too, with mixed ranks and alphas."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = {}
    for family in FAMILIES:
        weights, _ = adapted.trained_mixed(family, bases)
        paths[family] = folder / f"{family}.safetensors"
        storage.FORMATS["kohya"].write(paths[family], weights, family, torch.float32, {})
    return paths


def one_layer(path: Path, value: float = 1.0, *, layer: str = LAYER, width: int = 16) -> Path:
    """A kohya file that adds `value` to every entry of one square layer of the tiny bases."""
    update = LowRank(torch.ones(1, width), torch.full((width, 1), value), 1.0)
    storage.FORMATS["kohya"].write(path, {"unet": {layer: update}}, "sd1", torch.float32, {})
    return path


def single_file(family: str, bases: dict[str, Path], path: Path) -> Path:
    return tiny.tiny_single_file(bases[family], path, metadata={"note": "kept", **PREDICTION[family]})


def expected_folder(
    family: str, bases: dict[str, Path], adapters: list[tuple[Path, float]], folder: Path
) -> dict[str, set[str]]:
    """`folder` becomes the base plus strength * scale * up @ down, from the kohya files alone, in float64; returns
    component to the changed keys. Independent of lora_booth's reading, naming and merging."""
    shutil.copytree(bases[family], folder)
    modules = adapted.components(adapted.pipeline(family, bases))
    table = layers_by_kohya_name(adapted.pipeline(family, bases), family)
    changed: dict[str, set[str]] = {}
    for component in modules:
        path = next((folder / component).glob("*.safetensors"))
        tensors = load_file(path)
        plain = {key.removeprefix("text_model."): key for key in tensors}
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_"}
        for file, strength in adapters:
            values = load_file(file)
            names = {key.partition(".")[0] for key in values}
            for name in sorted(n for n in names if n.startswith(prefix.get(component, "lora_te2_"))):
                down, up = values[f"{name}.lora_down.weight"].double(), values[f"{name}.lora_up.weight"].double()
                scale = values[f"{name}.alpha"].item() / down.shape[0]
                key = plain[f"{table[name][1].removeprefix('text_model.')}.weight"]
                change = (strength * scale * up.flatten(1) @ down.flatten(1)).reshape(tensors[key].shape)
                tensors[key] = (tensors[key].double() + change).float()
                changed.setdefault(component, set()).add(key)
        save_file(tensors, path, metadata={"format": "pt"})
        assert len(changed[component]) == sum(
            1 for n in table if n.startswith(prefix.get(component, "lora_te2_")) and f"{n}.alpha" in values
        )
    return changed


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], changed: set[str]) -> None:
    """Changed tensors within float32 rounding of sums of a few products, all others equal byte for byte."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        if key in changed:
            assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-6), key
        else:
            assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_is_base_plus_scale_times_up_down_and_draws_like_the_adapter(
    family: str, bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    out = merge_into_base(base=str(bases[family]), adapters=[(kohya_files[family], 1.0)], out=tmp_path / "out")
    changed = expected_folder(family, bases, [(kohya_files[family], 1.0)], tmp_path / "expected")
    assert {c: len(keys) for c, keys in changed.items()} == {
        "sd1": {"unet": 277, "text_encoder": 12},
        "sd2": {"unet": 277, "text_encoder": 12},
        "sdxl": {"unet": 257, "text_encoder": 12, "text_encoder_2": 12},
    }[family]
    for path in sorted(p for p in bases[family].rglob("*") if p.is_file()):
        relative = path.relative_to(bases[family])
        if path.suffix == ".safetensors" and path.parent.name != "vae":
            keys = changed[path.parent.name]
            assert_close(load_file(out / relative), load_file(tmp_path / "expected" / relative), keys)
        else:
            assert (out / relative).read_bytes() == path.read_bytes()
    merged = adapted.pipeline(family, {family: out})
    _, drawn_with_adapter = adapted.trained_mixed(family, bases)
    # two orders of float32 summation through two steps of a network of random weights
    assert adapted.relative_difference(adapted.draw(merged), drawn_with_adapter) < 1e-4
    assert adapted.relative_difference(adapted.draw(adapted.pipeline(family, bases)), drawn_with_adapter) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_single_file_is_the_merged_folder_in_original_names(
    family: str, bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    base = single_file(family, bases, tmp_path / "base.safetensors")
    before = base.read_bytes()
    out = merge_into_base(base=str(base), adapters=[(kohya_files[family], 0.7)], out=tmp_path / "out.safetensors")
    expected_folder(family, bases, [(kohya_files[family], 0.7)], tmp_path / "folder")
    expected = load_file(tiny.tiny_single_file(tmp_path / "folder", tmp_path / "expected.safetensors"))
    original = load_file(base)
    changed = {key for key in original if not torch.equal(original[key], expected[key])}
    # 12 text layers of the tiny OpenCLIP are 6 tensors: q, k and v share one
    assert len(changed) == {"sd1": 277 + 12, "sd2": 277 + 6, "sdxl": 257 + 12 + 6}[family]
    assert_close(load_file(out), expected, changed)
    assert base.read_bytes() == before


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_merged_single_file_loads_and_draws_like_the_adapter(
    family: str,
    bases: dict[str, Path],
    kohya_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(bases[family], tmp_path / "architectures" / ARCHITECTURE[family])
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    base = single_file(family, bases, tmp_path / "base.safetensors")
    out = merge_into_base(base=str(base), adapters=[(kohya_files[family], 1.0)], out=tmp_path / "out.safetensors")
    loaded = loading.load(ModelConfig(base=str(out)), device="cpu", dtype=torch.float32)
    pipe = adapted.pipeline(family, bases)
    with torch.no_grad():
        for component, module in adapted.components(pipe).items():
            source = {"unet": loaded.denoiser, **loaded.text_encoders()}[component]
            module.load_state_dict(source.state_dict())
    _, drawn_with_adapter = adapted.trained_mixed(family, bases)
    assert adapted.relative_difference(adapted.draw(pipe), drawn_with_adapter) < 1e-4


def test_two_adapters_add_up_and_their_order_does_not_matter(
    bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    others = [one_layer(tmp_path / f"{n}.safetensors", 0.1 * (n + 1)) for n in range(2)]
    adapters = [(kohya_files["sd1"], 0.3), (others[0], -1.5), (others[1], 0.9)]
    out = merge_into_base(base=str(bases["sd1"]), adapters=adapters, out=tmp_path / "out")
    back = merge_into_base(base=str(bases["sd1"]), adapters=adapters[::-1], out=tmp_path / "back")
    changed = expected_folder("sd1", bases, adapters[:1], tmp_path / "expected")
    name = "unet/diffusion_pytorch_model.safetensors"
    expected = load_file(tmp_path / "expected" / name)
    expected[f"{LAYER}.weight"] += 0.1 * -1.5 + 0.2 * 0.9
    assert_close(load_file(out / name), expected, changed["unet"])
    one, two = (load_file(folder / name) for folder in (out, back))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_keeps_its_type_and_is_rounded_once(
    dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = single_file("sd1", bases, tmp_path / "full.safetensors")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(base).items()}
    tensors[KEY] = torch.ones_like(tensors[KEY])
    save_file(tensors, tmp_path / "base.safetensors")
    step = torch.finfo(dtype).eps  # from 1 to the next number; 0.35 of it vanishes alone, 0.7 rounds up
    adapters = [(one_layer(tmp_path / f"{n}.safetensors", 0.35 * step), 1.0) for n in range(2)]
    sums = []
    for count in (1, 2):
        out = tmp_path / f"out{count}.safetensors"
        merge_into_base(base=str(tmp_path / "base.safetensors"), adapters=adapters[:count], out=out)
        merged = load_file(out)
        assert {tensor.dtype for tensor in merged.values()} == {dtype}
        sums.append(merged[KEY].unique().tolist())
    assert sums == [[1.0], [1.0 + step]]


def test_strength_0_leaves_every_byte_of_the_data(
    bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    base = single_file("sdxl", bases, tmp_path / "full.safetensors")
    tensors = {key: tensor.half() for key, tensor in load_file(base).items()}
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors[key][0, :3] = torch.tensor([-0.0, 0.0, 6e-8])
    save_file(tensors, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    merge_into_base(base=str(tmp_path / "base.safetensors"), adapters=[(kohya_files["sdxl"], 0.0)], out=out)
    one, two = (read_layout(path) for path in (tmp_path / "base.safetensors", out))
    assert one.entries == two.entries
    data = [layout.path.read_bytes()[layout.data_start :] for layout in (one, two)]
    assert data[0] == data[1]


def test_a_change_of_q_alone_leaves_every_byte_of_k_and_v_in_their_common_tensor(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    width, layer = (
        tiny.TEXT_WIDTH,
        {"encoder.layers.1.self_attn.q_proj": LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)},
    )
    adapter, key = tmp_path / "a.safetensors", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    storage.FORMATS["kohya"].write(adapter, {"text_encoder": layer}, "sd2", torch.float32, {})
    tensors = load_file(single_file("sd2", bases, tmp_path / "plain.safetensors"))
    tensors[key][width:, 0] = -0.0
    save_file(tensors, tmp_path / "base.safetensors", metadata=PREDICTION["sd2"])
    out = tmp_path / "out.safetensors"
    merged = load_file(merge_into_base(base=str(tmp_path / "base.safetensors"), adapters=[(adapter, 1.0)], out=out))[
        key
    ]
    assert torch.allclose(merged[:width], tensors[key][:width] + 1)
    assert torch.equal(merged[width:].view(torch.int32), tensors[key][width:].view(torch.int32))


def test_dora_is_merged_by_its_own_formula_as_peft_does(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = adapted.adapted_pipeline("sd1", bases, targets=adapted.FEW, rank=4, alpha=3.0, dora=True)
    weights = inject.collect(adapted.components(trained))
    storage.FORMATS["diffusers"].write(tmp_path / "dora.safetensors", weights, "sd1", torch.float32, {})
    out = merge_into_base(base=str(bases["sd1"]), adapters=[(tmp_path / "dora.safetensors", 1.0)], out=tmp_path / "out")
    merged = adapted.pipeline("sd1", {"sd1": out})
    assert adapted.relative_difference(adapted.draw(merged), adapted.draw(trained)) < 1e-4


def test_linear_updates_of_1x1_convolutions_and_full_differences_are_merged(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up, diff = torch.randn(2, 32), torch.randn(32, 2), torch.randn(32, 32, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "linear.safetensors")
    save_file({f"{name.replace('_in', '_out')}.diff": diff}, tmp_path / "diff.safetensors")
    adapters = [(tmp_path / "linear.safetensors", 1.0), (tmp_path / "diff.safetensors", 0.5)]
    assert isinstance(storage.read_any(adapters[1][0])["unet"]["mid_block.attentions.0.proj_out"], Dense)
    file = "unet/diffusion_pytorch_model.safetensors"
    before = load_file(bases["sd1"] / file)
    after = load_file(merge_into_base(base=str(bases["sd1"]), adapters=adapters, out=tmp_path / "out") / file)
    found = {key for key in before if not torch.equal(before[key], after[key])}
    assert found == {f"mid_block.attentions.0.proj_{side}.weight" for side in ("in", "out")}
    key = "mid_block.attentions.0.proj_in.weight"
    assert torch.allclose(after[key], before[key] + (up @ down)[..., None, None], atol=1e-5)
    key = "mid_block.attentions.0.proj_out.weight"
    assert torch.allclose(after[key], before[key] + 0.5 * diff, atol=1e-6)


def test_the_projection_of_open_clip_is_merged_transposed(bases: dict[str, Path], tmp_path: Path) -> None:
    width = tiny.SECOND_TEXT_WIDTH
    update = LowRank(torch.randn(2, width), torch.randn(width, 2), 1.0)
    adapter = tmp_path / "a.safetensors"
    storage.FORMATS["diffusers"].write(adapter, {"text_encoder_2": {"text_projection": update}}, "", torch.float32, {})
    base = single_file("sdxl", bases, tmp_path / "base.safetensors")
    folder = merge_into_base(base=str(bases["sdxl"]), adapters=[(adapter, 1.0)], out=tmp_path / "out")
    file = merge_into_base(base=str(base), adapters=[(adapter, 1.0)], out=tmp_path / "out.safetensors")
    expected = load_file(tiny.tiny_single_file(folder, tmp_path / "expected.safetensors"))
    assert not torch.equal(load_file(base)["conditioner.embedders.1.model.text_projection"], expected[
        "conditioner.embedders.1.model.text_projection"])  # fmt: skip
    assert_close(load_file(file), expected, set())


def test_shards_and_variants_are_all_merged_and_stay_as_they_are_laid_out(
    bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["sd1"], base)
    whole = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    parts = [dict(list(tensors.items())[i::3]) for i in range(3)]
    names = [f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, base / "unet" / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    half = {key: tensor.half() for key, tensor in load_file(base / "text_encoder" / "model.safetensors").items()}
    save_file(half, base / "text_encoder" / "model.fp16.safetensors")
    out = merge_into_base(base=str(base), adapters=[(kohya_files["sd1"], 1.0)], out=tmp_path / "out")
    assert {p.name for p in (out / "unet").iterdir()} == {p.name for p in (base / "unet").iterdir()}
    plain = merge_into_base(base=str(bases["sd1"]), adapters=[(kohya_files["sd1"], 1.0)], out=tmp_path / "plain")
    expected = load_file(plain / "unet" / "diffusion_pytorch_model.safetensors")
    for name, part in zip(names, parts, strict=True):
        merged = load_file(out / "unet" / name)
        assert list(merged) == list(part)
        assert all(torch.equal(merged[key], expected[key]) for key in merged)
    full = load_file(plain / "text_encoder" / "model.safetensors")
    merged = load_file(out / "text_encoder" / "model.fp16.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert all(torch.allclose(merged[key].float(), full[key], atol=2e-3) for key in full)
    assert sum(not torch.equal(merged[key], half[key]) for key in half) == 12


def test_headers_keep_what_they_said_and_name_what_was_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = one_layer(tmp_path / "mine.safetensors")
    header = {"note": "kept", "modelspec.hash_sha256": "0x0", "modelspec.title": "Base"}
    base = tiny.tiny_single_file(bases["sd1"], tmp_path / "base.safetensors", metadata=header)
    once = merge_into_base(base=str(base), adapters=[(adapter, 0.5)], out=tmp_path / "once.safetensors")
    twice = merge_into_base(base=str(once), adapters=[(adapter, 0.25)], out=tmp_path / "twice.safetensors")
    with safe_open(twice, "pt") as file:
        found = file.metadata()
    entry = {"file": "mine.safetensors", "sha256": disk.sha256(adapter)}
    assert json.loads(found.pop("lora_booth.merged")) == [entry | {"strength": 0.5}, entry | {"strength": 0.25}]
    assert found == {
        "note": "kept",
        "modelspec.title": "Base",
        "modelspec.merged_from": "base.safetensors, mine.safetensors, once.safetensors, mine.safetensors",
    }
    folder = merge_into_base(base=str(bases["sd1"]), adapters=[(adapter, 1.0)], out=tmp_path / "folder")
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["modelspec.merged_from"] == "sd1, mine.safetensors"


def test_pickles_hidden_files_and_unmerged_weights_are_left_out_and_told(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["sd1"], base)
    for name in ("unet/model.bin", ".git/config", "whole.safetensors", "unet/other.safetensors", "unet/x.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    (base / "README.md").write_text("hello")
    recorder = Recorder()
    out = merge_into_base(
        base=str(base), adapters=[(one_layer(tmp_path / "a.safetensors"), 1.0)], out=tmp_path / "out", report=recorder
    )
    left_out = {p.relative_to(base) for p in base.rglob("*")} - {p.relative_to(out) for p in out.rglob("*")}
    assert {str(path) for path in left_out} == {
        ".git", ".git/config", "whole.safetensors", "unet/model.bin", "unet/other.safetensors", "unet/x.onnx",
    }  # fmt: skip
    assert "4 files of" in recorder.warnings[0]
    assert recorder.tasks.keys() == {"merge MiB"}


@pytest.mark.parametrize("kind", ["pipe", "endless", "dangling"])
def test_what_is_no_plain_file_is_not_copied_out_of_a_base(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["sd1"], base)
    if kind == "pipe":
        os.mkfifo(base / "README.md")
    else:
        (base / "README.md").symlink_to({"endless": "/dev/zero", "dangling": "nowhere"}[kind])
    with pytest.raises(ModelError, match=r"README\.md cannot be read: it is .*; remove it from the base"):
        merge_into_base(base=str(base), adapters=[(one_layer(tmp_path / "a.safetensors"), 1.0)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_linked_files_are_copied_as_files_as_the_hubs_cache_needs(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "models" / "snapshots" / "abc"
    blobs = tmp_path / "models" / "blobs"
    shutil.copytree(bases["sd1"], blobs)
    for path in sorted(p for p in blobs.rglob("*") if p.is_file()):
        link = base / path.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    out = merge_into_base(base=str(base), adapters=[(one_layer(tmp_path / "a.safetensors"), 1.0)], out=tmp_path / "out")
    found = [p for p in out.rglob("*") if p.is_file()]
    assert len(found) == sum(p.is_file() for p in blobs.rglob("*"))
    assert not any(p.is_symlink() for p in found)
    assert (blobs / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        bases["sd1"] / "unet" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_the_yaml_that_says_what_a_base_predicts_goes_along_and_averaged_weights_are_told(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    tensors = load_file(tiny.tiny_single_file(bases["sd2"], tmp_path / "plain.safetensors"))
    save_file(tensors | {"model_ema.x": torch.ones(1)}, base)
    base.with_suffix(".yaml").write_text("parameterization: v")
    adapter, recorder = one_layer(tmp_path / "a.safetensors"), Recorder()
    out = tmp_path / "out.safetensors"
    merge_into_base(base=str(base), adapters=[(adapter, 1.0)], out=out, report=recorder)
    assert out.with_suffix(".yaml").read_text() == "parameterization: v"
    assert "model_ema" in recorder.warnings[0]
    assert identify.identify(out).prediction_type == "v_prediction"


def refused(
    error: type[Exception], message: str, base: Path, adapter: Path, tmp_path: Path, *, strength: float = 1.0
) -> None:
    """Merging raises, and leaves the folder it would write into empty."""
    target = tmp_path / "target"
    target.mkdir()
    out = target / ("out" if base.is_dir() else "out.safetensors")
    with pytest.raises(error, match=message):
        merge_into_base(base=str(base), adapters=[(adapter, strength)], out=out)
    assert list(target.iterdir()) == []
    target.rmdir()


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left(
    is_folder: bool, bases: dict[str, Path], kohya_files: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["sd1"] if is_folder else single_file("sd1", bases, tmp_path / "base.safetensors")
    refused(ModelError, "sd1 model", base, kohya_files["sdxl"], tmp_path)
    unknown = one_layer(tmp_path / "unknown.safetensors", layer="down_blocks.3.attentions.0.proj_in")
    refused(ModelError, r"unet lacks layer down_blocks\.3\.attentions\.0\.proj_in", base, unknown, tmp_path)
    wide = one_layer(tmp_path / "wide.safetensors", width=17)
    refused(ModelError, rf"unet\.{LAYER} is \[16, 16\].*changes shape \[17, 17\]", base, wide, tmp_path)
    refused(ConfigError, "strength of wide.safetensors is nan", base, wide, tmp_path, strength=float("nan"))


def test_values_that_the_base_cannot_hold_are_refused_by_the_name_of_their_layer(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    full = single_file("sd1", bases, tmp_path / "full.safetensors")
    base = tmp_path / "base.safetensors"
    tensors = {key: tensor.half() for key, tensor in load_file(full).items()}
    save_file(tensors, base)
    large = one_layer(tmp_path / "large.safetensors", 7e4)
    refused(ModelError, rf"unet\.{LAYER} reaches 7e\+04.*float16.*65504.*lower the strength", base, large, tmp_path)
    huge = one_layer(tmp_path / "huge.safetensors", 1e38)
    refused(
        NumericError,
        rf"unet\.{LAYER} becomes NaN or infinite; lower the strength",
        full,
        huge,
        tmp_path,
        strength=100.0,
    )
    tensors[KEY][3, 2] = float("nan")
    save_file(tensors, base)
    refused(
        NumericError, rf"unet\.{LAYER} of the base holds NaN", base, one_layer(tmp_path / "a.safetensors"), tmp_path
    )


def test_quantised_bases_are_refused_with_the_reason(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = one_layer(tmp_path / "a.safetensors")
    plain = load_file(single_file("sd1", bases, tmp_path / "plain.safetensors"))
    base = tmp_path / "base.safetensors"
    for extra in (
        {KEY: torch.zeros(128, 1, dtype=torch.uint8), f"{KEY}.absmax": torch.ones(4)},
        {KEY: torch.zeros(16, 16, dtype=torch.int8), KEY.replace("weight", "SCB"): torch.ones(16)},
        {KEY: torch.zeros(16, 16, dtype=torch.float8_e4m3fn)},
        {"x.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
    ):
        save_file(plain | extra, base)
        refused(ModelError, "quantised.*original weights, then quantise", base, adapter, tmp_path)
    folder = tmp_path / "base"
    shutil.copytree(bases["sd1"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    refused(ModelError, r"unet/config\.json has a quantization_config.*original weights", folder, adapter, tmp_path)


def test_existing_outputs_and_names_of_the_wrong_kind_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = one_layer(tmp_path / "a.safetensors")
    file = single_file("sd1", bases, tmp_path / "base.safetensors")
    for base, name, message in (
        (bases["sd1"], "there", "exists and is not replaced"),
        (file, "there.safetensors", "exists and is not replaced"),
        (file, "folder", r"must end in \.safetensors"),
        (bases["sd1"], "file.safetensors", "name a folder"),
    ):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there.safetensors").write_text("mine")
        with pytest.raises(ConfigError, match=message):
            merge_into_base(base=str(base), adapters=[(adapter, 1.0)], out=tmp_path / name)
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_into_base(base=str(file), adapters=[], out=tmp_path / "out.safetensors")


def test_a_full_disk_is_told_before_anything_is_written(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    adapter = one_layer(tmp_path / "a.safetensors")
    file = single_file("sd1", bases, tmp_path / "base.safetensors")
    for base in (bases["sd1"], file):
        refused(DiskError, r"no space for .*out.*it needs \d+ bytes and 1000 are free", base, adapter, tmp_path)


def test_a_failure_in_the_middle_of_a_folder_leaves_nothing(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, os.strerror(5))

    adapter = one_layer(tmp_path / "a.safetensors")
    monkeypatch.setattr(os, "replace", broken)
    refused(DiskError, "cannot be written", bases["sd1"], adapter, tmp_path)


def test_rewriting_streams_and_changes_only_what_is_named(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7, dtype=torch.int64),
        "c": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0, 3),
        "d": torch.randn(2, 2).double(),
        "one": torch.tensor(3.0).half(),
    }
    save_file(tensors, tmp_path / "in.safetensors", metadata={"x": "1"})
    sizes: list[int] = []
    rewrite(
        read_layout(tmp_path / "in.safetensors"),
        tmp_path / "out.safetensors",
        {"c": lambda tensor: tensor + 1, "one": lambda tensor: tensor * 2},
        metadata={"y": "ü"},
        copied=sizes.append,
    )
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    expected = tensors | {"c": tensors["c"] + 1, "one": torch.tensor(6.0).half()}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    source = read_layout(tmp_path / "in.safetensors")
    assert read_layout(tmp_path / "out.safetensors").metadata == {"y": "ü"}
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    for length in range(8):  # the data begins at a multiple of 8 whatever the header says
        rewrite(source, tmp_path / "out.safetensors", {}, metadata={"x": "y" * length})
        assert read_layout(tmp_path / "out.safetensors").data_start % 8 == 0


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, (20).to_bytes(8, "little") + b'{"a": {"dtype": "F3'])
def test_a_broken_header_is_a_model_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="safetensors file"):
        read_layout(tmp_path / "x.safetensors")


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_a_model_error(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match="has 8 bytes"):
        read_layout(tmp_path / "x.safetensors")


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """A file of 256 MiB with one small change is written in less than a quarter of its size."""
    import subprocess
    import sys

    tensors = {f"t{i}": torch.zeros(16, 1 << 20) for i in range(4)}
    save_file(tensors | {"small": torch.zeros(4)}, tmp_path / "in.safetensors")
    del tensors
    code = f"""
import resource
from pathlib import Path
import torch
from lora_booth.run.safetensors import read_layout, rewrite
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path({str(tmp_path)!r})
rewrite(read_layout(folder / "in.safetensors"), folder / "out.safetensors", {{"small": lambda t: t + 1}}, metadata={{}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 * 1024  # KiB
    assert (tmp_path / "out.safetensors").stat().st_size > 256 << 20
