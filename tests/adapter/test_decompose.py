"""The best low-rank form, by hand, by singular values, and for every way it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_booth.adapter import decompose
from lora_booth.adapter.decompose import Approximation, approximate, tell_errors, whole_error
from lora_booth.adapter.weights import Dense, LowRank, delta
from lora_booth.errors import ConfigError, ModelError, NumericError
from tests.support.runs import Recorder


def low_rank(rank: int, fan_out: int, fan_in: int, tail: tuple[int, ...] = (), scale: float = 0.7) -> LowRank:
    generator = torch.Generator().manual_seed(rank + fan_out)
    down = torch.randn(rank, fan_in, *tail, generator=generator)
    return LowRank(down, torch.randn(fan_out, rank, *(1 for _ in tail), generator=generator), scale)


def with_spectrum(values: list[float], fan_out: int, fan_in: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator).double())[0] for n in (fan_out, fan_in))
    return (u * torch.tensor(values).double()) @ v.T


def relative_error(change: Tensor, approximation: Approximation) -> float:
    change = change.double()
    return float((delta(approximation.low_rank).double() - change).norm() / change.norm())


def test_the_two_largest_of_three_singular_values_are_kept_and_the_third_is_the_error() -> None:
    change = torch.tensor([[0.0, 2.0, 0.0], [6.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    found = approximate(change, rank=2)
    assert torch.allclose(delta(found.low_rank), torch.tensor([[0, 0, 0], [6.0, 0, 0], [0, 0, 3.0], [0, 0, 0]]))
    assert found.norm == pytest.approx(7.0)
    assert found.error == pytest.approx(2 / 7)  # (2^2 / (6^2 + 3^2 + 2^2))^(1/2)


@pytest.mark.parametrize("tail", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize(("fan_out", "fan_in"), [(20, 12), (12, 20), (12, 90)])
@pytest.mark.parametrize("kind", ["factors", "dense", "tensor"])
def test_at_its_own_rank_a_change_is_exact(kind: str, fan_out: int, fan_in: int, tail: tuple[int, ...]) -> None:
    update = low_rank(4, fan_out, fan_in, tail)
    change = delta(update)
    given_as = {"factors": update, "dense": Dense("diff", change), "tensor": change}[kind]
    found = approximate(given_as, rank=4)
    assert found.low_rank.down.shape == (4, fan_in, *tail)
    assert found.low_rank.up.shape == (fan_out, 4, *(1 for _ in tail))
    assert found.low_rank.scale == 1.0
    assert relative_error(change, found) < 1e-6
    assert found.error < 1e-6


@given(
    values=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    rank=st.integers(1, 7),
    is_factored=st.booleans(),
    is_wide=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_error_is_that_of_the_discarded_singular_values(
    values: list[float], rank: int, is_factored: bool, is_wide: bool
) -> None:
    shape = (7, 11) if is_wide else (11, 7)
    change = with_spectrum(values, *shape).float()
    update = LowRank(torch.eye(shape[1]), change, 1.0) if is_factored else change
    found = approximate(update, rank=rank)
    discarded = sorted(values, reverse=True)[rank:]
    best = math.sqrt(sum(v * v for v in discarded) / sum(v * v for v in values))
    assert found.error == pytest.approx(best, abs=1e-6)
    assert relative_error(change, found) == pytest.approx(best, abs=1e-6)
    assert found.low_rank.rank == min(rank, len(values))


@pytest.mark.parametrize("is_factored", [True, False])
@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.1, 1), (0.79, 1), (0.81, 2), (0.94, 2), (0.96, 3), (0.9999, 4), (1.0, 4)],  # shares .8, .95, .9875 and 1
)
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, rank: int, is_factored: bool) -> None:
    change = with_spectrum([8.0, 12**0.5, 3**0.5, 1.0], 9, 6)
    update = LowRank(torch.eye(6), change.float(), 1.0) if is_factored else change.float()
    found = approximate(update, energy=energy)
    assert found.low_rank.rank == rank
    assert 1 - found.error**2 >= energy - 1e-6


def test_the_factors_have_equal_norms() -> None:
    for update in (low_rank(3, 8, 5), delta(low_rank(3, 8, 5)), delta(low_rank(3, 8, 500))):
        factors = approximate(update, rank=2).low_rank
        down, up = factors.down.norm(dim=1), factors.up.norm(dim=0)
        assert torch.allclose(down, up, rtol=1e-4)


def test_a_rank_above_the_changes_gives_the_changes() -> None:
    padded = LowRank(
        torch.cat([low_rank(2, 8, 5).down] * 2), torch.cat([low_rank(2, 8, 5).up] * 2, dim=1), scale=0.5
    )  # four inner dimensions, two of them copies
    assert approximate(padded, rank=64).low_rank.rank == 2
    assert approximate(delta(padded), rank=64).low_rank.rank == 2
    assert approximate(low_rank(12, 8, 5), rank=64).low_rank.rank == 5
    assert approximate(delta(padded), energy=1.0).low_rank.rank == 2


@pytest.mark.parametrize("choice", [{"rank": 4}, {"energy": 0.9}])
def test_a_change_of_zero_has_rank_one_and_no_error(choice: dict[str, float]) -> None:
    for update in (LowRank(torch.ones(3, 5), torch.zeros(7, 3), 1.0), torch.zeros(7, 5)):
        found = approximate(update, **choice)
        assert (found.error, found.norm, found.low_rank.rank) == (0.0, 0.0, 1)
        assert torch.equal(delta(found.low_rank), torch.zeros(7, 5))
    convolution = approximate(torch.zeros(7, 5, 3, 3), **choice).low_rank
    assert (convolution.down.shape, convolution.up.shape) == ((1, 5, 3, 3), (7, 1, 1, 1))


def test_a_low_rank_update_is_never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "delta", None)
    huge = LowRank(torch.ones(2, 1 << 17), torch.ones(1 << 17, 2), 1.0)  # its matrix would take 64 GiB
    assert approximate(huge, rank=1).error < 1e-6


SLOW_SPECTRUM = [k**-0.7 for k in range(1, 300)]


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_the_range_finder_comes_within_half_a_percent_of_the_best(shape: tuple[int, int]) -> None:
    assert min(shape) > decompose._EXACT_SIDE
    change = with_spectrum(SLOW_SPECTRUM, *shape).float()
    found = approximate(change, rank=32)
    best = math.sqrt(sum(v * v for v in SLOW_SPECTRUM[32:]) / sum(v * v for v in SLOW_SPECTRUM))
    assert best * (1 - 1e-4) < found.error < 1.005 * best
    assert relative_error(change, found) == pytest.approx(found.error, abs=1e-6)
    share = [sum(v * v for v in SLOW_SPECTRUM[:k]) / sum(v * v for v in SLOW_SPECTRUM) for k in range(300)]
    for energy in (0.5, 0.8, 0.97):  # 0.97: beyond what a sketch of an eighth of the side shows
        smallest = next(k for k, kept in enumerate(share) if kept >= energy)
        by_energy = approximate(change, energy=energy)
        assert smallest <= by_energy.low_rank.rank <= smallest + 1
        assert 1 - by_energy.error**2 >= energy - 1e-6


def test_the_range_finder_is_exact_at_the_rank_of_the_change_and_leaves_the_random_state_alone() -> None:
    update = low_rank(8, 700, 80, (3, 3))
    torch.manual_seed(1)
    first = approximate(delta(update), rank=16)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    second = approximate(delta(update), rank=16)
    assert first.low_rank.rank == 8
    assert first.error < 2e-6  # float32 sums over 720 products
    assert torch.equal(first.low_rank.down, second.low_rank.down)


def test_dora_and_broken_numbers_are_refused() -> None:
    dora = LowRank(torch.ones(1, 3), torch.ones(2, 1), 1.0, magnitude=torch.ones(2))
    with pytest.raises(ModelError, match="Name the base"):
        approximate(dora, rank=1)
    bad = torch.ones(2, 3)
    bad[0, 0] = math.nan
    for update in (bad, Dense("diff", bad), LowRank(bad, torch.ones(4, 2), 1.0)):
        with pytest.raises(NumericError, match="NaN or infinity"):
            approximate(update, rank=1)


@pytest.mark.parametrize(
    "choice", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"energy": math.nan}]
)
def test_exactly_one_of_rank_and_energy_is_asked_for(choice: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"--(rank|energy)"):
        approximate(torch.ones(2, 2), **choice)


def test_errors_of_layers_add_up_by_their_norms_and_are_told_by_block() -> None:
    layer = low_rank(1, 2, 2)
    big, small = Approximation(layer, 0.1, 4.0), Approximation(layer, 1.0, 3.0)
    assert whole_error([big, small]) == pytest.approx(math.sqrt((0.4**2 + 3.0**2) / 25))
    assert whole_error([]) == whole_error([Approximation(layer, 0.0, 0.0)]) == 0.0
    recorder = Recorder()
    unet = {"down_blocks.0.a": big, "down_blocks.1.b": small, "mid_block.resnets.0.c": big, "down_blocks.0.d": big}
    tell_errors({"unet": unet, "text_encoder": {"encoder.layers.0.x": small}}, recorder)
    lines = [text.split() for _, text in recorder.events]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("down_blocks.0", "2", "10.000%"),
        ("down_blocks.1", "1", "100.000%"),
        ("mid_block", "1", "10.000%"),
        ("text_encoder", "1", "100.000%"),
        ("all", "5", "52.915%"),  # (3 * 0.16 + 2 * 9) / (3 * 16 + 2 * 9) = 18.48 / 66 = 0.28
    ]
