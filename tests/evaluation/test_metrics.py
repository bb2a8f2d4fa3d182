"""Each metric against numbers worked out by hand, on vectors of two numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_booth.evaluation import metrics

ROOT_HALF = math.sqrt(0.5)


def vectors(*degrees: float) -> Tensor:
    """Unit vectors of the plane."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_fidelity_and_preservation_are_the_mean_cosine_to_all_real_pictures() -> None:
    generated, real = vectors(0, 90), vectors(0, 60)
    expected = pytest.approx([(1 + 0.5) / 2, (0 + math.cos(math.radians(30))) / 2])
    assert metrics.subject_fidelity(generated, real) == expected
    assert metrics.preservation(generated, real) == expected


def test_prompt_fidelity_compares_each_picture_with_its_own_prompt_alone() -> None:
    assert metrics.prompt_fidelity(vectors(0, 90), vectors(60, 90)) == pytest.approx([0.5, 1.0])


def test_leak_is_the_rise_and_drift_the_change_of_the_same_prompt_and_noise() -> None:
    assert metrics.leak([0.5, 0.2], [0.1, 0.3]) == pytest.approx([0.4, -0.1])
    assert metrics.drift(vectors(0, 0, 0), vectors(0, 90, 180)) == pytest.approx([0, 1, 2], abs=1e-6)


def test_diversity_leaves_out_each_picture_with_itself() -> None:
    same, apart = vectors(10, 10), vectors(0, 60, 120)
    # pairs of 0, 60, 120 degrees: .5, .5 and -.5
    assert metrics.diversity([same, apart]) == pytest.approx([0, 1 - 0.5 / 3], abs=1e-6)


def test_the_ceiling_compares_different_real_pictures() -> None:
    assert metrics.ceiling(vectors(0, 60, 120)) == pytest.approx([0.0, 0.5, 0.0], abs=1e-6)


def test_share_is_zero_for_the_base_one_at_the_ceiling_and_no_number_without_room() -> None:
    assert metrics.share(0.2, 0.2, 0.8) == 0
    assert metrics.share(0.8, 0.2, 0.8) == pytest.approx(1)
    assert metrics.share(0.65, 0.2, 0.8) == pytest.approx(0.75)
    assert math.isnan(metrics.share(0.5, 0.8, 0.8))


def test_centring_takes_away_what_all_pictures_share() -> None:
    shared = torch.tensor([1.0, 0.0])
    features = metrics.centred(torch.tensor([[ROOT_HALF, ROOT_HALF], [ROOT_HALF, -ROOT_HALF]]), ROOT_HALF * shared)
    assert torch.allclose(features, torch.tensor([[0.0, 1.0], [0.0, -1.0]]), atol=1e-6)


def test_nearest_neighbours_and_auc_are_counted() -> None:
    features, labels = vectors(0, 10, 25, 90), ["a", "a", "b", "b"]
    assert metrics.nearest_is_same(features, labels) == 0.75  # 25 degrees has 10, of a, for its nearest
    same, different = metrics.pairs(features, labels)
    assert len(same) == 2 and len(different) == 4
    # same: 10 and 65 degrees apart; different: 25, 90, 15, 80. 10 beats all four, 65 beats 90 and 80
    assert metrics.separation(same, different) == pytest.approx(6 / 8)
    assert metrics.separation([0.5], [0.5]) == 0.5


@pytest.mark.parametrize("features", [torch.zeros(0, 2), torch.ones(1, 2), torch.ones(2), 2 * vectors(0)])
def test_features_that_are_no_unit_vectors_are_refused(features: Tensor) -> None:
    with pytest.raises(AssertionError, match="features"):
        metrics.subject_fidelity(features, vectors(0))


def test_what_cannot_be_paired_is_refused() -> None:
    for call in (metrics.drift, metrics.prompt_fidelity):
        with pytest.raises(AssertionError):
            call(vectors(0), vectors(0, 90))
    with pytest.raises(AssertionError, match="paired"):
        metrics.leak([0.1], [])
    with pytest.raises(AssertionError, match="one picture"):
        metrics.ceiling(vectors(0))
