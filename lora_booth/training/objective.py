"""From clean latents to one loss for each sample: noise, targets, weights.

What lives here: equations. What does not: the denoiser (a `predict` function is passed in), sums over samples
(`verbs/train.py`).

Words: `alpha_bar` is the cumulative product of (1 - beta), SNR = alpha_bar / (1 - alpha_bar); a *draw* is the
randomness of one sample in one step. Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512, appendix D),
min-SNR (arXiv 2303.09556), zero terminal SNR (arXiv 2305.08891, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_booth.config.settings import ObjectiveConfig
from lora_booth.models.families.schedules import NoiseSchedule
from lora_booth.run.randomness import generator_for

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents `[B, C, h, w]`, timesteps `[B]`) to prediction `[B, C, h, w]`."""


@dataclass(frozen=True)
class Draws:
    """The randomness of the objective in a micro-batch. `timesteps`: int64 `[B]`; `noise`: float32 `[B, C, h, w]`;
    `offsets`: float32 `[B, C, 1, 1]`."""

    timesteps: Tensor
    noise: Tensor
    offsets: Tensor


def draw(
    seed: int, step: int, positions: Sequence[int], shape: Sequence[int], num_timesteps: int
) -> tuple[Draws, Tensor]:
    """Draws for the samples at `positions` of the effective batch of `step`, and noise for their latents, float32
    `[B, *shape]`, by which they are drawn from the VAE's distribution; `shape` is `[C, h, w]`.

    Each sample has its own generator, keyed by (seed, step, position), so neither the micro-batch it falls into nor the
    process or device it runs on changes what it sees.
    """
    rows = []
    for position in positions:
        generator = generator_for(seed, "draw", step, position)
        timestep = torch.randint(0, num_timesteps, (), generator=generator)
        noise, latent_noise = (torch.randn(*shape, generator=generator) for _ in range(2))
        rows.append((timestep, noise, latent_noise, torch.randn(shape[0], 1, 1, generator=generator)))
    timesteps, noises, latent_noises, offsets = (torch.stack(column) for column in zip(*rows, strict=True))
    return Draws(timesteps, noises, offsets), latent_noises


@dataclass(frozen=True)
class Objective:
    """The denoising loss under one schedule. `min_snr_gamma` None and `noise_offset` 0 give the plain objective."""

    schedule: NoiseSchedule
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    huber_delta: float | None = None
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False)
    """By device: alpha_bar and weight of each timestep, so that the pass reads them without waiting for the device."""

    def loss(self, predict: Predict, latents: Tensor, draws: Draws) -> Tensor:
        """Loss of each sample, float32 `[B]`, mean over its elements, times its SNR weight."""
        table, _ = self._tables_on(latents.device)
        alpha_bar = table[draws.timesteps].view(-1, 1, 1, 1)
        noise = draws.noise + self.noise_offset * draws.offsets
        prediction = predict(add_noise(latents, noise, alpha_bar), draws.timesteps)
        target = self.target(latents, noise, alpha_bar)
        error = elementwise_loss(prediction.float(), target, self.huber_delta)
        return error.mean(dim=tuple(range(1, error.ndim))) * self.weight(draws.timesteps)

    def target(self, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
        """What the denoiser should output: noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0."""
        if self.schedule.prediction_type == "epsilon":
            return noise
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents

    def weight(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weight of each sample, float32 `[B]` on the device of `timesteps`, 1 without it.

        On the loss of the network's own output: min(SNR, g) / SNR for epsilon, min(SNR, g) / (SNR + 1) for v
        (arXiv 2303.09556, section 3.4). At SNR = 0 the epsilon weight is its limit, 1.
        """
        return self._tables_on(timesteps.device)[1][timesteps]

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            tables = (self.schedule.alphas_cumprod.float(), self._weights())
            self._tables[device] = (tables[0].to(device), tables[1].to(device))
        return self._tables[device]

    def _weights(self) -> Tensor:
        """Weight of each timestep, float32 `[T]`."""
        alpha_bar = self.schedule.alphas_cumprod
        if self.min_snr_gamma is None:
            return torch.ones(len(alpha_bar))
        snr = alpha_bar / (1 - alpha_bar)
        clipped = snr.clamp(max=self.min_snr_gamma)
        if self.schedule.prediction_type == "v_prediction":
            return (clipped / (snr + 1)).float()
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-30), torch.ones_like(snr)).float()


def objective_for(config: ObjectiveConfig, schedule: NoiseSchedule) -> Objective:
    """What the settings of [objective] mean under `schedule`."""
    huber_delta = config.huber_delta if config.loss == "huber" else None
    return Objective(schedule, config.min_snr_gamma, config.noise_offset, huber_delta)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (arXiv 2006.11239, eq. 4)."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def elementwise_loss(prediction: Tensor, target: Tensor, huber_delta: float | None) -> Tensor:
    """Squared error; with a delta, huber scaled so that small errors cost the same as their square."""
    if huber_delta is None:
        return (prediction - target) ** 2
    return 2 * torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=huber_delta)
