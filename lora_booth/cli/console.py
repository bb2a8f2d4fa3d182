"""What a run looks like: a live line, plain lines, JSON, or nothing.

Events and warnings go to standard output as permanent lines; progress is one line that is written over (terminal) or
repeated now and then (log).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_booth.run.report import Report, Silent

PLAIN_SECONDS = 10.0
"""Seconds between two progress lines of one task in a log."""
SMOOTHING = 0.9
"""Weight of the past in the shown losses."""


@contextmanager
def listening(*, as_json: bool, quiet: bool) -> Iterator[Report]:
    """The report that suits the caller's wish and standard output."""
    if os.environ.get("RANK", "0") != "0":
        yield Silent()  # of several processes only the first one speaks
    elif as_json:
        yield JsonReport()
    elif quiet:
        yield QuietReport()
    elif sys.stdout.isatty():
        live = LiveReport()
        with live.progress_bar:
            yield live
    else:
        yield PlainReport()


class JsonReport:
    """One JSON object per line: {"kind": …}."""

    def event(self, kind: str, text: str, **values: Any) -> None:
        """{"kind": kind, "text": text, …values}"""
        self._print({"kind": kind, "text": text, **values})

    def warn(self, text: str) -> None:
        """{"kind": "warning", "text": text}"""
        self._print({"kind": "warning", "text": text})

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """{"kind": "progress", "task": task, "done": done, "total": total, …values}"""
        self._print({"kind": "progress", "task": task, "done": done, "total": total, **values})

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), flush=True)


class QuietReport(Silent):
    """Warnings only, on standard error."""

    def warn(self, text: str) -> None:
        """One line on standard error."""
        print(f"warning: {text}", file=sys.stderr, flush=True)


class PlainReport:
    """Lines without cursor movement: events at once, progress every ten seconds and at the end of a task."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def event(self, kind: str, text: str, **values: Any) -> None:
        """One line."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """One line that begins with "warning:"."""
        print(f"warning: {text}", flush=True)

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """A line when it is time for one."""
        meter = self._meters.setdefault(task, Meter())
        meter.update(done, values)
        if done == total or time.monotonic() - meter.shown >= PLAIN_SECONDS:
            meter.shown = time.monotonic()
            eta = "" if done == total else f"  eta {clock(meter.seconds_left(total))}"
            print(f"{task}: {done}/{total}{eta}{meter.numbers()}", flush=True)


class LiveReport:
    """A rich progress bar for the task at hand, permanent lines above it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._meters: dict[str, Meter] = {}
        self._tasks: dict[str, TaskID] = {}
        self.progress_bar = Progress(
            TextColumn("{task.description:>18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
        )

    def event(self, kind: str, text: str, **values: Any) -> None:
        """One permanent line."""
        self._console.print(Text("✓ ", style="green"), Text(text), sep="")

    def warn(self, text: str) -> None:
        """One permanent line, marked."""
        self._console.print(Text("! ", style="yellow bold"), Text(text), sep="")

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """Move the bar; it disappears when the task is done."""
        meter = self._meters.setdefault(task, Meter())
        meter.update(done, values)
        if task not in self._tasks:
            self._tasks[task] = self.progress_bar.add_task(task, total=total, numbers="")
        self.progress_bar.update(self._tasks[task], completed=done, total=total, numbers=meter.numbers())
        if done == total:
            self.progress_bar.remove_task(self._tasks.pop(task))
            self._console.print(Text("✓ ", style="green"), Text(f"{task}: {total}{meter.numbers()}"), sep="")


class Meter:
    """Speed and smoothed numbers of one task."""

    def __init__(self) -> None:
        self.shown = time.monotonic()
        self._began = time.monotonic()
        self._first: int | None = None
        self._done = 0
        self._values: dict[str, float] = {}

    def update(self, done: int, values: dict[str, Any]) -> None:
        """Take note of a step. Losses are smoothed, everything else is shown as it is."""
        if self._first is None or done < self._done:  # or the task has begun anew, as with the next of many runs
            self._first, self._began = done, time.monotonic()
        self._done = done
        for name, value in values.items():
            if isinstance(value, (int, float)):
                old = self._values.get(name, float(value))
                self._values[name] = SMOOTHING * old + (1 - SMOOTHING) * value if name.endswith("_loss") else value

    def per_second(self) -> float:
        """Steps per second since the first one was seen."""
        return (self._done - (self._first or 0)) / max(1e-9, time.monotonic() - self._began)

    def seconds_left(self, total: int) -> float | None:
        """Seconds to the end at this speed, None before it is known."""
        speed = self.per_second()
        return (total - self._done) / speed if speed > 0 else None

    def numbers(self) -> str:
        """What a person wants to see of a training step; empty for other tasks."""
        if "instance_loss" not in self._values:
            return ""
        v = self._values
        parts = [f"{self.per_second():.2f} it/s", f"loss {v['instance_loss']:.4f}"]
        parts += [f"prior {v[key]:.4f}" for key in ("class_loss", "prior_loss", "norm_loss") if key in v]
        parts.append(f"lr {v['learning_rate']:.1e}")
        parts += [f"{v['memory_gib']:.1f} GiB"] if "memory_gib" in v else []
        return "  " + "  ".join(parts)


def clock(seconds: float | None) -> str:
    """ "1:02:03", "2:03", or "?" when it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
