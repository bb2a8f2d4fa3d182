"""What a run looks like from outside, in each of the four ways."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from lora_booth.cli import console
from lora_booth.cli.console import JsonReport, LiveReport, Meter, PlainReport, QuietReport, clock

STEP = {"instance_loss": 0.25, "class_loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "memory_gib": 5.8}


def test_json_is_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = JsonReport()
    report.event("saved", "step 3 saved", step=3)
    report.warn("careful")
    report.progress("train", 1, 2, **STEP)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["saved", "warning", "progress"]
    assert lines[0] == {"kind": "saved", "text": "step 3 saved", "step": 3}
    assert lines[2]["instance_loss"] == 0.25


def test_plain_lines_come_now_and_then_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    report = PlainReport()
    for done in range(1, 31):
        now[0] += 1.0
        report.progress("train", done, 30, **STEP)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["11/30", "21/30", "30/30"]
    assert lines[0] == "train: 11/30  eta 0:19  1.00 it/s  loss 0.2500  prior 0.5000  lr 1.0e-04  5.8 GiB"


def test_quiet_says_warnings_only_and_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    report = QuietReport()
    report.event("saved", "x")
    report.progress("train", 1, 2)
    report.warn("careful")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: careful\n")


def test_the_live_line_shows_speed_losses_rate_and_memory_and_keeps_events_above_it() -> None:
    report, screen = LiveReport(), io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=160)
    report._console = report.progress_bar.live.console = terminal
    with report.progress_bar:
        report.progress("train", 1, 2, **STEP)
        report.progress_bar.refresh()
        report.event("saved", "step 1 saved [not markup]")
        report.progress("train", 2, 2, **STEP)
    text = screen.getvalue()
    for part in ("train", "1/2", "loss 0.2500", "prior 0.5000", "lr 1.0e-04", "5.8 GiB", "step 1 saved [not markup]"):
        assert part in text


def test_a_log_gets_plain_lines_and_no_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with console.listening(as_json=False, quiet=False) as report:
        assert isinstance(report, PlainReport)
        report.event("base", "loading")
    assert capsys.readouterr().out == "loading\n"


def test_losses_are_smoothed_and_the_rest_is_not() -> None:
    meter = Meter()
    values: dict[str, Any] = {"instance_loss": 1.0, "learning_rate": 1.0}
    meter.update(1, values)
    meter.update(2, {"instance_loss": 0.0, "learning_rate": 0.0})
    assert "loss 0.9000" in meter.numbers()
    assert "lr 0.0e+00" in meter.numbers()


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (5, "0:05"), (65, "1:05"), (3723, "1:02:03")])
def test_a_clock_reads_as_people_write_it(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_a_task_that_begins_anew_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    meter = Meter()
    for moment, done in ((1.0, 1), (11.0, 11), (111.0, 1), (113.0, 5)):
        now[0] = moment
        meter.update(done, STEP)
    assert meter.per_second() == pytest.approx(2.0)
