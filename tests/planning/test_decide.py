"""Open choices get the values that the documentation promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_booth.config.config import Config
from lora_booth.data.buckets import Bucket
from lora_booth.data.images import Found, Picture
from lora_booth.data.subject import Pictures
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.planning import budget, decide, memory
from lora_booth.run.report import Silent

SIZES = {"sd1": (512, 64), "sd2": (768, 64), "sdxl": (1024, 64)}

CPU = torch.device("cpu")


def inputs(family: str, count: int) -> decide.Inputs:
    resolution, step = SIZES[family]
    configs = SHIPPED_CONFIGS / {"sd2": "sd2_v"}.get(family, family)
    facts = BaseFacts(Path(__file__), configs, family, "epsilon", resolution, step, {})  # type: ignore[arg-type]
    pictures = tuple(Picture(Path(f"{n}.jpg"), str(n), 600, 600, None) for n in range(count))
    return decide.Inputs(Pictures(Found(pictures, (), ()), None, None), facts)


def resolved(
    family: str = "sd1", count: int = 5, free_gib: float | None = None, **sections: dict[str, object]
) -> Config:
    of_a_card = {"model": {"base": "sd15", "precision": "bf16"}, "optimizer": {"name": "adamw8bit"}}
    values = {**of_a_card, "subject": {"images": "x", "class_noun": "dog"}, **sections}
    return decide.resolve(Config.model_validate(values), inputs(family, count), Silent(), device=CPU, free_gib=free_gib)


@pytest.mark.parametrize(
    ("family", "count", "steps"),
    [("sd1", 3, 400), ("sd1", 5, 500), ("sd1", 12, 1200), ("sd1", 40, 1200), ("sdxl", 4, 500), ("sdxl", 40, 1500)],
)
def test_steps_follow_the_number_of_pictures_within_limits(family: str, count: int, steps: int) -> None:
    assert resolved(family, count).train.steps == steps


def test_size_warm_up_and_saving_are_chosen() -> None:
    config = resolved("sdxl", 5)
    assert (config.data.resolution, config.data.bucket_step) == (1024, 64)
    assert (config.optimizer.warmup_steps, config.train.save_every_steps) == (25, 100)
    assert resolved(count=40).optimizer.warmup_steps == 60
    assert resolved(train={"steps": 9000}).optimizer.warmup_steps == 100


def test_what_is_set_stays() -> None:
    config = resolved(
        train={"steps": 7, "gradient_checkpointing": True, "save_every_steps": 3},
        data={"resolution": 256, "bucket_step": 32},
        optimizer={"warmup_steps": 0},
        adapter={"alpha": 1.0},
    )
    assert (config.train.steps, config.train.gradient_checkpointing, config.train.save_every_steps) == (7, True, 3)
    assert (config.data.resolution, config.data.bucket_step) == (256, 32)
    assert (config.optimizer.warmup_steps, config.adapter.alpha) == (0, 1.0)


@pytest.mark.parametrize(
    ("family", "free_gib", "rows", "share"),
    [
        ("sd1", None, 2, 0),
        ("sd1", 3.0, 1, 0.5),
        pytest.param("sd1", 12.0, 2, 0, marks=pytest.mark.slow),
        pytest.param("sd2", 4.0, 2, 1, marks=pytest.mark.slow),
        pytest.param("sdxl", 12.0, 2, 1, marks=pytest.mark.slow),
        pytest.param("sdxl", 24.0, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_activations_are_recomputed_only_where_memory_asks_for_it(
    family: str, free_gib: float | None, rows: int, share: float
) -> None:
    config = resolved(family, free_gib=free_gib)
    assert (config.train.batch_size, config.train.gradient_checkpointing) == (rows, share)


def test_the_budget_of_the_config_wins_over_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(config: Config, facts: BaseFacts, gib: float, bucket: Bucket, modules: None) -> budget.Plan:
        asked.append((gib, str(bucket)))
        return budget.Plan({}, (), (memory.Phase("train", {"base": 2**30}),), gib)

    monkeypatch.setattr(budget, "choose", choose)
    resolved(free_gib=80.0, memory={"budget_gib": 4.0})
    resolved(free_gib=80.0)
    assert asked == [(4.0, "512×512"), (80.0, "512×512")]


def test_advice_after_running_out_of_memory_leaves_out_what_is_done_already() -> None:
    first = decide.memory_advice(resolved())
    assert first.index("train.batch_size = 1") < first.index("train.gradient_checkpointing = 1")
    smallest = {"train": {"batch_size": 1, "gradient_checkpointing": True}, "memory": {"offload_activations": True}}
    later = decide.memory_advice(resolved(**smallest))
    assert "batch_size" not in later
    assert "1. model.quantize = nf4 (changes the result a little" in later
    assert "2. data.resolution = 384 (changes the result" in later
