"""Pictures from a family: the one place that runs a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_booth.errors import NumericError, lacks_memory
from lora_booth.models import devices
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.run.randomness import generator_for


def concatenate(rows: Sequence[Conditioning]) -> Conditioning:
    """One conditioning out of several, along the batch."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn. `sampler`: a key of `schedules.solver`; `sampler_steps`: denoiser calls per picture.

    `batch_size`: pictures that are denoised together, fewer where memory does not suffice and they are
    `is_divisible`; `is_tiled`: large ones are decoded in overlapping tiles;
    `is_denoiser_offloaded`: without the denoiser on the device; `on_step`: called after each step of the solver, may
    raise.
    """

    width_px: int
    height_px: int
    sampler: str
    sampler_steps: int
    guidance_scale: float
    batch_size: int = PICTURES_AT_ONCE
    is_divisible: bool = True
    is_tiled: bool = False
    is_denoiser_offloaded: bool = False
    on_step: Callable[[], None] = lambda: None


@contextmanager
def denoiser_offloaded(family: Family, *, is_wanted: bool) -> Iterator[None]:
    """Inside, the denoiser waits in main memory, if that is wanted, and leaves the device to the other parts."""
    if not is_wanted:
        yield
        return
    family.move_denoiser("cpu")
    try:
        yield
    finally:
        family.move_denoiser(family.device)


def draw(
    family: Family,
    prompts: Sequence[Conditioning],
    negative: Conditioning,
    sampling: Sampling,
    *,
    seeds: Sequence[int | str],
) -> Iterator[Image.Image]:
    """One picture per prompt and seed, in order; takes and raises what `sample` does."""
    drawn = 0
    for latents in sample(family, prompts, negative, sampling, seeds=seeds):
        yield from decode(family, latents, sampling, seeds=seeds[drawn : drawn + len(latents)])
        drawn += len(latents)


@torch.no_grad()
def sample(
    family: Family,
    prompts: Sequence[Conditioning],
    negative: Conditioning,
    sampling: Sampling,
    *,
    seeds: Sequence[int | str],
) -> Iterator[Tensor]:
    """Latents `[B, C, h, w]`, scaled, of one picture per prompt and seed, in order, some at a time.

    The starting noise of a picture depends on its seed alone. `prompts` and `negative` are single rows (batch of 1).
    Where the device's memory does not suffice, fewer are drawn together. Raises NumericError on a picture that is not
    finite.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
    pipeline, batch_size, start = family.pipeline(sampling.sampler), sampling.batch_size, 0

    def told(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        sampling.on_step()
        return values

    def denoise(rows: slice) -> Tensor:
        chosen = prompts[rows]
        inputs = family.pipeline_inputs(concatenate(chosen), concatenate([negative] * len(chosen)))
        latents: Tensor = pipeline(
            **inputs,
            width=sampling.width_px,
            height=sampling.height_px,
            num_inference_steps=sampling.sampler_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[generator_for("picture", seed) for seed in seeds[rows]],
            output_type="latent",  # the pipeline would decode all at once: 12 GiB for four SDXL pictures, 3 for one
            callback_on_step_end=told,
        ).images
        return latents

    while start < len(prompts):
        rows = slice(start, min(start + batch_size, len(prompts)))
        latents = _unless_too_large(denoise, rows, family.device) if sampling.is_divisible else denoise(rows)
        if latents is None:
            batch_size = (rows.stop - start) // 2
            continue
        _require_finite(latents, seeds[rows])
        yield latents
        start = rows.stop


def decode(family: Family, latents: Tensor, sampling: Sampling, *, seeds: Sequence[int | str]) -> Iterator[Image.Image]:
    """The pictures of `latents`. Raises NumericError on one that is not finite."""
    with denoiser_offloaded(family, is_wanted=sampling.is_denoiser_offloaded):
        pixels = family.decode_latents(latents, is_tiled=sampling.is_tiled)
    _require_finite(pixels, seeds)
    for picture in (pixels / 2 + 0.5).permute(0, 2, 3, 1):
        yield Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def _unless_too_large(denoise: Callable[[slice], Tensor], rows: slice, device: torch.device) -> Tensor | None:
    """`denoise(rows)`, or None where several rows exceed the memory of `device`."""
    try:
        return denoise(rows)
    except (RuntimeError, MemoryError) as error:
        if rows.stop - rows.start == 1 or not lacks_memory(error):
            raise
    devices.empty_cache(device)
    return None


def _require_finite(rows: Tensor, seeds: Sequence[int | str]) -> None:
    for row, seed in zip(rows, seeds, strict=True):
        if not torch.isfinite(row).all():
            raise NumericError(f"the picture of seed {seed} is not finite; set model.precision = bf16 or fp32.")
