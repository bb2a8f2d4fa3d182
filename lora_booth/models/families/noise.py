"""The noise levels of a base: how latents are noised, and what the denoiser is asked for.

What lives here: the protocol of a noise schedule with its two bodies, diffusion and rectified flow. What does not:
how a config of a base describes one (`schedules.py`), and the loss (`training/objective.py`).

Words: x0 are clean latents, n is noise of unit variance, `alpha_bar` the cumulative product of (1 - beta), SNR =
alpha_bar / (1 - alpha_bar), sigma the share of noise in a rectified flow. Sources: DDPM (arXiv 2006.11239),
v-prediction (arXiv 2202.00512, appendix D), min-SNR (arXiv 2303.09556), debiased weights (arXiv 2310.08442), zero
terminal SNR (arXiv 2305.08891, algorithm 1), rectified flow (arXiv 2209.03003), its logit-normal levels and their shift
(arXiv 2403.03206, sections 3.1 and 5.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lora_booth.models.bases.architectures import PredictionType

ALL_LEVELS = (0.0, 1.0)


class NoiseSchedule(Protocol):
    """The noise levels of a base. `timesteps` everywhere: `[B]`, as the denoiser takes them, on the device of x0."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the denoiser predicts: the noise, the velocity of a diffusion, or the velocity of a flow."""
        ...

    def draw_timestep(self, generator: torch.Generator, levels: tuple[float, float] = ALL_LEVELS) -> Tensor:
        """A level to train at, as a timestep without dimensions, by the distribution that training has; between these
        shares of the whole way from clean to noise."""
        ...

    def timesteps_at(self, levels: list[float]) -> Tensor:
        """The timesteps at these shares of the whole way from clean to noise, each in [0, 1)."""
        ...

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 with as much of `noise` as the timesteps say, `[B, C, h, w]`."""
        ...

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict of it, `[B, C, h, w]`."""
        ...

    def weight(self, timesteps: Tensor, min_snr_gamma: float | None, *, is_debiased: bool = False) -> Tensor:
        """The weight of each sample's loss, float32 `[B]`; 1 without min-SNR where it is not debiased either."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """The levels of DDPM: a table of `alphas_cumprod`, float64 `[T]`, falling, on the CPU. Timesteps are its places."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    _tables: dict[tuple[torch.device, float | None, bool], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    """By device and kind of weight: alpha_bar and weight of each timestep; a pass reads them without waiting."""

    @property
    def has_zero_terminal_snr(self) -> bool:
        """True when the last timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] < 1e-12)

    def rescaled_to_zero_terminal_snr(self) -> Diffusion:
        """The schedule shifted and scaled so that SNR(T-1) = 0 and SNR(0) stays (arXiv 2305.08891, algorithm 1)."""
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return Diffusion(root**2, self.prediction_type)

    def draw_timestep(self, generator: torch.Generator, levels: tuple[float, float] = ALL_LEVELS) -> Tensor:
        """int64, uniform."""
        first, end = (int(level * len(self.alphas_cumprod)) for level in levels)
        return torch.randint(first, max(end, first + 1), (), generator=generator)

    def timesteps_at(self, levels: list[float]) -> Tensor:
        """int64 `[B]`."""
        return torch.tensor([int(level * len(self.alphas_cumprod)) for level in levels])

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) n (arXiv 2006.11239, eq. 4)."""
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """n, or v = sqrt(alpha_bar) n - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0

    def weight(self, timesteps: Tensor, min_snr_gamma: float | None, *, is_debiased: bool = False) -> Tensor:
        """On the loss of the network's own output. Min-SNR: min(SNR, g) / SNR for epsilon, min(SNR, g) / (SNR + 1) for
        v (arXiv 2303.09556, section 3.4); at SNR = 0 the epsilon weight is its limit, 1. Debiased: 1 / sqrt(SNR) on the
        loss of the noise (arXiv 2310.08442), which is sqrt(SNR) / (SNR + 1) on that of v."""
        return self._tables_on(timesteps.device, min_snr_gamma, is_debiased)[1][timesteps]

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        return self._tables_on(timesteps.device, None, False)[0][timesteps].view(-1, 1, 1, 1)

    def _tables_on(self, device: torch.device, min_snr_gamma: float | None, is_debiased: bool) -> tuple[Tensor, Tensor]:
        kind = (device, min_snr_gamma, is_debiased)
        if kind not in self._tables:
            tables = (self.alphas_cumprod.float(), self._weights(min_snr_gamma, is_debiased))
            self._tables[kind] = (tables[0].to(device), tables[1].to(device))
        return self._tables[kind]

    def _weights(self, min_snr_gamma: float | None, is_debiased: bool) -> Tensor:
        """Weight of each timestep, float32 `[T]`."""
        alpha_bar = self.alphas_cumprod
        snr = alpha_bar / (1 - alpha_bar)
        if is_debiased:
            return (snr.sqrt() / (snr + 1) if self.prediction_type == "v_prediction" else snr.rsqrt()).float()
        if min_snr_gamma is None:
            return torch.ones(len(alpha_bar))
        clipped = snr.clamp(max=min_snr_gamma)
        if self.prediction_type == "v_prediction":
            return (clipped / (snr + 1)).float()
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-30), torch.ones_like(snr)).float()


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight ways from x0 to noise: x_t = (1 - sigma) x0 + sigma n. Timesteps are `scale` sigma, float32.

    `shift` moves the levels towards noise, as pictures of more pixels need: sigma' = s sigma / (1 + (s - 1) sigma).
    Levels are drawn logit-normal, as sigmoid(`mean` + `std` z) before the shift, z being normal.
    """

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    scale: int = 1000

    @property
    def prediction_type(self) -> PredictionType:
        """ "flow": the velocity n - x0."""
        return "flow"

    def draw_timestep(self, generator: torch.Generator, levels: tuple[float, float] = ALL_LEVELS) -> Tensor:
        """float32, logit-normal over the levels, shifted (arXiv 2403.03206, eq. 19 and 23)."""
        share = torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator))
        return self._shifted(levels[0] + (levels[1] - levels[0]) * share) * self.scale

    def timesteps_at(self, levels: list[float]) -> Tensor:
        """float32 `[B]`: shares of the way before the shift."""
        return self._shifted(torch.tensor(levels)) * self.scale

    def noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma n (arXiv 2209.03003, eq. 1)."""
        sigma = self._sigma(timesteps)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """n - x0, the same at every level."""
        return noise - x0

    def weight(self, timesteps: Tensor, min_snr_gamma: float | None, *, is_debiased: bool = False) -> Tensor:
        """1: the levels are drawn as often as they should count, so no weight has a place here."""
        assert min_snr_gamma is None and not is_debiased, "weights are refused for rectified flow before a run"
        return torch.ones(len(timesteps), device=timesteps.device)

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return (timesteps / self.scale).view(-1, 1, 1, 1)

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)
