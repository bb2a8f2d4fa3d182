"""The page of one run: what its templates are given, and the HTML that comes of it.

Templates escape all that they are given but curves, whose words are escaped where they are drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_booth.config.config import Config
from lora_booth.config.section import Section
from lora_booth.evaluation.scores import SHORT
from lora_booth.report import curves, pictures, usage, verdict
from lora_booth.report.curves import Figure, Series
from lora_booth.report.record import Record
from lora_booth.run import systems
from lora_booth.run.versions import CORE, VERSION

GENERATOR = f"lora_booth {VERSION}"
MARK = '<meta name="generator" content="lora_booth'
"""By which a page is known to be made here."""
MAX_VALUE = 120
"""Characters of a setting's value."""
METRICS = ("subject_fidelity", "prompt_fidelity", "leak", "drift", "diversity")
LOSSES = {
    "prior_loss": "held to what the base predicts",
    "class_loss": "class images",
    "norm_loss": "norm of the update",
}


@cache
def environment() -> Environment:
    """The package's templates; a name that they are not given is an error."""
    made = Environment(
        loader=PackageLoader("lora_booth.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["clock"] = verdict.clock
    return made


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of the package, filled."""
    common = {"generator": GENERATOR, "made_at": time.strftime("%Y-%m-%d %H:%M")}
    return environment().get_template(template).render(common | dict(values))


def page(record: Record) -> str:
    """The whole report of one run, as one HTML file that loads nothing."""
    config, found = record.config, record.scores
    lines = {name: drawn(figure, name) for name, figure in figures(record).items() if not figure.is_empty}
    shown = [metric for metric in METRICS if found and metric in found.encoders[0].candidates[0].metrics]
    before_after = pictures.before_and_after(record)
    real = pictures.real(record)
    return render(
        "run.html.j2",
        {
            "title": record.words,
            "kind": kind(config),
            "facts": facts(record),
            "verdict": verdict.of(record),
            "real": None if real is None or not before_after else pictures.shown(real),
            "before_after": before_after,
            "by_step": pictures.by_step(record),
            "curves": lines,
            "metrics": [SHORT[metric] for metric in shown],
            "table": verdict.table(found.encoders[0], shown) if found else [],
            "scores_sheet": pictures.sheet(record.folder / "scores.png") if found else None,
            "contact_sheet": pictures.sheet(record.folder / "contact_sheet.png"),
            "seen": seen(record),
            "notes": record.notes,
            "uses": usage.uses(record),
            "files": usage.files(record),
            "words": record.words,
            "warnings": record.warnings,
            "choices": choices(record),
            "exported": None if record.summary is None else (pictures.exported(record), record.summary.reason),
            "parts_of_run": parts(record),
            "has_memory": record.summary is not None and bool(record.summary.peak_gib_of),
            "summary": record.summary,
            "command": command(record),
            "settings": settings(config),
            "versions": versions(record),
            "faults": record.faults,
        },
    )


def kind(config: Config) -> str:
    """What was made, in two or three words."""
    made = {"none": "A LoRA adapter", "only": "A learnt word", "too": "A LoRA adapter and a learnt word"}
    return made[config.adapter.embedding]


def learnt(config: Config) -> list[str]:
    """What is trained, in a few words."""
    layers = [] if config.adapter.embedding == "only" else [f"rank {config.adapter.rank}", config.adapter.targets]
    return layers + ([] if config.adapter.embedding == "none" else [f'the word "{config.subject.token}"'])


def facts(record: Record) -> list[tuple[str, str]]:
    """What kind of run it is, in a few words each."""
    config, summary = record.config, record.summary
    given = {} if record.stored is None else record.stored["inputs"]
    begun = None if record.stored is None else time.strftime("%Y-%m-%d", time.localtime(record.stored["started_at"]))
    trained = None if summary is None else f"{summary.num_parameters:,} parameters"
    found = {
        "base": base_name(config),
        "pictures": str(len(given["pictures"])) if given.get("pictures") else None,
        "steps": f"{record.steps_done} of {config.train.steps}" if summary is None else str(summary.steps),
        "adapter": ", ".join([*learnt(config), *([trained] if trained else [])]),
        "prior": config.prior.mode,
        "took": None if summary is None else verdict.clock(summary.seconds),
        "begun": begun,
    }
    return [(name, text) for name, text in found.items() if text is not None]


def figures(record: Record) -> dict[str, Figure]:
    """The curves of a run by name; some may be empty."""
    validation = Series("validation", record.points("validation_loss"), is_dotted=True)
    return {
        "instance": Figure(
            "Loss on your pictures",
            "Falls while the subject is learnt; validation uses fixed noise, and rises when it learns by heart.",
            [Series("instance images", record.points("instance_loss"), is_noisy=True), validation],
            has_zero=True,
        ),
        "prior": Figure(
            "Loss of the prior",
            "What holds the base: it should stay low and level.",
            [Series(told, record.points(name), is_noisy=True) for name, told in LOSSES.items()],
            has_zero=True,
        ),
        "drift": Figure(
            "Drift at each save",
            "How far predictions for other pictures have moved from the base's.",
            [Series("drift of predictions", record.points("prediction_drift"), is_dotted=True)],
            has_zero=True,
        ),
        "likeness": likeness_figure(record),
    }


def likeness_figure(record: Record) -> Figure:
    """Likeness of the candidates over their steps, a line for each strength."""
    title, says = "Likeness of what was compared", "Kept checkpoints, with 90 % intervals."
    if record.scores is None:
        return Figure(title, says, [])
    found = record.scores.encoders[0]
    series = []
    for strength in sorted({one.strength for one in found.candidates}, reverse=True):
        of = sorted((o for o in found.candidates if o.strength == strength), key=lambda one: one.step)
        known = [(one.step, one.metrics["subject_fidelity"]) for one in of if "subject_fidelity" in one.metrics]
        points, ends = [(step, one.mean) for step, one in known], [(one.low, one.high) for _, one in known]
        series.append(Series(f"strength {strength:g}", points, is_dotted=True, ends=ends))
    levels = {"the base": found.base.get("subject_fidelity"), "real pictures": found.ceiling}
    return Figure(title, says, series, {name: one.mean for name, one in levels.items() if one is not None})


def seen(record: Record) -> list[str]:
    """What the model was trained on, a sentence each."""
    config, told = record.config, []
    given = {} if record.stored is None else record.stored["inputs"]
    count = len(given.get("pictures", {}))
    if count and config.train.steps:
        times = config.train.steps * config.train.images_per_step / count
        side = f" of about {config.data.resolution}² pixels" if config.data.resolution else ""
        told.append(f"{count} pictures, cut to sizes{side}, each seen about {times:.0f} times in all.")
    if given.get("held_out_pictures"):
        told.append(f"{len(given['held_out_pictures'])} more were held out, to judge by.")
    return told


def choices(record: Record) -> list[tuple[str, str, str]]:
    """Each setting that was left open: its name, its value, and what it is and why."""
    chosen = {} if record.notes is None else record.notes.chosen
    found = []
    for name, value in chosen.items():
        section, _, key = name.partition(".")
        model = getattr(record.config, section, None)
        field = type(model).model_fields.get(key) if isinstance(model, Section) else None
        found.append((name, _cut(value), "" if field is None else field.description or ""))
    return found


def parts(record: Record) -> list[tuple[str, float, float, float | None]]:
    """Each part of the run: its seconds, its share of them in percent, and the memory by its end in GiB."""
    summary = record.summary
    if summary is None:
        seconds = sum(value for _, value in record.points("seconds"))
        return [("steps so far", seconds, 100.0, None)] if seconds else []
    all_seconds, gib_of = sum(summary.seconds_of.values()) or 1.0, summary.peak_gib_of or {}
    return [
        (part, seconds, 100 * seconds / all_seconds, gib_of.get(part))
        for part, seconds in summary.seconds_of.items()
        if seconds >= 0.05
    ]


def command(record: Record) -> str:
    """What trains a run of the same settings again; of one that is not finished, what continues it."""
    config_path = f"{record.shown_folder}/config.toml"
    words = ["lora-booth", "train", config_path]
    if record.summary is not None:
        words.append(f"run.folder={record.shown_folder}-again")
    return systems.command_line(words)


def settings(config: Config) -> str:
    """Every setting as `section.key = value`, a line each, of paths only the name."""
    values, found = config.model_dump(mode="json", exclude_none=True), []
    values["model"]["base"] = base_name(config)
    for section, model in config:
        for key, value in model:
            if key in values[section]:
                shown = value.name if isinstance(value, Path) else values[section][key]
                found.append(f"{section}.{key} = {_cut(json.dumps(shown, ensure_ascii=False))}")
    return "\n".join(found)


def versions(record: Record) -> dict[str, str]:
    """Versions of what computes; those of all other packages stand in notes.json."""
    noted = {} if record.notes is None else record.notes.versions
    return {name: noted[name] for name in ("lora-booth", "python", *CORE) if name in noted}


def base_name(config: Config) -> str:
    """The base as others may see it: of a path its last part."""
    base = Path(config.model.base)
    return base.name if base.is_absolute() or config.model.base.startswith(("./", "../", "~")) else config.model.base


def drawn(figure: Figure, salt: str) -> tuple[str, str, Markup]:
    """Title, words and picture of a figure; the words in it are escaped by matplotlib and by `curves`."""
    return figure.title, figure.says, Markup(curves.svg(figure, salt))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
