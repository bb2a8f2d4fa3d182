"""From the figures of runs to differences with intervals: means over seeds, paired by subject and seed.

Words: a *place* is an arm's state, as ("images", END); a *front* is what likeness costs in drift: the points of several
states of an arm, from the untrained base on, where both are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.ablations.arms import END, NUM_SEEDS, State
from lora_booth.evaluation.intervals import Interval, mean_interval, paired, sign_flip

CONFIDENCE = 0.9
LEAST_ROOM = 0.1
"""Between base and ceiling; a subject with less has no share of it that means anything."""
NUM_SUBJECTS = 7
PLANNED = NUM_SUBJECTS * NUM_SEEDS
FLAT = 0.05
"""A difference of likeness that counts as none; also what makes a subject clearly worse."""

Place = tuple[str, State]
Front = tuple[str, Sequence[State]]


@dataclass(frozen=True)
class Difference:
    """Of two arms, by subject. `num_pairs`: runs of one arm that have a partner of the same subject and seed."""

    by_subject: Mapping[str, float]
    num_pairs: int

    @property
    def is_measured(self) -> bool:
        """Every subject is there, with a seed at least."""
        return len(self.by_subject) >= NUM_SUBJECTS

    @property
    def interval(self) -> Interval:
        """Of the mean over subjects."""
        values = list(self.by_subject.values())
        return paired(values, [0.0] * len(values), confidence=CONFIDENCE)

    @property
    def p(self) -> float:
        """Of the exact sign-flip test, which with 7 subjects is .016 at least."""
        return sign_flip(list(self.by_subject.values()))

    def verdict(self, expected: str) -> str:
        """Whether the difference is as `expected`, "+", "-" or "0", by its interval alone."""
        if not self.is_measured:
            return "not yet measured"
        low, high = self.interval.low, self.interval.high
        if expected == "0":
            is_flat, is_other = low > -FLAT and high < FLAT, high < -FLAT or low > FLAT
            return "came out" if is_flat else "did not come out" if is_other else "not decided"
        if expected == "-":
            low, high = -high, -low
        return "came out" if low > 0 else "the reverse came out" if high < 0 else "not decided"

    @property
    def worse(self) -> list[str]:
        """Subjects that are clearly worse in the first arm."""
        return [name for name, value in sorted(self.by_subject.items()) if value < -FLAT]


class Table:
    """All figures of a file of results."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.subjects: dict[str, dict[str, Any]] = dict(results["subjects"])
        self.runs: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {}
        for key, run in results["runs"].items():
            arm, subject, seed = key.split("/")
            self.runs[arm, subject, int(seed)] = run["figures"]

    def count(self, arm: str) -> int:
        """Runs of the arm that are there."""
        return sum(name == arm for name, _, _ in self.runs)

    def is_whole(self, arm: str, state: State = END) -> bool:
        """Whether every subject has a seed."""
        return len(self.values((arm, state), "likeness")) >= NUM_SUBJECTS

    def values(self, place: Place, figure: str, seeds: Mapping[str, set[int]] | None = None) -> dict[str, float]:
        """Mean over seeds of a figure, by subject; "rise" and "share" are made of likeness. `seeds`: only these."""
        found: dict[str, list[float]] = {}
        for (arm, subject, seed), figures in self.runs.items():
            if arm == place[0] and place[1].name in figures and (seeds is None or seed in seeds.get(subject, set())):
                value = self._figure(figures[place[1].name], subject, figure)
                if value is not None:
                    found.setdefault(subject, []).append(value)
        return {subject: sum(values) / len(values) for subject, values in sorted(found.items())}

    def interval(self, place: Place, figure: str) -> Interval | None:
        """Of the mean over subjects; None where nothing is measured."""
        values = list(self.values(place, figure).values())
        return mean_interval(values, confidence=CONFIDENCE) if values else None

    def difference(self, a: Place, b: Place, figure: str) -> Difference:
        """The figure at `a` less that at `b`."""
        seeds = self._common((a[0], (a[1],)), (b[0], (b[1],)))
        ours, theirs = self.values(a, figure, seeds), self.values(b, figure, seeds)
        return Difference({name: ours[name] - theirs[name] for name in ours}, sum(map(len, seeds.values())))

    def at_equal_drift(self, a: Front, b: Front) -> Difference:
        """Likeness of the first arm less that of the second where other prompts have changed as much, by interpolation
        along their fronts: at the most that the second changes them, or at the most that both reach."""
        seeds = self._common(a, b)
        found = {}
        for subject in seeds:
            only = {subject: seeds[subject]}
            ours, theirs = (self.front(arm, states, only) for arm, states in (a, b))
            drift = min(max(x for x, _ in ours), max(x for x, _ in theirs))
            found[subject] = likeness_at(ours, drift) - likeness_at(theirs, drift)
        return Difference(found, sum(map(len, seeds.values())))

    def front(self, arm: str, states: Sequence[State], seeds: Mapping[str, set[int]]) -> list[tuple[float, float]]:
        """Drift and likeness at each state, mean over `seeds`' subjects, from the untrained base on."""
        points = [(0.0, _mean(self.values((arm, states[-1]), "likeness_before", seeds)))]
        for state in states:
            drift, likeness = (self.values((arm, state), figure, seeds) for figure in ("other_change", "likeness"))
            points.append((_mean(drift), _mean(likeness)))
        return sorted(points)

    def _common(self, a: Front, b: Front) -> dict[str, set[int]]:
        """Subject to the seeds that have all states of both; an older recipe may have had fewer."""
        have = []
        for arm, states in (a, b):
            names = {state.name for state in states}
            have.append(
                {(s, seed) for (name, s, seed), found in self.runs.items() if name == arm and names <= {*found}}
            )
        common: dict[str, set[int]] = {}
        for subject, seed in sorted(have[0] & have[1]):
            common.setdefault(subject, set()).add(seed)
        return common

    def _figure(self, figures: Mapping[str, float], subject: str, figure: str) -> float | None:
        rise = figures["likeness"] - figures["likeness_before"]
        if figure == "rise":
            return rise
        if figure == "share":
            room = self.subjects[subject]["ceiling"] - figures["likeness_before"]
            return rise / room if room >= LEAST_ROOM else None
        return figures[figure]


def likeness_at(front: Sequence[tuple[float, float]], drift: float) -> float:
    """Likeness where a front reaches `drift`, between its two nearest points; at its end if it does not go so far."""
    for (x0, y0), (x1, y1) in pairwise(front):
        if x0 <= drift <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (drift - x0) / (x1 - x0)
    return front[-1][1]


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
