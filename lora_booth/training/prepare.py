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
from lora_booth.data import images, masks
from lora_booth.data.buckets import Crop
from lora_booth.data.images import Picture
from lora_booth.data.sheet import contact_sheet
from lora_booth.data.subject import Pictures, crops_of, prompt_of, shown_prompts
from lora_booth.errors import DataError, lacks_memory
from lora_booth.models import devices
from lora_booth.models.at_once import class_images_at_once
from lora_booth.models.bases.sources import is_local
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import denoiser_offloaded
from lora_booth.run import cache_folder
from lora_booth.run.cache import TensorCache, require_finite
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.report import Report
from lora_booth.training import class_drawing, reach, watching
from lora_booth.training.cache_keys import prompt_key
from lora_booth.training.class_images import ClassImage
from lora_booth.training.order import Order
from lora_booth.training.reach import Reach, TrainingImage, Validation

FADED = 0.25
"""What is left on the contact sheet of a background that a mask leaves out."""
MAX_HELD_BYTES = 2**28
"""Of pictures cut to size, as `Cuts` holds them: some eighty of 1024 px."""


@dataclass(frozen=True)
class Moments:
    """Latents of one image as a normal distribution. float32 `[C, h, w]` each, scaled, on the CPU."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Prepared:
    """What the loop trains on. `validation`: what every save looks at; `latents` by latent key; `prompts`: one row each
    by prompt, under the untrained base; `masks`: float32 `[1, h, w]` by mask key, 1 where a picture shows the subject,
    elsewhere what the background counts.

    `drawing_seconds`: what it took to draw class images; `drawn_together`: how many at once.
    """

    order: Order
    validation: Validation
    latents: Mapping[str, Moments]
    prompts: Mapping[str, Conditioning]
    drawing_seconds: float
    drawn_together: int
    masks: Mapping[str, Tensor]


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
    found = pictures.instances.pictures
    pairs = zip(found, crops_of(config, found), strict=True)
    shown = [(f"{picture.name}: {prompt_of(config, picture)}", _seen(picture, crop, cuts)) for picture, crop in pairs]
    return contact_sheet(shown, title="What the model will see")


def _seen(picture: Picture, crop: Crop, cuts: Cuts) -> Any:
    """A crop, uint8 `[H, W, 3]`, in which a mask's background is faded."""
    array = cuts.of(picture, crop)
    if picture.mask is None:
        return array
    size = (crop.bucket.width_px, crop.bucket.height_px)
    shown = FADED + (1 - FADED) * masks.crop(masks.read(picture.mask), crop, size)[..., None] / 255
    return (255 - (255 - array) * shown).astype("uint8")


def prepare(
    config: Resolved,
    family: Family,
    pictures: Pictures,
    *,
    report: Report,
    stop: StopRequest,
    validation_rows: int = watching.MIN_ROWS,
    first_step: int = 0,
    judged_by: Sequence[str] = (),
    together: int | None = None,
    cuts: Cuts | None = None,
) -> Prepared:
    """Encode the prompts and pictures that the steps from `first_step` on and the validation reach, and draw the class
    images that they reach and that are not there. `judged_by`: prompts besides; `cuts`: those of the contact sheet.

    `together`: how many class images the run has begun to draw at once; by default as many as the config allows, fewer
    where memory does not suffice.
    Text encoders that are not trained are released as soon as the prompts are encoded; afterwards
    training does not need the VAE either. Raises Interrupted between two images, NumericError naming a picture whose
    latents are not finite.
    """
    root, run_folder = cache_folder.folder_of(config), config.folder
    with cache_folder.in_use(root, run_folder=run_folder, base=_about(config, family)["base"]):
        needed = {"validation_rows": validation_rows, "first_step": first_step}
        given = (config, family, pictures, needed, judged_by, together, cuts or Cuts())
        prepared = _prepare(*given, report=report, stop=stop)
    cache_folder.trim(root, config.run.cache_limit_gib * 2**30, lambda text: report.event("cache", text))
    return prepared


def _prepare(
    config: Resolved,
    family: Family,
    pictures: Pictures,
    needed: Mapping[str, int],
    judged_by: Sequence[str],
    begun_with: int | None,
    cuts: Cuts,
    *,
    report: Report,
    stop: StopRequest,
) -> Prepared:
    is_offloaded = config.memory.offload_denoiser
    together = begun_with or class_images_at_once(config)
    wanted, reached = _reach(config, family, pictures, together, **needed)
    with denoiser_offloaded(family, is_wanted=is_offloaded):
        texts = [*shown_prompts(config), *sorted(item.prompt for item in reached.items), *judged_by]
        prompts = encode_prompts(config, family, list(dict.fromkeys(texts)), report)
        if not config.adapter.is_text_trained:
            family.release_text_encoders()
    _touch(config, reached.pictures)  # nobody clears it while class images are drawn
    began = time.perf_counter()
    while True:
        try:
            given = (wanted, reached.keys, family, config, prompts)
            drawn, count = class_drawing.draw_missing(*given, together=together, report=report, stop=stop)
            break
        except (RuntimeError, MemoryError) as error:
            if together == 1 or begun_with is not None or not lacks_memory(error):
                raise
        devices.empty_cache(family.device)
        together //= 2  # all of them: fewer together are other pictures, up to rounding
        wanted, reached = _reach(config, family, pictures, together, **needed)
    drawing_seconds = time.perf_counter() - began
    if wanted:
        _tell_drawn(config, len(wanted), len(drawn), count, report)
    with denoiser_offloaded(family, is_wanted=is_offloaded):
        latents = _encode(config, family, reached.pictures, cuts, report=report, stop=stop)
    # As the solver left them: a distribution without width.
    latents |= {name: Moments(found, torch.zeros_like(found)) for name, found in drawn.items()}
    for item in reached.items:
        assert latents[item.latent_key].mean.shape == item.shape, f"latents of {item.name} are not of {item.shape}"
    masked = _masks(config, family, reached.masked)
    return Prepared(reached.order, reached.validation, latents, prompts, drawing_seconds, together, masked)


