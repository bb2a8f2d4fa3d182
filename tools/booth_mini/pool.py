"""The denoiser's training pool: latents of composed pictures and the conditioning of their captions, made
once.

Autoencoder and text encoder are frozen by then, so that a training step of the denoiser is only the denoiser.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tools.booth_mini.compose import Composer, Variety
from tools.booth_mini.data import load_icons
from tools.booth_mini.models import make_clip, make_vae
from tools.booth_mini.nouns import DENOISER, SET_WEIGHTS, is_training
from tools.booth_mini.state import load_ema, replacing
from tools.booth_mini.train_vae import to_tensor

POOL_FILE = "pool.pt"
VARIETY = Variety(composite_share=0.14, hue_share=0.08, jitter=0.2)
"""Narrow, for a denoiser trained in CPU hours; FULL where a GPU is at hand."""
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


def load_or_make_pool(data: Path, out: Path, *, size: int, seed: int) -> Pool:
    """The pool saved in `out`, or a new one of `size` pictures from the EMA weights of the first two steps."""
    path = out / POOL_FILE
    if not path.exists():
        vae, clip = make_vae(), make_clip()
        vae.load_state_dict(load_ema(out / "vae.pt"))
        clip.load_state_dict(load_ema(out / "clip.pt"))
        tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
        pool = make_pool(Composer(*load_icons(data)), vae.eval(), clip.eval(), tokenizer, size=size, seed=seed)
        with replacing(path) as part:
            torch.save(vars(pool), part)
    return load_pool(out)


def load_pool(out: Path) -> Pool:
    """The pool saved in `out`; delete the file to have another drawn."""
    return Pool(**torch.load(out / POOL_FILE, weights_only=True))


@torch.no_grad()
def make_pool(
    composer: Composer, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, *, size: int, seed: int
) -> Pool:
    """Draws `size` pictures of common nouns and encodes them and their captions."""
    rng = np.random.default_rng([seed, 3])
    icons = rng.choice(len(composer.names), size=size, p=icon_weights(composer))
    captions = {caption: row for row, caption in enumerate(["", *SHEET_PROMPTS])}
    caption_of, latents = [], []
    begun = time.time()
    for at in range(0, size, 64):
        drawn = [composer.draw(int(icon), rng, VARIETY) for icon in icons[at : at + 64]]
        caption_of += [captions.setdefault(picture.caption, len(captions)) for picture in drawn]
        pixels = to_tensor(np.stack([picture.pixels for picture in drawn]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(vae.encode(pixels).latent_dist.mean.float())
        if at % 6400 == 0:
            print(f"pool {at} of {size}, {time.time() - begun:.0f} s", flush=True)
    joined = torch.cat(latents)
    scaling_factor = round(1.0 / float(joined.std()), 4)
    return Pool(
        latents=(joined * scaling_factor).half(),
        caption_of=torch.tensor(caption_of),
        conditioning=encode_prompts(clip.text_model, tokenizer, list(captions)).half(),
        captions=list(captions),
        scaling_factor=scaling_factor,
    )


@torch.no_grad()
def encode_prompts(text_encoder: torch.nn.Module, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Conditioning [N, 32, 192] as the pipeline makes it: last hidden state, padded to the full length."""
    parts = []
    for at in range(0, len(prompts), 256):
        batch = tokenizer(prompts[at : at + 256], padding="max_length", truncation=True, return_tensors="pt")
        parts.append(text_encoder(input_ids=batch.input_ids).last_hidden_state.float())
    return torch.cat(parts)


def icon_weights(composer: Composer) -> NDArray[np.float64]:
    """How often the denoiser sees each icon: by its noun and its set; zero for everything else."""
    weights = np.array(
        [DENOISER.get(n.label, 0.0) * SET_WEIGHTS.get(n.set_name, 0.0) * is_training(n) for n in composer.names]
    )
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
