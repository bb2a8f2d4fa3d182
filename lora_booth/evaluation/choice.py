"""The best checkpoint and strength: the most like the subject among those that forgot little.

The rule: a candidate is *feasible* when the upper bound of its leak is under 0.1 and that of its drift under 0.6 of the
subject's own change. Of the feasible ones the largest mean likeness sets the mark; of all that cannot be told from it,
the one with the least drift is chosen. Where none is feasible it is the one with the least drift, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_booth.evaluation.intervals import mean_interval, paired

MAX_LEAK = 0.1
MAX_DRIFT_SHARE = 0.6
"""Of the mean change of the subject's own pictures."""
BOUND_CONFIDENCE = 0.8
"""Of an interval whose upper end is a one-sided bound of 90 %."""


@dataclass(frozen=True)
class Candidate:
    """One checkpoint at one strength, with its metrics: a value for each picture, paired over candidates.

    `step`: 0 of a file, which has none. `likeness` and `leak` are empty where no real picture of the subject is at
    hand. `drift` is of unrelated prompts, `subject_change` the same of the subject's.
    """

    step: int
    strength: float
    likeness: Sequence[float]
    leak: Sequence[float]
    drift: Sequence[float]
    subject_change: Sequence[float]

    @property
    def told(self) -> str:
        """How a message names it."""
        return f"step {self.step} at strength {self.strength:g}" if self.step else f"strength {self.strength:g}"


@dataclass(frozen=True)
class Choice:
    """The best candidate, why in one plain sentence, and whether it is feasible; if not, the user is to be warned."""

    candidate: Candidate
    reason: str
    is_feasible: bool


def choose(candidates: Sequence[Candidate], *, is_in_sample: bool = False, seed: int = 0) -> Choice:
    """The best of `candidates` by the rule above, the same each time.

    `is_in_sample`: the likeness is to pictures that were trained on, which the reason says. Without any likeness
    nothing but drift bounds the choice, and the largest change of the subject's pictures stands for it.
    """
    assert candidates, "there is nothing to choose from"
    feasible = [candidate for candidate in candidates if is_feasible(candidate, seed=seed)]
    count = f"{len(feasible)} of {len(candidates)}"
    if not feasible:
        least = min(candidates, key=_drift)
        bounds = f"a leak under {MAX_LEAK:g} and a drift under {MAX_DRIFT_SHARE:g} of the subject's change"
        return Choice(
            least,
            f"{least.told} has the least drift, {_drift(least):z.3f}, and none of {len(candidates)} keeps to {bounds}",
            False,
        )
    if not all(candidate.likeness for candidate in candidates):
        strongest = max(feasible, key=lambda candidate: (_mean(candidate.subject_change), -_drift(candidate)))
        change = _mean(strongest.subject_change)
        return Choice(
            strongest,
            f"{strongest.told} changes the subject's pictures most, by {change:z.3f}, at a drift of "
            f"{_drift(strongest):z.3f}, among {count} that keep to the bounds; without pictures of the subject its "
            "likeness is unknown",
            True,
        )
    top = max(feasible, key=lambda candidate: (_mean(candidate.likeness), -_drift(candidate)))
    equal = [c for c in feasible if c is top or paired(top.likeness, c.likeness, seed=seed).low <= 0]
    best = min(equal, key=lambda candidate: (_drift(candidate), -_mean(candidate.likeness)))
    return Choice(best, _reason(best, top, count, "in-sample likeness" if is_in_sample else "likeness"), True)


def is_feasible(candidate: Candidate, *, seed: int = 0) -> bool:
    """Whether the upper 90 % bounds of its leak, where it is known, and drift are low enough."""
    allowed = MAX_DRIFT_SHARE * _mean(candidate.subject_change)
    return (not candidate.leak or _bound(candidate.leak, seed) < MAX_LEAK) and _bound(candidate.drift, seed) < allowed


def _reason(best: Candidate, top: Candidate, count: str, likeness: str) -> str:
    figures = f"{likeness} {_mean(best.likeness):z.3f} and drift {_drift(best):z.3f}"
    if best is top:
        return f"{best.told} has the largest {likeness}, with {figures}, among {count} that keep to the bounds"
    return (
        f"{best.told} has the least drift, with {figures}, among those of {count} within the bounds that cannot be "
        f"told from the largest {likeness}, {_mean(top.likeness):z.3f} of {top.told}"
    )


def _bound(values: Sequence[float], seed: int) -> float:
    return mean_interval(values, confidence=BOUND_CONFIDENCE, seed=seed).high


def _drift(candidate: Candidate) -> float:
    return _mean(candidate.drift)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
