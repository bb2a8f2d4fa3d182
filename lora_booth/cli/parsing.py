"""Words that hold several values: FILE:STRENGTH, lists of strengths, WIDTHxHEIGHT."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lora_booth.config import inputs
from lora_booth.errors import ConfigError


def parse_adapter(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:STRENGTH" as a path and a strength, 1 where none is given."""
    name, colon, strength = text.rpartition(":")
    if colon and not os.path.lexists(text):
        with suppress(ValueError):
            return Path(name), float(strength)
    return Path(text), 1.0


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" as numbers. Raises ConfigError for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f'--strengths "{inputs.shown(text)}" is not a list of numbers; write e.g. 0,0.5,1.') from None


def parse_size(text: str) -> tuple[int, int] | None:
    """ "512x768" as width and height, "" as None. Raises ConfigError for anything else."""
    if not text:
        return None
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ConfigError(
            f'--size "{inputs.shown(text)}" is not a size; write WIDTHxHEIGHT in pixels, e.g. 512x768.'
        ) from None
    return width, height
