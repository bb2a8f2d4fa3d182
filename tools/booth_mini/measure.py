"""Measures the shipped model and writes figures.json and a contact sheet (`python -m tools.booth_mini.measure`).

Figures: PSNR of the autoencoder on art that no training step saw, and how much of its edges is kept; contrastive
retrieval among 200 pairs of such art; prompt adherence of guided samples by the mini-CLIP's own choice among 50 nouns
and among all that the denoiser is to know; contexts; pictures per second; file sizes.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from tools.booth_mini.compose import COLOURS, KINDS, PLAIN, Composer, article
from tools.booth_mini.contexts import context_shares, context_shares_of_drawings
from tools.booth_mini.data import load_icons
from tools.booth_mini.export import load_parts
from tools.booth_mini.nouns import SET_WEIGHTS, WIDER
from tools.booth_mini.pool import encode_prompts
from tools.booth_mini.train_clip import embed_captions, retrieval, retrieval_pairs
from tools.booth_mini.train_unet import sample
from tools.booth_mini.train_vae import held_out_pictures, psnr_db, reconstruct, to_tensor, write_sheet

NOUNS: tuple[str, ...] = (
    "dog",
    "cat",
    "fox",
    "lion",
    "bear",
    "panda",
    "koala",
    "rabbit",
    "mouse",
    "frog",
    "pig",
    "cow",
    "horse",
)
NOUNS += ("monkey", "chicken", "penguin", "owl", "duck", "fish", "octopus", "whale", "crab", "turtle", "butterfly")
NOUNS += ("elephant", "apple", "banana", "strawberry", "watermelon", "pineapple", "carrot", "pizza", "hamburger")
NOUNS += ("doughnut", "cookie", "rocket", "car", "bus", "airplane", "bicycle", "heart", "star", "sun", "balloon")
NOUNS += ("umbrella", "house", "ghost", "robot", "sunflower", "tulip")
LABELS = {"apple": ("red apple", "green apple"), "car": ("automobile",), "heart": ("red heart",)}
"""Nouns that are not the label, or that with "face", of their drawings."""
CONTEXTS = (
    *(f"a dog face on {'an' if colour == 'orange' else 'a'} {colour} background" for colour in COLOURS),
    *(f"a cat face on {'an' if colour == 'orange' else 'a'} {colour} background" for colour in COLOURS),
    *(f"a {colour} dog face" for colour in ("red", "yellow", "green", "teal", "blue", "purple", "pink")),
    *(f"{noun} in a desert" for noun in ("a dog", "a fox", "a small penguin")),
    *(f"{noun} under the stars" for noun in ("a cat", "a rocket")),
    *(f"{noun} wearing a top hat" for noun in ("a dog face", "a cat face", "a panda", "a ghost")),
    *(f"{noun} wearing a crown" for noun in ("a dog face", "a frog", "a lion")),
    "a dog next to a balloon",
    "a small dog on a blue background",
    "two penguins",
    "a cat on top of a rocket",
    "a 3d icon of a dog face",
    "a lion in a city",
    "a red car on a green background",
)


@torch.no_grad()
def measure(model: Path, data: Path, sheet: Path) -> dict[str, Any]:
    """All figures of one model folder, JSON-ready; writes the contact sheet of 100 prompts."""
    vae, unet, clip, tokenizer = load_parts(model)
    composer = Composer(*load_icons(data))
    art = to_tensor(held_out_pictures(composer, 200))
    pairs = retrieval_pairs(composer, 200)
    top1, top5 = retrieval(clip, tokenizer, pairs)
    prompts = [article(noun) for noun in NOUNS]
    begun = time.time()
    pictures = draw_prompts(unet, vae, clip, tokenizer, prompts)
    seconds = time.time() - begun
    context_pictures = draw_prompts(unet, vae, clip, tokenizer, list(CONTEXTS))
    write_sheet(sheet, torch.cat([pictures, context_pictures]), columns=10)
    is_right = adherence(clip, tokenizer, pictures, NOUNS)
    wider = [article(label) for label in WIDER]
    is_right_of_all = adherence(clip, tokenizer, draw_prompts(unet, vae, clip, tokenizer, wider), wider, wider)
    decoded = reconstruct(vae, art)

    def draw(prompts: list[str]) -> Tensor:
        return draw_prompts(unet, vae, clip, tokenizer, prompts)

    border, border_is_right = background_accuracy(context_pictures[: 2 * len(COLOURS)])
    return {
        "date": date.today().isoformat(),
        "machine": f"CPU only, {torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}",
        "autoencoder_psnr_db": {
            "held_out_art": round(psnr_db(decoded, art), 2),
            "edges_kept": round(edges(decoded) / edges(art), 3),
            "pictures": len(art),
        },
        "retrieval_held_out": {"top1": round(top1, 3), "top5": round(top5, 3), "pairs": len(pairs)},
        "prompt_adherence": {
            "top1_of_50_nouns": round(sum(is_right) / len(is_right), 3),
            "missed": [noun for noun, right in zip(NOUNS, is_right, strict=True) if not right],
            "guidance_scale": 3.0,
            "steps": 20,
            "of_real_drawings": round(adherence_of_drawings(composer, clip, tokenizer), 3),
            "top1_of_all_nouns": round(sum(is_right_of_all) / len(is_right_of_all), 3),
            "all_nouns": len(wider),
        },
        "contexts": {
            "drawn": context_shares(clip, tokenizer, draw, tuple(KINDS)),
            "of_real_compositions": context_shares_of_drawings(composer, clip, tokenizer, tuple(KINDS)),
        },
        "background_colours": {"right": round(border_is_right, 3), "wrong": border},
        "pictures_per_second": round(len(prompts) / seconds, 2),
        "file_bytes": {str(p.relative_to(model)): p.stat().st_size for p in sorted(model.rglob("*.safetensors"))},
        "total_bytes": sum(p.stat().st_size for p in model.rglob("*") if p.is_file()),
    }


def draw_prompts(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    prompts: list[str],
) -> Tensor:
    """Guided samples [B, 3, 64, 64] in -1..1 of prompts, 20 DDIM steps, from one fixed batch of noise."""
    conditioning = encode_prompts(clip.text_model, tokenizer, ["", *prompts])
    empty, text = conditioning[:1], conditioning[1:]
    scaling_factor = float(vae.config["scaling_factor"])
    return sample(unet, vae, text, empty, scaling_factor=scaling_factor)


@torch.no_grad()
def adherence(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: Tensor,
    nouns: Sequence[str],
    among: Sequence[str] | None = None,
) -> list[bool]:
    """For each picture: whether the mini-CLIP finds its own noun nearest `among` prompts, by default those of NOUNS."""
    prompts = [article(noun) for noun in NOUNS] if among is None else list(among)
    own = [article(noun) for noun in nouns] if among is None else nouns
    texts = embed_captions(clip, tokenizer, prompts, pictures.device)
    images = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pictures).pooler_output), dim=-1)
    best = (images @ texts.T).argmax(dim=1)
    return [prompts[int(choice)] == prompt for prompt, choice in zip(own, best, strict=True)]


def edges(pictures: Tensor) -> float:
    """Mean energy of the differences between neighbouring pixels: blur lowers it."""
    return float(sum(pictures.diff(dim=side).square().mean() for side in (-1, -2)))


def adherence_of_drawings(composer: Composer, clip: CLIPModel, tokenizer: CLIPTokenizer) -> float:
    """The same for real drawings on white, of the denoiser's sets: what perfect samples would reach. Mean of nouns."""
    rng = np.random.default_rng(11)
    shares = []
    for noun in NOUNS:
        icons = [
            icon
            for label in LABELS.get(noun, (f"{noun} face", noun))
            for icon in composer.by_label.get(label, [])
            if composer.names[icon].set_name in SET_WEIGHTS
        ]
        assert icons, f"no drawing of {noun}"
        pixels = np.stack([composer.draw(icon, rng, PLAIN, colour="white").pixels for icon in icons])
        right = adherence(clip, tokenizer, to_tensor(pixels), [noun] * len(icons))
        shares.append(sum(right) / len(right))
    return sum(shares) / len(shares)


