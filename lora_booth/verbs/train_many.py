"""Many subjects one after the other: what they share is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.config.many import NamedRun
from lora_booth.errors import DeviceMemoryError, Interrupted, LoraBoothError, lacks_memory
from lora_booth.report.overview import Overview
from lora_booth.report.verdict import clock
from lora_booth.run.report import Report
from lora_booth.run.summary import Summary
from lora_booth.training.shared import SharedBase
from lora_booth.verbs.train import train

MAX_TOLD = 12
"""Failed runs that the last lines name."""


@dataclass(frozen=True)
class Ended:
    """How a run of many ended: with a summary, or by an error."""

    run: NamedRun
    summary: Summary | None
    error: LoraBoothError | None


class Numbered:
    """A listener that says of which run of many each line is."""

    def __init__(self, listener: Report, name: str, place: str) -> None:
        self._listener, self._name, self._label = listener, name, f"[{place} {name}]"

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Handed on, with the run."""
        self._listener.event(kind, f"{self._label} {text}", **values)

    def warn(self, text: str) -> None:
        """Handed on, with the run."""
        self._listener.warn(f"{self._label} {text}")

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """Handed on under the task's own name: the next run goes on with a bar that a failed one has left."""
        self._listener.progress(task, done, total, run=self._name, **values)


def train_many(
    runs: Sequence[NamedRun],
    out: Path,
    report: Report,
    *,
    continue_command: str = "the same command",
    tell_fault: Callable[[Exception], str] = str,
) -> list[Ended]:
    """Train `runs` in turn, or continue them. One that fails is told and passed over; an overview of all is kept in
    `out`. `tell_fault`: what to say of an error that nobody foresaw.

    Raises Interrupted when a signal asked to stop, after everything was saved.
    """
    shared, ended = SharedBase(), list[Ended]()
    overview = Overview(out, runs)
    try:
        for number, run in enumerate(runs, start=1):
            report.progress("subjects", number - 1, len(runs))
            listener = Numbered(report, run.name, f"{number}/{len(runs)}")
            ended.append(_ended(run, shared, listener, continue_command, tell_fault))
            overview.add(run, ended[-1].error, report)
        report.progress("subjects", len(runs), len(runs))
    finally:
        overview.write(report)
    _tell(ended, overview.path, report)
    return ended


def _ended(
    run: NamedRun, shared: SharedBase, report: Report, command: str, tell_fault: Callable[[Exception], str]
) -> Ended:
    try:
        return Ended(run, train(run.config, report=report, continue_command=command, shared=shared), None)
    except Interrupted:
        raise
    except LoraBoothError as error:
        found = error
    except Exception as error:  # of one subject, which must not keep the others from being trained
        found = DeviceMemoryError(str(error)) if lacks_memory(error) else LoraBoothError(tell_fault(error))
    found.__traceback__ = found.__cause__ = found.__context__ = None  # whose frames would hold the failed run's base
    report.warn(f"{found} The other subjects go on.")
    return Ended(run, None, found)


def _tell(ended: Sequence[Ended], overview: Path, report: Report) -> None:
    """A line for each run, and how many failed."""
    width = max(len(one.run.name) for one in ended)
    for one in ended:
        if one.summary is not None:
            words = [f"{one.summary.steps} steps in {clock(one.summary.seconds)}", *filter(None, [one.summary.scores])]
            words += list(one.summary.files.values())[:1]
            report.event("run", f"{one.run.name:<{width}}  {', '.join(words)}", name=one.run.name, is_done=True)
    failed = [one for one in ended if one.error is not None]
    for one in failed[:MAX_TOLD]:
        first = next(iter(str(one.error).splitlines()), "")
        report.event("run", f"{one.run.name:<{width}}  failed: {first}", name=one.run.name, is_done=False)
    count = f"{len(ended) - len(failed)} of {len(ended)} subjects are trained"
    more = f"; {len(failed)} failed, which the same command tries again" if failed else ""
    report.event("summary", f"{count}{more}; overview: {overview}", overview=str(overview))