def _reach(
    config: Resolved, family: Family, pictures: Pictures, together: int, **needed: int
) -> tuple[list[ClassImage], Reach]:
    """The class images that the base draws for the run, `together`, and what of everything its steps reach."""
    fingerprint, root = family.fingerprint, cache_folder.folder_of(config) / "class_images"
    made: dict[str, Any] = {"made_by": class_drawing.made_by(family, config, together), "root": root}
    made |= {"fingerprint": fingerprint, "about": _about(config, family)}
    wanted, shape = reach.class_images_of(config, pictures, **made), family.latent_shape
    found = reach.of(config, pictures, wanted, fingerprint=fingerprint, latent_shape=shape, **needed)
    return wanted, found


def _tell_drawn(config: Resolved, num_wanted: int, num_reached: int, num_new: int, report: Report) -> None:
    steps = config.train.steps
    where = f"in {cache_folder.folder_of(config) / 'class_images'}"
    told = f"{num_wanted} class images"
    if num_reached < num_wanted:
        told = f"{num_reached} of {told} are reached in {steps} steps"
    report.event("class_images", f"{told}, {num_new} of them new, {where}", drawn=num_new)


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


def _encode(
    config: Resolved,
    family: Family,
    pictures: Sequence[TrainingImage],
    cuts: Cuts,
    *,
    report: Report,
    stop: StopRequest,
) -> dict[str, Moments]:
    """Moments of each picture by the key of its latents. Raises Interrupted between two."""
    cache = TensorCache(cache_folder.folder_of(config) / "latents", _about(config, family))
    encoded = {}
    for done, image in enumerate(pictures, start=1):
        stop.check(class_drawing.STOPPED)
        encoded[image.key] = _encode_image(family, cache, image, cuts)
        report.progress("encode images", done, len(pictures))
    for path in cache.damaged:
        report.warn(f"cache file {path} was damaged; it has been made again.")
    return encoded


@torch.no_grad()
def _encode_image(family: Family, cache: TensorCache, image: TrainingImage, cuts: Cuts) -> Moments:
    """Moments of one picture, through the cache."""
    assert image.picture is not None, "what the base draws has latents already"
    stored = cache.get(image.key)
    if stored is None:
        array = cuts.of(image.picture, image.crop)
        array = array[:, ::-1].copy() if image.is_flipped else array
        mean, std = family.encode_images(torch.as_tensor(images.to_pixels(array))[None])
        stored = {"mean": mean[0].cpu(), "std": std[0].cpu()}
        require_finite(stored, f"latents of {image.picture.path.name}")
        cache.put(image.key, stored)
    return Moments(stored["mean"], stored["std"])


def _masks(config: Resolved, family: Family, images: Sequence[TrainingImage]) -> dict[str, Tensor]:
    """How much each latent of the pictures with a mask counts, by mask key."""
    weighed: dict[str, Tensor] = {}
    for image in images:
        assert image.picture is not None and image.picture.mask is not None and image.mask_key is not None
        bucket, background = image.crop.bucket, config.objective.background_weight
        _, height, width = family.latent_shape(bucket.width_px, bucket.height_px)
        cut = torch.from_numpy(masks.crop(masks.read(image.picture.mask), image.crop, (width, height))).float() / 255
        weights = background + (1 - background) * (cut.flip(1) if image.is_flipped else cut)
        if not weights.any():
            raise DataError(
                f"of {image.picture.mask.path.name} nothing is left where its picture is cropped to {bucket}; set "
                "objective.background_weight above 0, or crop the picture to its subject."
            )
        weighed[image.mask_key] = weights[None]
    return weighed


def _touch(config: Resolved, wanted: Sequence[TrainingImage]) -> None:
    """Note that the latents of pictures are used now, where they are there."""
    cache = TensorCache(cache_folder.folder_of(config) / "latents")
    for image in wanted:
        cache.touch(image.key)


def _about(config: Resolved, family: Family) -> dict[str, str]:
    """What `lora-booth cache` tells of what is made here: the base, by name and by its weights."""
    base = config.model.base
    return {"base": Path(base).name if is_local(config.model) else base, "fingerprint": family.fingerprint}
