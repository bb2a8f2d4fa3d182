"""A step starts no more operations than it did when they were counted: what binds a fast card."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import operations
from lora_booth.models.families import components
from tests.adapter.test_inject import forward, tiny_unet


@pytest.mark.parametrize(("architecture", "most"), [("sd1", 2050), pytest.param("sdxl", 6700, marks=pytest.mark.slow)])
def test_a_step_of_a_full_size_base_starts_no_more_operations(architecture: str, most: int) -> None:
    modules, config = operations.modules_of(architecture)
    counted = modules.step_work(config, None).num_operations
    assert 0.9 * most < counted <= most


def test_the_benchmark_and_the_planner_count_the_same() -> None:
    modules, config = operations.modules_of("sd1")
    starts = operations.of_step("sd1")
    assert starts.computing.total() == modules.step_work(config, None).num_operations + 1  # the copy of the adapter
    assert starts.computing["attention"] == 64 and starts.computing["_foreach_copy_"] == 1


def test_leaving_out_divisions_by_1_changes_no_number_and_a_compiler_gets_its_factors_back() -> None:
    plain = tiny_unet()
    ours = copy.deepcopy(plain)
    components.prepare_unet_(ours, 0.0, "sdpa", is_offloading=False)
    factors = [vars(m)[name] for m in ours.modules() for name in ("rescale_output_factor",) if name in vars(m)]
    assert factors and not any(isinstance(factor, float) for factor in factors)
    with torch.no_grad():
        assert torch.equal(forward(ours), forward(plain))
    if components.has_compiler():
        components.compile_unet_(ours)
        assert {m.rescale_output_factor for m in ours.modules() if "rescale_output_factor" in vars(m)} == {1.0}


def test_a_factor_that_is_not_1_stays() -> None:
    unet = tiny_unet()
    block = unet.mid_block.resnets[0]
    block.output_scale_factor = 2.0
    components.drop_divisions_(unet)
    assert block.output_scale_factor == 2.0
