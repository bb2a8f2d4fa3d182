"""One training step on a made-up batch, and the memory it holds at its fullest: what a plan is traced with.

What lives here: a batch in the shapes of a real one, the loss of it as the loop computes it, and the count. What does
not: which steps a run has and what else it holds (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_booth.families.base import Conditioning, Family
from lora_booth.objectives import Draws, Objective
from lora_booth.tracing import LiveBytes, Work, fused_attention, held_bytes


@dataclass(frozen=True)
class Batch:
    """What a micro-step is given on the device; only the timesteps of `draws` lie on the CPU. `conditioning` is None
    where the text encoders are trained, and make it in the pass."""

    latents: Tensor
    draws: Draws
    geometry: Tensor
    conditioning: Conditioning | None

    @property
    def tensors(self) -> list[Tensor]:
        draws = self.draws
        tensors = [self.latents, draws.noise, draws.latent_noise, draws.offsets, self.geometry]
        return tensors + list((self.conditioning or {}).values())


def make_batch(
    family: Family, rows: int, shape: Sequence[int], *, is_text_trained: bool, device: torch.device
) -> Batch:
    """A batch in the shapes and types of a real one. `shape`: of one row's latents, `[C, h, w]`."""
    latents, noise, latent_noise = (torch.zeros(rows, *shape, device=device) for _ in range(3))
    timesteps = torch.full((rows,), len(family.schedule.alphas_cumprod) // 2)
    draws = Draws(timesteps, noise, latent_noise, torch.zeros(rows, shape[0], 1, 1, device=device))
    with torch.no_grad():
        conditioning = None if is_text_trained else family.encode_prompts([""] * rows)
    return Batch(latents, draws, torch.ones(rows, 6, device=device), conditioning)


def micro_step(family: Family, objective: Objective, batch: Batch) -> Tensor:
    """The loss of a batch as the loop computes it, ready for backward."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = family.encode_prompts([""] * len(noisy))
        return family.predict(noisy, timesteps, conditioning, batch.geometry)

    return objective.loss(predict, batch.latents, batch.draws).sum()


class StepTrace(NamedTuple):
    """Bytes at the fullest moment of one forward and backward, those of gradients and all others, and its work."""

    gradients: int
    others: int
    work: Work


def trace_step(
    family: Family, objective: Objective, batch: Batch, parameters: Sequence[nn.Parameter], known: Sequence[Tensor]
) -> StepTrace:
    """What one forward and backward holds beyond `known`, and asks of a card.

    Gradients that `parameters` hold already count as gradients. Attention is traced as the fused kernels allocate it.
    """
    held = [p.grad for p in parameters if p.grad is not None]
    live = LiveBytes(batch.latents.device.type, [*known, *held, *batch.tensors])
    with live, fused_attention(live.work):
        micro_step(family, objective, batch).backward()  # type: ignore[no-untyped-call]
    new = live.at_peak(p.grad for p in parameters if p.grad is not None)
    return StepTrace(held_bytes(held) + new, live.peak - new, live.work)
