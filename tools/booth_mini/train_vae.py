"""Training step 1: the autoencoder. Loss = L1 + 2 MSE + gradient L1 + KL, on composed pictures of all icons.

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

from tools.booth_mini.compose import PLAIN, Composer, Pixels
from tools.booth_mini.nouns import is_training, is_validation
from tools.booth_mini.state import Training

KL_WEIGHT = 1e-3


def train_vae(training: Training, composer: Composer, *, batch_size: int, seed: int, encoder_frozen: bool) -> None:
    """Runs `training` (of `make_vae()`) to its end; with a frozen encoder only the decoder moves, latents stay."""
    model = training.model
    assert isinstance(model, AutoencoderKL), "the first step trains an AutoencoderKL"
    if encoder_frozen:
        # The pool's latents come from the EMA's encoder: make it the one that stays.
        model.load_state_dict(training.ema.module.state_dict())
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    device = next(model.parameters()).device
    icons = [index for index, name in enumerate(composer.names) if is_training(name)]
    held_out = to_tensor(held_out_pictures(composer, 64)).to(device)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        drawn = [composer.draw(int(rng.choice(icons)), rng).pixels for _ in range(batch_size)]
        noise = torch.Generator("cpu").manual_seed(seed * 1_000_003 + step)
        pictures = to_tensor(np.stack(drawn)).to(device)
        return vae_loss(model, pictures, is_halved=not encoder_frozen and rng.random() < 0.33, generator=noise)

    def on_save(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, AutoencoderKL)
        decoded = reconstruct(ema, held_out)
        print(f"step {step} held-out PSNR {psnr_db(decoded, held_out):.2f} dB", flush=True)
        sheet = torch.cat([held_out[:16], decoded[:16]])
        write_sheet(training.path.with_suffix(".png"), sheet, columns=16)

    training.run(loss_at, on_save)


def vae_loss(model: AutoencoderKL, x: Tensor, *, is_halved: bool, generator: torch.Generator) -> Tensor:
    """Scalar loss of pictures [B, 3, H, W] in -1..1; the KL is the mean over latent entries."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        moments = model.encode(x).latent_dist
        mean, logvar = moments.mean.float(), moments.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(x.device)
        z = mean + torch.exp(0.5 * logvar) * noise
        target = F.avg_pool2d(x, 2) if is_halved else x
        y = model.decode(F.avg_pool2d(z, 2) if is_halved else z).sample.float()
    error = y - target
    slope = (error.diff(dim=-1)).abs().mean() + (error.diff(dim=-2)).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * slope + KL_WEIGHT * kl


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
