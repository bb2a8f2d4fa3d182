"""Where user input enters: words, paths and small files of any shape.

What comes out is safe to work with.

What lives here: whether a word can be a word, whether a path is a plain file that can be read at all, and reading small
files whole, within a bound. What does not: what the words and files mean.

A plain file is asked for by its kind before it is opened, since opening a named pipe waits for a writer for ever, and a
device never ends. Links are followed; one that leads nowhere, or in a circle, is told as such.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from lora_booth.errors import ConfigError, LoraBoothError

MAX_BYTES = 16 * 2**20
"""Of a small file that is read whole: a config, a vocabulary, the state of a run. The largest real one has 4 MB."""
MAX_SHOWN = 80
"""Characters of a user's word that a message repeats."""
MAX_PATH = 1000
"""Of a path in a message; real ones are shorter."""
MISSING = "it is missing"
"""What `why_unreadable` says of a path where nothing is."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def shown(text: object, *, max_letters: int = MAX_SHOWN) -> str:
    """`text` as a message repeats it: printable, on one line, cut where it is long."""
    try:
        letters = str(text)[: max_letters + 1]
    except ValueError:
        letters = "a number of thousands of digits"  # which Python does not spell, since that takes for ever
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in letters)
    return plain if len(plain) <= max_letters else plain[: max_letters - 1] + "…"


def shown_path(path: Path) -> str:
    """`path` as a message repeats it: as `shown`, and whole, since the name that matters stands at its end."""
    return shown(path, max_letters=MAX_PATH)


def word(text: str, name: str) -> str:
    """`text` itself. Raises ConfigError, naming `name`, when it is not UTF-8 or holds a NUL, which no file can hold."""
    if "\0" in text:
        raise ConfigError(f'{name} "{shown(text)}" holds a NUL character; leave it out.')
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python reads a byte that is not UTF-8
        raise ConfigError(f'{name} "{shown(text)}" is not UTF-8; write it so, or rename the file.')
    return text


def require_number(value: float, name: str, low: float, high: float) -> None:
    """Raises ConfigError, naming `name`, when `value` is NaN or does not lie from `low` to `high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name} is {shown(value)}; give a number from {low:g} to {high:g}.")


def why_unreadable(path: Path) -> str | None:
    """Why `path` is no plain file that can be opened, in one clause ("it is a folder"); None when it is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"it is a link to {shown(os.readlink(path))}, which is missing" if path.is_symlink() else MISSING
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return reason(error)
    return next((f"it is {kind}" for is_kind, kind in _KINDS if is_kind(mode)), None)


def is_plain_file(path: Path) -> bool:
    """Whether `path` is a plain file, links followed; never raises."""
    return why_unreadable(path) is None


def require_plain_file(path: Path, remedy: str, error: type[LoraBoothError]) -> Path:
    """`path` itself. Raises `error` with `remedy` (what to do, one clause) when it is no plain file."""
    why = why_unreadable(path)
    if why is not None:
        raise error(f"{shown_path(path)} cannot be read: {why}; {remedy}.")
    return path


def read_text(
    path: Path, remedy: str, error: type[LoraBoothError], *, max_bytes: int = MAX_BYTES, errors: str = "strict"
) -> str:
    """The UTF-8 text of a small plain file. Raises `error`, with the path, why, and `remedy`, for anything else.

    `errors`: as `bytes.decode` has it, what is done about bytes that are no UTF-8.
    """
    require_plain_file(path, remedy, error)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes >> 20} MiB")
        return data.decode("utf-8-sig", errors)
    except (OSError, ValueError) as fault:
        raise error(f"{shown_path(path)} cannot be read ({reason(fault)}); {remedy}.") from fault


def read_object(path: Path, remedy: str, error: type[LoraBoothError]) -> dict[str, Any]:
    """The JSON object in a small file. Raises `error`, with the path, why, and `remedy`, for anything else."""
    text = read_text(path, remedy, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise error(f"{shown_path(path)} is not valid JSON ({reason(fault)}); {remedy}.") from fault
    if not isinstance(value, dict):
        raise error(f"{shown_path(path)} is not a JSON object; {remedy}.")
    return value


def read_fields(path: Path, kinds: Mapping[str, Any], remedy: str, error: type[LoraBoothError]) -> dict[str, Any]:
    """The fields named in `kinds` of the JSON object in a small file, each of the type that an annotation spells.

    Raises `error`, with the path, why, and `remedy`, also where one is missing; fields of other names are left out.
    """
    values = read_object(path, remedy, error)
    for name, kind in kinds.items():
        if not is_kind(values.get(name), kind):
            raise error(f'{shown_path(path)} is damaged: "{name}" is missing, or not what was written; {remedy}.')
    return {name: values[name] for name in kinds if name in values}


def is_kind(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type as annotations spell it: str, int, float (finite), dict[str, …], X | None."""
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(is_kind(one, get_args(kind)[1]) for one in value.values())
    if get_args(kind):
        return any(is_kind(value, one) for one in get_args(kind))
    if isinstance(value, int) and kind in (int, float):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))


def read_toml(path: Path, remedy: str, error: type[LoraBoothError]) -> dict[str, Any]:
    """The table in a small TOML file. Raises `error`, with the path, why, and `remedy`, for anything else."""
    text = read_text(path, remedy, error)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # ValueError: also a number of thousands of digits
        raise error(f"{shown_path(path)} is not valid TOML ({reason(fault)}); {remedy}.") from fault


def reason(fault: BaseException) -> str:
    """What an exception says, in one short line; its name where it says nothing."""
    text = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
    return shown(next(iter(text.splitlines()), "")) or type(fault).__name__
