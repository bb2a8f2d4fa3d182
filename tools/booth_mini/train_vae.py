"""Training step 1: the autoencoder, on composed pictures of all icons.

Loss = L1 + 2 MSE + half the gradients' L1 + 0.05 of a perceptual difference + 0.001 KL.

A third of the batches halve the latents and ask for the halved picture (equivariance regularisation after
EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509): smoother latents, which the denoiser learns sooner.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tools.booth_mini.ahead import drawn_ahead
from tools.booth_mini.compose import PLAIN, Composer, Pixels
from tools.booth_mini.nouns import is_training, is_validation
from tools.booth_mini.perceptual import Perceptual
from tools.booth_mini.state import Training, autocast

KL_WEIGHT = 1e-3
PERCEPTUAL_WEIGHT = 0.05
HALVED_SHARE = 0.33


def train_vae(
    training: Training,
    composer: Composer,
    perceptual: Perceptual,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    frozen: AutoencoderKL | None = None,
) -> None:
    """Runs `training` (of `make_vae()`) to its end.

    With a `frozen` autoencoder only the decoder moves, and learns to draw its latents: a denoiser trained on them fits.
    """
    model = training.model
    assert isinstance(model, AutoencoderKL), "the first step trains an AutoencoderKL"
    device = next(model.parameters()).device
    perceptual.to(device)
    icons = [index for index, name in enumerate(composer.names) if is_training(name)]
    held_out = to_tensor(held_out_pictures(composer, 64)).to(device)
    encoder = model if frozen is None else frozen.requires_grad_(False).to(device)  # type: ignore[arg-type]

    def draw(step: int) -> Pixels:
        rng = np.random.default_rng([seed, 1, step])
        return np.stack([composer.draw(int(rng.choice(icons)), rng).pixels for _ in range(batch_size)])

    pictures = drawn_ahead(draw, training.steps_left, workers)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + step)
        x = to_tensor(next(pictures)).to(device)
        z, kl = draw_latents(encoder, x, generator)
        is_halved = frozen is None and float(torch.rand((), generator=generator)) < HALVED_SHARE
        return drawing_loss(model, perceptual, z, x, is_halved=is_halved) + KL_WEIGHT * kl

    def on_save(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, AutoencoderKL)
        decoded = reconstruct(ema, held_out)
        print(f"step {step} held-out PSNR {psnr_db(decoded, held_out):.2f} dB", flush=True)
        sheet = torch.cat([held_out[:16], decoded[:16]])
        write_sheet(training.path.with_suffix(".png"), sheet, columns=16)

    training.run(loss_at, on_save)


def draw_latents(encoder: AutoencoderKL, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sampled latents of pictures [B, 3, H, W] in -1..1, and the mean KL of a latent entry."""
    with autocast(x.device):
        moments = encoder.encode(x).latent_dist
    mean, logvar = moments.mean.float(), moments.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(x.device)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return mean + torch.exp(0.5 * logvar) * noise, kl


def drawing_loss(model: AutoencoderKL, perceptual: Perceptual, z: Tensor, x: Tensor, *, is_halved: bool) -> Tensor:
    """How far the decoder's drawings of latents are from the pictures they stand for, or from these at half size."""
    target = F.avg_pool2d(x, 2) if is_halved else x
    with autocast(x.device):
        y = model.decode(F.avg_pool2d(z, 2) if is_halved else z).sample.float()
    error = y - target
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    pixels = error.abs().mean() + 2 * error.square().mean() + 0.5 * slope
    return pixels + PERCEPTUAL_WEIGHT * perceptual(y, target)


def held_out_pictures(composer: Composer, count: int) -> Pixels:
    """Plain pictures [count, 64, 64, 3] of icons that no training step has shown."""
    icons = [index for index, name in enumerate(composer.names) if is_validation(name)]
    rng = np.random.default_rng(1234)
    return np.stack([composer.draw(int(i), rng, PLAIN).pixels for i in rng.permutation(icons)[:count]])


@torch.no_grad()
def reconstruct(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures through the encoder's mean and back, clamped to -1..1, in float32."""
    return torch.cat([model.decode(model.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(16)])


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE), peak = 2 for pictures in -1..1."""
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / mse)).mean())


def to_tensor(pixels: Pixels) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def write_sheet(path: Path, x: Tensor, columns: int) -> None:
    """A PNG of pictures [B, 3, H, W] in -1..1, row by row."""
    tiles = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    blank = np.full_like(tiles[:1], 255)
    tiles = np.concatenate([tiles, *[blank] * (-len(tiles) % columns)])
    rows = [np.concatenate(list(tiles[at : at + columns]), axis=1) for at in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
