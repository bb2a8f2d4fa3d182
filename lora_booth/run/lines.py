"""Files of one JSON object a line for each step: appended, cut back to a step, read in parts.

What lives here: metrics.jsonl and saves.jsonl of a run folder. What does not: whose the folder is (`folder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_booth.config import inputs
from lora_booth.errors import DiskError
from lora_booth.run import disk

MAX_BYTES = 2**30
"""Of one file; two million steps write less."""


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line to `path`. Raises DiskError where it is no plain file, or cannot be written."""
    require_own(path)
    with disk.writing(path), path.open("ab") as file:
        file.write(json.dumps(values).encode() + b"\n")


def forget_after(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, and damaged ones; returns how many are left. Raises as `append`."""
    require_own(path)
    if not path.exists():
        return 0
    with disk.writing(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = {number: line for line in lines if (number := _step_of(line)) is not None and number <= step}
    disk.write_text(path, "".join(line + "\n" for line in kept.values()))
    return len(kept)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of the lines that are whole, by step, the last of each, and how many lines are damaged; nothing of a
    file that is missing. Raises DiskError where there is something else."""
    if inputs.why_unreadable(path) == inputs.MISSING:
        return [], 0
    lines = inputs.read_text(path, "remove it", DiskError, max_bytes=MAX_BYTES, errors="replace").splitlines()
    found = {number: json.loads(line) for line in lines if (number := _step_of(line)) is not None}
    return [found[step] for step in sorted(found)], sum(_step_of(line) is None for line in lines)


def require_own(path: Path) -> None:
    """Raises DiskError where `path` is no plain file, is larger than any run makes it, or is a link, which may lead out
    of the run folder."""
    why = "it is a link" if path.is_symlink() else inputs.why_unreadable(path)
    if why is None:
        with disk.writing(path):
            size = path.stat().st_size
        why = f"it has more than {MAX_BYTES >> 20} MiB" if size > MAX_BYTES else None
    if why not in (None, inputs.MISSING):
        raise DiskError(f"{path} cannot be written: {why}; remove it, and the same command goes on.")


def _step_of(line: str) -> int | None:
    """The step of a line; None for one that is torn, as the last of a killed process, or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if inputs.is_kind(step, int) and step > 0 else None
