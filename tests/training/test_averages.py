"""The exponential average: its numbers, that it changes no step, that a killed run goes on with it, and the export."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_booth.adapter.files import storage
from lora_booth.config.settings import OptimizerConfig
from lora_booth.errors import Interrupted
from lora_booth.planning.optimizer_states import state_bytes
from lora_booth.training import optimizers
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At, assert_equal, assert_near, trained

EVERY: dict[str, Any] = {"train": {"steps": 4, "save_every_steps": 1, "keep_last": 10}}


def kept(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "checkpoints" / f"step-{n:06d}" / "adapter.safetensors") for n in range(1, 5)]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_average_is_that_of_the_formula_over_the_same_steps(
    optimizer: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    trained(make_config(name="plain", optimizer={"name": optimizer}, **EVERY))
    trained(make_config(name="averaged", optimizer={"name": optimizer, "ema_decay": 0.25}, **EVERY))
    steps, averages = kept(tmp_path / "plain"), kept(tmp_path / "averaged")
    # Decays of the four updates: 2/11, 3/12, then 0.25. B begins at 0, so that its first average is 9/11 of its value.
    expected = {name: t * 9 / 11 for name, t in steps[0].items() if "lora_B" in name}
    assert_near({n: averages[0][n] for n in expected}, expected, 1e-7)
    for number in range(1, 4):
        expected = {name: 0.25 * t + 0.75 * steps[number][name] for name, t in expected.items()}
        assert_near({n: averages[number][n] for n in expected}, expected, 1e-7)


def test_a_killed_run_goes_on_to_the_same_bytes(make_config: MakeConfig) -> None:
    averaged = {"optimizer": {"ema_decay": 0.9}}
    straight = trained(make_config(name="straight", **averaged))
    with pytest.raises(Interrupted):
        train.train(make_config(**averaged), report=At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(trained(make_config(**averaged)), straight)


def test_previews_on_the_way_change_no_step(make_config: MakeConfig) -> None:
    averaged = {"optimizer": {"ema_decay": 0.9}}
    preview = {
        "images_per_prompt": 1,
        "every_steps": 1,
        "sampler_steps": 2,
        "sampler": "ddim",
        "prompts": ["a {class}"],
    }
    seen = trained(make_config(name="seen", preview=preview, **averaged))
    assert_equal(seen, trained(make_config(name="unseen", **averaged, preview={"images_per_prompt": 0})))


def test_what_is_exported_is_the_average(make_config: MakeConfig, tmp_path: Path) -> None:
    last = trained(make_config(optimizer={"ema_decay": 0.5}, export={"dtype": "fp32"}))
    found = storage.read(tmp_path / "run" / "yql_dog_diffusers.safetensors")["unet"]
    for path, low in found.items():
        assert torch.equal(low.up, last[f"unet.{path}.lora_B.default.weight"]), path


def test_averages_stand_where_nothing_updates_them() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    config = OptimizerConfig(name="adamw", ema_decay=0.5, weight_decay=0.0)
    optimizer: Any = optimizers.make([{"params": [parameter], "lr": 1.0}], config, device_type="cpu")
    parameter.grad = torch.ones(3)
    optimizer.step()
    moved = parameter.detach().clone()
    optimizers.set_mode_(optimizer, training=False)
    optimizers.set_mode_(optimizer, training=False)
    assert torch.allclose(parameter, moved * 9 / 11)
    with pytest.raises(AssertionError, match="an update of the averages"):
        optimizer.step()
    optimizers.set_mode_(optimizer, training=True)
    assert torch.equal(parameter, moved)


def test_plan_counts_the_averages_and_schedule_free_is_refused_beside_them(make_config: MakeConfig) -> None:
    shapes = [(1024, 1024)]
    sizes = [state_bytes(shapes, OptimizerConfig(ema_decay=decay), device_type="cuda") for decay in (None, 0.9)]
    assert sizes[1] - sizes[0] == 4 * 1024 * 1024
    with pytest.raises(Exception, match="which averages by itself"):
        make_config(optimizer={"name": "schedulefree", "ema_decay": 0.9})
