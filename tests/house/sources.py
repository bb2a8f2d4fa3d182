"""The package's own sources, parsed once, for the tests that read them."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lora_booth"


@lru_cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name below the package, as `run.folder`, to path and syntax tree."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) >= 100
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): (p, ast.parse(p.read_text())) for p in paths}


def imported(tree: ast.AST, *, but_types: bool = False) -> set[str]:
    """All that a module imports, anywhere in it, with the names taken: `lora_booth.run.disk`, `typing.Any`.

    `but_types`: not what stands under `if TYPE_CHECKING`, which is never loaded.
    """
    names: set[str] = set()
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    skipped = {id(node) for block in blocks for node in ast.walk(block)} if but_types else set()
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names
