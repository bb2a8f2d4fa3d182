"""Several runs side by side, as one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lora_booth.config import toml
from lora_booth.errors import ConfigError
from lora_booth.evaluation import scores
from lora_booth.evaluation.scores import SHORT
from lora_booth.report import page as single
from lora_booth.report import pictures, usage, verdict
from lora_booth.report.curves import Figure, Series
from lora_booth.report.pictures import Captioned, Gallery
from lora_booth.report.record import Record

UNIMPORTANT = ("run.folder", "run.cache", "run.cache_limit_gib", "run.report", "export.name")
NOT_KNOWN = "–"


def page(records: Sequence[Record]) -> str:
    """The comparison of at least two runs, as one HTML file that loads nothing."""
    names = labels(records)
    faults = [f"{name}: {fault}" for name, record in zip(names, records, strict=True) for fault in record.faults]
    shown = {name: figure for name, figure in figures(names, records).items() if not figure.is_empty}
    return single.render(
        "compare.html.j2",
        {
            "title": f"{len(records)} runs side by side",
            "names": names,
            "rows": rows(records),
            "remark": remark(records),
            "galleries": galleries(names, records),
            "curves": {name: single.drawn(figure, name) for name, figure in shown.items()},
            "settings": differing(records),
            "commands": [single.command(record) for record in records],
            "faults": faults,
        },
    )


def labels(records: Sequence[Record]) -> list[str]:
    """A short name for each run: its folder's, or where two are alike the whole path."""
    short = [record.folder.resolve().name for record in records]
    return [
        name if short.count(name) == 1 else record.shown_folder for name, record in zip(short, records, strict=True)
    ]


def rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """What is said of each run, a row for each thing; those of which nobody knows anything are left out."""
    asked: dict[str, Callable[[Record], str | None]] = {
        "verdict": lambda record: verdict.of(record).headline,
        "subject": lambda record: record.config.fill("{token} {class}"),
        "base": lambda record: single.base_name(record.config),
        "pictures": lambda record: str(len(record.stored["inputs"]["pictures"])) if record.stored else None,
        "steps": lambda record: str(record.steps_done),
        "exported": lambda record: None if record.summary is None else pictures.exported(record),
    }
    for metric in single.METRICS:
        asked[SHORT[metric]] = lambda record, metric=metric: _measured(record, metric)  # type: ignore[misc]
    asked |= {
        "encoder": lambda record: record.scores.encoders[0].record.name if record.scores else None,
        "time": lambda record: None if record.summary is None else verdict.clock(record.summary.seconds),
        "most memory": lambda record: None if record.summary is None else f"{record.summary.peak_gib:.1f} GiB",
        "parameters": lambda record: None if record.summary is None else f"{record.summary.num_parameters:,}",
        "file": lambda record: next((file.size for file in usage.files(record)), None),
        "device": lambda record: record.notes.device if record.notes else None,
    }
    found = [(name, [ask(record) for record in records]) for name, ask in asked.items()]
    return [(name, [text or NOT_KNOWN for text in texts]) for name, texts in found if any(texts)]


def remark(records: Sequence[Record]) -> str | None:
    """Why the scores of these runs may not be compared; None where they may, or where fewer than two have any."""
    found = [record.scores for record in records if record.scores is not None]
    for other in found[1:]:
        try:
            scores.require_comparable(found[0], other)
        except ConfigError as error:
            return str(error)
    return None


def galleries(names: Sequence[str], records: Sequence[Record]) -> list[Gallery]:
    """Prompts that two or more runs have drawn, with the first seed's picture of each, after the first run's base."""
    drawn = [{gallery.prompt: gallery.cells for gallery in pictures.before_and_after(record)} for record in records]
    found = []
    for prompt in dict.fromkeys(prompt for prompts in drawn for prompt in prompts):
        holders = [(name, cells[prompt]) for name, cells in zip(names, drawn, strict=True) if prompt in cells]
        if len(holders) > 1:
            base = Captioned(holders[0][1][0].picture, f"the base of {holders[0][0]}", f"“{prompt}” by the base")
            after = [Captioned(cells[1].picture, name, f"“{prompt}” with {name}") for name, cells in holders]
            found.append(Gallery(prompt, [base, *after]))
    return found


def figures(names: Sequence[str], records: Sequence[Record]) -> dict[str, Figure]:
    """Curves of all runs, a line each."""

    def lines(value: str, **how: Any) -> list[Series]:
        return [Series(name, record.points(value), **how) for name, record in zip(names, records, strict=True)]

    likeness = [
        Series(name, next((s.points for s in single.likeness_figure(record).series if s.points), []), is_dotted=True)
        for name, record in zip(names, records, strict=True)
    ]
    held, kept = "Held to what the base predicts.", "Of the kept checkpoints, at the largest strength of each run."
    return {
        "instance": Figure("Loss on instance images", "", lines("instance_loss", is_noisy=True), has_zero=True),
        "prior": Figure("Loss of the prior", held, lines("prior_loss", is_noisy=True), has_zero=True),
        "class": Figure("Loss on class images", "", lines("class_loss", is_noisy=True), has_zero=True),
        "drift": Figure("Drift at each save", "", lines("prediction_drift", is_dotted=True), has_zero=True),
        "likeness": Figure("Likeness", kept, likeness),
    }


def differing(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with each run's value."""
    keys: dict[str, None] = {}
    for other in records[1:]:
        lines = toml.differing_keys(records[0].config, other.config, ignore=UNIMPORTANT)
        keys |= dict.fromkeys(line.partition(": ")[0] for line in lines)
    values = [dict(line.split(" = ", 1) for line in single.settings(record.config).splitlines()) for record in records]
    return [(key, [settings.get(key, NOT_KNOWN) for settings in values]) for key in keys]


def _measured(record: Record, metric: str) -> str | None:
    best = verdict.chosen(record)
    return None if best is None or metric not in best.metrics else verdict.cell(best.metrics[metric])
