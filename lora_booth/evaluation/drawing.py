"""Drawing what is judged: the same prompts and noise for the base and for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_booth.data.images import to_pixels
from lora_booth.evaluation.measure import Drawn
from lora_booth.evaluation.prompts import Prompts
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import Sampling, draw

Condition = Callable[[Sequence[str]], Conditioning]
"""Prompts to their conditioning, on the denoiser's device."""


@torch.no_grad()
def draw_all(
    family: Family,
    condition: Condition,
    prompts: Prompts,
    negative_prompt: str,
    sampling: Sampling,
    *,
    seed: int,
    per_prompt: int,
) -> Drawn:
    """`per_prompt` pictures of each prompt of the subject, one of each other, with the adapter as it is set now.

    A prompt of the subject and that of its class start from the same noise. Raises what `sampling.draw` does.
    """
    wanted = [(prompt, seed + number) for prompt in prompts.subject for number in range(per_prompt)]
    wanted += [(prompt, seed) for prompt in (*prompts.classes, *prompts.unrelated)]
    known = {prompt: condition([prompt]) for prompt in dict.fromkeys(prompt for prompt, _ in wanted)}
    negative = condition([negative_prompt])
    rows: list[Conditioning] = [known[prompt] for prompt, _ in wanted]
    pictures = list(draw(family, rows, negative, sampling, seeds=[number for _, number in wanted]))
    ends = len(prompts.subject) * per_prompt
    subject = tuple(tuple(pictures[start : start + per_prompt]) for start in range(0, ends, per_prompt))
    classes = pictures[ends : ends + len(prompts.classes)]
    return Drawn(subject, tuple(classes), tuple(pictures[ends + len(prompts.classes) :]))


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as the VAE takes them: float32 `[N, 3, H, W]` in [-1, 1]."""
    return torch.stack([torch.from_numpy(to_pixels(np.asarray(picture.convert("RGB")))) for picture in pictures])
