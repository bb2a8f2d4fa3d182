"""Everything that is computed once: class images, latents, prompts, their order.

All of it goes through caches that outlive the run, so that an interrupted or repeated preparation starts where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_booth.config.resolved import Filled, Resolved
from lora_booth.data import images
from lora_booth.data.buckets import Crop, assign
from lora_booth.data.images import Picture
from lora_booth.data.sheet import contact_sheet
from lora_booth.data.subject import Pictures, crops_of, plain_prompt, prompt_of, prompts_of
from lora_booth.errors import lacks_memory
from lora_booth.models import devices
from lora_booth.models.bases.sources import is_local
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import denoiser_offloaded
from lora_booth.run import cache_folder
from lora_booth.run.cache import TensorCache, require_finite
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.report import Report
from lora_booth.training import candidates, class_images
from lora_booth.training.cache_keys import latent_key, prompt_key
from lora_booth.training.class_images import ClassImage
from lora_booth.training.order import Item, Order, Role

MAX_HELD_BYTES = 2**28
"""Of pictures cut to size, as `Cuts` holds them: some eighty of 1024 px."""


@dataclass(frozen=True)
class Moments:
    """Latents of one image as a normal distribution. float32 `[C, h, w]` each, scaled, on the CPU."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Prepared:
    """What the loop trains on. `latents` by latent key; `prompts`: one row each by prompt, under the untrained base.

    `drawing_seconds`: what it took to draw class images; `drawn_together`: how many at once.
    """

    order: Order
    validation: tuple[Item, ...]
    latents: Mapping[str, Moments]
    prompts: Mapping[str, Conditioning]
    drawing_seconds: float
    drawn_together: int


@dataclass(frozen=True)
class _Image:
    """One image on its way to its latents. `source`: a picture of the user's, or a class image that was drawn."""

    role: Role
    source: Picture | ClassImage
    crop: Crop
    prompt: str
    is_flipped: bool = False
    plain_prompt: str | None = None

    @property
    def name(self) -> str:
        return self.source.path.name + (" (mirrored)" if self.is_flipped else "")


