"""Class images: what the base draws of the class before it learns the subject, so that it does not forget it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_booth import files
from lora_booth.config import PriorConfig
from lora_booth.data.buckets import Bucket
from lora_booth.data.cache import ABANDONED_SECONDS, key
from lora_booth.families.base import Conditioning, Family
from lora_booth.families.sampling import draw
from lora_booth.interrupts import StopRequest
from lora_booth.report import Report

STOPPED = "stopped while preparing; what was done is kept, and the same command goes on from there"


@dataclass(frozen=True)
class ClassImage:
    """One class image: where it is or will be, what was asked for, at which size."""

    path: Path
    prompt: str
    bucket: Bucket


def wanted(
    prior: PriorConfig, prompts: Sequence[str], sizes: Sequence[Bucket], *, fingerprint: str, root: Path
) -> list[ClassImage]:
    """The `prior.num_images` class images of a run: `prompts` in turn, at the instance images' `sizes` in turn.

    Place and seed of an image follow from base, prompt, size, sampler and its number among its like. So runs that ask
    for the same share it, and asking for more later keeps those that exist.
    """
    counts: dict[str, int] = {}
    images = []
    for number in range(prior.num_images):
        prompt, bucket = prompts[number % len(prompts)], sizes[(number // len(prompts)) % len(sizes)]
        settings = (prior.sampler, prior.sampler_steps, prior.guidance_scale)
        group = key("class image", fingerprint, prompt, bucket.width_px, bucket.height_px, *settings)[:24]
        counts[group] = counts.get(group, -1) + 1
        images.append(ClassImage(root / group / f"{counts[group]:05d}.png", prompt, bucket))
    return images


def draw_missing(
    images: Sequence[ClassImage],
    family: Family,
    prior: PriorConfig,
    prompts: Mapping[str, Conditioning],
    *,
    report: Report,
    stop: StopRequest,
) -> int:
    """Draw those of `images` that do not exist yet, each written whole; returns how many were drawn.

    `prompts` holds the conditioning of every image's prompt and of "". Raises Interrupted between two images.
    """
    missing: dict[tuple[str, Bucket], list[ClassImage]] = {}
    for image in images:
        if not image.path.exists():
            missing.setdefault((image.prompt, image.bucket), []).append(image)
    for folder in {image.path.parent for image in images}:
        files.remove_abandoned(folder, older_than_seconds=ABANDONED_SECONDS)
    done, total = 0, sum(map(len, missing.values()))
    for (prompt, bucket), alike in missing.items():
        pictures = draw(
            family,
            [prompts[prompt]] * len(alike),
            prompts[""],
            width_px=bucket.width_px,
            height_px=bucket.height_px,
            seeds=[f"class image {image.path.parent.name} {image.path.stem}" for image in alike],
            sampler=prior.sampler,
            sampler_steps=prior.sampler_steps,
            guidance_scale=prior.guidance_scale,
        )
        for image, picture in zip(alike, pictures, strict=True):
            with files.replacing(image.path) as temporary:
                picture.save(temporary, format="PNG")
            done += 1
            report.progress("draw class images", done, total)
            stop.check(STOPPED)
    return done
