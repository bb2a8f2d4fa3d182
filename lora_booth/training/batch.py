"""What one pass of the denoiser is given on the device, and the losses that come of it.

What lives here: the pass, as training, validation and the prediction of memory share it. What does not: where inputs
come from (`loop.py`, and made up in `planning/memory.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_booth.models.families.family import Conditioning, Family
from lora_booth.training.objective import Comparison, Draws, Objective


@dataclass(frozen=True)
class Reference:
    """The rows `first` to `last` of a batch, which are compared with the base; instance rows are before
    `num_instances`.

    `conditioning`: of these rows, by the untrained text encoders; `disabled`: a block in which the adapter is off.
    """

    first: int
    num_instances: int
    last: int
    conditioning: Conditioning
    disabled: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Batch:
    """Rows of one shape, all on the device: `latents` float32 `[B, C, h, w]`, `geometry` float32 `[B, 6]`; `masks`, of
    runs that have any: what each place counts in a row's loss, float32 `[B, 1, h, w]`.

    `conditioning` is None where the text encoders are trained; then they make it of `prompts` in the pass.
    """

    latents: Tensor
    draws: Draws
    geometry: Tensor
    conditioning: Conditioning | None
    prompts: Sequence[str]
    reference: Reference | None = None
    masks: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of what `change` makes of each tensor."""
        changed: list[Conditioning | None] = []
        for conditioning in (self.conditioning, None if self.reference is None else self.reference.conditioning):
            changed.append(None if conditioning is None else {name: change(t) for name, t in conditioning.items()})
        reference = self.reference
        if reference is not None and changed[1] is not None:
            reference = replace(reference, conditioning=changed[1])
        draws = Draws(**{name: change(tensor) for name, tensor in vars(self.draws).items()})
        masks = None if self.masks is None else change(self.masks)
        return Batch(change(self.latents), draws, change(self.geometry), changed[0], self.prompts, reference, masks)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that lies on the device."""
        compared = {} if self.reference is None else self.reference.conditioning
        conditioned = (*(self.conditioning or {}).values(), *compared.values())
        masks = [] if self.masks is None else [self.masks]
        return [self.latents, *vars(self.draws).values(), self.geometry, *conditioned, *masks]


def sample_losses(family: Family, objective: Objective, batch: Batch) -> Tensor:
    """Loss of each row, float32 `[B]`, weighted by noise level, but not by role. Nothing in here waits for the
    device."""

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = family.encode_prompts(batch.prompts)
        return family.predict(noisy, timesteps, conditioning, batch.geometry)

    return objective.loss(predict, batch.latents, batch.draws, _comparison(family, batch), batch.masks)


def _comparison(family: Family, batch: Batch) -> Comparison | None:
    """How the rows of the batch's reference are predicted by the base."""
    reference = batch.reference
    if reference is None:
        return None
    geometry = batch.geometry[reference.first : reference.last]

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        with reference.disabled():
            return family.predict(noisy, timesteps, reference.conditioning, geometry)

    return Comparison(reference.first, reference.num_instances, reference.last, predict)
