"""From clean latents to one loss for each sample, and the randomness of each sample.

What lives here: the loss. What does not: noising, targets and weights (`models/families/noise.py`), the denoiser (a
`predict` function is passed in), sums over samples (`loop.py`).

A *draw* is the randomness of one sample in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_booth.config.settings import ObjectiveConfig
from lora_booth.models.families.noise import ALL_LEVELS, NoiseSchedule
from lora_booth.run.randomness import generator_for

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents `[B, C, h, w]`, timesteps `[B]`) to prediction `[B, C, h, w]`."""


@dataclass(frozen=True)
class Draws:
    """The randomness of the objective in a micro-batch. `timesteps`: `[B]`, as the schedule has them; `noise`: float32
    `[B, C, h, w]`; `offsets`: float32 `[B, C, 1, 1]`."""

    timesteps: Tensor
    noise: Tensor
    offsets: Tensor


def draw(
    seed: int,
    step: int,
    positions: Sequence[int],
    shape: Sequence[int],
    schedule: NoiseSchedule,
    levels: tuple[float, float] = ALL_LEVELS,
) -> tuple[Draws, Tensor]:
    """Draws for the samples at `positions` of the effective batch of `step`, and noise for their latents, float32
    `[B, *shape]`, by which they are drawn from the VAE's distribution; `shape` is `[C, h, w]`, `levels` the shares of
    the noise levels that are drawn from.

    Each sample has its own generator, keyed by (seed, step, position), so neither the micro-batch it falls into nor the
    process or device it runs on changes what it sees.
    """
    rows = []
    for position in positions:
        generator = generator_for(seed, "draw", step, position)
        timestep = schedule.draw_timestep(generator, levels)
        noise, latent_noise = (torch.randn(*shape, generator=generator) for _ in range(2))
        rows.append((timestep, noise, latent_noise, torch.randn(shape[0], 1, 1, generator=generator)))
    timesteps, noises, latent_noises, offsets = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(timesteps, noises, offsets), latent_noises


@dataclass(frozen=True)
class Comparison:
    """The rows `first` to `last` of a micro-batch, which are compared with the base's own prediction: those before
    `num_instances` by direct consistency optimization, the others because it is what they are to keep.

    `predict`: the denoiser without its adapter, for these rows alone.
    """

    first: int
    num_instances: int
    last: int
    predict: Predict

    def predict_rows(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the base predicts for these rows of a micro-batch, float32 `[last - first, C, h, w]`."""
        return self.predict(noisy[self.first : self.last], timesteps[self.first : self.last]).float()


@dataclass(frozen=True)
class Objective:
    """The denoising loss under one schedule. `min_snr_gamma` None and `noise_offset` 0 give the plain objective."""

    schedule: NoiseSchedule
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    huber_delta: float | None = None
    dco_beta: float | None = None
    is_debiased: bool = False
    levels: tuple[float, float] = ALL_LEVELS

    def loss(
        self,
        predict: Predict,
        latents: Tensor,
        draws: Draws,
        compared: Comparison | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample, float32 `[B]`, mean over its elements, times its weight. `masks`, float32
        `[B, 1, h, w]`: what each place counts in that mean, Σ m e / Σ m.

        Of a row of the model's prior it is the mean of (v(x_t, c) - v_base(x_t, c))², x_t being a noised picture of the
        subject and c a prompt that does not name it: the base is distilled into itself, as in learning without
        forgetting (arXiv 1606.09282). It is 0 until the adapter changes something, exactly where the row goes through
        the denoiser alone, else up to rounding.
        """
        schedule, timesteps = self.schedule, draws.timesteps
        noise = draws.noise + self.noise_offset * draws.offsets
        noisy = schedule.noised(latents, noise, timesteps)
        base = None if compared is None else compared.predict_rows(noisy, timesteps)
        prediction = predict(noisy, timesteps)
        target, weight = schedule.target(latents, noise, timesteps), self._weight(timesteps)
        if compared is None or base is None:
            return self._losses(prediction, target, weight, masks)
        first, count, last = compared.first, compared.num_instances, compared.last
        kept = torch.cat([target[:count], base[count - first :], target[last:]])
        losses = self._losses(prediction, kept, weight, masks)
        if first == count:
            return losses
        own = None if masks is None else masks[first:count]
        of_base = self._losses(base[: count - first], target[first:count], weight[first:count], own)
        return torch.cat([losses[:first], self._consistency(losses[first:count], of_base), losses[count:]])

    def _weight(self, timesteps: Tensor) -> Tensor:
        return self.schedule.weight(timesteps, self.min_snr_gamma, is_debiased=self.is_debiased)

    def _losses(self, prediction: Tensor, target: Tensor, weight: Tensor, masks: Tensor | None) -> Tensor:
        error = elementwise_loss(prediction.float(), target, self.huber_delta)
        places = tuple(range(1, error.ndim))
        if masks is not None:
            return (error * masks).mean(dim=places) / masks.mean(dim=places) * weight
        return error.mean(dim=places) * weight

    def _consistency(self, losses: Tensor, of_base: Tensor) -> Tensor:
        """-log sigmoid(-beta (loss - loss of the base)) (DCO, arXiv 2402.12004), times 2 / beta: so its gradient
        begins as that of the plain loss, and vanishes as the model gets better than the base."""
        assert self.dco_beta is not None, "rows are compared that way only with it"
        return torch.nn.functional.softplus(self.dco_beta * (losses - of_base)) * (2 / self.dco_beta)


def objective_for(config: ObjectiveConfig, schedule: NoiseSchedule) -> Objective:
    """What the settings of [objective] mean under `schedule`."""
    huber_delta = config.huber_delta if config.loss == "huber" else None
    return Objective(
        schedule,
        config.min_snr_gamma,
        config.noise_offset,
        huber_delta,
        config.dco_beta,
        config.debiased,
        config.timestep_range,
    )


def elementwise_loss(prediction: Tensor, target: Tensor, huber_delta: float | None) -> Tensor:
    """Squared error; with a delta, huber scaled so that small errors cost the same as their square."""
    if huber_delta is None:
        return (prediction - target) ** 2
    return 2 * torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=huber_delta)
