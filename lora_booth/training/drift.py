"""The cheap drift at every save: how far the adapter moves predictions for other pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_booth.config.resolved import Resolved
from lora_booth.evaluation.prediction import Probe, predictions, probe, relative_change
from lora_booth.models import devices
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import Sampling, concatenate, sample
from lora_booth.run.interrupts import StopRequest
from lora_booth.training import candidates, class_images

MAX_SOLVER_STEPS = 12
"""Denoiser calls for a picture that nobody looks at, at most."""


@dataclass(frozen=True)
class Drift:
    """What predictions are compared with: noised pictures of `prompts` by the base, and what it predicts there."""

    prompts: Sequence[str]
    at: Probe
    own: Tensor

    def of(self, family: Family, conditioning: Conditioning) -> float:
        """The mean over rows of ||v - v_base||² / ||v_base||²; `conditioning`: of the prompts. In [0, inf)."""
        values = relative_change(predictions(family, self.at, conditioning), self.own)
        return sum(values) / len(values)


@torch.no_grad()
def of_base(config: Resolved, family: Family, prompts: Mapping[str, Conditioning], stop: StopRequest) -> Drift | None:
    """Draw the unrelated pictures while the denoiser is still without an adapter; None where nothing is to be chosen.

    `prompts`: conditioning by prompt. Raises Interrupted between two steps of the solver.
    """
    if config.evaluate.choose == "last":
        return None
    asked, side, preview = candidates.asked(config)[1].unrelated, config.data.resolution, config.preview
    sampling = Sampling(
        width_px=side,
        height_px=side,
        sampler=preview.sampler,
        sampler_steps=min(preview.sampler_steps, MAX_SOLVER_STEPS),
        guidance_scale=preview.guidance_scale,
        batch_size=config.memory.pictures_at_once,
        on_step=lambda: stop.check(class_images.STOPPED),
    )
    rows = [prompts[prompt] for prompt in asked]
    seeds = [f"drift {number}" for number in range(len(asked))]
    latents = torch.cat([part.cpu().float() for part in sample(family, rows, prompts[""], sampling, seeds=seeds)])
    geometry = torch.tensor([[side, side, 0, 0, side, side]] * len(asked), dtype=torch.float32)
    at = probe(family, latents, geometry)
    conditioning = {name: devices.put(t, family.device) for name, t in concatenate(rows).items()}
    return Drift(asked, at, predictions(family, at, conditioning))
