"""The rule for the best checkpoint and strength, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from lora_booth.evaluation.choice import Candidate, choose, is_feasible


def candidate(step: int = 100, strength: float = 1.0, **metrics: Any) -> Candidate:
    """One that is feasible, with values that do not spread unless they are given."""
    values = {"likeness": [0.7, 0.7], "leak": [0.0, 0.0], "drift": [0.1, 0.1], "subject_change": [1.0, 1.0]}
    return Candidate(step, strength, **{**values, **metrics})


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"leak": [0.09, 0.09]}, True),
        ({"leak": [0.1, 0.1]}, False),
        ({"leak": [0.0, 0.16]}, False),  # the mean, .08, is low enough; the upper bound of two values is the larger
        ({"drift": [0.59, 0.59]}, True),
        ({"drift": [0.6, 0.6]}, False),
        ({"drift": [0.1, 0.1], "subject_change": [0.1, 0.2]}, False),  # .6 of .15 is .09
        ({"drift": [0.08, 0.08], "subject_change": [0.1, 0.2]}, True),
        ({"leak": []}, True),
    ],
)
def test_a_candidate_is_feasible_when_leak_and_drift_are_surely_low(metrics: Any, expected: bool) -> None:
    assert is_feasible(candidate(**metrics)) is expected


def test_the_largest_likeness_wins_among_the_feasible() -> None:
    leaking = candidate(300, likeness=[0.9, 0.9], leak=[0.3, 0.3])
    best = candidate(200, likeness=[0.8, 0.8], drift=[0.3, 0.3])
    choice = choose([candidate(100), best, leaking])
    assert choice.candidate is best and choice.is_feasible
    assert choice.reason == (
        "step 200 at strength 1 has the largest likeness, with likeness 0.800 and drift 0.300, among 2 of 3 that keep "
        "to the bounds"
    )


def test_of_those_that_cannot_be_told_apart_the_least_drift_wins() -> None:
    top = candidate(200, likeness=[0.9, 0.7, 0.8], drift=[0.3] * 3)
    near = candidate(100, 0.8, likeness=[0.8, 0.75, 0.8], drift=[0.2] * 3)  # higher at one picture: the interval has 0
    far = candidate(100, 0.6, likeness=[0.8, 0.6, 0.7], drift=[0.1] * 3)  # lower by .1 at each picture
    choice = choose([far, near, top])
    assert choice.candidate is near
    assert "cannot be told from the largest likeness, 0.800 of step 200 at strength 1" in choice.reason
    assert choose([far, top]).candidate is top


def test_the_least_drift_is_taken_with_a_warning_where_none_is_feasible() -> None:
    mild = candidate(100, likeness=[0.1, 0.1], leak=[0.2, 0.2], drift=[0.7, 0.7])
    strong = candidate(200, likeness=[0.9, 0.9], leak=[0.2, 0.2], drift=[0.9, 0.9])
    choice = choose([strong, mild])
    assert choice.candidate is mild and not choice.is_feasible
    assert choice.reason.startswith("step 100 at strength 1 has the least drift, 0.700, and none of 2 keeps to")


def test_likeness_to_trained_pictures_is_called_in_sample() -> None:
    assert "in-sample likeness 0.700" in choose([candidate()], is_in_sample=True).reason
    assert "in-sample" not in choose([candidate()]).reason


def test_without_pictures_only_drift_bounds_how_much_the_subject_may_change() -> None:
    weak = candidate(100, 0.6, likeness=[], leak=[], drift=[0.1, 0.1], subject_change=[0.5, 0.5])
    strong = candidate(100, 1.0, likeness=[], leak=[], drift=[0.3, 0.3], subject_change=[0.9, 0.9])
    drifting = candidate(200, 1.0, likeness=[], leak=[], drift=[0.8, 0.8], subject_change=[1.0, 1.0])
    choice = choose([weak, strong, drifting])
    assert choice.candidate is strong and "its likeness is unknown" in choice.reason


def test_the_choice_does_not_depend_on_the_order_of_candidates() -> None:
    many = [
        candidate(step, s, likeness=[0.7 + step / 1e4, 0.7 - s / 10], drift=[s / 5, s / 5])
        for step in (100, 200)
        for s in (0.6, 0.8, 1.0)
    ]
    assert choose(many).candidate == choose(many[::-1]).candidate


def test_each_reason_is_one_sentence_without_its_full_stop() -> None:
    cases = [[candidate()], [candidate(leak=[1.0, 1.0])], [candidate(likeness=[])]]
    for case in cases:
        reason = choose(case).reason
        assert "\n" not in reason and ". " not in reason and not reason.endswith(".")
