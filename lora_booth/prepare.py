"""Everything that is computed once, before the first step: class images, latents, prompt embeddings, the items' order.

All of it goes through caches that outlive the run, so that an interrupted or repeated preparation starts where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from lora_booth import class_images, files
from lora_booth.config import Config
from lora_booth.data import images
from lora_booth.data.batches import Item, Order, Role
from lora_booth.data.buckets import Crop, assign
from lora_booth.data.cache import TensorCache, latent_key, prompt_key, require_finite
from lora_booth.data.images import Picture
from lora_booth.data.sheet import contact_sheet
from lora_booth.families.base import Conditioning, Family
from lora_booth.interrupts import StopRequest
from lora_booth.report import Report
from lora_booth.subject import Pictures, crops_of, prompts_of


@dataclass(frozen=True)
class Moments:
    """Latents of one image as a normal distribution. float32 `[C, h, w]` each, scaled, on the CPU."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Prepared:
    """What the loop trains on. `latents` by latent key; `prompts`: one row each by prompt, under the untrained base."""

    order: Order
    validation: tuple[Item, ...]
    latents: Mapping[str, Moments]
    prompts: Mapping[str, Conditioning]


@dataclass(frozen=True)
class _Image:
    """One image on its way into the latent cache."""

    role: Role
    picture: Picture
    crop: Crop
    prompt: str
    is_flipped: bool = False

    @property
    def name(self) -> str:
        return self.picture.path.name + (" (mirrored)" if self.is_flipped else "")


def cache_folder(config: Config) -> Path:
    """Where latents, embeddings and class images are kept between runs."""
    return config.run.cache or user_cache_path("lora_booth")


def prepare(
    config: Config, family: Family, pictures: Pictures, *, sheet_path: Path, report: Report, stop: StopRequest
) -> Prepared:
    """Draw missing class images, encode all images and prompts, and write the contact sheet.

    `config` is resolved. Afterwards training needs neither the VAE nor, unless they are trained, the text encoders.
    Raises Interrupted between two images, NumericError naming a picture whose latents are not finite.
    """
    prompts = encode_prompts(config, family, prompts_of(config, pictures), report)
    instances = _instances(config, pictures.instances.pictures, is_flipped=False)
    if not sheet_path.exists():
        _write_sheet(config, instances, sheet_path)
    mirrored = _instances(config, pictures.instances.pictures, is_flipped=True) if config.data.flip else []
    held_out = _instances(config, pictures.held_out.pictures if pictures.held_out else (), is_flipped=False)
    classes = _classes(config, family, pictures, instances, prompts, report=report, stop=stop)

    cache = TensorCache(cache_folder(config) / "latents")
    everything = [*instances, *mirrored, *classes, *held_out]
    latents: dict[str, Moments] = {}
    items = []
    for done, image in enumerate(everything, start=1):
        stop.check(class_images.STOPPED)
        key, moments = _encode_image(config, family, cache, image)
        latents[key] = moments
        geometry = image.crop.mirrored().geometry if image.is_flipped else image.crop.geometry
        channels, height, width = moments.mean.shape
        items.append(Item(image.role, image.name, key, (channels, height, width), image.prompt, geometry))
        report.progress("encode images", done, len(everything))
    for path in cache.damaged:
        report.warn(f"cache file {path} was damaged; it has been made again.")

    num_instances = len(instances) + len(mirrored)
    num_trained = num_instances + len(classes)
    order = Order(
        tuple(items[:num_instances]),
        tuple(items[num_instances:num_trained]),
        config.train.images_per_step,
        config.prior.loss_weight,
        config.train.seed,
    )
    validation = items[num_trained:] or items[: len(instances)]
    return Prepared(order, tuple(validation), latents, prompts)


@torch.no_grad()
def encode_prompts(config: Config, family: Family, texts: Sequence[str], report: Report) -> dict[str, Conditioning]:
    """Conditioning of every prompt by the untrained base, one row each, on the CPU, through the cache."""
    cache = TensorCache(cache_folder(config) / "prompts")
    dtype = next(family.denoiser.parameters()).dtype
    encoded: dict[str, Conditioning] = {}
    for done, text in enumerate(texts, start=1):
        key = prompt_key(family.fingerprint, text, dtype=dtype)
        row = cache.get(key)
        if row is None:
            row = {name: tensor.cpu() for name, tensor in family.encode_prompts([text]).items()}
            require_finite(row, f'embeddings of the prompt "{text}"')
            cache.put(key, row)
        encoded[text] = row
        report.progress("encode prompts", done, len(texts))
    return encoded


def _instances(config: Config, pictures: Sequence[Picture], *, is_flipped: bool) -> list[_Image]:
    crops = crops_of(config, pictures)
    prompts = [config.fill(picture.caption or config.subject.prompt) for picture in pictures]
    return [_Image("instance", *row, is_flipped) for row in zip(pictures, crops, prompts, strict=True)]


def _classes(
    config: Config,
    family: Family,
    pictures: Pictures,
    instances: Sequence[_Image],
    prompts: Mapping[str, Conditioning],
    **listeners: Any,
) -> list[_Image]:
    """Class images: none without a prior, the user's own in the instance buckets, or drawn by the base."""
    if not config.has_prior:
        return []
    templates = [config.fill(template) for template in config.prior.prompts]
    sizes = [image.crop.bucket for image in instances]
    if pictures.classes is not None:
        own = pictures.classes.pictures
        texts = [config.fill(p.caption) if p.caption else templates[i % len(templates)] for i, p in enumerate(own)]
        crops = [assign(p.width_px, p.height_px, sorted(set(sizes))) for p in own]
        return [_Image("class", *row) for row in zip(own, crops, texts, strict=True)]
    root = cache_folder(config) / "class_images"
    wanted = class_images.wanted(config.prior, templates, sizes, fingerprint=family.fingerprint, root=root)
    drawn = class_images.draw_missing(wanted, family, config.prior, prompts, **listeners)
    report: Report = listeners["report"]
    report.event("class_images", f"{len(wanted)} class images, {drawn} of them new, in {root}", drawn=drawn)
    found = []
    for image in wanted:
        width, height = image.bucket.width_px, image.bucket.height_px
        picture = Picture(image.path, files.sha256(image.path), width, height, None)
        found.append(_Image("class", picture, assign(width, height, [image.bucket]), image.prompt))
    return found


@torch.no_grad()
def _encode_image(config: Config, family: Family, cache: TensorCache, image: _Image) -> tuple[str, Moments]:
    """Key and moments of one image, through the cache."""
    key = latent_key(
        family.fingerprint, image.picture.sha256, image.crop, dtype=torch.float32, is_flipped=image.is_flipped
    )
    stored = cache.get(key)
    if stored is None:
        array = _cut(config, image)
        mean, std = family.encode_images(torch.as_tensor(images.to_pixels(array))[None])
        stored = {"mean": mean[0].cpu(), "std": std[0].cpu()}
        require_finite(stored, f"latents of {image.picture.path.name}")
        cache.put(key, stored)
    return key, Moments(stored["mean"], stored["std"])


def _cut(config: Config, image: _Image) -> Any:
    """uint8 `[H, W, 3]`: the part of the picture that is trained on."""
    array = images.crop(images.read(image.picture.path, sha256=image.picture.sha256), image.crop)
    return array[:, ::-1].copy() if image.is_flipped else array


def _write_sheet(config: Config, instances: Sequence[_Image], path: Path) -> None:
    shown = [(f"{image.name}: {image.prompt}", _cut(config, image)) for image in instances]
    contact_sheet(shown, path, title="What the model will see")
