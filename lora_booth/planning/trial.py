"""One training step on a made-up batch, and the memory it holds at its fullest: what a plan is traced with.

What lives here: a batch in the shapes of a real one, and the count. What does not: the pass (`training/batch.py`),
which steps a run has and what else it holds (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_booth.models.families.family import Family
from lora_booth.planning.tracing import LiveBytes, Work, fused_attention, held_bytes
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.objective import Draws, Objective


def make_batch(
    family: Family, rows: int, shape: Sequence[int], *, is_text_trained: bool, device: torch.device
) -> Batch:
    """A batch in the shapes and types of a real one. `shape`: of one row's latents, `[C, h, w]`."""
    latents, noise = (torch.zeros(rows, *shape, device=device) for _ in range(2))
    timesteps = torch.full((rows,), len(family.schedule.alphas_cumprod) // 2, device=device)
    draws = Draws(timesteps, noise, torch.zeros(rows, shape[0], 1, 1, device=device))
    prompts = [""] * rows
    with torch.no_grad():
        conditioning = None if is_text_trained else family.encode_prompts(prompts)
    return Batch(latents, draws, torch.ones(rows, 6, device=device), conditioning, prompts)


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
        sample_losses(family, objective, batch).sum().backward()  # type: ignore[no-untyped-call]
    new = live.at_peak(p.grad for p in parameters if p.grad is not None)
    return StepTrace(held_bytes(held) + new, live.peak - new, live.work)
