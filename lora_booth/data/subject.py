"""The pictures of one run: their folders, how they are cut, and their prompts.

No torch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_booth.config.config import Config, slot_faults, without_token
from lora_booth.config.resolved import Filled
from lora_booth.data import concepts, images
from lora_booth.data.buckets import Crop, assign, buckets
from lora_booth.data.images import Found, Picture, shown
from lora_booth.errors import DataError
from lora_booth.run.report import Report

MIN_PICTURES = 3
MAX_FACTORIAL = 6
"""Tags of which all orders are counted: 720 are more than anybody may ask for."""
WORDS = "{token} {class}"
SLOTS = ("token", "class")
"""What captions may hold in braces."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of the user's that a run reads, found and checked but not kept in memory."""

    instances: Found
    classes: Found | None
    held_out: Found | None

    @property
    def all(self) -> list[Found]:
        """Those that there are."""
        return [found for found in (self.instances, self.classes, self.held_out) if found is not None]

    def hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of pictures and of their captions, each by file name: what a run's result depends on."""
        found = {"": self.instances, "class_": self.classes, "held_out_": self.held_out}
        groups: dict[str, dict[str, str]] = {}
        for kind, of in found.items():
            pictures = of.pictures if of is not None else ()
            groups[f"{kind}pictures"] = {p.name: p.sha256 for p in pictures}
            captions = {f"{p.name.removesuffix(p.path.suffix)}.txt": p.caption for p in pictures if p.caption}
            groups[f"{kind}captions"] = {k: hashlib.sha256(v.encode()).hexdigest() for k, v in captions.items()}
            drawn = {p.name: p.mask.sha256 for p in pictures if p.mask is not None}
            groups |= {f"{kind}masks": drawn} if drawn else {}  # older runs have no such group
        return groups


def find_pictures(config: Config, report: Report) -> Pictures:
    """Look at every folder of pictures that the config names, and tell what was left out or looks odd.

    Raises DataError for a folder without pictures, when there are too few of the subject, and for captions with a slot
    that would be trained as it stands.
    """

    masked_by, more = config.subject.masks, f"Put {MIN_PICTURES} or more pictures there"

    def found_in(folder: Path | None, remedy: str, **changed: Any) -> Found | None:
        if folder is None:
            return None
        captions = config.subject.captions == "files"
        settings = {"max_megapixels": config.data.max_megapixels, "masked_by": masked_by, **changed}
        found = images.find(folder, captions=captions, remedy=remedy, **settings)
        for fault in found.left_out:
            report.warn(f"left out: {fault}")
        for fault in found.warnings:
            report.warn(str(fault))
        return found

    found = found_in(config.subject.images, more, concepts_are_used=True)
    assert found is not None
    parts, has_plain = [found], bool(found.pictures)
    for path, concept in concepts.in_folder(config.subject.images).items():
        found = found_in(path, more)
        assert found is not None
        parts.append(replace(found, pictures=tuple(replace(picture, concept=concept) for picture in found.pictures)))
        report.event("concept", f"{shown(path)}: {len(found.pictures)} pictures of {concept.fill(WORDS)}")
        if has_plain:
            report.warn(
                f"sub-folder {shown(path)} beside the pictures in {config.subject.images} is taken for another "
                f'subject, "{concept.fill(WORDS)}"; rename it if it is none.'
            )
    instances = _together(parts)
    _require_named(config, instances)
    if len(instances.pictures) < MIN_PICTURES:
        raise DataError(
            f"subject.images {config.subject.images} has {len(instances.pictures)} usable pictures, at least "
            f"{MIN_PICTURES} are needed; add some."
        )
    if instances.is_background_shared and not any(p.caption or p.mask for p in instances.pictures):
        report.warn(
            f"the pictures in {config.subject.images} share their background and have neither captions nor masks, so "
            "it will be learnt as a part of the subject; name it in captions, or mask it (docs/guide.md)."
        )
    own = config.prior.folder if config.has_class_images else None
    classes = found_in(own, "Leave prior.folder out, or put pictures of its class there", masked_by="off")
    held_out = found_in(
        config.subject.held_out, "Leave subject.held_out out, or put other pictures of the subject there"
    )
    pictures = Pictures(instances, classes, held_out)
    written = [p for found in pictures.all for p in found.pictures if p.caption]
    faults = [fault for p in written for fault in slot_faults(str(p.path.with_suffix(".txt")), p.caption or "", SLOTS)]
    if faults:
        raise DataError("\n".join([*faults[:5], *([f"and {len(faults) - 5} more"] if len(faults) > 5 else [])]))
    return pictures


