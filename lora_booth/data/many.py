"""Many subjects, from a file or a folder of folders, to their runs. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lora_booth.config import many
from lora_booth.config.inputs import reason, shown_path
from lora_booth.config.many import NamedRun, Tables
from lora_booth.data import concepts
from lora_booth.errors import ConfigError


def read(source: Path, usual: Tables, out: Path, overrides: Sequence[str] = ()) -> list[NamedRun]:
    """The runs that `source` describes, each in a folder of its own in `out`.

    `source`: a TOML file of subjects (`config/many.py`), or a folder with a folder of pictures for each subject, whose
    name may be "10_yql dog", with token and class noun of its own. `usual`: sections whose settings hold where neither
    the file nor `overrides` say anything. Raises ConfigError that tells the faults of all runs.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ConfigError(f"--out {shown_path(out)} is no folder; choose another name.")
    if not os.path.isdir(source):  # which, unlike Path.is_dir, has an answer for every word
        return many.load(source, usual, out, overrides)
    subjects = []
    for folder in _folders(source):
        named = concepts.of_name(folder.name)
        words = {} if named is None else {"token": named.token, "class_noun": named.class_noun}
        subjects.append({"name": folder.name, "images": str(folder), **words})
    if not subjects:
        raise ConfigError(
            f"{shown_path(source)} holds no folders; put the pictures of each subject into one of its own."
        )
    return many.runs(subjects, usual, out, source=shown_path(source), overrides=overrides)


def _folders(source: Path) -> list[Path]:
    """Sub-folders in their order, hidden ones left out. Raises ConfigError where they cannot be listed."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(source) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise ConfigError(f"{shown_path(source)} cannot be listed ({reason(error)}); let it be read.") from error
