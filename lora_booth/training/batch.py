"""What one pass of the denoiser is given on the device, and the losses that come of it.

What lives here: the pass, as training, validation and the prediction of memory share it. What does not: where inputs
come from (`loop.py`, and made up in `planning/memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_booth.models.families.family import Conditioning, Family
from lora_booth.training.objective import Draws, Objective


@dataclass(frozen=True)
class Batch:
    """Rows of one shape, all on the device: `latents` float32 `[B, C, h, w]`, `geometry` float32 `[B, 6]`.

    `conditioning` is None where the text encoders are trained; then they make it of `prompts` in the pass.
    """

    latents: Tensor
    draws: Draws
    geometry: Tensor
    conditioning: Conditioning | None
    prompts: Sequence[str]

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that lies on the device."""
        return [self.latents, *vars(self.draws).values(), self.geometry, *(self.conditioning or {}).values()]


def sample_losses(family: Family, objective: Objective, batch: Batch) -> Tensor:
    """Loss of each row, float32 `[B]`, weighted by noise level, but not by role. Nothing in here waits for the
    device."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = family.encode_prompts(batch.prompts)
        return family.predict(noisy, timesteps, conditioning, batch.geometry)

    return objective.loss(predict, batch.latents, batch.draws)
