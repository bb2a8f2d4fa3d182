"""What pyproject.toml asks for, in the three ways in which `make test-…` tries it: `python -m tools.requirements WAY`.

oldest: each requirement at its lower bound. newest: as it is written. next: without its upper bound, which tells what
releases to come will break. Uses the standard library alone, since it runs before anything is installed.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("dev", "optim", "tracking", "heic", "likeness", "miniature")
"""What the tests need."""
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(way: str, text: str) -> list[str]:
    """The requirements of a pyproject.toml, `text`, rewritten for `way`. Raises ValueError for an unknown one."""
    project = tomllib.loads(text)["project"]
    listed = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    rewrite = {"oldest": _at_lower_bound, "newest": str, "next": _without_upper_bound}.get(way)
    if rewrite is None:
        raise ValueError(f'"{way}" is no way to try requirements; use oldest, newest or next')
    return [rewrite(line) for line in listed]


def _at_lower_bound(line: str) -> str:
    asked, semicolon, marker = line.partition(";")
    return re.sub(r">=([\w.]+)(,<[\w.]+)?", r"==\1", asked) + semicolon + marker


def _without_upper_bound(line: str) -> str:
    asked, semicolon, marker = line.partition(";")
    return re.sub(r",?<[\w.]+", "", asked) + semicolon + marker


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], PYPROJECT.read_text(encoding="utf-8"))))
