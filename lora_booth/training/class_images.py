"""Class images: what the base draws of the class before it learns the subject.

Trained on beside the subject, they keep the base from forgetting the class.

What lives here: which class images a run has, and where each lies. What does not: drawing them (`class_drawing.py`).

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
from typing import TYPE_CHECKING

from PIL import Image

from lora_booth.config.settings import PriorConfig
from lora_booth.data.buckets import Bucket
from lora_booth.run import disk
from lora_booth.run.cache import TensorCache, key, writing

if TYPE_CHECKING:
    from torch import Tensor


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
        stored = latents.float().to("cpu", copy=True).contiguous()
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


def batches(images: Sequence[ClassImage], reached: Container[str], together: int) -> list[list[ClassImage]]:
    """`images` of one prompt and size, so many `together`, wherever one of them is `reached`."""
    alike: dict[tuple[str, Bucket], list[ClassImage]] = {}
    for image in images:
        alike.setdefault((image.prompt, image.bucket), []).append(image)
    groups = [group[i : i + together] for group in alike.values() for i in range(0, len(group), together)]
    return [group for group in groups if any(image.name in reached for image in group)]
