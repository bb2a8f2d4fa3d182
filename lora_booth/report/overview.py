"""Many runs on one page: a card for each, which leads to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lora_booth.config.inputs import reason, shown
from lora_booth.config.many import NamedRun
from lora_booth.errors import LoraBoothError
from lora_booth.evaluation.scores import SHORT
from lora_booth.report import page, pictures, record, verdict
from lora_booth.report.pictures import Captioned
from lora_booth.report.write import FILE_NAME, MAX_SHARE, require_own
from lora_booth.run import disk
from lora_booth.run.report import Report

NAME = "overview.html"
CARD_PX = 160
"""Side of a card's picture: some kB, so that a thousand of them can be on one page."""
METRICS = ("subject_fidelity", "drift")


@dataclass(frozen=True)
class Card:
    """What is shown of a run. `mark`: "good", "bad" or "open"; `link`: to its report, relative; `metrics`: what was
    measured, by a short name."""

    name: str
    words: str
    headline: str
    mark: str
    link: str | None
    cells: Sequence[Captioned]
    metrics: dict[str, str]
    took: str | None


class Overview:
    """overview.html in `folder`, made anew when a run has ended, and in the end."""

    def __init__(self, folder: Path, runs: Sequence[NamedRun]) -> None:
        self.path = folder / NAME
        self._cards = {run.name: _waiting(run) for run in runs}
        self._seconds, self._made_at, self._is_told = 0.0, float("-inf"), False

    def add(self, run: NamedRun, error: LoraBoothError | None, report: Report) -> None:
        """Take note of how `run` ended; then the page, where it is its time: each run makes all of it anew."""
        self._cards[run.name] = _card(run, error)
        if time.monotonic() - self._made_at > self._seconds / MAX_SHARE:
            self.write(report)

    def write(self, report: Report) -> None:
        """Make the page. What goes wrong is told once: the runs matter more."""
        began = time.monotonic()
        try:
            require_own(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_text(self.path, text(list(self._cards.values())))
        except Exception as error:
            if not self._is_told:
                report.warn(f"{NAME} could not be made ({reason(error)}); training goes on without it.")
            self._is_told = True
        self._made_at = time.monotonic()
        self._seconds = self._made_at - began


def text(cards: Sequence[Card]) -> str:
    """The page of all `cards`, as one HTML file that loads nothing."""
    counts = {mark: sum(card.mark == mark for card in cards) for mark in ("good", "bad", "open")}
    done = sum(card.took is not None for card in cards)  # also where run.report is false, so that there is no link
    return page.render("overview.html.j2", {"title": f"{done} of {len(cards)} subjects", "cards": cards} | counts)


def _waiting(run: NamedRun) -> Card:
    return Card(run.name, run.config.fill("{token} {class}"), "Waits for its turn.", "open", None, [], {}, None)


def _card(run: NamedRun, error: LoraBoothError | None) -> Card:
    folder, words = run.config.folder, run.config.fill("{token} {class}")
    link = f"{quote(folder.name)}/{FILE_NAME}" if (folder / FILE_NAME).is_file() else None
    if error is not None:
        told = shown(next(iter(str(error).splitlines()), ""), max_letters=300)
        return Card(run.name, words, f"Failed: {told}", "bad", link, [], {}, None)
    try:
        found = record.read(folder)
    except LoraBoothError as fault:
        return Card(run.name, words, f"Its files could not be read: {fault}", "bad", link, [], {}, None)
    best, said = verdict.chosen(found), verdict.of(found)
    metrics = {} if best is None else {SHORT[m]: verdict.cell(best.metrics[m]) for m in METRICS if m in best.metrics}
    took = None if found.summary is None else verdict.clock(found.summary.seconds)
    return Card(run.name, words, said.headline, said.mark, link, _cells(found), metrics, took)


def _cells(found: record.Record) -> list[Captioned]:
    """The first pair of before and after, small."""
    return [
        Captioned(pictures.shown(cell, side_px=CARD_PX), caption, f"{found.words} {caption} training")
        for cell, caption in zip(pictures.first_pair(found), ("before", "after"), strict=False)
    ]
