"""Whether composed pictures show what their prompt says beside the noun: of alternatives, which does the pair choose?

A prompt competes with the bare noun and with the same noun in the other contexts of its kind: "a dog wearing a crown"
with "a dog", "a dog wearing a top hat" and so on. So the noun itself tells nothing, and chance is 1 / alternatives.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from tools.booth_mini.compose import BARE_NAMES, HATS, NEIGHBOURS, PEDESTALS, SCENES, Composer, Variety, article, plural
from tools.booth_mini.nouns import SET_WEIGHTS
from tools.booth_mini.train_clip import embed_captions
from tools.booth_mini.train_vae import to_tensor

CONTEXT_NOUNS = ("dog face", "cat face", "panda", "frog", "lion", "penguin")
"""Two prompts of every kind for each."""
UNTURNED = Variety(hue_share=0.0)

Draw = Callable[[list[str]], Tensor]
"""Prompts to pictures [B, 3, 64, 64] in -1..1."""


def alternatives(kind: str, noun: str) -> list[str]:
    """The prompts of one kind about one noun; the first is the bare noun."""
    bare = article(noun)
    named = [
        article(BARE_NAMES.get(label, label)) for label in {"hat": HATS, "on top": PEDESTALS}.get(kind, NEIGHBOURS)
    ]
    of_kind = {
        "scene": [f"{bare} {place}" for place in SCENES.values()],
        "hat": [f"{bare} wearing {hat}" for hat in named],
        "next to": [f"{bare} next to {neighbour}" for neighbour in named],
        "on top": [f"{bare} on top of {pedestal}" for pedestal in named],
        "two": [f"two {plural(noun)}"],
        "small": [article(f"small {noun}")],
    }
    return [bare, *of_kind[kind]]


@torch.no_grad()
def chosen(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, candidates: list[list[str]]) -> list[str]:
    """For each picture, which of its candidates the contrastive pair finds nearest."""
    images = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pictures).pooler_output), dim=-1)
    texts = [embed_captions(clip, tokenizer, row, pictures.device) for row in candidates]
    return [row[int((text @ image).argmax())] for image, text, row in zip(images, texts, candidates, strict=True)]


def context_shares(clip: CLIPModel, tokenizer: CLIPTokenizer, draw: Draw, kinds: tuple[str, ...]) -> dict[str, float]:
    """Kind -> share of drawn prompts that are chosen among their alternatives."""
    shares = {}
    for kind in kinds:
        asked: list[tuple[str, list[str]]] = []
        for number, noun in enumerate(CONTEXT_NOUNS):
            bare, *composed = alternatives(kind, noun)
            asked += [(composed[(2 * number + turn) % len(composed)], [bare, *composed]) for turn in range(2)]
        found = chosen(clip, tokenizer, draw([prompt for prompt, _ in asked]), [choices for _, choices in asked])
        right = [choice == prompt for choice, (prompt, _) in zip(found, asked, strict=True)]
        shares[kind] = round(sum(right) / len(right), 3)
    return shares


def context_shares_of_drawings(
    composer: Composer, clip: CLIPModel, tokenizer: CLIPTokenizer, kinds: tuple[str, ...]
) -> dict[str, float]:
    """The same for real compositions of the denoiser's sets: what perfect samples would reach."""
    rng, shares = np.random.default_rng(12), {}
    for kind in kinds:
        pixels, candidates, asked = [], [], []
        for noun in CONTEXT_NOUNS:
            icons = [i for i in composer.by_label[noun] if composer.names[i].set_name in SET_WEIGHTS]
            for _ in range(10):
                picture = composer.draw(int(rng.choice(icons)), rng, UNTURNED, colour="white", kind=kind)
                choices = alternatives(kind, noun)
                named = [choice for choice in choices[1:] if picture.caption.endswith(choice)]
                if named:
                    pixels.append(picture.pixels)
                    candidates.append(choices)
                    asked.append(named[0])
        found = chosen(clip, tokenizer, to_tensor(np.stack(pixels)), candidates)
        shares[kind] = round(sum(a == b for a, b in zip(found, asked, strict=True)) / len(asked), 3)
    return shares
