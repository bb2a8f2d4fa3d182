"""Many subjects in one process: each as if it were alone, and none in the way of another."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_booth.config.config import Config
from lora_booth.config.many import NamedRun
from lora_booth.errors import ConfigError, DataError
from lora_booth.models import loading
from lora_booth.training import loop
from lora_booth.verbs.train_many import read, train_many
from tests.conftest import MakeConfig
from tests.support.runs import Recorder, assert_equal, trained


def adapter_of(config: Config) -> dict[str, object]:
    newest = max((config.folder / "checkpoints").iterdir())
    return load_file(newest / "adapter.safetensors")


def test_each_subject_ends_as_its_single_run_and_the_base_is_loaded_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "plain": {"adapter": {"rank": 2}},
        "texts": {"adapter": {"rank": 2, "text_encoder": True}},
        "word": {"adapter": {"rank": 2, "embedding": "too"}, "export": {"name": "adapter"}},
        "again": {"adapter": {"rank": 2, "dora": True}},
    }
    alone = {name: trained(make_config(name=f"alone-{name}", **sections)) for name, sections in kinds.items()}
    runs = [NamedRun(name, make_config(name=name, **sections)) for name, sections in kinds.items()]
    loads = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs))[1])
    ended = train_many(runs, tmp_path, Recorder())
    assert [one.error for one in ended] == [None] * len(runs) and len(loads) == 1
    for run in runs:
        assert_equal(adapter_of(run.config), alone[run.name])


def test_a_subject_that_fails_is_passed_over_and_the_same_runs_go_on(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    runs = [
        NamedRun("first", make_config(name="first")),
        NamedRun("empty", make_config(name="none", subject={"images": empty})),
        NamedRun("odd", make_config(name="odd")),
        NamedRun("last", make_config(name="last", train={"seed": 3})),
    ]
    expected, optimize = trained(make_config(name="alone", train={"seed": 3})), loop.optimize

    def fail(s: loop.Session, *rest: object) -> None:
        if s.run.folder.name == "odd":
            raise ZeroDivisionError("of nobody's making")
        optimize(s, *rest)  # type: ignore[arg-type]

    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimize", fail)
        ended = train_many(runs, tmp_path, recorder, tell_fault=lambda error: f"told: {error}")
    assert [type(one.error).__name__ for one in ended] == ["NoneType", "DataError", "LoraBoothError", "NoneType"]
    assert isinstance(ended[1].error, DataError) and str(ended[2].error) == "told: of nobody's making"
    assert_equal(adapter_of(runs[3].config), expected)
    page = (tmp_path / "overview.html").read_text()
    assert "2 of 4 subjects" in recorder.events[-1][1] and page.count("Failed: ") == 2
    ended = train_many(runs, tmp_path, Recorder())
    assert [one.error is None for one in ended] == [True, False, True, True]


def test_a_folder_of_folders_is_a_subject_each(tmp_path: Path) -> None:
    for name in ("rex", "10_wbv cat", ".hidden"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    usual = {"model": {"base": "booth-mini"}, "subject": {"class_noun": "dog"}}
    cat, rex = read(tmp_path / "photos", usual, tmp_path / "out")
    assert (cat.config.subject.token, cat.config.subject.class_noun) == ("wbv", "cat")
    assert rex.config.subject.class_noun == "dog" and rex.config.folder == tmp_path / "out" / "rex"
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="holds no folders"):
        read(tmp_path / "bare", usual, tmp_path / "out")
