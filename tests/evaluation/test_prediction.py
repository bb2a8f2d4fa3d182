"""The drift of predictions: what it is on a tiny base, and that it leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.config.settings import AdapterConfig, ModelConfig
from lora_booth.evaluation.prediction import LEVELS, predictions, probe, relative_change
from lora_booth.evaluation.prompts import PREDICTED_ROWS
from lora_booth.models import loading
from lora_booth.models.families.family import Family
from lora_booth.run.randomness import generator_for
from tests.support.adapted import randomise_

Adapted = tuple[Family, dict[str, nn.Module]]


@pytest.fixture
def adapted(bases: dict[str, Path]) -> Adapted:
    """A tiny base whose denoiser has an adapter that was not trained."""
    family = loading.load(ModelConfig(base=str(bases["ends"])), device="cpu", dtype=torch.float32)
    modules = {"unet": family.denoiser}
    inject.inject_(modules, AdapterConfig(rank=2), seed=1)
    return family, modules


def inputs(family: Family, count: int = 3) -> dict[str, Any]:
    latents = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = family.encode_prompts(["a dog", "a cat", "a toy"][:count])
    geometry = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * count)
    return {"latents": latents, "conditioning": conditioning, "geometry": geometry}


def prediction_drift(
    family: Family,
    modules: dict[str, nn.Module],
    latents: Tensor,
    conditioning: dict[str, Tensor],
    geometry: Tensor,
    *,
    base_conditioning: dict[str, Tensor] | None = None,
    rows_at_once: int = 4,
    **words: Any,
) -> list[float]:
    """As training has it at every save."""
    at = probe(family, latents, geometry, **words)
    with inject.disabled(modules):
        own = predictions(family, at, base_conditioning or conditioning, rows_at_once=rows_at_once)
    return relative_change(predictions(family, at, conditioning, rows_at_once=rows_at_once), own)


def test_an_untrained_adapter_moves_no_prediction(adapted: Adapted) -> None:
    family, modules = adapted
    assert prediction_drift(family, modules, **inputs(family)) == [0.0] * PREDICTED_ROWS


def test_a_row_is_the_relative_square_of_the_difference(adapted: Adapted) -> None:
    family, modules = adapted
    randomise_(modules)
    given = inputs(family)
    found = prediction_drift(family, modules, **given, seed=7)
    row = 4  # the second turn through three pictures: the second picture, one level further
    noise = torch.randn(4, 16, 16, generator=generator_for("prediction drift", 7, row))[None]
    timesteps = family.schedule.timesteps_at([LEVELS[2]])
    noisy = family.schedule.noised(given["latents"][1:2], noise, timesteps)
    own = {name: rows[1:2] for name, rows in given["conditioning"].items()}

    def predict() -> Tensor:
        with torch.no_grad():
            return family.predict(noisy, timesteps, own, given["geometry"][1:2])

    moved = predict()
    with inject.disabled(modules):
        base = predict()
    assert found[row] == pytest.approx(float(((moved - base) ** 2).sum() / (base**2).sum()), rel=1e-4)
    assert len(found) == PREDICTED_ROWS and len(set(found)) == PREDICTED_ROWS and min(found) > 0


def test_a_stronger_adapter_moves_predictions_more_and_each_call_gives_the_same(adapted: Adapted) -> None:
    family, modules = adapted
    means = []
    for std in (0.02, 0.05, 0.1):
        randomise_(modules, std=std)
        first, second = (prediction_drift(family, modules, **inputs(family)) for _ in range(2))
        assert first == second
        means.append(sum(first) / PREDICTED_ROWS)
    assert means == sorted(means) and means[2] > 2 * means[0]
    few = prediction_drift(family, modules, **inputs(family), rows_at_once=1)
    assert few == pytest.approx(first, rel=1e-4)


def test_an_adapter_of_text_encoders_counts_too(adapted: Adapted) -> None:
    family, modules = adapted
    given = inputs(family)
    other = {name: rows + 0.5 for name, rows in given["conditioning"].items()}
    found = prediction_drift(
        family, modules, given["latents"], other, given["geometry"], base_conditioning=given["conditioning"]
    )
    assert min(found) > 0


def test_one_picture_is_enough(adapted: Adapted) -> None:
    family, modules = adapted
    randomise_(modules)
    assert len(prediction_drift(family, modules, **inputs(family, 1), num_rows=5)) == 5
