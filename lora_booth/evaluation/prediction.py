"""How far an adapter moves the base's predictions: drift without drawing a picture.

On the miniature it goes with the drift of pictures over 18 runs (Pearson's r .99; .85 without the two runs that had no
prior), for two passes of 16 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_booth.evaluation.prompts import PREDICTED_ROWS
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.run.randomness import generator_for

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Shares of the way from clean to noise at which predictions are compared."""


@dataclass(frozen=True)
class Probe:
    """Noised pictures at which predictions are compared: `noisy` `[R, C, h, w]`, `timesteps` `[R]`, `geometry`
    `[R, 6]`, and for each row the place of its prompt."""

    noisy: Tensor
    timesteps: Tensor
    geometry: Tensor
    rows: Tensor


def probe(
    family: Family,
    latents: Tensor,
    geometry: Tensor,
    *,
    seed: int = 0,
    levels: Sequence[float] = LEVELS,
    num_rows: int = PREDICTED_ROWS,
) -> Probe:
    """`num_rows` noised rows of `latents` `[N, C, h, w]`, scaled, with their `geometry` `[N, 6]`; float32, on the CPU.

    The pictures are taken in turn, at `levels` in turn, with noise that depends on `seed` and the row alone, so that
    checkpoints can be compared.
    """
    count = len(latents)
    assert count and len(geometry) == count, f"{count} latents have {len(geometry)} geometries"
    chosen = torch.tensor([row % count for row in range(num_rows)])
    level = [levels[(row % count + row // count) % len(levels)] for row in range(num_rows)]
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=generator_for("prediction drift", seed, r)) for r in range(num_rows)]
    )
    timesteps = family.schedule.timesteps_at(level)
    noisy = family.schedule.noised(latents.cpu().float()[chosen], noise, timesteps)
    return Probe(noisy, timesteps, geometry.cpu()[chosen], chosen)


@torch.no_grad()
def predictions(family: Family, at: Probe, conditioning: Conditioning, *, rows_at_once: int = 4) -> Tensor:
    """What the denoiser predicts at each row, float32 `[R, C, h, w]` on the CPU. `conditioning`: of each picture's
    prompt. `rows_at_once` changes memory and time."""
    found = []
    for start in range(0, len(at.rows), rows_at_once):
        part = slice(start, start + rows_at_once)
        noisy, timesteps, geometry = (x[part].to(family.device) for x in (at.noisy, at.timesteps, at.geometry))
        found.append(family.predict(noisy, timesteps, _rows(conditioning, at.rows[part]), geometry).float().cpu())
    return torch.cat(found)


def relative_change(moved: Tensor, base: Tensor) -> list[float]:
    """||v - v_base||² / ||v_base||² of each row of two predictions; 0 where they are equal."""
    change = (moved - base).flatten(1).square().sum(dim=1) / base.flatten(1).square().sum(dim=1)
    return [float(value) for value in change]


def _rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    return {name: tensor[rows.to(tensor.device)] for name, tensor in conditioning.items()}
