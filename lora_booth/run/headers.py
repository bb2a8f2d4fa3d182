"""What stands at the beginning of a safetensors file.

Its tensors' names, types, shapes and places, and its metadata.

What lives here: reading and checking it without torch, within a bound. What does not: the numbers themselves.
Format: github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.config.inputs import reason, require_plain_file, shown_path
from lora_booth.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `start` and `end`: bytes from the beginning of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """`data_start`: where the data section begins, in bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read(path: Path) -> Header:
    """The header of a safetensors file. Raises ModelError when it has none, or another length than its header says."""
    require_plain_file(path, AGAIN, ModelError)
    name = shown_path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(b"version "):
                raise ModelError(f"{name} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository.")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{name} is not a safetensors file, or it is cut off; {AGAIN}.")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({reason(error)}); {AGAIN}.") from error
    try:
        values = json.loads(text)
        metadata = _metadata(values.pop("__metadata__", {}))
        entries = {key: _entry(value) for key, value in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{name} has a broken safetensors header ({reason(error)}); {AGAIN}.") from None
    end = max((entry.end for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(f"{name} has {size} bytes where its header says {8 + length + end}; {AGAIN}.")
    return Header(entries, metadata, 8 + length)


def data_start(content: bytes) -> int:
    """Where the data begin in a safetensors file's bytes."""
    return 8 + int.from_bytes(content[:8], "little")


def unchecked(content: bytes) -> dict[str, Any]:
    """The header in the bytes of a safetensors file, as it stands there. Raises ValueError when it is no JSON."""
    values: dict[str, Any] = json.loads(content[8 : data_start(content)])
    return values


def _entry(value: Any) -> Entry:
    start, end = value["data_offsets"]
    numbers = [*value["shape"], start, end]
    if not isinstance(value["dtype"], str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor has an odd type, shape or place")
    if start > end:
        raise ValueError("a tensor ends before it begins")
    return Entry(value["dtype"], tuple(value["shape"]), start, end)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata are no words")
    return value
