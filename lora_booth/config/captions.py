"""The short captions that ship: what the model's own prior holds fast besides the class."""

from __future__ import annotations

from pathlib import Path

_FILE = Path(__file__).parents[1] / "assets" / "prompts" / "captions.txt"


def generic() -> tuple[str, ...]:
    """All 64, in their order; how they were chosen is said in the file."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
