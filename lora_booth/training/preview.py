"""Pictures drawn on the way: the same prompts and seeds every time, as one labelled grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from lora_booth.config.resolved import Resolved
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import Sampling, draw

Conditions = Callable[[Sequence[str]], Conditioning]
"""Prompts to their conditioning, on the denoiser's device."""
Rows = list[tuple[str, list[Image.Image]]]


def draw_rows(
    config: Resolved, family: Family, condition: Conditions, *, on_step: Callable[[], None] = lambda: None
) -> Rows:
    """`images_per_prompt` pictures of each preview prompt through the adapter as it is now, in the config's order.

    Nothing else of the run is touched: pictures have their own random streams. `on_step` is called after each step of
    the solver, and may raise.
    """
    preview, side = config.preview, config.data.resolution
    prompts = [config.fill(prompt) for prompt in preview.prompts]
    columns = range(preview.images_per_prompt)
    sampling = Sampling(
        width_px=side,
        height_px=side,
        sampler=preview.sampler,
        sampler_steps=preview.sampler_steps,
        guidance_scale=preview.guidance_scale,
        batch_size=config.memory.pictures_at_once,
        is_tiled=config.memory.tiled_decoding,
        is_denoiser_offloaded=config.memory.offload_denoiser,
        on_step=on_step,
    )
    conditioning = [condition([prompt]) for prompt in prompts for _ in columns]
    negative = condition([config.fill(preview.negative_prompt)])
    seeds = [preview.seed + column for _ in prompts for column in columns]
    pictures = draw(family, conditioning, negative, sampling, seeds=seeds)
    return [(prompt, [next(pictures) for _ in columns]) for prompt in prompts]


def before_and_after(before: Rows, after: Rows) -> Rows:
    """For each prompt and seed the picture before, and beside it the one after."""
    pairs = zip(before, after, strict=True)
    return [(prompt, [p for both in zip(old, new, strict=True) for p in both]) for (prompt, old), (_, new) in pairs]
