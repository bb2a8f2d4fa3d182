"""The files of an adapter that are handed to the user.

They are the adapter in every format asked for, the word that was learnt, what programs show beside the adapter, and
what each program will do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_booth.adapter.decompose import approximate, tell_errors
from lora_booth.adapter.files import embedding, kohya, storage
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.adapter.files.metadata import network_fields
from lora_booth.adapter.files.sidecar import cover_fields, write_cover, write_sidecar
from lora_booth.adapter.programs.verdicts import tell_programs
from lora_booth.adapter.weights import AdapterWeights, uses_dora, weight_change
from lora_booth.run import disk
from lora_booth.run.report import Report

SUFFIX = {"kohya": "", "diffusers": "_diffusers"}
"""What follows the name in each format's file; the portable file, which people hand on, has the plain name."""
DORA_RANK_FACTOR = 2
"""Rank of the portable form of a DoRA layer over its own: it must also hold how the rows were rescaled."""

WeightOf = Callable[[str, str], Tensor]
"""Component and module path to the base's weight of that layer."""


@dataclass(frozen=True)
class Delivery:
    """What is handed over. `folder`: where; `name`: of the files, without ending; `header`: without hashes.

    `trigger`: what a prompt must say, "" where that is not known; `cover`: a picture made with the adapter; `word`:
    that which was learnt as vectors, and has a file of its own.
    """

    folder: Path
    name: str
    family: str
    header: dict[str, str]
    dtype: str
    trigger: str = ""
    cover: Image.Image | None = None
    word: Embedding | None = None

    def path(self, format_name: str) -> Path:
        """The file of a format."""
        return self.folder / f"{self.name}{SUFFIX[format_name]}.safetensors"


@torch.no_grad()
def forms(
    formats: Sequence[str], weights: AdapterWeights, weight_of: WeightOf, report: Report
) -> dict[str, AdapterWeights]:
    """What each format can hold of `weights`; none where a word alone was learnt.

    DoRA has no form that every program reads: for "kohya" each of its layers becomes the nearest plain LoRA of twice
    the rank, and the error is told.
    """
    if not any(weights.values()):
        return {}
    return {name: _portable(weights, weight_of, report) if name == "kohya" else weights for name in formats}


def bodies(delivery: Delivery, forms: Mapping[str, AdapterWeights]) -> dict[str, bytes]:
    """Format to the bytes of its file without metadata, made once. Raises as `storage.Format.body` does."""
    dtype = storage.DTYPES[delivery.dtype]
    return {
        name: storage.FORMATS[name].body(delivery.path(name).name, weights, delivery.family, dtype)
        for name, weights in forms.items()
    }


def write_files(
    delivery: Delivery, forms: Mapping[str, AdapterWeights], report: Report, made: Mapping[str, bytes] | None = None
) -> dict[str, Path]:
    """Write `forms`, format to weights, the sidecar and cover of the portable one, and the word's file; returns the
    paths by format, that of the word as "embedding".

    `made`: what `bodies` gave. Raises ModelError, NumericError and DiskError as `storage.Format.write` does. Nothing is
    written before every format has taken the adapter.
    """
    header, dtype = delivery.header, storage.DTYPES[delivery.dtype]
    if delivery.cover is not None:
        header = header | cover_fields(delivery.cover)
    made = bodies(delivery, forms) if made is None else made
    contents = {}
    if delivery.word is not None:
        learnt = embedding.content(delivery.word, delivery.family)
        contents[delivery.folder / delivery.word.file_name] = learnt
        header = header | embedding.beside(delivery.word, learnt)
    for name, weights in forms.items():
        fields, file = header | network_fields(weights), delivery.path(name)
        contents[file] = storage.FORMATS[name].content(file.name, made[name], fields)
    for file, content in contents.items():
        disk.write_bytes(file, content)
    if "kohya" in forms:
        path = delivery.path("kohya")
        description = header.get("modelspec.description", "")
        write_sidecar(path, family=delivery.family, trigger=delivery.trigger, description=description)
        if delivery.cover is not None:
            write_cover(path, delivery.cover)
        for fault in kohya.faults(forms["kohya"], delivery.family, dtype):
            report.warn(fault)
    words = {} if delivery.word is None else {"embedding": delivery.folder / delivery.word.file_name}
    return {name: delivery.path(name) for name in forms} | words


def tell_word(path: Path, report: Report, *, has_adapter: bool) -> None:
    """Where the file of a learnt word goes, and how prompts call it."""
    for program, (place, written) in embedding.PLACE.items():
        report.event("word", f"{program}: {path.name} {place}; a prompt says {written.format(word=path.stem)}")
    if has_adapter:
        report.event("word", "both files belong together: without its word the adapter is half of what was trained")


def tell_use(path: Path, format_name: str, delivery: Delivery, report: Report) -> None:
    """Where the file goes and what each program it is meant for makes of it; and what a prompt must say."""
    tell_programs(path, delivery.family, report, only=None if format_name == "kohya" else ("diffusers",))
    if delivery.trigger and format_name == "kohya":
        report.event("trigger", f'write "{delivery.trigger}" in the prompt; strength 1 is as trained')


def _portable(weights: AdapterWeights, weight_of: WeightOf, report: Report) -> AdapterWeights:
    """`weights` with plain layers in place of DoRA's."""
    if not uses_dora(weights):
        return weights
    parts = {
        component: {
            path: approximate(weight_change(weight_of(component, path), low), rank=DORA_RANK_FACTOR * low.rank)
            if low.magnitude is not None
            else approximate(low, rank=low.rank)
            for path, low in layers.items()
        }
        for component, layers in weights.items()
    }
    report.event("dora", "DoRA has no form that all programs read; the portable file is its nearest plain LoRA:")
    tell_errors(parts, report)
    return {component: {path: part.low_rank for path, part in layers.items()} for component, layers in parts.items()}
