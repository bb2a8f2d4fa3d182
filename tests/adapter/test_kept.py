"""Any kept checkpoint can be exported, and what a run leaves behind names neither its user nor where it lay."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.numbers import weights_of
from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run.folder import Run
from lora_booth.training import loop, tally
from lora_booth.verbs import export as verb_export
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import Recorder, session_of

FEW_LAYERS = r"regex:.*mid_block.*attn2\.to_k"


@pytest.fixture
def finished(make_config: MakeConfig) -> Config:
    """A run of four steps that keeps the second and the fourth."""
    config = make_config(adapter={"targets": FEW_LAYERS, "alpha": 3.0}, export={"dtype": "fp32"}, data={"flip": True})
    train.train(config)
    return config


def same(one: Path, other: Path) -> bool:
    first, second = (storage.read(path)["unet"] for path in (one, other))
    return all(torch.equal(first[name].up, second[name].up) for name in first) and first.keys() == second.keys()


def test_any_kept_checkpoint_is_exported_by_its_step(finished: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    last = verb_export.export(file=folder, step="last", dtype="fp32")
    assert {path.name for path in last.values()} == {
        "yql_dog-000004.safetensors",
        "yql_dog-000004_diffusers.safetensors",
    }
    assert all(same(path, folder / path.name.replace("-000004", "")) for path in last.values())
    header, own = (storage.read_metadata(p) for p in (last["kohya"], folder / "yql_dog.safetensors"))
    assert header["modelspec.trigger_phrase"] == "yql dog"
    assert header["lora_booth.identity"] == own["lora_booth.identity"]
    recorder = Recorder()
    second = verb_export.export(file=folder, step="2", out=tmp_path / "second", dtype="fp32", report=recorder)
    assert storage.read_metadata(second["kohya"])["ss_steps"] == "2"
    assert not same(second["kohya"], last["kohya"])
    told = dict(recorder.events)["checkpoint"]
    best = Run(folder).best_step()
    assert re.search(
        rf"step 2 of .*run; kept with their validation loss: 2 \(.*\), 4 \(.*\); the best is {best}$", told
    )
    chosen = verb_export.export(file=folder, step="best", out=tmp_path / "best", dtype="fp32")
    assert same(chosen["kohya"], second["kohya"] if best == 2 else last["kohya"])


def test_a_checkpoint_is_a_source_by_its_folder_or_file(finished: Config, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    by_folder = verb_export.export(file=checkpoint, formats=("kohya",), out=tmp_path / "a")
    by_file = verb_export.export(file=checkpoint / "adapter.safetensors", formats=("kohya",), out=tmp_path / "b")
    assert by_folder["kohya"].read_bytes() == by_file["kohya"].read_bytes()


def test_a_step_that_is_not_kept_or_damaged_is_told(finished: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for step in ("3", "first", "-1", "²", "9" * 5000):
        with pytest.raises(
            ConfigError, match=rf"--step {step[:70]}.*: run folder .* keeps the steps 2, 4; name one, or best"
        ):
            verb_export.export(file=folder, step=step)
    with pytest.raises(ConfigError, match="is no run folder; leave it out"):
        verb_export.export(file=folder / "yql_dog.safetensors", step="2")
    (folder / "checkpoints" / "step-000002" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"step-000002 is damaged .*; choose another --step"):
        verb_export.export(file=folder, step="2")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="keeps no checkpoint yet"):
        verb_export.export(file=folder)


@pytest.mark.parametrize(
    "settings",
    [{"rslora": True, "rank_pattern": {"to_k": 4}}, {"dora": True, "alpha_pattern": {"to_q": 5.0}}, {"alpha": 3.0}],
)
def test_a_checkpoint_says_all_that_the_adapter_is(
    settings: dict[str, Any], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(adapter=settings | {"text_encoder": True}), monkeypatch)
    expected, found = inject.collect(s.adapted), weights_of(inject.state(s.adapted), s.config.adapter)
    assert found.keys() == expected.keys() and len(found) == 2
    for component, layers in expected.items():
        assert found[component].keys() == layers.keys()
        for path, layer in layers.items():
            other = found[component][path]
            assert other.scale == layer.scale
            assert all(torch.equal(*pair) for pair in zip(other.tensors, layer.tensors, strict=True))
    broken = {name: t[:1] for name, t in inject.state(s.adapted).items()}
    with pytest.raises(ModelError, match="is of another config"):
        weights_of(broken, s.config.adapter)


def test_a_run_that_is_finished_again_gives_the_same_bytes(finished: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    files = {path: path.read_bytes() for path in folder.glob("yql_dog*")}
    assert len(files) == 3
    for path in (*files, folder / "summary.json"):
        path.unlink()
    train.train(finished)
    assert files == {path: path.read_bytes() for path in files}


def test_two_equal_runs_differ_in_their_start_alone(finished: Config, make_config: MakeConfig, tmp_path: Path) -> None:
    train.train(finished.with_values({"run": {"folder": tmp_path / "twin"}, "memory": {"pictures_at_once": 8}}))
    for name in ("yql_dog.safetensors", "yql_dog_diffusers.safetensors"):
        one, other = (storage.read_metadata(tmp_path / run / name) for run in ("run", "twin"))
        apart = {key for key in one | other if one.get(key) != other.get(key)}
        assert apart <= {"ss_training_started_at", "modelspec.date"}


def test_mirrored_pictures_are_counted_once(finished: Config, tmp_path: Path) -> None:
    header = storage.read_metadata(tmp_path / "run" / "yql_dog.safetensors")
    assert header["ss_num_train_images"] == "5"
    assert header["ss_optimizer"] == "adamw", "and auto is told as what it meant"


def test_a_finished_run_that_was_copied_names_its_new_place(finished: Config, tmp_path: Path) -> None:
    before = train.train(finished)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    config = toml.load(tmp_path / "moved" / "config.toml")
    assert config.run.folder == tmp_path / "moved"
    summary = train.train(config)
    assert summary.files == {name: path.replace("/run/", "/moved/") for name, path in before.files.items()}
    assert replace(summary, folder=before.folder, files=before.files) == before
    for path in ("summary.json", "inputs.json"):
        assert str(tmp_path) not in (tmp_path / "moved" / path).read_text()


def test_a_run_folder_does_not_hold_the_name_of_its_user(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(make_config().subject.images, tmp_path / "dogs")
    shutil.copytree(make_config().model.base, tmp_path / "base")
    config = make_config(
        model={"base": str(tmp_path / "base")},
        subject={"images": tmp_path / "dogs"},
        run={"cache": tmp_path / "cache"},
        train={"steps": 1},
        adapter={"targets": FEW_LAYERS},
    )
    train.train(config)
    kept = tmp_path / "run" / "config.toml"
    assert 'images = "~/dogs"' in kept.read_text() and 'base = "~/base"' in kept.read_text()
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(texts) > 8
    assert not any(str(tmp_path).encode() in text for text in texts)
    loaded = toml.load(kept)
    assert (loaded.subject.images, loaded.model.base) == (config.subject.images, config.model.base)
    train.train(config)


def test_layers_without_a_gradient_are_looked_for_at_the_first_step_that_does_not_overflow(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    honest = loop._reduce_and_clip_
    norms = iter([float("inf"), float("inf")])
    monkeypatch.setattr(tally, "_require_gradients", lambda s: looked.append(len(skipped)))
    monkeypatch.setattr(loop, "_reduce_and_clip_", lambda s: honest(s) * 0 + next(norms, 1.0))
    recorder = Recorder()
    skipped = recorder.events
    train.train(make_config(model={"precision": "fp16"}, adapter={"targets": FEW_LAYERS}), report=recorder)
    assert len(looked) == 1
    assert [kind for kind, _ in skipped[: looked[0]]].count("skipped_step") == 2
