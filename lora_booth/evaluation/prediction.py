"""How far an adapter moves the base's predictions: drift without drawing a picture.

On the miniature it goes with the drift of pictures over 18 runs (Pearson's r .99; .85 without the two runs that had no
prior), for two passes of 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.run.randomness import generator_for

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Shares of the way from clean to noise at which predictions are compared."""
ROWS = 16


@torch.no_grad()
def prediction_drift(
    family: Family,
    adapted: Mapping[str, nn.Module],
    latents: Tensor,
    conditioning: Conditioning,
    geometry: Tensor,
    *,
    seed: int = 0,
    levels: Sequence[float] = LEVELS,
    num_rows: int = ROWS,
    rows_at_once: int = 4,
    base_conditioning: Conditioning | None = None,
) -> list[float]:
    """||v - v_base||² / ||v_base||² of `num_rows` rows, v being the prediction with the adapter and v_base without.

    `latents` `[N, C, h, w]`, scaled, of pictures of the base that have nothing to do with the subject, with the
    `conditioning` of their prompts and their `geometry` `[N, 6]`. They are taken in turn, at `levels` in turn, with
    noise that depends on `seed` and the row alone, so that checkpoints can be compared. `base_conditioning`: what the
    text encoders without an adapter make of the prompts, where they carry one. `rows_at_once` changes memory and time.

    0 is an adapter that changes nothing; the mean of the rows is the figure. Modules are in evaluation mode while this
    computes, and afterwards as they were. Nothing has gradients.
    """
    count = len(latents)
    assert count and len(geometry) == count, f"{count} latents have {len(geometry)} geometries"
    chosen = [row % count for row in range(num_rows)]
    level = [levels[(row % count + row // count) % len(levels)] for row in range(num_rows)]
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=generator_for("prediction drift", seed, r)) for r in range(num_rows)]
    )
    values: list[float] = []
    with _evaluating(adapted):
        for start in range(0, num_rows, rows_at_once):
            part = slice(start, min(start + rows_at_once, num_rows))
            rows = torch.tensor(chosen[part])
            x0, n = latents.cpu().float()[rows].to(family.device), noise[part].to(family.device)
            timesteps = family.schedule.timesteps_at(list(level[part])).to(family.device)
            noisy, places = family.schedule.noised(x0, n, timesteps), geometry.cpu()[rows].to(family.device)
            moved = family.predict(noisy, timesteps, _rows(conditioning, rows), places).float()
            own = conditioning if base_conditioning is None else base_conditioning
            with inject.disabled(adapted):
                base = family.predict(noisy, timesteps, _rows(own, rows), places).float()
            change = (moved - base).flatten(1).square().sum(dim=1) / base.flatten(1).square().sum(dim=1)
            values += [float(value) for value in change]
    return values


def _rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    return {name: tensor[rows.to(tensor.device)] for name, tensor in conditioning.items()}


@contextmanager
def _evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, all `modules` and their parts are in evaluation mode."""
    was = [(part, part.training) for module in modules.values() for part in module.modules()]
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        for part, is_training in was:
            part.training = is_training
