"""An adapter of a file or a run, written in the formats that programs load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_booth.adapter import kept
from lora_booth.adapter.delivery import SUFFIX, Delivery, WeightOf, forms, tell_use, tell_word, write_files
from lora_booth.adapter.files import embedding, storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.files.family import family_of
from lora_booth.adapter.files.metadata import base_fields, carried, prediction_of
from lora_booth.adapter.weights import AnyWeights, find_module
from lora_booth.config import inputs, names
from lora_booth.config.toml import base_named
from lora_booth.errors import ConfigError, DataError, ModelError
from lora_booth.models import loading
from lora_booth.models.families.components import load_component
from lora_booth.run.report import Report, Silent


@torch.no_grad()
def export(
    *,
    file: Path,
    out: Path | None = None,
    formats: Sequence[str] = ("kohya", "diffusers"),
    dtype: str = "fp16",
    name: str | None = None,
    trigger: str | None = None,
    cover: Path | None = None,
    base: str | None = None,
    leave_out: Sequence[str] = (),
    step: str | None = None,
    report: Report | None = None,
) -> dict[str, Path]:
    """Write the adapter in `file` in other formats or another type, with its header, and tell what programs will do.

    `file` may be a run folder, or a checkpoint of one; `step`: which of its kept ones, "best", "last" or a number.
    `out` and `name`: default those of `file`; existing files are not replaced. `base`: needed for the portable form of
    DoRA, and where the file does not tell its family. `leave_out`: as in storage.contents.
    Raises ConfigError, ModelError and DiskError.
    """
    report = report or Silent()
    storage.require_choices(formats, dtype)
    if name is not None:
        names.require(name, "--name")
    read, word, header, own_name, folder = _source(file, step, leave_out, report)
    name = own_name if name is None else name
    weights, family = storage.low_rank(file.name, read), _family(file, read, header, base)
    trigger = header.get("modelspec.trigger_phrase", "") if trigger is None else trigger
    fields = base_fields(family, prediction_of(header), name) | carried(header)
    fields |= {"modelspec.title": name, "ss_output_name": name}
    fields |= {"modelspec.trigger_phrase": trigger} if trigger else {}
    picture = None if cover is None else _open(cover)
    delivered = Delivery(out or folder, name, family, fields, dtype, trigger, picture, word)
    _refuse_existing(delivered, formats, file)
    paths = write_files(delivered, forms(formats, weights, _weights_of(base, file), report), report)
    for format_name, path in paths.items():
        report.event("exported", f"{format_name} file: {path}", path=str(path))
        if format_name != "embedding":
            tell_use(path, format_name, delivered, report)
        else:
            tell_word(path, report, has_adapter=len(paths) > 1)
    return paths


def _source(
    file: Path, step: str | None, leave_out: Sequence[str], report: Report
) -> tuple[AnyWeights, Embedding | None, dict[str, str], str, Path]:
    """Weights, learnt word and header of `file`, or of a checkpoint of the run that it is, and what is written by
    default: its name and folder."""
    found = kept.find(file, step)
    if found is not None:
        report.event("checkpoint", found.told)
        weights: AnyWeights = {component: {**layers} for component, layers in found.weights.items()}
        return weights, found.word, found.header, found.name, found.folder
    if step is not None:
        raise ConfigError(f"--step {step} chooses a checkpoint of a run, but {file} is no run folder; leave it out.")
    name = file.stem.removesuffix(SUFFIX["diffusers"])
    embedding.remind([file], report)
    return storage.read_all([file], leave_out, report)[0], None, storage.read_metadata(file), name, file.parent


def _weights_of(base: str | None, file: Path) -> WeightOf:
    """The layers of a base, loaded when first asked for."""
    loaded = {}

    def weight_of(component: str, path: str) -> Tensor:
        if base is None:
            raise ModelError(
                f"{file.name} is DoRA, whose portable form depends on the base's weights; name the base with --base, "
                "or export the diffusers format alone."
            )
        if component not in loaded:
            loaded[component] = load_component(loading.facts(base_named(base)), component)
        return find_module(loaded[component], path).get_parameter("weight")

    return weight_of


def _family(file: Path, weights: AnyWeights, header: dict[str, str], base: str | None) -> str:
    """The family of the adapter: what it tells itself, which `base` must agree with; else that of `base`."""
    told = family_of(weights, header)
    if base is not None:
        family: str = loading.facts(base_named(base)).family
        if told not in (None, family):
            raise ModelError(
                f"{file.name} is of {told}, but --base {base} is of {family}; name the base it was made for."
            )
        return family
    if told is None:
        raise ModelError(f"{file.name} does not tell which family it is of; name its base with --base.")
    return told


def _refuse_existing(delivery: Delivery, formats: Sequence[str], file: Path) -> None:
    paths = [delivery.path(name) for name in formats]
    paths += [] if delivery.word is None else [delivery.folder / delivery.word.file_name]
    if "kohya" in formats:
        portable = delivery.path("kohya")
        paths += [portable.with_suffix(".json")] + ([portable.with_suffix(".png")] if delivery.cover else [])
    for path in paths:
        if os.path.lexists(path):
            which = "the source itself" if path.exists() and path.samefile(file) else "there already"
            raise ConfigError(f"{path} is {which} and is not replaced; choose another --name or --out.")


def _open(cover: Path) -> Image.Image:
    inputs.require_plain_file(cover, "give --cover a PNG, JPEG or WebP file", DataError)
    try:
        with Image.open(cover, formats=("PNG", "JPEG", "WEBP")) as picture:
            picture.load()
            return picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"--cover {cover} cannot be read as a picture ({error}); give a PNG, JPEG or WebP file."
        ) from error
