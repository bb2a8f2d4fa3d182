"""What a run trains on and looks at, and when: known before anything is encoded or drawn.

So a run of 20 steps encodes the pictures of 20 steps, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_booth.config.resolved import Filled
from lora_booth.data.buckets import Crop, assign
from lora_booth.data.images import Picture
from lora_booth.data.subject import Pictures, crops_of, nouns_of, plain_prompt, prompt_of, prompts_in_turn
from lora_booth.training.cache_keys import latent_key, mask_key
from lora_booth.training.class_images import ClassImage, wanted
from lora_booth.training.order import Item, Order, Role, Shape, validation_levels

Validation = tuple[tuple[Item, list[float]], ...]
"""Images with the noise levels at which each is looked at, as shares of all."""


@dataclass(frozen=True)
class TrainingImage:
    """One image on its way to its latents, which `key` names. `picture`: the user's; None where the base draws it."""

    role: Role
    name: str
    key: str
    crop: Crop
    prompt: str
    picture: Picture | None
    is_flipped: bool = False
    plain_prompt: str | None = None
    in_turn: tuple[tuple[str, str | None], ...] = ()

    @property
    def repeats(self) -> int:
        """How often it comes before all come again."""
        return 1 if self.picture is None or self.picture.concept is None else self.picture.concept.repeats

    @property
    def mask_key(self) -> str | None:
        """That of its mask, None where it has none, or where none counts."""
        mask = None if self.picture is None or self.role != "instance" else self.picture.mask
        if mask is None:
            return None
        return mask_key(mask.sha256, self.crop, is_alpha=mask.is_alpha, is_flipped=self.is_flipped)

    def item(self, shape: Shape) -> Item:
        """The same with latents of `shape`, as steps see it."""
        geometry = self.crop.mirrored().geometry if self.is_flipped else self.crop.geometry
        prompts = (self.prompt, geometry, self.plain_prompt)
        return Item(self.role, self.name, self.key, shape, *prompts, self.mask_key, self.in_turn)


@dataclass(frozen=True)
class Reach:
    """`images`: all that a run could train on or look at; `order`: all its steps; `validation`: what every save looks
    at, each with its noise levels; `steps`: those that will be run."""

    images: Sequence[TrainingImage]
    order: Order
    validation: Validation
    steps: range

    @cached_property
    def items(self) -> frozenset[Item]:
        """What is reached of all that, with the prompts that it comes under."""
        return self.order.reached(self.steps) | {item for item, _ in self.validation}

    @cached_property
    def keys(self) -> frozenset[str]:
        """Of the latents of every image that is reached."""
        if self.steps.start or not self.order.has_all(self.steps.stop):
            return frozenset(item.latent_key for item in self.items)
        looked_at = (item for item, _ in self.validation)
        return frozenset(item.latent_key for item in (*self.order.instances, *self.order.classes, *looked_at))

    @property
    def pictures(self) -> list[TrainingImage]:
        """The user's pictures that are reached, each to be encoded once."""
        return list({image.key: image for image in self.images if image.picture and image.key in self.keys}.values())

    @property
    def masked(self) -> list[TrainingImage]:
        """The pictures that are reached and have a mask, each to be read once."""
        found = {image.mask_key: image for image in self.images if image.mask_key and image.key in self.keys}
        return list(found.values())


def of(
    config: Filled,
    pictures: Pictures,
    drawn: Sequence[ClassImage],
    *,
    fingerprint: str,
    latent_shape: Callable[[int, int], Shape],
    validation_rows: int,
    first_step: int = 0,
) -> Reach:
    """What the steps from `first_step` on reach, and the validation of so many rows.

    `drawn`: the class images that the base draws; `fingerprint`: of the base; `latent_shape`: of a picture by its width
    and height in pixels.
    """

    def of_user(role: Role, picture: Picture, crop: Crop, prompt: str, *, is_flipped: bool = False) -> TrainingImage:
        key = latent_key(fingerprint, picture.sha256, crop, is_flipped=is_flipped)
        name = picture.name + (" (mirrored)" if is_flipped else "")
        plain = plain_prompt(config, picture, prompt) if role == "instance" else None
        in_turn = prompts_in_turn(config, picture) if role == "instance" else ()
        return TrainingImage(role, name, key, crop, prompt, picture, is_flipped, plain, in_turn)

    def instances(found: Sequence[Picture], *, is_flipped: bool = False) -> list[TrainingImage]:
        pairs = zip(found, crops_of(config, found), strict=True)
        return [of_user("instance", p, crop, prompt_of(config, p), is_flipped=is_flipped) for p, crop in pairs]

    plain = instances(pictures.instances.pictures)
    both = plain + (instances(pictures.instances.pictures, is_flipped=True) if config.data.flip else [])
    trained = [image for image in both for _ in range(image.repeats)]
    classes = [_drawn(image) for image in drawn]
    if pictures.classes is not None:
        available, templates = sorted({image.crop.bucket for image in plain}), _class_prompts(config, pictures)
        for number, picture in enumerate(pictures.classes.pictures):
            prompt = config.fill(picture.caption) if picture.caption else templates[number % len(templates)]
            crop = assign(picture.width_px, picture.height_px, available)
            classes.append(of_user("class", picture, crop, prompt))
    looked_at = instances(pictures.held_out.pictures) if pictures.held_out else plain

    def items(images: Sequence[TrainingImage]) -> tuple[Item, ...]:
        buckets = [image.crop.bucket for image in images]
        shapes = [latent_shape(bucket.width_px, bucket.height_px) for bucket in buckets]
        return tuple(image.item(shape) for image, shape in zip(images, shapes, strict=True))

    nouns = nouns_of(config, pictures.instances.pictures)
    filled = (caption.replace("{class}", noun) for caption in config.prior.captions for noun in nouns)
    captions = tuple(dict.fromkeys(filled)) if config.has_model_prior else ()
    weight, train = config.prior.loss_weight, config.train
    dropout = config.subject.caption_dropout
    order = Order(items(trained), items(classes), train.images_per_step, weight, train.seed, captions, dropout)
    levels = [validation_levels(number, len(looked_at), validation_rows) for number in range(len(looked_at))]
    validation = tuple(pair for pair in zip(items(looked_at), levels, strict=True) if pair[1])
    return Reach((*trained, *classes, *looked_at), order, validation, range(first_step, train.steps))


def class_images_of(
    config: Filled,
    pictures: Pictures,
    *,
    fingerprint: str = "",
    made_by: Sequence[str | int] = (),
    root: Path = Path(),
    about: Mapping[str, str] | None = None,
) -> list[ClassImage]:
    """The class images that the base draws for a run, none where there are the user's own or it does without.

    The rest says where they lie, as for `class_images.wanted`; without it they can be counted.
    """
    if not config.has_class_images or pictures.classes is not None:
        return []
    sizes = [crop.bucket for crop in crops_of(config, pictures.instances.pictures)]
    made: dict[str, Any] = {"fingerprint": fingerprint, "made_by": made_by, "root": root, "about": about}
    return wanted(config.prior, _class_prompts(config, pictures), sizes, **made)


def _class_prompts(config: Filled, pictures: Pictures) -> list[str]:
    """Those of the class images, in turn for all class nouns."""
    nouns = nouns_of(config, pictures.instances.pictures)
    return [template.replace("{class}", noun) for template in config.prior.prompts for noun in nouns]


def _drawn(image: ClassImage) -> TrainingImage:
    size = image.bucket
    crop = assign(size.width_px, size.height_px, [size])
    return TrainingImage("class", image.path.name, image.name, crop, image.prompt, None)
