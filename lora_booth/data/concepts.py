"""Several subjects in one run: a sub-folder for each, named as kohya's scripts name theirs.

`10_yql dog` holds pictures of "yql dog" that come ten times as often as those of `1_wbv cat`. The words of [subject]
name one of them, whose likeness is measured. What lives here: what such a name says. What does not: the pictures in it
(`images.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MAX_REPEATS = 1000
_NAMED = re.compile(r"([0-9]{1,4})_(\S+) +(\S.*)")


@dataclass(frozen=True)
class Concept:
    """One subject of several: the word that names it, what it is, and how often its pictures come."""

    token: str
    class_noun: str
    repeats: int

    def fill(self, template: str) -> str:
        """`template` with the slots {token} and {class} replaced."""
        return template.replace("{token}", self.token).replace("{class}", self.class_noun)


def of_name(name: str) -> Concept | None:
    """What a sub-folder's name says; None where it is no such name."""
    found = _NAMED.fullmatch(name.strip())
    repeats = 0 if found is None else int(found[1])
    if found is None or not 1 <= repeats <= MAX_REPEATS or set("{}") & set(name):
        return None
    return Concept(found[2], found[3].strip(), repeats)


def in_folder(folder: Path) -> dict[Path, Concept]:
    """The sub-folders with such names, in their order; none where the folder cannot be listed."""
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return {}
    found = {path: of_name(path.name) for path in sorted(paths)}
    return {path: concept for path, concept in found.items() if concept is not None}


def folder_of(folder: Path, token: str, class_noun: str) -> Path:
    """Where the pictures of one subject lie: its sub-folder, or `folder` itself where it has none."""
    own = (path for path, one in in_folder(folder).items() if (one.token, one.class_noun) == (token, class_noun))
    return next(own, folder)


def words_of(names: Iterable[str]) -> list[str]:
    """Token and class noun of every subject that pictures, by their names in a run's inputs, are of."""
    found = dict.fromkeys(of_name(name.partition("/")[0]) for name in names if "/" in name)
    return [f"{one.token} {one.class_noun}" for one in found if one is not None]
