"""What the files of a run folder tell of a run, finished or not, and what could not be read.

What lives here: reading, which never ends at a damaged file as long as the run's config can be read. What does not:
pictures (`pictures.py`) and what is said of it all (`page.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_booth.config import inputs, toml
from lora_booth.config.config import Config
from lora_booth.config.inputs import shown_path
from lora_booth.data import concepts
from lora_booth.errors import ConfigError, LoraBoothError
from lora_booth.evaluation import scores
from lora_booth.evaluation.scores import Scores
from lora_booth.run import identity, lines, notes
from lora_booth.run.folder import Run
from lora_booth.run.notes import Notes
from lora_booth.run.state import is_begun
from lora_booth.run.summary import Summary

Found = TypeVar("Found")
Points = Sequence[tuple[int, float]]
"""Step and value."""


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it. `stored`: its inputs.json; `metrics` and `saves`: their lines by step; `warnings`:
    what was warned of; `faults`: a sentence for each file that could not be read, or not wholly."""

    folder: Path
    config: Config
    stored: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    saves: Sequence[Mapping[str, Any]]
    summary: Summary | None
    scores: Scores | None
    notes: Notes | None
    warnings: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def steps_done(self) -> int:
        """Of a finished run all; else the last that metrics.jsonl has."""
        if self.summary is not None:
            return self.summary.steps
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def words(self) -> str:
        """What a prompt says to call the subject, or one of several."""
        given = {} if self.stored is None else self.stored["inputs"].get("pictures", {})
        return ", ".join(concepts.words_of(given)) or self.config.fill("{token} {class}")

    @property
    def shown_folder(self) -> str:
        """The folder as a command names it: as it was given, but from the user's home."""
        return toml.from_home(self.folder)

    def points(self, name: str) -> Points:
        """The values `name` of metrics.jsonl or saves.jsonl, those that are finite numbers."""
        lines = [*self.metrics, *self.saves]
        return [(line["step"], float(line[name])) for line in lines if inputs.is_kind(line.get(name), float)]


def read(folder: Path) -> Record:
    """The run in `folder`. Raises ConfigError where there is none, or its config.toml cannot be read."""
    is_folder = os.path.isdir(folder)  # which, unlike Path.is_dir, has an answer for names that are too long
    if not is_folder or not is_begun(folder):
        what = "is no folder" if not is_folder else "holds no run: it has no config.toml"
        raise ConfigError(f"{shown_path(folder)} {what}; name the folder of a run, as `lora-booth train` makes it.")
    config, faults, run = toml.load(folder / "config.toml"), list[str](), Run(folder)

    def tried(reading: Callable[[], Found | None]) -> Found | None:
        try:
            return reading()
        except LoraBoothError as error:
            faults.append(str(error).replace(f"{folder}/", ""))
            return None

    def lines_of(path: Path) -> Sequence[Mapping[str, Any]]:
        found, num_damaged = tried(lambda: lines.read(path)) or ([], 0)
        if num_damaged:
            faults.append(f"{path.name}: damaged lines that are left out here: {num_damaged}.")
        return found

    def scores_found() -> Scores | None:
        path = folder / scores.FILE_NAME
        return None if inputs.why_unreadable(path) == inputs.MISSING else scores.read(path)

    return Record(
        folder=folder,
        config=config,
        stored=tried(lambda: identity.read(folder)),
        metrics=lines_of(run.metrics_path),
        saves=lines_of(run.saves_path),
        summary=tried(run.summary),
        scores=tried(scores_found),
        notes=tried(lambda: notes.read(folder)),
        warnings=tuple(tried(run.warnings) or ()),
        faults=tuple(faults),
    )