def background_accuracy(pictures: Tensor) -> tuple[list[str], float]:
    """Pictures of COLOURS in order, twice round: which corners are nearer to another colour, and the share right."""
    table = torch.tensor(list(COLOURS.values())).float()
    pixels = ((pictures + 1) * 127.5).clamp(0, 255)
    corners = torch.cat([pixels[..., :4, :4].flatten(2), pixels[..., :4, -4:].flatten(2)], dim=-1).median(dim=-1).values
    nearest = torch.cdist(corners, table).argmin(dim=1)
    names = list(COLOURS)
    wrong = [
        f"{names[row % len(names)]} -> {names[int(choice)]}"
        for row, choice in enumerate(nearest)
        if row % len(names) != int(choice)
    ]
    return wrong, 1 - len(wrong) / len(pictures)


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("lora_booth/assets/booth_mini"))
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--out", type=Path, help="JSON file (default: MODEL/figures.json)")
    parser.add_argument("--sheet", type=Path, default=Path("build/booth_mini/contact_sheet.png"))
    arguments = parser.parse_args()
    assert len(NOUNS) == 50 and len(NOUNS) + len(CONTEXTS) >= 100
    figures = measure(arguments.model, arguments.data, arguments.sheet)
    text = json.dumps(figures, indent=1)
    (arguments.out or arguments.model / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
