"""docs/likeness.md."""

from pathlib import Path
from typing import Any


def write(results: dict[str, Any], folder: Path) -> None:
    raise NotImplementedError
