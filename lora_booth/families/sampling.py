"""Pictures from a family: the one place that runs a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image

from lora_booth.errors import NumericError
from lora_booth.families.base import Conditioning, Family
from lora_booth.objectives import generator_for

PICTURES_AT_ONCE = 4
"""Pictures that are denoised together; large ones are decoded one by one (`vae.PIXELS_AT_ONCE`)."""


def concatenate(rows: Sequence[Conditioning]) -> Conditioning:
    """One conditioning out of several, along the batch."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def draw(
    family: Family,
    prompts: Sequence[Conditioning],
    negative: Conditioning,
    *,
    width_px: int,
    height_px: int,
    seeds: Sequence[int | str],
    sampler: str,
    sampler_steps: int,
    guidance_scale: float,
    batch_size: int = PICTURES_AT_ONCE,
) -> Iterator[Image.Image]:
    """One picture per prompt and seed, in order. The starting noise of a picture depends on its seed alone.

    `prompts` and `negative` are single rows (batch of 1). Raises NumericError on a picture that is not finite.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
    pipeline = family.pipeline(sampler)
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        inputs = family.pipeline_inputs(concatenate(rows), concatenate([negative] * len(rows)))
        latents = pipeline(
            **inputs,
            width=width_px,
            height=height_px,
            num_inference_steps=sampler_steps,
            guidance_scale=guidance_scale,
            generator=[generator_for("picture", seed) for seed in seeds[start : start + batch_size]],
            output_type="latent",  # the pipeline would decode all at once: 12 GiB for four SDXL pictures, 3 for one
        ).images
        decoded = (family.decode_latents(latents) / 2 + 0.5).permute(0, 2, 3, 1)
        for pixels, seed in zip(decoded, seeds[start : start + batch_size], strict=True):
            if not torch.isfinite(pixels).all():
                raise NumericError(f"the picture of seed {seed} is not finite; set model.precision = bf16 or fp32.")
            yield Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
