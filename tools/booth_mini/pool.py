"""The denoiser's training pools, one a stage: latents of composed pictures and the conditioning of their captions.

Autoencoder and text encoder are frozen by then, so that a training step of the denoiser is only the denoiser.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tools.booth_mini.ahead import drawn_ahead
from tools.booth_mini.compose import Composer, Picture, Variety
from tools.booth_mini.data import load_icons
from tools.booth_mini.models import make_clip, make_vae
from tools.booth_mini.nouns import DENOISER, SET_WEIGHTS, WIDER, is_training
from tools.booth_mini.state import autocast, load_ema, replacing
from tools.booth_mini.train_vae import to_tensor

BATCH = 64


@dataclass(frozen=True)
class Stage:
    """What the denoiser sees until the share `until` of its steps: nouns with their weights, and compositions."""

    until: float
    nouns: Mapping[str, float]
    variety: Variety


STAGES: tuple[Stage, ...] = (
    Stage(0.15, DENOISER, Variety(composite_share=0.0, hue_share=0.05, jitter=0.15)),
    Stage(0.4, DENOISER, Variety(composite_share=0.25, hue_share=0.08, jitter=0.2)),
    Stage(1.0, WIDER, Variety(composite_share=0.35, hue_share=0.08, jitter=0.3)),
)
"""Shapes come from few things of nearly fixed size and place; then compositions; then more things."""
SHEET_PROMPTS = (
    "a dog",
    "a dog face",
    "a cat",
    "a cat face on a green background",
    "a dog on a red background",
    "a rocket",
    "an apple",
    "a panda",
    "a fox",
    "a blue dog face",
    "a dog face wearing a top hat",
    "a small dog in a desert",
    "a pizza on a blue background",
    "a frog next to a balloon",
    "a sunflower",
    "a car",
)
"""What the sample sheets written during training show; captions 1 to 16 of every pool."""


@dataclass(frozen=True)
class Pool:
    """Unit-variance latents [N, 4, 16, 16], the caption index [N] of each and conditioning [M, 32, 192], in
    float16.

    Caption 0 is the empty prompt, the next ones are SHEET_PROMPTS. `scaling_factor` is what the
    autoencoder's config must say.
    """

    latents: Tensor
    caption_of: Tensor
    conditioning: Tensor
    captions: list[str]
    scaling_factor: float


@dataclass(frozen=True)
class Coders:
    """What turns pictures and captions into latents and conditioning."""

    vae: AutoencoderKL
    clip: CLIPModel
    tokenizer: CLIPTokenizer


def load_or_make_pool(
    data: Path, out: Path, stage: int, *, size: int, seed: int, device: torch.device, workers: int = 0
) -> Pool:
    """The pool of STAGES[stage] saved in `out`, or a new one of `size` pictures by the EMA of the first two parts."""
    path = _pool_file(out, stage)
    if not path.exists():
        vae, clip = make_vae(), make_clip()
        vae.load_state_dict(load_ema(out / "vae.pt"))
        clip.load_state_dict(load_ema(out / "clip.pt"))
        tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
        coders = Coders(vae.eval().to(device), clip.eval().to(device), tokenizer)
        composer = Composer(*load_icons(data))
        factor = load_pool(out).scaling_factor if stage else None
        pool = make_pool(composer, coders, stage, size=size, seed=seed, workers=workers, scaling_factor=factor)
        with replacing(path) as part:
            torch.save(vars(pool), part)
    return load_pool(out, stage)


def load_pool(out: Path, stage: int = 0) -> Pool:
    """The pool of one stage saved in `out`; delete the file to have another drawn."""
    return Pool(**torch.load(_pool_file(out, stage), weights_only=True))


def _pool_file(out: Path, stage: int) -> Path:
    return out / f"pool_{stage}.pt"


@torch.no_grad()
def make_pool(
    composer: Composer,
    coders: Coders,
    stage: int,
    *,
    size: int,
    seed: int,
    workers: int = 0,
    scaling_factor: float | None = None,
) -> Pool:
    """Draws `size` pictures of a stage's nouns and encodes them and their captions.

    The first pool's `scaling_factor` is that of every later one.
    """
    weights = icon_weights(composer, STAGES[stage].nouns)

    def draw(number: int) -> list[Picture]:
        rng = np.random.default_rng([seed, 3, stage, number])
        icons = rng.choice(len(weights), size=min(BATCH, size - number * BATCH), p=weights)
        return [composer.draw(int(icon), rng, STAGES[stage].variety) for icon in icons]

    captions = {caption: row for row, caption in enumerate(["", *SHEET_PROMPTS])}
    caption_of, latents = [], []
    begun, device = time.time(), coders.vae.device
    for number, drawn in enumerate(drawn_ahead(draw, range(-(-size // BATCH)), workers)):
        caption_of += [captions.setdefault(picture.caption, len(captions)) for picture in drawn]
        pixels = to_tensor(np.stack([picture.pixels for picture in drawn])).to(device)
        with autocast(device):
            latents.append(coders.vae.encode(pixels).latent_dist.mean.float().cpu())
        if number % 100 == 0:
            print(f"pool {number * BATCH} of {size}, {time.time() - begun:.0f} s", flush=True)
    joined = torch.cat(latents)
    scaling_factor = scaling_factor or round(1.0 / float(joined.std()), 4)
    return Pool(
        latents=(joined * scaling_factor).half(),
        caption_of=torch.tensor(caption_of),
        conditioning=encode_prompts(coders.clip.text_model, coders.tokenizer, list(captions)).half().cpu(),
        captions=list(captions),
        scaling_factor=scaling_factor,
    )


@torch.no_grad()
def encode_prompts(text_encoder: torch.nn.Module, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Conditioning [N, 32, 192] as the pipeline makes it: last hidden state, padded to the full length."""
    parts, device = [], next(text_encoder.parameters()).device
    for at in range(0, len(prompts), 256):
        batch = tokenizer(prompts[at : at + 256], padding="max_length", truncation=True, return_tensors="pt")
        parts.append(text_encoder(input_ids=batch.input_ids.to(device)).last_hidden_state.float())
    return torch.cat(parts)


def icon_weights(composer: Composer, nouns: Mapping[str, float]) -> NDArray[np.float64]:
    """How often the denoiser sees each icon: by its noun and its set; zero for everything else."""
    weights = np.array(
        [nouns.get(n.label, 0.0) * SET_WEIGHTS.get(n.set_name, 0.0) * is_training(n) for n in composer.names]
    )
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
