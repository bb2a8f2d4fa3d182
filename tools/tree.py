"""README's map of the package: a tree of one line for each file, made of the first lines of their docstrings.

python -m tools.tree            prints it
python -m tools.tree --write    puts it into README.md, between the two marks
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tree: python -m tools.tree --write -->\n```\n", "```\n<!-- end of tree -->"
ORDER = ("config", "run", "data", "models", "adapter", "evaluation", "training", "planning", "report", "verbs", "cli")
"""The folders of the package as the law has them: each imports only from those before it."""
MAX_COLUMNS = 120
NAME_COLUMNS = 27


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def lines(folder: Path, depth: int = 0) -> Iterator[str]:
    """A folder with what it holds: its own modules first, then its folders; `__init__` speaks for its folder."""
    yield _line(folder.name + "/", first_line(folder / "__init__.py"), depth)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield _line(path.name, first_line(path), depth + 1)
    folders = (path.parent for path in folder.glob("*/__init__.py"))
    for inner in sorted(folders, key=lambda path: (ORDER.index(path.name) if depth == 0 else 0, path.name)):
        yield from lines(inner, depth + 1)


def tree(package: Path = ROOT / "lora_booth") -> str:
    """The whole map, one line for each file."""
    return "\n".join(lines(package)) + "\n"


def placed(readme: str) -> str:
    """`readme` with the map between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tree() + END + after


def _line(name: str, says: str, depth: int) -> str:
    return f"{'  ' * depth + name:<{NAME_COLUMNS}} {says}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(placed(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tree(), end="")
