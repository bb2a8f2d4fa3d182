"""The complete config files that ship with the package.

Also which of them a short command line starts from.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Inside an installed package, or beside it in a checkout."""
MINIATURE = FOLDER / "demo.toml"


def for_base(base: str | None) -> Path | None:
    """The file that a command line without a config file starts from: the miniature needs its own numbers."""
    return MINIATURE if base == "booth-mini" else None
