"""The tests that need a card: `make test-gpu`, counted while they run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from benchmarks.card.kit import ROOT, Kit
from benchmarks.card.outcomes import Figures, Job, Unfinished
from benchmarks.card.store import Results

JOB = "make test-gpu"
MAX_LINE_CHARACTERS = 300


def jobs(kit: Kit) -> Iterator[Job]:
    """All of them are one job."""
    results = Results(kit.results, kit.card)
    known = partial(results.put, "tests", JOB, "running")
    yield JOB, lambda: run(files(), kit.out / "pytest", lambda figures: known(figures=figures))


def files() -> list[Path]:
    """Those with tests that are marked so; others would only be imported."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in paths if re.search(r"\bmark\.gpu\b", path.read_text(encoding="utf-8"))]
    assert found, f"no test among {len(paths)} files needs a card"
    return found


def run(paths: Sequence[Path], folder: Path, known: Callable[[Figures], None]) -> Figures:
    """Counts of the tests in `paths` that need a card, `known` as they grow; `folder` is theirs, and goes.

    Raises Unfinished where pytest itself fails, as it does when a file cannot be imported.
    """
    os.chdir(ROOT)
    counts = Counts(known)
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--basetemp={folder}", "--tb=short"]
    try:
        code = pytest.main([*options, *map(str, paths)], plugins=[counts])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise Unfinished(f"pytest ended with {pytest.ExitCode(code).name}", counts.figures)
    return counts.figures


class Counts:
    """A plugin of pytest: numbers of outcomes, the first line of each failure, and reasons for skipping."""

    def __init__(self, known: Callable[[Figures], None]) -> None:
        self._known = known
        self.figures: Figures = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "skips": {}, "seconds": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After each phase of a test; setup and teardown count where they are not as they should be."""
        name = report.nodeid.rpartition("::")[2]
        if report.when != "call" and report.outcome == "passed":
            return
        self.figures[report.outcome] += 1
        self.figures["seconds"][name] = round(report.duration, 1)
        if report.outcome == "failed":
            self.figures["failures"][name] = _first_line(report)
        if report.outcome == "skipped":
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.figures["skips"][reason] = self.figures["skips"].get(reason, 0) + 1
        self._known(self.figures)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.outcome == "failed":
            self.figures["failures"][report.nodeid] = report.longreprtext.strip().splitlines()[-1][:MAX_LINE_CHARACTERS]


def _first_line(report: pytest.TestReport) -> str:
    """Of the error: lines that begin with E are it."""
    lines = [line.removeprefix("E").strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return next(iter(lines), report.longreprtext.strip().partition("\n")[0])[:MAX_LINE_CHARACTERS]
