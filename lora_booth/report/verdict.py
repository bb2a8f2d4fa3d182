"""What is said of a run first: how far it is, how like its subject, and what it forgot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_booth.evaluation.intervals import Interval
from lora_booth.evaluation.scores import ByEncoder, Scored
from lora_booth.report.pictures import exported
from lora_booth.report.record import Record


@dataclass(frozen=True)
class Bar:
    """A value on a common scale, its interval, and where bar and interval begin and how wide they are, in percent."""

    name: str
    told: str
    start: float
    width: float
    low: float
    span: float
    is_main: bool


@dataclass(frozen=True)
class Verdict:
    """`headline`: one sentence; `details`: what stands under it; `mark`: "good", "bad" or "open"."""

    headline: str
    details: tuple[str, ...]
    mark: str
    bars: tuple[Bar, ...] = ()


def of(record: Record) -> Verdict:
    """The verdict on a run, by what its files tell."""
    if record.summary is None:
        return _unfinished(record)
    best = chosen(record)
    if best is None or "subject_fidelity" not in best.metrics:
        return _unmeasured(record, best)
    assert record.scores is not None, "it has what was chosen"
    found, likeness = record.scores.encoders[0], best.metrics["subject_fidelity"]
    headline = _headline(likeness, found.base.get("subject_fidelity"), found.is_feasible)
    kind = "pictures it was trained on" if record.scores.is_in_sample else "pictures it was not trained on"
    details = [_forgotten(best, found)]
    details.append(f"Measured by {found.record.name} against {len(record.scores.real)} {kind}; lines: 90 % intervals.")
    return Verdict(headline, tuple(details), "good" if found.is_feasible else "bad", bars(found, best))


def chosen(record: Record) -> Scored | None:
    """What was exported, as it was measured; None where it was not."""
    if record.scores is None:
        return None
    found, summary = record.scores.encoders[0], record.summary
    if summary is None or summary.exported_step is None:
        return found.candidates[found.best]
    wanted = (summary.exported_step, summary.exported_strength)
    return next((one for one in found.candidates if (one.step, one.strength) == wanted), None)


def bars(found: ByEncoder, best: Scored) -> tuple[Bar, ...]:
    """Likeness without the adapter, with it, and of the real pictures to each other, on one scale."""
    likeness = {
        "without the adapter": found.base.get("subject_fidelity"),
        "with the adapter": best.metrics["subject_fidelity"],
        "real pictures to each other": found.ceiling,
    }
    known = {name: interval for name, interval in likeness.items() if interval is not None}
    low = min(0.0, *(interval.low for interval in known.values()))
    scale = max(*(interval.high for interval in known.values()), low + 1e-6) - low
    return tuple(_bar(name, interval, low, scale) for name, interval in known.items())


def _bar(name: str, interval: Interval, low: float, scale: float) -> Bar:
    def place(value: float) -> float:
        return 100 * (value - low) / scale

    start, end = sorted((place(0.0), place(interval.mean)))
    span = place(interval.high) - place(interval.low)
    return Bar(name, _signed(interval.mean), start, end - start, place(interval.low), span, name == "with the adapter")


def _headline(likeness: Interval, base: Interval | None, is_feasible: bool) -> str:
    """Whether it learnt its subject, by whether the intervals of likeness with and without it are apart."""
    now = _signed(likeness.mean)
    if base is None:
        return f"Likeness {now}."
    if likeness.low <= base.high:
        return f"Not surely more like its subject than the base: likeness {now}, without it {_signed(base.mean)}."
    price = "" if is_feasible else ", but forgot more than it should"
    return f"It learnt its subject{price}: likeness {now}, without it {_signed(base.mean)}."


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _forgotten(best: Scored, found: ByEncoder) -> str:
    drift, change, leak = (best.metrics.get(name) for name in ("drift", "subject_change", "leak"))
    parts = [] if drift is None else [f"pictures of other things changed by {drift.mean:.2f}"]
    parts += [f"those of the subject by {change.mean:.2f}"] if change is not None else []
    parts += [f"the bare class took on {leak.mean:+.2f} of it"] if leak is not None else []
    kept = "It forgot little" if found.is_feasible else "It forgot more than the bounds allow"
    return f"{kept}: {', '.join(parts)}." if parts else f"{kept}."


def _unfinished(record: Record) -> Verdict:
    done, steps = record.steps_done, record.config.train.steps
    if not done:
        return Verdict("Not a step is done yet.", ("Pictures and base are being prepared, or it was stopped.",), "open")
    share = f" of {steps}" if steps else ""
    seconds = [value for _, value in record.points("seconds")]
    left = (
        () if not steps or not seconds else (f"The other steps take about {clock(median(seconds) * (steps - done))}.",)
    )
    return Verdict(f"Not finished: step {done}{share}.", left, "open")


def _unmeasured(record: Record, best: Scored | None) -> Verdict:
    assert record.summary is not None, "it is finished"
    details = ["Likeness was not measured; `lora-booth evaluate` does it for any run."]
    if best is not None and "drift" in best.metrics:
        details.append(f"Pictures of other things changed by {best.metrics['drift'].mean:.2f}.")
    return Verdict(
        f"Finished after {record.summary.steps} steps; exported is {exported(record)}.", tuple(details), "open"
    )


def clock(seconds: float) -> str:
    """Seconds as 0:42, 3:05 or 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def table(found: ByEncoder, shown: Sequence[str]) -> list[tuple[str, bool, list[str]]]:
    """A row for the base and for each candidate: its name, whether it was the best, and the `shown` metrics."""
    rows = [("the base", False, found.base)]
    rows += [(one.told, place == found.best, one.metrics) for place, one in enumerate(found.candidates)]
    return [(name, is_best, [cell(metrics.get(metric)) for metric in shown]) for name, is_best, metrics in rows]


def cell(interval: Interval | None) -> str:
    """A mean with half of its interval."""
    if interval is None:
        return "–"
    half = (interval.high - interval.low) / 2
    told = f"{interval.mean:.3f}" + (f" ± {half:.3f}" if half else "")
    return told.replace("-", "\N{MINUS SIGN}")
