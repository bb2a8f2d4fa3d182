"""Learning rates as numbers, optimizers by really stepping them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_booth.config.settings import OptimizerConfig
from lora_booth.errors import ConfigError
from lora_booth.training.optimizers import OPTIMIZERS, default_name, learning_rate_factor, make, set_mode_


def test_warm_up_is_linear_starts_above_zero_and_reaches_one() -> None:
    factors = [learning_rate_factor(s, steps=10, warmup_steps=4, schedule="constant") for s in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_no_warm_up_starts_at_one() -> None:
    assert learning_rate_factor(0, steps=10, warmup_steps=0, schedule="constant") == 1.0


def test_linear_and_cosine_fall_from_one_towards_zero() -> None:
    linear = [learning_rate_factor(s, steps=4, warmup_steps=0, schedule="linear") for s in range(4)]
    cosine = [learning_rate_factor(s, steps=4, warmup_steps=0, schedule="cosine") for s in range(4)]
    assert linear == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_run_of_warm_up_only_is_possible() -> None:
    assert learning_rate_factor(0, steps=1, warmup_steps=1, schedule="cosine") == 0.5


def _fit(name: str, learning_rate: float) -> tuple[torch.Tensor, Any]:
    target = torch.linspace(-1, 1, 8192).view(2, 4096)  # bitsandbytes quantises tensors of 4096 numbers and more
    parameter = torch.nn.Parameter(torch.zeros(2, 4096))
    settings = OptimizerConfig(name=name, learning_rate=learning_rate)  # type: ignore[arg-type]
    optimizer = make([{"params": [parameter], "lr": learning_rate}], settings, device_type="cpu")
    set_mode_(optimizer, training=True)
    for _ in range(60):
        loss = ((parameter - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    set_mode_(optimizer, training=False)
    return ((parameter - target) ** 2).mean().detach(), optimizer


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [
        ("adamw", 2e-2),
        ("adamw8bit", 2e-2),
        ("lion8bit", 1e-2),
        ("adafactor", 2e-2),
        ("prodigy", 1.0),
        ("schedulefree", 0.1),
    ],
)
def test_every_optimizer_that_runs_on_a_cpu_learns(name: str, learning_rate: float) -> None:
    row = OPTIMIZERS[name]
    pytest.importorskip(row.module)
    loss, optimizer = _fit(name, learning_rate)
    assert type(optimizer).__name__ == row.class_name
    assert loss < 0.1  # from 1/3


def test_every_row_is_a_setting() -> None:
    allowed = OptimizerConfig.model_fields["name"].annotation
    assert {*OPTIMIZERS, "auto"} == set(allowed.__args__)  # type: ignore[union-attr]


def test_auto_is_eight_bit_on_cuda_only() -> None:
    assert (default_name("cuda"), default_name("cpu")) == ("adamw8bit", "adamw")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-booth\[optim\]'"):
        make([], OptimizerConfig(name="prodigy"), device_type="cpu")
