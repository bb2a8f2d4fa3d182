"""Class images: what the base draws of the class before it learns the subject.

Trained on beside the subject, they keep the base from forgetting the class.

What is trained on are the latents as the solver left them. The picture of the same name beside them is to be looked at:
nothing goes through the VAE twice. Neither counts without the other, so what a run sees does not depend on what a cache
has lost. Those of one prompt and size are always drawn in the same batches, because rounding depends on the batch size;
so where one is needed, its whole batch is drawn.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_booth.config.resolved import Filled, Resolved
from lora_booth.config.settings import PriorConfig
from lora_booth.data.buckets import Bucket
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import PICTURES_AT_ONCE, Sampling, decode, sample
from lora_booth.run import disk
from lora_booth.run.cache import TensorCache, key, writing
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.report import Report

STOPPED = "stopped while preparing; what was done is kept, and the same command goes on from there"


@dataclass(frozen=True)
class ClassImage:
    """One class image: which one of its like, what was asked for, at which size. `cache`: the folder of its like."""

    cache: TensorCache
    number: int
    prompt: str
    bucket: Bucket
    seed: str

    @property
    def name(self) -> str:
        """Unique among all class images."""
        return f"{self.cache.folder.name}/{self.number:05d}"

    @property
    def path(self) -> Path:
        """Where the picture is, or will be."""
        return self.cache.folder / f"{self.number:05d}.png"

    def latents(self) -> Tensor | None:
        """float32 `[C, h, w]` on the CPU, scaled; None unless picture and latents are there and whole."""
        # Unlike Path.exists, this says no where another user's folder does not let us look.
        stored = self.cache.get(self.path.stem) if os.path.exists(self.path) else None
        return None if stored is None else stored["latents"]

    def save(self, picture: Image.Image, latents: Tensor) -> Tensor:
        """Write both, the picture last; the latents as they would be read."""
        stored = latents.to("cpu", torch.float32, copy=True).contiguous()
        self.cache.put(self.path.stem, {"latents": stored})
        with writing(self.path):
            disk.write_png(self.path, picture)
        return stored


def wanted(
    prior: PriorConfig,
    prompts: Sequence[str],
    sizes: Sequence[Bucket],
    *,
    fingerprint: str,
    made_by: Sequence[str | int],
    root: Path,
    about: Mapping[str, str] | None = None,
) -> list[ClassImage]:
    """The `prior.num_images` class images of a run: `prompts` in turn, at the instance images' `sizes` in turn.

    The seed of an image follows from base, prompt, size, sampler and its number among its like, its place also from
    what it is `made_by`. So runs that ask for the same share it, and asking for more later keeps those that exist.
    """
    counts: Counter[str] = Counter()
    caches: dict[str, TensorCache] = {}
    images = []
    for number in range(prior.num_images):
        prompt, bucket = prompts[number % len(prompts)], sizes[(number // len(prompts)) % len(sizes)]
        settings = (prior.sampler, prior.sampler_steps, prior.guidance_scale)
        group = key("class image", fingerprint, prompt, bucket.width_px, bucket.height_px, *settings)[:24]
        if group not in caches:
            caches[group] = TensorCache(root / key("class image", group, *made_by)[:24], about)
        images.append(
            ClassImage(caches[group], counts[group], prompt, bucket, f"class image {group} {counts[group]:05d}")
        )
        counts[group] += 1
    return images


def most_together(config: Filled) -> int:
    """Class images that a run draws together unless it has begun with fewer: `PICTURES_AT_ONCE`, halved until the
    config allows it.

    More would be faster on a large card, but then what is drawn would depend on its free memory.
    """
    together = PICTURES_AT_ONCE
    while together > (config.memory.pictures_at_once or PICTURES_AT_ONCE):
        together //= 2
    return together


def made_by(family: Family, config: Resolved, together: int) -> tuple[str | int, ...]:
    """All that class images depend on besides base, prompt, size, sampler and seed: number type, kind of device, noise
    schedule, and how many are drawn `together`, because a device rounds by it."""
    dtype = next(family.denoiser.parameters()).dtype
    return (str(dtype), family.device.type, int(config.objective.zero_terminal_snr), together)


def draw_missing(
    images: Sequence[ClassImage],
    reached: Container[str],
    family: Family,
    config: Resolved,
    prompts: Mapping[str, Conditioning],
    *,
    together: int,
    report: Report,
    stop: StopRequest,
) -> tuple[dict[str, Tensor], int]:
    """The latents of those of `images` whose names are `reached`, by name, and how many had to be drawn for them: the
    batches of those that are not there yet, each image written whole. Nothing is read again, so a cache that is cleared
    meanwhile loses nothing.

    `prompts` holds the conditioning of every reached image's prompt and of "". Images of one prompt and size are drawn
    in the same batches whether they are drawn for the first time or again after a kill, because rounding depends on the
    batch size. Raises Interrupted between two steps of the solver; what was being drawn then is drawn again. Raises
    what the device raises when its memory does not suffice for so many `together`.
    """
    found: dict[str, Tensor] = {}
    missing: list[tuple[list[ClassImage], set[str]]] = []
    for batch in batches(images, reached, together):
        stored = {image.name: image.latents() for image in batch if image.name in reached}
        if None in stored.values():
            stored |= {image.name: image.latents() for image in batch if image.name not in reached}
            missing.append((batch, {name for name, latents in stored.items() if latents is None}))
        found |= {name: latents for name, latents in stored.items() if latents is not None}
    for path in (path for cache in {id(i.cache): i.cache for i in images}.values() for path in cache.damaged):
        report.warn(f"{path} was damaged; its class image is drawn again.")
    done, total = 0, sum(len(names) for _, names in missing)
    for batch, names in missing:
        sampling = _sampling(config, batch[0].bucket, together, stop)
        seeds = [image.seed for image in batch]
        conditioning = [prompts[batch[0].prompt]] * len(batch)
        for latents in sample(family, conditioning, prompts[""], sampling, seeds=seeds):
            pictures = decode(family, latents, sampling, seeds=[image.name for image in batch])
            for image, row, picture in zip(batch, latents, pictures, strict=True):
                if image.name in names:
                    found[image.name] = image.save(picture, row)
                    done += 1
                    report.progress("draw class images", done, total)
    return {name: latents for name, latents in found.items() if name in reached}, done


def batches(images: Sequence[ClassImage], reached: Container[str], together: int) -> list[list[ClassImage]]:
    """`images` of one prompt and size, so many `together`, wherever one of them is `reached`."""
    alike: dict[tuple[str, Bucket], list[ClassImage]] = {}
    for image in images:
        alike.setdefault((image.prompt, image.bucket), []).append(image)
    groups = [group[i : i + together] for group in alike.values() for i in range(0, len(group), together)]
    return [group for group in groups if any(image.name in reached for image in group)]


def _sampling(config: Resolved, bucket: Bucket, together: int, stop: StopRequest) -> Sampling:
    return Sampling(
        width_px=bucket.width_px,
        height_px=bucket.height_px,
        sampler=config.prior.sampler,
        sampler_steps=config.prior.sampler_steps,
        guidance_scale=config.prior.guidance_scale,
        batch_size=together,
        is_divisible=False,
        is_tiled=config.memory.tiled_decoding,
        is_denoiser_offloaded=config.memory.offload_denoiser,
        on_step=lambda: stop.check(STOPPED),
    )
