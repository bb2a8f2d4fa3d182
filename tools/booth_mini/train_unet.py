"""Training step 3: the denoiser, stage by stage, each on a pool of latents and conditioning made once.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512) with zero terminal SNR (Lin et al. 2023). The weight of
the v-loss is min(SNR + 1, 5) / (SNR + 1): min-SNR-5 (Hang et al. 2023, arXiv 2303.09556) with the + 1 kept
in the minimum, since min(SNR, 5) / (SNR + 1) is 0 at the terminal timestep, which decides backgrounds.
Timesteps are drawn in proportion to that weight, one per stratum of the batch, instead of weighting the
loss.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tools.booth_mini.models import make_scheduler, make_vae
from tools.booth_mini.pool import SHEET_PROMPTS, STAGES, Pool, load_or_make_pool
from tools.booth_mini.state import Training, autocast, load_ema
from tools.booth_mini.train_vae import write_sheet

PROMPT_DROPOUT = 0.1
MAX_WEIGHT = 5.0


def train_unet(
    training: Training, data: Path, out: Path, *, batch_size: int, seed: int, workers: int = 0, pool_size: int
) -> None:
    """Runs `training` (of `make_unet()`) to its end, through STAGES; writes a sheet of samples at each save."""
    model = training.model
    assert isinstance(model, UNet2DConditionModel), "the third step trains a UNet2DConditionModel"
    device = next(model.parameters()).device
    if device.type == "cpu":
        # Plain matrix products: 39 pictures per CPU-second against 34 with torch's fused kernel, whose
        # backward is slow there (AMD EPYC (Zen 4), one thread, bf16, 2026-11-21). Same weights, same
        # function.
        model.set_attn_processor(AttnProcessor())
    vae = make_vae()
    vae.load_state_dict(load_ema(out / "vae.pt"))
    vae.to(device)  # type: ignore[arg-type]
    for number, stage in enumerate(STAGES):
        until = round(stage.until * training.schedule.steps)
        if training.step >= until:
            continue
        pool = load_or_make_pool(data, out, number, size=pool_size, seed=seed, device=device, workers=workers)
        print(f"stage {number}: {len(pool.latents)} latents, {len(pool.captions)} captions", flush=True)

        def on_save(ema: nn.Module, step: int, pool: Pool = pool) -> None:
            assert isinstance(ema, UNet2DConditionModel)
            write_samples(ema, vae, pool, out / f"unet_{step:06d}.png")

        training.run(denoising_loss(model, pool, batch_size=batch_size, seed=seed), on_save, until=until)


def denoising_loss(model: UNet2DConditionModel, pool: Pool, *, batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """A function (step) -> the loss of that step's batch from the pool."""
    device = next(model.parameters()).device
    alphas_cumprod = make_scheduler().alphas_cumprod
    draw_timesteps = timestep_sampler(alphas_cumprod)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pool.latents), (batch_size,), generator=generator)
        x0 = pool.latents[rows].float()
        captions = pool.caption_of[rows].clone()
        captions[torch.rand(batch_size, generator=generator) < PROMPT_DROPOUT] = 0
        t = draw_timesteps(batch_size, generator)
        eps = torch.randn(x0.shape, generator=generator)
        alpha = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        noisy, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
        with autocast(device):
            predicted = model(noisy.to(device), t.to(device), pool.conditioning[captions].float().to(device)).sample
        return (predicted.float() - v.to(device)).square().mean()

    return loss_at


def write_samples(unet: UNet2DConditionModel, vae: AutoencoderKL, pool: Pool, path: Path) -> None:
    """A sheet of SHEET_PROMPTS."""
    begun = time.time()
    empty, text = pool.conditioning[: 1 + len(SHEET_PROMPTS)].float().to(vae.device).split([1, len(SHEET_PROMPTS)])
    write_sheet(path, sample(unet, vae, text, empty, scaling_factor=pool.scaling_factor), columns=8)
    print(f"{path.name} written in {time.time() - begun:.0f} s", flush=True)


def timestep_sampler(alphas_cumprod: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """A function (batch size, generator) -> timesteps [B], drawn in proportion to the loss weight, stratified."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = (snr + 1).clamp(max=MAX_WEIGHT) / (snr + 1)
    cumulative = (weight / weight.sum()).cumsum(0)

    def draw(batch_size: int, generator: torch.Generator) -> Tensor:
        u = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        shuffled = u[torch.randperm(batch_size, generator=generator)]
        return torch.searchsorted(cumulative, shuffled).clamp(max=len(cumulative) - 1)

    return draw


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: Tensor,
    empty: Tensor,
    *,
    scaling_factor: float,
    guidance_scale: float = 3.0,
    steps: int = 20,
) -> Tensor:
    """Pictures [B, 3, 64, 64] in -1..1 by DDIM with classifier-free guidance, from fixed noise."""
    scheduler: DDIMScheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    count = len(text)
    conditioning = torch.cat([empty.expand(count, -1, -1), text])
    x = torch.randn((count, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(7)).to(text.device)
    for t in scheduler.timesteps:
        with autocast(text.device):
            both = unet(torch.cat([x, x]), t.to(text.device), conditioning).sample.float()
        plain, guided = both.chunk(2)
        x = scheduler.step(plain + guidance_scale * (guided - plain), t, x).prev_sample
    return vae.decode(x / scaling_factor).sample.clamp(-1, 1)
