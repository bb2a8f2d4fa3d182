"""Adapter files written in each format, and read without trusting them.

A format is one module with `to_tensors`, and a line in FORMATS; its spelling is read by `keys.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_booth.adapter.files import diffusers, kohya
from lora_booth.adapter.files.keys import naming_of, parse
from lora_booth.adapter.files.metadata import (
    MAX_HEADER_BYTES,
    SCALES_FIELD,
    Facts,
    metadata,
    trigger_words,
    with_metadata,
)
from lora_booth.adapter.files.reading import LEAVABLE, gather, kept, require_no_stranger, strictly
from lora_booth.adapter.weights import VECTORS, AdapterWeights, AnyWeights, Dense, LowRank, nonfinite
from lora_booth.config.inputs import read_object, require_plain_file, shown, why_unreadable
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run import disk, headers
from lora_booth.run.number_types import DTYPES
from lora_booth.run.report import Report

__all__ = [
    "DTYPES",
    "FORMATS",
    "Contents",
    "Facts",
    "Format",
    "contents",
    "detect",
    "low_rank",
    "metadata",
    "opened",
    "read",
    "read_all",
    "read_any",
    "read_metadata",
    "require_choices",
    "require_matrices",
    "trigger_words",
]


@dataclass(frozen=True)
class Format:
    """One way to name an adapter's tensors."""

    to_tensors: Callable[[AdapterWeights, str, torch.dtype], dict[str, Tensor]]
    """(weights, family, dtype) to the file's tensors."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What every file of the format says in its header."""

    def write(
        self, path: Path, weights: AdapterWeights, family: str, dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        """Write `path`, whole or not at all, with `metadata` and the hashes of the data in the header.

        Raises ModelError when the format cannot hold the adapter, NumericError when the adapter is not finite,
        DiskError when the file cannot be written.
        """
        disk.write_bytes(path, self.content(path.name, self.body(path.name, weights, family, dtype), metadata))

    def body(self, name: str, weights: AdapterWeights, family: str, dtype: torch.dtype) -> bytes:
        """What `write` writes into a file of that `name`, without metadata. Raises as it does, but no DiskError."""
        tensors = self.to_tensors(weights, family, dtype)
        if not tensors:
            raise ModelError(f"{name} would be empty: the adapter has no layers.")
        return save(tensors)

    def content(self, name: str, body: bytes, metadata: Mapping[str, str]) -> bytes:
        """`body` with `metadata` and hashes in its header. Raises ModelError when that is too long for programs."""
        content = with_metadata(body, {**metadata, **self.fields})
        header = headers.data_start(content) - 8
        if header > MAX_HEADER_BYTES:
            raise ModelError(
                f"The header of {name} would take {header} bytes, and ComfyUI reads {MAX_HEADER_BYTES}; shorten "
                "the metadata."
            )
        return content


FORMATS = {
    "diffusers": Format(
        lambda weights, family, dtype: diffusers.to_tensors(weights, dtype), {SCALES_FIELD: "multiplied into lora_B"}
    ),
    "kohya": Format(kohya.to_tensors),
}
"""Values of `export.formats`: what can be written."""

STORED = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Types, as safetensors calls them, that hold the numbers of an adapter; a single number may have any that is real."""
REAL = (*STORED, "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


def require_choices(formats: Sequence[str] | None, dtype: str | None) -> None:
    """Raises ConfigError when a format or the type that a verb's flags name is unknown, or no format is named.

    None, for either: as in the source.
    """
    for name in (formats or [""]) if formats is not None else []:
        if name not in FORMATS:
            raise ConfigError(f'--format "{name}" is unknown; use {" or ".join(FORMATS)}.')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'--dtype "{dtype}" is unknown; use one of {", ".join(DTYPES)}.')


@dataclass(frozen=True)
class Contents:
    """What a file holds: its naming, layers in float32 on the CPU, header, and what is wrong.

    `naming`: "kohya", "diffusers", "peft" or "comfyui". `dtypes`: type, as "F16", to the count of tensors that have it.
    `faults`: one sentence each; layers with a fault are not among `weights`, except those that are not finite.
    `left_out`: word to the keys that it named.
    """

    naming: str
    weights: AnyWeights
    header: dict[str, str]
    dtypes: dict[str, int]
    faults: tuple[str, ...]
    left_out: dict[str, list[str]]


def contents(path: Path, leave_out: Sequence[str] = ()) -> Contents:
    """Everything in an adapter file of any naming and kind, sound or not; for telling about it, not for using it.

    `leave_out`: words of reading.LEAVABLE or beginnings of keys or layers, which are passed over.
    Nothing in the file is executed. Raises ModelError when it is missing, a pickle, cut off, of no known naming, or for
    another model, and where nothing is left of it.
    """
    with opened(path) as file:
        keys = list(file.keys())
        naming, header = _naming_of(path, keys), dict(file.metadata() or {})
        wanted, left = kept(keys, leave_out)
        if not wanted:
            raise ModelError(f"Nothing is left of {path.name} without {', '.join(leave_out)}; leave out less.")
        dtypes = {key: str(file.get_slice(key).get_dtype()) for key in wanted}
        faults = _type_faults({key: (dtypes[key], file.get_slice(key).get_shape()) for key in wanted})
        tensors = {} if faults else {key: file.get_tensor(key) for key in wanted}
    weights: AnyWeights = {}
    if not faults:
        weights, faults = gather(tensors, diffusers.scale_from(_beside(path) if naming == "peft" else header))
    broken = nonfinite(weights)
    if broken:
        faults.append(
            f"{path.name} holds NaN or infinity in {len(broken)} layers, first {broken[0]}; its training diverged. Use "
            "an earlier checkpoint."
        )
    return Contents(naming, weights, header, dict(Counter(dtypes.values())), tuple(faults), left)


def read_any(path: Path, leave_out: Sequence[str] = ()) -> AnyWeights:
    """The adapter in a sound file of any naming and kind, float32 on the CPU; `leave_out` as in `contents`.

    Raises ModelError when it is missing, a pickle, damaged, of no known naming or kind, half an adapter, or not finite.
    """
    return _sound(path, contents(path, leave_out))


def read_all(paths: Sequence[Path], leave_out: Sequence[str], report: Report) -> list[AnyWeights]:
    """`read_any` of each file; what is left out is told. Raises ConfigError too, for a word that names nothing."""
    if any(not word for word in leave_out):
        raise ConfigError(f"--leave-out has an empty word; use {', '.join(LEAVABLE)} or the beginning of a key.")
    read, used = [], set()
    for path in paths:
        found = contents(path, leave_out)
        read.append(_sound(path, found))
        for word, keys in found.left_out.items():
            if keys:
                used.add(word)
                report.warn(f"{path.name} is used without {len(keys):,} keys ({shown(word)}), first {shown(keys[0])}.")
    for word in leave_out:
        if word not in used and word not in LEAVABLE:
            raise ConfigError(
                f'--leave-out "{shown(word)}" names nothing in the files; use {", ".join(LEAVABLE)} or the beginning '
                "of a key or of a layer's name, as `lora-booth inspect` tells them."
            )
    return read


def read(path: Path) -> AdapterWeights:
    """The adapter in a sound file, float32 on the CPU. Raises ModelError as `read_any` and `trainable` do."""
    return trainable(path.name, read_any(path))


def trainable(name: str, weights: AnyWeights) -> AdapterWeights:
    """`weights` of the adapter file `name` as what PEFT computes: plain LoRA, or DoRA over the outputs.

    Raises ModelError for other kinds.
    """
    found = low_rank(name, weights)
    for component, layers in found.items():
        for module, update in layers.items():
            if update.over_inputs:
                raise ModelError(
                    f"{name} is DoRA over the inputs at {component}.{module}, as LyCORIS and OneTrainer write it, "
                    "which PEFT cannot compute: `lora-booth merge --base` merges it into a base, `lora-booth resize "
                    "--base` makes a plain LoRA of it."
                )
    return found


def low_rank(name: str, weights: AnyWeights) -> AdapterWeights:
    """`weights` of the adapter file `name` as the low-rank ones that they are. Raises ModelError for other kinds."""
    require_matrices(name, weights)
    found: AdapterWeights = {}
    for component, layers in weights.items():
        for module, update in layers.items():
            if not isinstance(update, LowRank):
                raise ModelError(
                    f"{name} is {update.kind} at {component}.{module}, which cannot be used here; "
                    f"`lora-booth resize {name} --rank 16` makes a plain LoRA of it."
                )
            found.setdefault(component, {})[module] = update
    return found


def require_matrices(name: str, weights: AnyWeights) -> None:
    """Raise ModelError, naming them all, when the file `name` changes vectors, which no LoRA can hold."""
    found: dict[str, list[str]] = {}
    for component, layers in weights.items():
        for path, update in layers.items():
            if isinstance(update, Dense) and update.kind in VECTORS:
                found.setdefault(update.kind, []).append(f"{component}.{path}")
    if found:
        found = {kind: found[kind] for kind in VECTORS if kind in found}
        told = " and ".join(f"{len(names)} {LEAVABLE[kind]}, first {names[0]}" for kind, names in found.items())
        raise ModelError(
            f"{name} also changes {told}, which no LoRA can hold. To go on without them, export, generate, "
            f"merge and resize take --leave-out {','.join(found)}; `lora-booth merge --base` takes them all."
        )


def detect(path: Path) -> str:
    """What a user calls the naming of a file, as in Contents. Raises ModelError as `contents` does."""
    with opened(path) as file:
        return _naming_of(path, list(file.keys()))


def read_metadata(path: Path) -> dict[str, str]:
    """The header's fields; empty when there are none. Raises ModelError as `contents` does."""
    with opened(path) as file:
        return dict(file.metadata() or {})


def _sound(path: Path, found: Contents) -> AnyWeights:
    try:
        return strictly(found.weights, found.faults)
    except ModelError as error:
        raise ModelError(str(error) if path.name in str(error) else f"{path.name}: {error}") from error


def _type_faults(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> list[str]:
    """One sentence for each type that cannot be the numbers of an adapter; `tensors`: key to type and shape."""
    strange: dict[str, list[str]] = {}
    for key, (dtype, shape) in tensors.items():
        if dtype not in (REAL if prod(shape) == 1 else STORED):
            strange.setdefault(dtype, []).append(key)
    return [
        f"{keys[0]} is stored as {dtype}, and so are {len(keys) - 1} others, which cannot be read as an adapter's "
        "numbers; ask its author for a file in fp16, bf16 or fp32."
        for dtype, keys in strange.items()
    ]


def _beside(path: Path) -> dict[str, str]:
    """What PEFT's adapter_config.json beside `path` says of scales. Raises ModelError when there is none."""
    config = path.with_name("adapter_config.json")
    remedy = "put it there" if why_unreadable(config) else "save the adapter again"
    why = f"{path.name} is in PEFT's naming, whose strength stands in adapter_config.json beside it"
    return diffusers.peft_metadata(read_object(config, f"{why}; {remedy}", ModelError))


def _naming_of(path: Path, keys: Sequence[str]) -> str:
    if not keys:
        raise ModelError(f"{path.name} holds no tensors, so it is no adapter.")
    try:
        require_no_stranger(keys)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error
    parsed = (parse(key) for key in keys)
    found = next((key for key in parsed if key and key.spelling != "unknown"), None) or next(
        (key for key in map(parse, keys) if key), None
    )
    if found is not None:
        return naming_of(found.spelling)
    raise ModelError(
        f"{path.name} is no LoRA in kohya, diffusers, PEFT or ComfyUI naming; its first key is {shown(keys[0])}. A "
        "full model or a checkpoint of a run is something else; a learnt word (an embedding) is used as it is."
    )


def opened(path: Path) -> safe_open:
    """The file, open; tensors are read, not mapped, which would hold the file on Windows as long as one of them lives.

    Raises ModelError when it is no safetensors file.
    """
    require_plain_file(path, "check the path", ModelError)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ModelError(f"{path} could not be read: {error.strerror}; check the path.") from error
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        if start.startswith((b"PK\x03\x04", b"\x80")):  # asked last: a header's length may begin with 0x80 too
            raise ModelError(
                f"{path.name} is a pickle, which can run any program when it is opened, so it is not read; ask its "
                "author for a .safetensors file."
            ) from error
        raise ModelError(f"{path.name} is not a whole safetensors file ({error}); fetch or export it again.") from error
