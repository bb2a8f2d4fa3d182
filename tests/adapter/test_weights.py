"""The update by hand, padding, what a dtype holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_booth.adapter import weights
from lora_booth.adapter.weights import LowRank
from lora_booth.errors import ModelError, NumericError


def test_delta_of_a_linear_layer_is_scale_times_up_times_down() -> None:
    low_rank = LowRank(down=torch.tensor([[1.0, 2.0, 3.0]]), up=torch.tensor([[10.0], [0.5]]), scale=0.5)
    assert weights.delta(low_rank).tolist() == [[5.0, 10.0, 15.0], [0.25, 0.5, 0.75]]


def test_delta_of_a_convolution_is_its_two_convolutions_in_one() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = LowRank(
        down=torch.randn(2, 3, 3, 3, generator=generator), up=torch.randn(5, 2, 1, 1, generator=generator), scale=1.5
    )
    assert weights.delta(low_rank).shape == (5, 3, 3, 3)
    x = torch.randn(1, 3, 6, 6, generator=generator)
    two = 1.5 * nn.functional.conv2d(nn.functional.conv2d(x, low_rank.down), low_rank.up)
    one = nn.functional.conv2d(x, weights.delta(low_rank))
    assert torch.allclose(one, two, atol=1e-4)  # sums of 54 products of size 1 to 3 in float32


@pytest.mark.parametrize("tail", [(), (3, 3)])
def test_padding_keeps_the_update_and_trimming_undoes_it(tail: tuple[int, ...]) -> None:
    up_tail = (1,) * len(tail)
    low_rank = LowRank(torch.randn(2, 4, *tail), torch.randn(5, 2, *up_tail), 0.5)
    wide = weights.padded(low_rank, 6)
    assert wide.down.shape == (6, 4, *tail)
    assert wide.up.shape == (5, 6, *up_tail)
    assert torch.equal(weights.delta(wide), weights.delta(low_rank))
    back = weights.trimmed(wide)
    assert torch.equal(back.down, low_rank.down)
    assert torch.equal(back.up, low_rank.up)
    assert weights.padded(low_rank, 1) is low_rank


def test_trimming_keeps_what_is_zero_in_one_factor_only() -> None:
    untrained = LowRank(torch.randn(3, 4), torch.zeros(5, 3), 1.0)
    assert weights.trimmed(untrained).rank == 3
    up = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    down = torch.tensor([[1.0], [3.0], [0.0], [0.0]])  # inner dimensions: in use, up zero, down zero, padding
    assert weights.trimmed(LowRank(down, up, 1.0)).down.tolist() == [[1.0], [3.0], [0.0]]
    assert weights.trimmed(LowRank(torch.zeros(3, 4), torch.zeros(5, 3), 1.0)).rank == 3


def test_a_nan_is_found_and_its_layer_named() -> None:
    good = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    bad = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, magnitude=torch.tensor([1.0, math.nan]))
    adapter = {"unet": {"a": good, "b": bad}}
    assert weights.nonfinite(adapter) == ["unet.b"]
    with pytest.raises(NumericError, match=r"1 layers .* first unet\.b"):
        weights.require_finite(adapter)
    weights.require_finite({"unet": {"a": good}})
    assert weights.uses_dora(adapter)
    assert weights.num_parameters(adapter) == 4 + 4 + 2


def test_a_value_too_large_for_the_dtype_is_refused_by_name() -> None:
    tensors = {"x": torch.tensor([1.0]), "y": torch.tensor([-7e4])}
    with pytest.raises(ModelError, match=r"y reaches 7e\+04, more than fp16 holds \(65504\)"):
        weights.cast(tensors, torch.float16)
    assert weights.cast(tensors, torch.bfloat16)["y"].dtype == torch.bfloat16


def test_underflow_is_told_and_ordinary_rounding_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(8, 8, generator=generator) * 1e-2
    assert weights.rounding_faults({"x": ordinary}, torch.float16) == []
    assert weights.rounding_faults({"x": ordinary}, torch.bfloat16) == []
    assert "1 of 2 tensors" in weights.rounding_faults({"x": ordinary, "y": ordinary * 1e-4}, torch.float16)[0]
    row_gone = ordinary.clone()
    row_gone[3] = 1e-9  # far too small to count in the tensor's error
    assert len(weights.rounding_faults({"x": row_gone}, torch.float16)) == 1
    assert weights.rounding_faults({"x": row_gone}, torch.float32) == []


def test_a_layer_is_found_with_and_without_text_model() -> None:
    old = nn.ModuleDict({"text_model": nn.ModuleDict({"encoder": nn.Linear(1, 1)})})
    new = nn.ModuleDict({"encoder": nn.Linear(1, 1)})
    assert weights.plain_path("text_model.encoder") == weights.plain_path("encoder") == "encoder"
    assert weights.find_module(old, "encoder") is old["text_model"]["encoder"]
    assert weights.find_module(new, "encoder") is new["encoder"]
    with pytest.raises(ModelError, match="has no layer decoder"):
        weights.find_module(new, "decoder")
