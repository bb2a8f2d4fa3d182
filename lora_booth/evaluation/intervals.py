"""Means with bootstrap intervals, paired differences, and the exact sign-flip test. A stand-in, to be replaced."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float
    confidence: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.9, seed: int = 0) -> Interval:
    """The mean of `values` with its percentile bootstrap interval."""
    draw = random.Random(seed)
    count = len(values)
    means = sorted(sum(draw.choices(values, k=count)) / count for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return Interval(
        sum(values) / count, means[int(tail * RESAMPLES)], means[int((1 - tail) * RESAMPLES) - 1], confidence
    )


def paired(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.9, seed: int = 0) -> Interval:
    """The mean of a - b, pair by pair, with its interval."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence=confidence, seed=seed)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference of 0: the share of all sign changes whose mean is at least as large."""
    observed = abs(sum(differences))
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)
