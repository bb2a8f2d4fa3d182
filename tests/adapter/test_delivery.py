"""Files in every format with what programs show beside them, DoRA's portable form, and conversions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_booth.adapter import delivery, inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import AdapterWeights, delta, weight_change
from lora_booth.errors import ConfigError, DataError, ModelError
from lora_booth.run.report import Silent
from lora_booth.verbs import export as verb_export
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import adapted
from tests.support.runs import Recorder

HEADER = {
    "modelspec.trigger_phrase": "yql dog",
    "modelspec.prediction_type": "epsilon",
    "modelspec.author": "Ada",
    "ss_base_model_version": "sd_v1",
}


@pytest.fixture
def source(tmp_path: Path, bases: dict[str, Path]) -> Path:
    """A diffusers file of a mixed adapter, in a folder of its own."""
    weights, _ = adapted.trained_mixed("sd1", bases)
    path = tmp_path / "source" / "dog_diffusers.safetensors"
    path.parent.mkdir()
    storage.FORMATS["diffusers"].write(path, weights, "sd1", torch.float32, HEADER)
    return path


def dora(bases: dict[str, Path]) -> tuple[AdapterWeights, delivery.WeightOf]:
    pipe = adapted.adapted_pipeline("sd1", bases, targets=adapted.FEW, rank=2, dora=True)
    modules = adapted.components(pipe)
    return inject.collect(modules), lambda component, path: inject.base_weight(modules, component, path)


def test_a_conversion_keeps_updates_header_and_name_and_adds_what_programs_show(source: Path, tmp_path: Path) -> None:
    cover = tmp_path / "cover.png"
    Image.new("RGB", (40, 30), "red").save(cover)
    recorder = Recorder()
    paths = verb_export.export(file=source, out=tmp_path / "out", dtype="fp32", cover=cover, report=recorder)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dog.json",
        "dog.png",
        "dog.safetensors",
        "dog_diffusers.safetensors",
    ]
    before = storage.read(source)
    for path in paths.values():
        after = storage.read(path)
        for component, layers in before.items():
            for name, update in layers.items():
                assert torch.allclose(delta(after[component][name]), delta(update), atol=1e-6)
        header = storage.read_metadata(path)
        assert header["modelspec.author"] == "Ada" and header["ss_output_name"] == "dog"
        assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
        assert (
            header["sshs_model_hash"] != storage.read_metadata(source)["sshs_model_hash"] or path == paths["diffusers"]
        )
    assert json.loads((tmp_path / "out" / "dog.json").read_text())["activation text"] == "yql dog"
    text = "\n".join(line for _, line in recorder.events)
    for program in ("AUTOMATIC1111", "ComfyUI", "InvokeAI", "stable-diffusion.cpp"):
        assert program in text
    assert 'write "yql dog" in the prompt' in text


def test_the_scales_that_stood_in_the_header_are_in_the_tensors_now_and_not_twice(source: Path, tmp_path: Path) -> None:
    tensors, weights = load_file(source), storage.read(source)
    collated = {
        f"{component}.{key}": value for component in weights for key, value in {"r": 4, "lora_alpha": 4}.items()
    }
    with_header = tmp_path / "h_diffusers.safetensors"
    save_file(tensors, with_header, metadata=HEADER | {"lora_adapter_metadata": json.dumps(collated)})
    expected = storage.read(with_header)
    for path in verb_export.export(file=with_header, out=tmp_path / "out", dtype="fp32").values():
        assert "lora_adapter_metadata" not in storage.read_metadata(path)
        written = storage.read(path)["unet"]
        assert all(
            torch.allclose(delta(written[name]), delta(low), atol=1e-6) for name, low in expected["unet"].items()
        )


def test_every_program_takes_every_layer_of_the_portable_file(source: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    verb_export.export(file=source, out=tmp_path / "out", formats=("kohya",), report=recorder)
    rows = [line for kind, line in recorder.events if kind == "program"]
    count = sum(map(len, storage.read(source).values()))
    assert count > 50 and len(rows) == 8
    assert all(f"  {count} of {count}  " in row for row in rows)


def test_nothing_is_replaced_not_even_the_source(source: Path) -> None:
    content = source.read_bytes()
    with pytest.raises(ConfigError, match="the source itself"):
        verb_export.export(file=source, formats=("diffusers",))
    verb_export.export(file=source, formats=("kohya",))
    with pytest.raises(ConfigError, match="there already"):
        verb_export.export(file=source, formats=("kohya",))
    assert source.read_bytes() == content


@pytest.mark.parametrize("ending", [".json", ".png"])
def test_a_sidecar_or_picture_of_the_users_is_not_replaced(ending: str, source: Path) -> None:
    own = source.with_name(f"dog{ending}")
    Image.new("RGB", (8, 8)).save(own, format="PNG")
    content = own.read_bytes()
    with pytest.raises(ConfigError, match=f"dog{ending} is there already"):
        verb_export.export(file=source, formats=("kohya",), cover=own)
    assert own.read_bytes() == content
    assert sorted(p.name for p in source.parent.iterdir()) == [own.name, source.name]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cover": "broken.png"}, DataError, "cannot be read as a picture"),
        ({"cover": "none.png"}, DataError, r"none\.png cannot be read: it is missing"),
        ({"formats": ("onnx",)}, ConfigError, "onnx"),
        ({"dtype": "int4"}, ConfigError, "int4"),
        ({"base": "sdxl"}, ModelError, "is of sd1"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    changes: dict[str, object],
    error: type[Exception],
    message: str,
    source: Path,
    tmp_path: Path,
    bases: dict[str, Path],
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    values = {key: tmp_path / str(value) if key == "cover" else value for key, value in changes.items()}
    values |= {"base": str(bases["sdxl"])} if "base" in values else {}
    with pytest.raises(error, match=message):
        verb_export.export(file=source, out=tmp_path / "out", **values)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_portable_form_of_dora_is_near_and_its_error_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    weights, weight_of = dora(bases)
    recorder = Recorder()
    forms = delivery.forms(("kohya", "diffusers"), weights, weight_of, recorder)
    assert forms["diffusers"] is weights
    told = [line for kind, line in recorder.events if kind == "error"]
    lost = whole = 0.0
    for component, layers in weights.items():
        for path, low in layers.items():
            plain = forms["kohya"][component][path]
            assert plain.magnitude is None
            assert plain.rank == min(delivery.DORA_RANK_FACTOR * low.rank, *low.up.shape[:1], low.down[0].numel())
            true = weight_change(weight_of(component, path), low)
            lost += float((true - delta(plain).reshape(true.shape)).square().sum())
            whole += float(true.square().sum())
    assert 0.0 < (lost / whole) ** 0.5 < 0.9
    assert f"{(lost / whole) ** 0.5:.3%}" in told[-1]
    files = delivery.write_files(delivery.Delivery(tmp_path, "dog", "sd1", {}, "fp32"), forms, Silent())
    assert not any("dora" in key or "magnitude" in key for key in load_file(files["kohya"]))


def test_an_adapter_that_one_format_cannot_hold_leaves_no_file_of_the_other(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Scaled by 1e37 its numbers overflow where the scale is multiplied in, and not where it stands beside them."""
    weights, _ = adapted.trained_mixed("sd1", bases)
    huge = {name: {path: replace(low, scale=1e37) for path, low in layers.items()} for name, layers in weights.items()}
    large = {name: {p: replace(low, up=low.up * 1e3) for p, low in layers.items()} for name, layers in huge.items()}
    source = tmp_path / "source.safetensors"
    storage.FORMATS["kohya"].write(source, large, "sd1", torch.float32, HEADER)
    with pytest.raises(ModelError, match=r"more than fp32 holds .*; lower its strength"):
        verb_export.export(file=source, out=tmp_path / "out", dtype="fp32")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert verb_export.export(file=source, out=tmp_path / "out", dtype="fp32", formats=("kohya",))


