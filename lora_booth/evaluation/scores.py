"""What an evaluation found, as scores.json keeps it, and which two of them may be compared.

Nothing in the file names a path: pictures and encoders are known by their names and digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_booth.config import inputs
from lora_booth.errors import ConfigError, DataError
from lora_booth.evaluation.features import Record
from lora_booth.evaluation.intervals import Interval
from lora_booth.run import disk

SCHEMA = 1
FILE_NAME = "scores.json"
AGAIN = "remove it and evaluate again"
SHORT = {
    "subject_fidelity": "likeness",
    "share": "share",
    "prompt_fidelity": "prompt",
    "preservation": "class",
    "leak": "leak",
    "diversity": "diversity",
    "drift": "drift",
    "subject_change": "change",
    "prediction_drift": "pd",
}
"""Metric to its short name in tables, in their order."""


@dataclass(frozen=True)
class Scored:
    """One checkpoint at one strength, measured by one encoder: metric to its mean and interval."""

    step: int
    strength: float
    metrics: dict[str, Interval]

    @property
    def told(self) -> str:
        """How a table names it; a file, which has no steps, by its strength alone."""
        return f"step {self.step} at {self.strength:g}" if self.step else f"strength {self.strength:g}"


@dataclass(frozen=True)
class ByEncoder:
    """All that one encoder measured. `ceiling`: likeness of the real pictures to each other, None for fewer than two;
    `base`: metrics of the base alone; `best`: the place of the chosen candidate, and why it was chosen."""

    record: Record
    ceiling: Interval | None
    base: dict[str, Interval]
    candidates: tuple[Scored, ...]
    best: int
    reason: str
    is_feasible: bool


@dataclass(frozen=True)
class Scores:
    """An evaluation. `real`: name of each real picture to its SHA-256; `is_in_sample`: they were trained on.

    `drawing`: what pictures depend on besides the adapter: base, prompts, solver, seed.
    """

    name: str
    token: str
    class_noun: str
    real: dict[str, str]
    is_in_sample: bool
    drawing: dict[str, Any]
    encoders: tuple[ByEncoder, ...]

    def write(self, path: Path) -> None:
        """Write `path`, whole or not at all. Raises DiskError."""
        disk.write_text(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Scores:
    """What `Scores.write` wrote. Raises DataError for a file that is missing or damaged, ConfigError for another
    version's."""
    values = inputs.read_object(path, AGAIN, DataError)
    schema = values.pop("schema", None)
    if schema != SCHEMA:
        raise ConfigError(
            f"{inputs.shown_path(path)} has the schema {inputs.shown(schema)}, and this version of lora_booth reads "
            f"{SCHEMA}; {AGAIN}."
        )
    try:
        return _scores(values)
    except (TypeError, ValueError, KeyError, AttributeError) as fault:
        raise DataError(f"{inputs.shown_path(path)} is damaged ({inputs.reason(fault)}); {AGAIN}.") from fault


def require_comparable(one: Scores, other: Scores) -> list[tuple[ByEncoder, ByEncoder]]:
    """The encoders that both were measured by, in pairs.

    Raises ConfigError, naming what differs, where there is none: figures of two encoders say nothing of each other; and
    where the likeness is to other pictures, or the prompts are others.
    """
    if one.real != other.real or one.is_in_sample != other.is_in_sample:
        raise ConfigError(
            f"{one.name} and {other.name} were compared with different real pictures, so their likeness cannot be "
            "compared; evaluate both with the same --subject."
        )
    differing = [key for key in one.drawing if key in other.drawing and one.drawing[key] != other.drawing[key]]
    if differing:
        raise ConfigError(
            f"{one.name} and {other.name} were drawn with another {', '.join(differing)}, so their scores cannot be "
            "compared; evaluate both with the same options."
        )
    found = [(a, b) for a in one.encoders for b in other.encoders if a.record.is_comparable(b.record)]
    if not found:
        names = " and ".join(_encoder_names(scores) for scores in (one, other))
        raise ConfigError(
            f"{one.name} and {other.name} were measured by different encoders, or other preprocessing ({names}), so "
            "their scores cannot be compared; evaluate both with the same --encoder."
        )
    return found


def _encoder_names(scores: Scores) -> str:
    return ", ".join(f"{e.record.name} {e.record.weights_sha256[:8]}" for e in scores.encoders)


def _scores(values: Mapping[str, Any]) -> Scores:
    kinds = {"name": str, "token": str, "class_noun": str, "is_in_sample": bool}
    kinds |= {"real": dict[str, str], "drawing": dict, "encoders": list}
    _require_kinds(values, kinds)
    if not values["encoders"]:
        raise ValueError("it has no encoders")
    return Scores(**{**_known(Scores, values), "encoders": tuple(map(_by_encoder, values["encoders"]))})


def _by_encoder(values: Mapping[str, Any]) -> ByEncoder:
    _require_kinds(values, {"best": int, "reason": str, "is_feasible": bool, "record": dict, "candidates": list})
    record = values["record"]
    texts = ("name", "weights_sha256", "preprocessing_sha256")
    _require_kinds(record, {**dict.fromkeys(texts, str), "revision": str | None, "versions": dict[str, str]})
    candidates = tuple(_scored(candidate) for candidate in values["candidates"])
    if not 0 <= values["best"] < len(candidates):
        raise ValueError('"best" is no place among the candidates')
    made = {
        "record": Record(**_known(Record, record)),
        "ceiling": None if values["ceiling"] is None else _interval(values["ceiling"]),
        "base": _metrics(values["base"]),
        "candidates": candidates,
    }
    return ByEncoder(**{**_known(ByEncoder, values), **made})


def _scored(values: Mapping[str, Any]) -> Scored:
    _require_kinds(values, {"step": int, "strength": float})
    return Scored(values["step"], float(values["strength"]), _metrics(values["metrics"]))


def _metrics(values: Mapping[str, Any]) -> dict[str, Interval]:
    return {str(name): _interval(interval) for name, interval in values.items()}


def _interval(values: Mapping[str, Any]) -> Interval:
    _require_kinds(values, dict.fromkeys(("mean", "low", "high", "confidence"), float))
    return Interval(**_known(Interval, values))


def _known(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among `values`; a later version may have written more."""
    return {field.name: values[field.name] for field in fields(kind)}


def _require_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if not inputs.is_kind(values.get(name), kind):
            raise ValueError(f'"{name}" is missing, or not what was written')


def table(found: ByEncoder) -> Sequence[str]:
    """Lines of aligned columns: the base, then each candidate, the chosen one marked; means with half intervals."""
    rows = [("", found.base), *((candidate.told, candidate.metrics) for candidate in found.candidates)]
    shown = [metric for metric in SHORT if any(metric in metrics for _, metrics in rows)]
    cells = [["", *(SHORT[metric] for metric in shown)]]
    for number, (told, metrics) in enumerate(rows):
        mark = " *" if number == found.best + 1 else ""
        cells.append([(told or "base") + mark, *(_cell(metrics.get(metric)) for metric in shown)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(shown) + 1)]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells]  # fmt: skip


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:z.3f} ±{half:.3f}" if half else f"{interval.mean:z.3f}"
