"""A safetensors file read whole, or written again with some tensors changed.

The new file has the same tensors, types, shapes and offsets; its data section is copied in pieces, and only changed
tensors differ; it is never held in memory. Format: github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_booth.errors import ModelError
from lora_booth.run import headers
from lora_booth.run.headers import Entry
from lora_booth.run.number_types import FLOATS

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Layout:
    """The header of a file. `data_start`: where its data section begins, in bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU; read, not mapped. Raises ModelError where it is no whole safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path, backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no whole safetensors file ({error}); {headers.AGAIN}.") from error
    return tensors


def read_layout(path: Path) -> Layout:
    """The header of a safetensors file. Raises ModelError when it has none or an entry's bytes do not fit its shape."""
    header = headers.read(path)
    for entry in header.entries.values():
        count = entry.end - entry.start
        if entry.dtype in FLOATS and count != prod(entry.shape) * FLOATS[entry.dtype].itemsize:
            told = f"a tensor {entry.dtype} {list(entry.shape)} has {count} bytes"
            raise ModelError(f"{path} is no whole safetensors file ({told}); {headers.AGAIN}.")
    return Layout(path, header.entries, header.metadata, header.data_start)


def rewrite(
    source: Layout,
    target: Path,
    changed: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    metadata: Mapping[str, str],
    copied: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `target`, an existing or new file: `source` with each tensor named in `changed` put through its function.

    A function gets the tensor in its own type, one of FLOATS, and returns one of the same type and shape. `metadata`
    replaces that of the header. `copied` is told the number of bytes written after each piece.
    Memory: one tensor and what its function needs, or 16 MiB. A failure leaves a part of `target`.
    """
    position = 0
    order = sorted(changed, key=lambda key: source.entries[key].start)
    with source.path.open("rb") as reader, target.open("wb") as writer:
        writer.write(_header(source, metadata))
        reader.seek(source.data_start)
        for key in order:
            entry = source.entries[key]
            if entry.start < position:
                raise ModelError(f"{source.path}: {key} shares its bytes with another tensor; save the file again.")
            _copy(reader, writer, entry.start - position, copied)
            tensor = _tensor(reader.read(entry.end - entry.start), entry)
            result = changed[key](tensor)
            assert result.shape == tensor.shape and result.dtype == tensor.dtype, f"{key} changed its shape or type"
            writer.write(result.contiguous().flatten().view(torch.uint8).numpy().data)
            copied(entry.end - entry.start)
            position = entry.end
        _copy(reader, writer, None, copied)


def _header(source: Layout, metadata: Mapping[str, str]) -> bytes:
    """The first bytes of the new file; padded with spaces so that the data begins at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, entry in source.entries.items():
        header[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(data: bytes, entry: Entry) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=FLOATS[entry.dtype]).reshape(entry.shape)


def _copy(reader: BinaryIO, writer: BinaryIO, count: int | None, copied: Callable[[int], None]) -> None:
    """Copy `count` bytes, or all that follow."""
    while count is None or count > 0:
        piece = reader.read(_PIECE_BYTES if count is None else min(count, _PIECE_BYTES))
        if not piece:
            return
        writer.write(piece)
        copied(len(piece))
        count = None if count is None else count - len(piece)
