"""What a run noted when it last began, as notes.json keeps it for those who look at it later.

Nothing that is computed depends on it, and nothing in it names a folder of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from lora_booth.config import inputs
from lora_booth.config.config import Config
from lora_booth.config.resolved import Resolved
from lora_booth.errors import DiskError
from lora_booth.run import disk

FILE_NAME = "notes.json"
AGAIN = "remove it; only the report misses it"


@dataclass(frozen=True)
class Notes:
    """`chosen`: setting, as "train.steps", to its value as JSON, of those that were left open; `left_out`: files that
    were not used, and `remarks` on files that were, each to why; `versions`: of packages; `device`: what computes."""

    chosen: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def write(self, folder: Path) -> None:
        """Write notes.json in a run folder. Raises DiskError."""
        disk.write_text(folder / FILE_NAME, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> Notes | None:
    """What `Notes.write` wrote; None where there is nothing. Raises DiskError when it is damaged."""
    path = folder / FILE_NAME
    if inputs.why_unreadable(path) == inputs.MISSING:
        return None
    return Notes(**inputs.read_fields(path, get_type_hints(Notes), AGAIN, DiskError))


def choices(wished: Config, resolved: Resolved) -> dict[str, str]:
    """Each setting that `wished` left open, with the value that was chosen."""
    before, chosen = wished.model_dump(mode="json"), resolved.model_dump(mode="json")
    return {f"{s}.{k}": _spelled(v) for s, pairs in chosen.items() for k, v in pairs.items() if v != before[s][k]}


def _spelled(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def by_name(faults: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each name with all that is said of it, in one line."""
    found: dict[str, str] = {}
    for name, text in faults:
        found[name] = f"{found[name]}; {text}" if name in found else text
    return found