def test_a_dora_file_needs_its_base_for_the_portable_form_and_not_for_the_other(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    weights, weight_of = dora(bases)
    source = tmp_path / "source_diffusers.safetensors"
    storage.FORMATS["diffusers"].write(source, weights, "sd1", torch.float32, HEADER)
    with pytest.raises(ModelError, match="--base"):
        verb_export.export(file=source, out=tmp_path / "a")
    verb_export.export(file=source, out=tmp_path / "b", formats=("diffusers",))
    paths = verb_export.export(
        file=source, out=tmp_path / "c", formats=("kohya",), base=str(bases["sd1"]), dtype="fp32"
    )
    expected = delivery.forms(("kohya",), weights, weight_of, Silent())["kohya"]
    read = storage.read(paths["kohya"])
    for path, low in expected["unet"].items():
        assert torch.allclose(delta(read["unet"][path]), delta(low), atol=1e-5)


def test_a_file_that_does_not_tell_its_family_needs_a_base(bases: dict[str, Path], tmp_path: Path) -> None:
    weights, _ = adapted.trained_mixed("sd1", bases)
    some = {path: low for path, low in weights["unet"].items() if path.startswith("mid_block") and ".attn1." in path}
    source = tmp_path / "s_diffusers.safetensors"
    storage.FORMATS["diffusers"].write(source, {"unet": some}, "sd1", torch.float32, {})
    with pytest.raises(ModelError, match="--base"):
        verb_export.export(file=source, out=tmp_path / "a")
    paths = verb_export.export(file=source, out=tmp_path / "b", base=str(bases["sd1"]), formats=("kohya",))
    assert storage.read_metadata(paths["kohya"])["ss_base_model_version"].startswith("sd_v1")


def test_a_run_makes_the_bytes_of_its_files_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made, save = [], storage.save
    monkeypatch.setattr(storage, "save", lambda tensors: (made.append(len(tensors)), save(tensors))[1])
    train.train(make_config(preview={"images_per_prompt": 1, "sampler_steps": 1, "prompts": ["a {class}"]}))
    assert len(made) == 2, "one file for each format, though its header changes when the cover is there"
