"""How far a mean may be trusted: bootstrap intervals, and an exact test of paired differences.

What lives here: one-dimensional samples in, numbers out. What does not: what is independent of what. Pictures of one
subject are not independent samples of subjects, so figures over several subjects are those of the subjects' means.
scipy is imported where it is used: it takes half a second, which runs that compare nothing need not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.9
"""Of an interval: 5 % lie on either side, so that its upper end is a one-sided bound of 95 %."""
RESAMPLES = 9999
EXACT_UP_TO = 16
"""Differences whose 2^n signs are all tried; of more, 2^16 are drawn."""


@dataclass(frozen=True)
class Interval:
    """The mean of a sample, and the ends of its bootstrap interval at `confidence`; in the sample's unit."""

    mean: float
    low: float
    high: float
    confidence: float


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (Efron & Tibshirani 1993, chapter 13; scipy.stats).

    The values are taken as independent: for a clustered bootstrap pass one mean for each cluster, as each subject. A
    sample of one, or of equal values, has no spread that could be resampled, so both ends are its mean. With few values
    the interval is too narrow: of five, a nominal 90 % covers about 80 %.
    Raises AssertionError for no values, or some that are not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1 and len(sample) and np.isfinite(sample).all(), "a mean needs finite values"
    assert 0 < confidence < 1, f"confidence {confidence} is no share"
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]), float(sample[0]), confidence)
    from scipy import stats

    ends = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=999,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(ends.low), float(ends.high), confidence)


def paired(a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Interval of the mean of `a` - `b`, where the two have the same prompt and noise, or the same subject, in turn."""
    assert len(a) == len(b), f"{len(a)} values cannot be paired with {len(b)}"
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence=confidence, seed=seed)


def sign_flip(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of paired differences being as far from 0 on average: their signs flipped in all 2^n ways.

    Exact up to 16 differences. It cannot be below 2 / 2^n: with 7 subjects never below .016, whatever they show.
    Source: Fisher 1935, section 21; scipy.stats.permutation_test of one sample.
    """
    sample = np.asarray(differences, dtype=np.float64)
    assert sample.ndim == 1 and len(sample) and np.isfinite(sample).all(), "a test needs finite differences"
    from scipy import stats

    found = stats.permutation_test(
        (sample,),
        np.sum,
        permutation_type="samples",
        n_resamples=2**EXACT_UP_TO,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
