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
from lora_booth.training import candidates, class_drawing, watching


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
def of_base(
    config: Resolved, family: Family, prompts: Mapping[str, Conditioning], num_rows: int, stop: StopRequest
) -> Drift:
    """Draw the unrelated pictures while the denoiser is still without an adapter, and look at `num_rows` of them.

    `prompts`: conditioning by prompt. Raises Interrupted between two steps of the solver.
    """
    asked, side = candidates.drifted(config), config.data.resolution
    sampling = Sampling(
        width_px=side,
        height_px=side,
        sampler=config.preview.sampler,
        sampler_steps=watching.SOLVER_STEPS,
        guidance_scale=1.0,
        batch_size=config.memory.pictures_at_once,
        on_step=lambda: stop.check(class_drawing.STOPPED),
    )
    rows = [prompts[prompt] for prompt in asked]
    seeds = [f"drift {number}" for number in range(len(asked))]
    latents = torch.cat([part.cpu().float() for part in sample(family, rows, prompts[""], sampling, seeds=seeds)])
    geometry = torch.tensor([[side, side, 0, 0, side, side]] * len(asked), dtype=torch.float32)
    at = probe(family, latents, geometry, num_rows=num_rows)
    conditioning = {name: devices.put(t, family.device) for name, t in concatenate(rows).items()}
    return Drift(asked, at, predictions(family, at, conditioning))
