"""Intervals and the sign-flip test, against numbers worked out by hand."""

from __future__ import annotations

import warnings

import pytest

from lora_booth.evaluation.intervals import Interval, mean_interval, paired, sign_flip


@pytest.mark.parametrize("values", [[0.25], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_a_sample_without_spread_has_its_mean_for_both_ends_and_no_warning(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval(values) == Interval(values[0], values[0], values[0], 0.9)


def test_the_interval_of_two_values_is_that_of_their_three_possible_means() -> None:
    """Resamples of {0, 1} have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    assert mean_interval([0.0, 1.0], confidence=0.9) == Interval(0.5, 0.0, 1.0, 0.9)
    assert mean_interval([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5, 0.5, 0.4)


def test_an_interval_is_the_same_each_time_narrows_with_more_values_and_covers_the_mean() -> None:
    few, many = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0] * 16
    first, second = mean_interval(few), mean_interval(many)
    assert first == mean_interval(few)
    assert first.low < first.mean == second.mean == 1.5 < first.high
    # the mean of 64 such values has a standard error of sqrt(1.25 / 64) = .140, and 90 % of a normal lie within 1.645
    assert (second.low, second.high) == pytest.approx((1.5 - 0.230, 1.5 + 0.230), abs=0.02)
    assert second.high - second.low < (first.high - first.low) / 3


def test_what_two_samples_share_cancels_in_pairs() -> None:
    a, b = [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]
    difference = paired(a, b)
    assert (difference.low, difference.mean, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(AssertionError, match="paired"):
        paired(a, b[:2])


def test_the_sign_flip_test_counts_all_signs() -> None:
    """Of 1, 2, 4 the eight sums are ±7, ±5, ±3, ±1: two are as far from 0 as 7; with -1 four are as far as 5."""
    assert sign_flip([1.0, 2.0, 4.0]) == pytest.approx(2 / 8)
    assert sign_flip([-1.0, 2.0, 4.0]) == pytest.approx(4 / 8)
    assert sign_flip([0.3] * 7) == pytest.approx(2 / 2**7)
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([1.0] * 16) == pytest.approx(2 / 2**16)


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_no_mean_is_made_of_nothing_or_of_what_is_not_finite(values: list[float]) -> None:
    with pytest.raises(AssertionError, match="finite"):
        mean_interval(values)
    with pytest.raises(AssertionError, match="finite"):
        sign_flip(values)
