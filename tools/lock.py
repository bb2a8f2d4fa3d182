"""constraints.txt out of what `pip freeze` lists: `python -m tools.lock FREEZE`. Exact versions, for every system.

A local tag ("2.13.0+cpu") says which build is installed here and not which version, so it is cut off.
"""

import re
import sys
from pathlib import Path

HEAD = """# The exact versions that `make demo` and `make test` install. Made by `make lock`; not to be edited.
"""


def constraints(freeze: str) -> str:
    """The text of the file. Raises ValueError for a line that names no version, as a package from a folder has it."""
    lines = []
    for line in freeze.split():
        match = re.fullmatch(r"([\w.-]+)==([\w.!]+)(\+[\w.]+)?", line)
        if match is None:
            raise ValueError(f'"{line}" names no version; install everything from the index')
        lines.append(f"{re.sub('[-_.]+', '-', match[1]).lower()}=={match[2]}")
    return HEAD + "".join(f"{line}\n" for line in sorted(lines))


if __name__ == "__main__":
    print(constraints(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
