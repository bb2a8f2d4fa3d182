"""The page while a run trains: kept up, never in its way, and never over somebody else's file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_booth.errors import ConfigError
from lora_booth.report import page, write
from lora_booth.run.folder import Run
from lora_booth.run.report import Silent
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.report.reading import Page
from tests.support.runs import Recorder, assert_equal, trained

KEPT: dict[str, Any] = {"report": True}


class Looking(Recorder):
    """Keeps the verdict of the page as it is after each save."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, list[str | None]()

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        super().progress(task, done, total, **values)
        path = self.folder / "report.html"
        if task == "train":
            self.seen.append(Page(path.read_text()).under[""] if path.exists() else None)


def test_a_run_keeps_its_page_while_it_trains_and_in_the_end(make_config: MakeConfig) -> None:
    config = make_config(run=KEPT, train={"steps": 3, "save_every_steps": 1})
    look = Looking(config.folder)
    train.train(config, report=look)
    assert look.seen[0] is None and "Not finished: step 1 of 3." in (look.seen[1] or "")
    last = Page((config.folder / "report.html").read_text())
    assert "Finished after 3 steps" in last.under[""] and not look.warnings


def test_a_run_without_it_has_none(make_config: MakeConfig) -> None:
    config = make_config(train={"steps": 1})
    train.train(config)
    assert not (config.folder / "report.html").exists()


def test_a_page_that_fails_is_told_once_and_changes_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(make_config(name="plain"))

    def fail(*_: Any) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr(page, "page", fail)
    recorder = Recorder()
    found = trained(make_config(name="failing", run=KEPT), recorder)
    assert_equal(found, plain)
    assert recorder.warnings == ["report.html could not be made (no page today); training goes on without it."]


def test_it_takes_a_fiftieth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], list[float]()

    def slow(_: Path) -> None:
        made.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(write.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(write, "write", slow)
    monkeypatch.setattr(Run, "require_taken", lambda _: None)
    listener = write.Refreshing(Silent(), Run(tmp_path))
    for _ in range(300):
        now[0] += 1.0
        listener.event("saved", "")
    assert made == [1.0, 104.0, 207.0]
    listener.event("preview", "")
    listener.event("note", "")
    assert len(made) == 3
    listener.refresh()
    assert len(made) == 4


def test_a_folder_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    recorder = Recorder()
    write.Refreshing(recorder, Run(tmp_path / "gone")).refresh()
    assert not (tmp_path / "gone").exists() and "could not be made" in recorder.warnings[0]


def test_listeners_hear_all_that_they_heard(tmp_path: Path) -> None:
    recorder = Recorder()
    listener = write.Refreshing(recorder, Run(tmp_path))
    listener.event("base", "a base", step=1)
    listener.warn("careful")
    listener.progress("train", 1, 2)
    assert (recorder.events, recorder.warnings, recorder.tasks) == ([("base", "a base")], ["careful"], {"train": 1})


class TestWhatIsThere:
    def test_its_own_page_is_replaced(self, copied: Callable[..., Path]) -> None:
        folder = copied()
        before = (folder / "report.html").read_bytes()
        (folder / "metrics.jsonl").unlink()
        assert write.write(folder).read_bytes() != before
        assert not list(folder.glob(".*.tmp"))

    @pytest.mark.parametrize("kind", ["a page", "a link", "a folder", "a pipe"])
    def test_somebody_elses_is_left_alone(self, kind: str, copied: Callable[..., Path], tmp_path: Path) -> None:
        folder = copied()
        path, other = folder / "report.html", tmp_path / "other.html"
        shutil.move(path, other)
        before = other.read_bytes()
        make = {
            "a page": lambda: path.write_text("<html>mine</html>"),
            "a link": lambda: path.symlink_to(other),
            "a folder": path.mkdir,
            "a pipe": lambda: os.mkfifo(path),
        }
        make[kind]()
        with pytest.raises(ConfigError, match=r"report.html exists, was not made by lora_booth and is not replaced"):
            write.write(folder)
        assert other.read_bytes() == before
        assert kind != "a page" or path.read_text() == "<html>mine</html>"