class Cuts:
    """The parts of pictures that are trained on, each cut once for the sheet and the latents, while memory suffices."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._held: dict[tuple[Path, Crop], Any] = {}
        self._left_bytes = max_bytes

    def of(self, picture: Picture, crop: Crop) -> Any:
        """uint8 `[H, W, 3]`. Raises DataError when the picture is not what it was."""
        held = self._held.get((picture.path, crop))
        if held is not None:
            return held
        array = images.crop(images.read(picture.path, sha256=picture.sha256), crop)
        if array.nbytes <= self._left_bytes:
            self._held[picture.path, crop] = array
            self._left_bytes -= array.nbytes
        return array


def sheet(config: Filled, pictures: Pictures, cuts: Cuts) -> Image.Image:
    """The contact sheet: each instance image as the model will see it, with its prompt."""
    instances = _instances(config, pictures.instances.pictures, is_flipped=False)
    pairs = zip(pictures.instances.pictures, instances, strict=True)
    shown = [(f"{image.name}: {image.prompt}", cuts.of(picture, image.crop)) for picture, image in pairs]
    return contact_sheet(shown, title="What the model will see")


def prepare(
    config: Resolved,
    family: Family,
    pictures: Pictures,
    *,
    report: Report,
    stop: StopRequest,
    together: int | None = None,
    cuts: Cuts | None = None,
) -> Prepared:
    """Encode all prompts, draw missing class images, and encode all pictures. `cuts`: those of the contact sheet.

    `together`: how many class images the run has begun to draw at once; by default as many as the config allows, fewer
    where memory does not suffice.
    Text encoders that are not trained are released as soon as the prompts are encoded; afterwards
    training does not need the VAE either. Raises Interrupted between two images, NumericError naming a picture whose
    latents are not finite.
    """
    root, run_folder = cache_folder.folder_of(config), config.folder
    with cache_folder.in_use(root, run_folder=run_folder, base=_about(config, family)["base"]):
        prepared = _prepare(config, family, pictures, together, cuts or Cuts(), report=report, stop=stop)
    cache_folder.trim(root, config.run.cache_limit_gib * 2**30, lambda text: report.event("cache", text))
    return prepared


def _prepare(
    config: Resolved,
    family: Family,
    pictures: Pictures,
    together: int | None,
    cuts: Cuts,
    *,
    report: Report,
    stop: StopRequest,
) -> Prepared:
    is_offloaded = config.memory.offload_denoiser
    with denoiser_offloaded(family, is_wanted=is_offloaded):
        texts = prompts_of(config, pictures)
        texts += candidates.asked(config)[1].all if config.evaluate.choose == "best" else ()
        prompts = encode_prompts(config, family, list(dict.fromkeys(texts)), report)
        if not config.adapter.text_encoder:
            family.release_text_encoders()
    instances = _instances(config, pictures.instances.pictures, is_flipped=False)
    mirrored = _instances(config, pictures.instances.pictures, is_flipped=True) if config.data.flip else []
    held_out = _instances(config, pictures.held_out.pictures if pictures.held_out else (), is_flipped=False)
    _touch(config, family, [*instances, *mirrored, *held_out])  # nobody clears it while class images are drawn
    began = time.perf_counter()
    found = _classes(config, family, pictures, instances, prompts, together, report=report, stop=stop)
    classes, drawn, drawn_together = found
    drawing_seconds = time.perf_counter() - began

    everything = [*instances, *mirrored, *classes, *held_out]
    with denoiser_offloaded(family, is_wanted=is_offloaded):
        encoded = _encode(config, family, everything, drawn, cuts, report=report, stop=stop)
    latents: dict[str, Moments] = {}
    items = []
    for image, (key, moments) in zip(everything, encoded, strict=True):
        latents[key] = moments
        geometry = image.crop.mirrored().geometry if image.is_flipped else image.crop.geometry
        channels, height, width = moments.mean.shape
        shape, rest = (channels, height, width), (image.prompt, geometry, image.plain_prompt)
        items.append(Item(image.role, image.name, key, shape, *rest))

    num_instances = len(instances) + len(mirrored)
    num_trained = num_instances + len(classes)
    order = Order(
        tuple(items[:num_instances]),
        tuple(items[num_instances:num_trained]),
        config.train.images_per_step,
        config.prior.loss_weight,
        config.train.seed,
        captions=tuple(map(config.fill, config.prior.captions)) if config.has_model_prior else (),
    )
    validation = items[num_trained:] or items[: len(instances)]
    return Prepared(order, tuple(validation), latents, prompts, drawing_seconds, drawn_together)


@torch.no_grad()
def encode_prompts(config: Resolved, family: Family, texts: Sequence[str], report: Report) -> dict[str, Conditioning]:
    """Conditioning of every prompt by the untrained base, one row each, on the CPU, through the cache."""
    cache = TensorCache(cache_folder.folder_of(config) / "prompts", _about(config, family))
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


def _instances(config: Filled, pictures: Sequence[Picture], *, is_flipped: bool) -> list[_Image]:
    crops = crops_of(config, pictures)
    return [
        _Image("instance", picture, crop, prompt_of(config, picture), is_flipped, plain_prompt(config, picture))
        for picture, crop in zip(pictures, crops, strict=True)
    ]


def _classes(
    config: Resolved,
    family: Family,
    pictures: Pictures,
    instances: Sequence[_Image],
    prompts: Mapping[str, Conditioning],
    begun_with: int | None,
    **listeners: Any,
) -> tuple[list[_Image], dict[str, Tensor], int]:
    """Class images: none where they are no prior, the user's own in the instance buckets, or drawn by the base, whose
    latents come with them by name; and how many were drawn together in the end. `begun_with`: what `prepare` calls
    `together`."""
    together = begun_with or class_images.most_together(config)
    if not config.has_class_images:
        return [], {}, together
    templates = [config.fill(template) for template in config.prior.prompts]
    sizes = [image.crop.bucket for image in instances]
    if pictures.classes is not None:
        own = pictures.classes.pictures
        texts = [config.fill(p.caption) if p.caption else templates[i % len(templates)] for i, p in enumerate(own)]
        crops = [assign(p.width_px, p.height_px, sorted(set(sizes))) for p in own]
        return [_Image("class", *row) for row in zip(own, crops, texts, strict=True)], {}, together
    places: dict[str, Any] = {"root": cache_folder.folder_of(config) / "class_images", "about": _about(config, family)}
    while True:
        made_by, fingerprint = class_images.made_by(family, config, together), family.fingerprint
        made: dict[str, Any] = {"fingerprint": fingerprint, "made_by": made_by}
        wanted = class_images.wanted(config.prior, templates, sizes, **made, **places)
        try:
            latents, count = class_images.draw_missing(wanted, family, config, prompts, together=together, **listeners)
            break
        except (RuntimeError, MemoryError) as error:
            if together == 1 or begun_with is not None or not lacks_memory(error):
                raise
        devices.empty_cache(family.device)
        together //= 2  # all of them: fewer together are other pictures, up to rounding
    text = f"{len(wanted)} class images, {count} of them new, in {places['root']}"
    listeners["report"].event("class_images", text, drawn=count)
    crops = [assign(image.bucket.width_px, image.bucket.height_px, [image.bucket]) for image in wanted]
    found = [_Image("class", image, crop, image.prompt) for image, crop in zip(wanted, crops, strict=True)]
    return found, latents, together


def _encode(
    config: Resolved,
    family: Family,
    everything: Sequence[_Image],
    drawn: Mapping[str, Tensor],
    cuts: Cuts,
    *,
    report: Report,
    stop: StopRequest,
) -> list[tuple[str, Moments]]:
    """Key and moments of each image; `drawn`: latents of class images by name. Raises Interrupted between two."""
    cache = TensorCache(cache_folder.folder_of(config) / "latents", _about(config, family))
    encoded = []
    for done, image in enumerate(everything, start=1):
        stop.check(class_images.STOPPED)
        if isinstance(image.source, ClassImage):
            latents = drawn[image.source.name]  # as the solver left them: a distribution without width
            encoded.append((image.source.name, Moments(latents, torch.zeros_like(latents))))
        else:
            encoded.append(_encode_image(family, cache, image, image.source, cuts))
        report.progress("encode images", done, len(everything))
    for path in cache.damaged:
        report.warn(f"cache file {path} was damaged; it has been made again.")
    return encoded


@torch.no_grad()
def _encode_image(
    family: Family, cache: TensorCache, image: _Image, picture: Picture, cuts: Cuts
) -> tuple[str, Moments]:
    """Key and moments of one picture, through the cache."""
    key = _key(family, image, picture)
    stored = cache.get(key)
    if stored is None:
        array = cuts.of(picture, image.crop)
        array = array[:, ::-1].copy() if image.is_flipped else array
        mean, std = family.encode_images(torch.as_tensor(images.to_pixels(array))[None])
        stored = {"mean": mean[0].cpu(), "std": std[0].cpu()}
        require_finite(stored, f"latents of {picture.path.name}")
        cache.put(key, stored)
    return key, Moments(stored["mean"], stored["std"])


def _key(family: Family, image: _Image, picture: Picture) -> str:
    flipped = image.is_flipped
    return latent_key(family.fingerprint, picture.sha256, image.crop, dtype=torch.float32, is_flipped=flipped)


def _touch(config: Resolved, family: Family, wanted: Sequence[_Image]) -> None:
    """Note that the latents of pictures are used now, where they are there."""
    cache = TensorCache(cache_folder.folder_of(config) / "latents")
    for image in wanted:
        if isinstance(image.source, Picture):
            cache.touch(_key(family, image, image.source))


def _about(config: Resolved, family: Family) -> dict[str, str]:
    """What `lora-booth cache` tells of what is made here: the base, by name and by its weights."""
    base = config.model.base
    return {"base": Path(base).name if is_local(config.model) else base, "fingerprint": family.fingerprint}