def _together(parts: Sequence[Found]) -> Found:
    """The pictures of several folders as those of one."""
    if len(parts) == 1:
        return parts[0]
    pictures, left_out, warnings = (
        tuple(item for part in parts for item in getattr(part, name)) for name in ("pictures", "left_out", "warnings")
    )
    return Found(pictures, left_out, warnings, any(part.is_background_shared for part in parts))


def _require_named(config: Config, instances: Found) -> None:
    """Raises DataError where [subject] names none of several subjects, or one of them would have to be learnt as a word
    beside it."""
    told = {picture.concept.fill(WORDS): picture.concept for picture in instances.pictures if picture.concept}
    if told and not any(is_own(config, picture) for picture in instances.pictures):
        first = next(iter(told.values()))
        raise DataError(
            f'"{config.fill(WORDS)}" is none of the subjects in {config.subject.images}: {", ".join(told)}. Set '
            f'subject.token and subject.class_noun to those that are measured, as "{first.token}" and '
            f'"{first.class_noun}".'
        )
    if config.adapter.embedding != "none" and {one.token for one in told.values()} - {config.subject.token}:
        raise DataError(
            f'adapter.embedding is "{config.adapter.embedding}", and one word alone can be learnt as vectors, but '
            f"{config.subject.images} has several: {', '.join(told)}. Train them one by one."
        )


def is_own(config: Config, picture: Picture) -> bool:
    """Whether an instance image shows what [subject] names, and not another one of several subjects."""
    return picture.concept is None or picture.concept.fill(WORDS) == config.fill(WORDS)


def nouns_of(config: Config, pictures: Sequence[Picture]) -> list[str]:
    """The class nouns of all subjects."""
    nouns = [config.subject.class_noun if p.concept is None else p.concept.class_noun for p in pictures]
    return list(dict.fromkeys(nouns))


def tell_small(config: Filled, pictures: Pictures, report: Report) -> None:
    """Warn of each picture that has to be enlarged."""
    for found in pictures.all:
        for picture, crop in zip(found.pictures, crops_of(config, found.pictures), strict=True):
            if crop.enlargement > 1:
                size = f"{picture.width_px}×{picture.height_px}"
                report.warn(
                    f"{shown(picture.path)} has {size} pixels and is enlarged {crop.enlargement:.1f} times, to "
                    f"{crop.bucket}, so it will look soft; take a larger one, or lower data.resolution."
                )


def crops_of(config: Filled, pictures: Sequence[Picture]) -> list[Crop]:
    """The crop of each picture under the buckets of the config."""
    data = config.data
    available = buckets(data.resolution, data.bucket_step, data.max_aspect)
    return [assign(picture.width_px, picture.height_px, available) for picture in pictures]


def shown_prompts(config: Config) -> list[str]:
    """The prompts of previews, and the empty one."""
    return [config.fill(text) for text in ("", config.preview.negative_prompt, *config.preview.prompts)]


def prompt_of(config: Config, picture: Picture) -> str:
    """The prompt of an instance image."""
    return _filler(config, picture)(picture.caption or config.subject.prompt)


def _filler(config: Config, picture: Picture) -> Callable[[str], str]:
    return config.fill if picture.concept is None else picture.concept.fill


def plain_prompt(config: Config, picture: Picture, prompt: str) -> str | None:
    """A prompt of an instance image with the token left out; None where it has none, so that nothing would differ."""
    plain = without_token(prompt, config.subject.token if picture.concept is None else picture.concept.token)
    return plain if plain != prompt else None


def prompts_in_turn(config: Config, picture: Picture) -> tuple[tuple[str, str | None], ...]:
    """What an instance image may come under, each with its plain prompt; empty where that is its own prompt alone."""
    subject = config.subject
    if picture.caption:
        texts = tag_orders(picture.caption, subject.tag_orders, kept=subject.kept_tags, seed=config.train.seed)
    else:
        texts = (subject.prompt, *subject.templates)
    prompts = [_filler(config, picture)(text) for text in texts]
    return tuple((prompt, plain_prompt(config, picture, prompt)) for prompt in prompts) if len(prompts) > 1 else ()


def tag_orders(caption: str, num_orders: int, *, kept: int, seed: int) -> tuple[str, ...]:
    """A caption of tags, between commas, in so many orders, or as many as there are; the first is its own, and the
    first `kept` tags stay where they are."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    first, rest = tags[:kept], list(dict.fromkeys(tags[kept:]))
    num_orders = min(num_orders, math.factorial(min(len(rest), MAX_FACTORIAL)))
    drawn, found = random.Random(f"{seed} tags {caption}"), {caption: None}
    orders = {tuple(rest)}
    while len(orders) < num_orders:
        order = tuple(drawn.sample(rest, len(rest)))
        found |= {} if order in orders else {", ".join([*first, *order]): None}
        orders.add(order)
    return tuple(found)
