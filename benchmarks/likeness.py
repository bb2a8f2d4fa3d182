"""How like the mascot the miniature draws, without and with an adapter, and how much other prompts change.

    python -m benchmarks.likeness runs/demo/emo_dog.safetensors

Likeness is the mean cosine between the pictures' features and those of the mascot's pictures that were not trained on;
change is 1 - cosine between the same prompt and seed before and after. Both by the miniature's own image tower, in
[-1, 1] and [0, 2]; figures of other towers cannot be compared with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from lora_booth.cli.demo import MASCOT, demo_config
from lora_booth.config.results import PreviewConfig
from lora_booth.config.settings import ModelConfig
from lora_booth.models import loading
from lora_booth.models.families.family import Family
from lora_booth.models.sampling import Sampling, draw
from tools.booth_mini.export import load_evaluator

MODEL = MASCOT.parent / "booth_mini"
SIDE_PX = 64
SEEDS = (11, 12, 13, 14)
SUBJECT, CLASS, OTHERS = "a emo dog", "a dog", ("a rocket", "a cat")
IN_CONTEXT = f"{SUBJECT} on a green background"
PROMPTS = (SUBJECT, CLASS, *OTHERS, IN_CONTEXT)

Drawn = dict[tuple[str, str], list[Image.Image]]
"""("before" or "after", prompt) to one picture per seed."""


def draw_both(
    adapter: Path,
    preview: PreviewConfig,
    prompts: Sequence[str] = PROMPTS,
    *,
    base: str = "booth-mini",
    seeds: Sequence[int] = SEEDS,
) -> Drawn:
    """Every prompt by the base alone and through the adapter file, from the same noise."""
    family = loading.load(ModelConfig(base=base), device="cpu", dtype=torch.float32)
    before = {("before", prompt): sketch(family, prompt, preview, seeds) for prompt in prompts}
    family.pipeline("ddim").load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    return before | {("after", prompt): sketch(family, prompt, preview, seeds) for prompt in prompts}


@torch.no_grad()
def sketch(family: Family, prompt: str, preview: PreviewConfig, seeds: Sequence[int]) -> list[Image.Image]:
    """One picture per seed."""
    sampling = Sampling(SIDE_PX, SIDE_PX, preview.sampler, preview.sampler_steps, preview.guidance_scale)
    conditioning = [family.encode_prompts([prompt])] * len(seeds)
    return list(draw(family, conditioning, family.encode_prompts([""]), sampling, seeds=seeds))


@torch.no_grad()
def features(pictures: list[Image.Image]) -> Tensor:
    """Unit vectors `[B, D]` of the miniature's own image tower."""
    small = [picture.convert("RGB").resize((SIDE_PX, SIDE_PX)).tobytes() for picture in pictures]
    array = torch.stack([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in small])
    pixels = array.view(-1, SIDE_PX, SIDE_PX, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    vectors = _evaluator().get_image_features(pixel_values=pixels)
    vectors = vectors if isinstance(vectors, Tensor) else vectors.pooler_output
    return torch.nn.functional.normalize(vectors, dim=-1)


@lru_cache(maxsize=1)
def _evaluator() -> CLIPModel:
    return load_evaluator(MODEL)


def likeness(pictures: list[Image.Image], unseen: Sequence[Path] | None = None) -> float:
    """Mean cosine similarity to the pictures `unseen`, default the mascot's, none of which was trained on."""
    paths = sorted((MASCOT / "held_out").glob("*.png")) if unseen is None else unseen
    assert paths, "no pictures to compare with"
    return float((features(pictures) @ features([Image.open(path) for path in paths]).T).mean())


def change(drawn: Drawn, prompt: str) -> float:
    """Mean 1 - cosine between the same prompt and seed before and after."""
    before, after = (features(drawn[when, prompt]) for when in ("before", "after"))
    return 1 - float((before * after).sum(dim=-1).mean())


def main() -> None:
    """Print the figures of an adapter file as JSON."""
    drawn = draw_both(Path(sys.argv[1]), demo_config(Path("runs/demo")).preview)
    figures = {
        prompt: {
            "likeness_before": round(likeness(drawn["before", prompt]), 3),
            "likeness_after": round(likeness(drawn["after", prompt]), 3),
            "change": round(change(drawn, prompt), 3),
        }
        for prompt in PROMPTS
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
