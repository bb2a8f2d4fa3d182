"""Many subjects in one process: each as if it were alone, and none in the way of another."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest

from lora_booth.config.many import NamedRun
from lora_booth.errors import DataError, Interrupted, NumericError
from lora_booth.models import loading
from lora_booth.training import loop
from lora_booth.verbs.train_many import Numbered, train_many
from tests.conftest import MakeConfig
from tests.support.runs import At, Recorder, adapter_of, assert_equal, trained


def test_each_subject_ends_as_its_single_run_and_the_base_is_loaded_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "word": {"adapter": {"rank": 2, "embedding": "too"}, "export": {"name": "adapter"}},
        "texts": {"adapter": {"rank": 2, "text_encoder": True}},
        "plain": {"adapter": {"rank": 2}},  # which releases the text encoders that the next one needs
        "again": {"adapter": {"rank": 2, "dora": True, "text_encoder": True}},
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
        NamedRun("infinite", make_config(name="infinite")),
        NamedRun("last", make_config(name="last", train={"seed": 3})),
    ]
    expected, optimize = trained(make_config(name="alone", train={"seed": 3})), loop.optimize

    lost: list[weakref.ref[Any]] = []

    def fail(s: loop.Session, *rest: object) -> None:
        if s.run.folder.name == "odd":
            lost.append(weakref.ref(s.family))
            raise ZeroDivisionError("of nobody's making")
        if s.run.folder.name == "infinite":
            lost.append(weakref.ref(s.family))
            raise NumericError("a loss is infinite")
        optimize(s, *rest)  # type: ignore[arg-type]

    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimize", fail)
        ended = train_many(runs, tmp_path, recorder, tell_fault=lambda error: f"told: {error}")
    assert [type(one.error).__name__ for one in ended] == [
        *("NoneType", "DataError", "LoraBoothError", "NumericError", "NoneType")
    ]
    assert isinstance(ended[1].error, DataError) and str(ended[2].error) == "told: of nobody's making"
    assert_equal(adapter_of(runs[4].config), expected)
    gc.collect()
    assert [base() for base in lost] == [None, None], "nothing keeps the base of a run that failed, nor does its error"
    page = (tmp_path / "overview.html").read_text()
    assert "2 of 5 subjects" in recorder.events[-1][1] and page.count("Failed: ") == 3
    ended = train_many(runs, tmp_path, Recorder())
    assert [one.error is None for one in ended] == [True, False, True, True, True]


def test_what_a_run_changed_in_the_noise_schedule_ends_with_it(make_config: MakeConfig, tmp_path: Path) -> None:
    changed = make_config("sd2", "changed", objective={"zero_terminal_snr": True})
    expected = trained(make_config("sd2", "alone"))
    train_many([NamedRun("changed", changed), NamedRun("plain", make_config("sd2", "plain"))], tmp_path, Recorder())
    assert_equal(adapter_of(make_config("sd2", "plain")), expected)


def test_a_signal_stops_all_and_the_same_runs_end_as_if_never_stopped(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = [NamedRun(name, make_config(name=name, train={"seed": n})) for n, name in enumerate(("one", "two"))]
    expected = trained(make_config(name="alone", train={"seed": 1}))

    class InTheSecond(At):
        def progress(self, task: str, done: int, total: int, **values: Any) -> None:
            if values.get("run") == "two":
                super().progress(task, done, total)

    stopping = InTheSecond(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="type this"):
        train_many(runs, tmp_path, stopping, continue_command="type this")
    assert not (runs[1].config.folder / "summary.json").exists()
    assert "1 of 2 subjects" in (tmp_path / "overview.html").read_text()
    assert [one.error for one in train_many(runs, tmp_path, Recorder())] == [None, None]
    assert_equal(adapter_of(runs[1].config), expected)


def test_lines_name_their_run_and_bars_are_taken_over_by_the_next(tmp_path: Path) -> None:
    recorder = Recorder()
    for place, name in enumerate(("one", "two"), start=1):
        listener = Numbered(recorder, name, f"{place}/2")
        listener.event("saved", "step 1 saved")
        listener.progress("train", place, 4)
    assert [text for _, text in recorder.events] == ["[1/2 one] step 1 saved", "[2/2 two] step 1 saved"]
    assert recorder.tasks == {"train": 2}
