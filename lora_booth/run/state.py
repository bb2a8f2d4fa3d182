"""How far the run in a folder has come, told without reading it and without torch."""

from __future__ import annotations

import os
from pathlib import Path


def is_begun(folder: Path) -> bool:
    """Whether a run folder holds a run."""
    return os.path.exists(folder / "config.toml")


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return os.path.exists(folder / "summary.json")
