"""What was counted of a base, kept, so that no pass is traced twice; usual settings ship.

What lives here: a group of figures for each base and settings that they depend on, in a file beside the caches, and in
one of the package's. What does not: counting (`built.py`).

Kept figures are those of these sources and these versions of packages, or none; those that ship are of these versions,
and a test holds them against new ones. A file that is damaged or of somebody else counts as empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lora_booth.config import inputs
from lora_booth.config.resolved import Filled
from lora_booth.errors import DiskError
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.planning.work import Work
from lora_booth.run import disk
from lora_booth.run.cache_folder import COUNTS, folder_of
from lora_booth.run.versions import installed
from lora_booth.training.optimizers import OPTIMIZERS, chosen_name

PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "assets" / "counts.txt"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "prodigyopt", "schedulefree")
"""Whose code is traced, or asked for the bytes that it keeps."""
MAX_GROUPS = 32
"""In the file beside the caches; the oldest go."""


@dataclass(frozen=True)
class Pass:
    """Bytes at the fullest moment of a pass, without those of `gradients`, and its work."""

    peak: int
    work: Work
    gradients: int = 0


Figure = int | Pass
Group = dict[str, Figure]
"""What was counted, by its name in `memory.py`."""


@dataclass
class Counts:
    """The figures of one base under some settings. `key`: digest of both; `folder`: of the file, None for no file."""

    key: str
    folder: Path | None = None
    figures: Group = field(default_factory=dict)
    has_new: bool = False

    @staticmethod
    def of(config: Filled, facts: BaseFacts, *, is_kept: bool = True) -> Counts:
        """Those that are known. Without `is_kept` none are, and none will be."""
        key, folder = key_of(config, facts), folder_of(config)
        is_of_run = folder.absolute().is_relative_to(config.folder.absolute())  # which must be empty when a run begins
        if not is_kept or is_of_run:
            return Counts(key)
        found = (_lines(SHIPPED, stamp()), _lines(folder / COUNTS, _own_stamp()))
        shipped, kept = (_from_line(lines.get(key, "{}")) for lines in found)
        return Counts(key, folder, shipped | kept)

    def add(self, name: str, figure: Figure) -> None:
        """Know one more."""
        self.figures[name], self.has_new = figure, True

    def keep(self) -> None:
        """Write what is new; a file that cannot be written is left alone: all can be counted again."""
        if self.folder is None or not self.has_new:
            return
        lines = _lines(self.folder / COUNTS, _own_stamp())
        lines[self.key] = _to_line(_from_line(lines.pop(self.key, "{}")) | self.figures)
        try:
            _write(self.folder / COUNTS, _own_stamp(), dict(list(lines.items())[-MAX_GROUPS:]))
        except (DiskError, OSError):
            return
        self.has_new = False


def key_of(config: Filled, facts: BaseFacts) -> str:
    """Digest of all that figures depend on besides their names: the base's configs, and settings."""
    row = facts.architecture
    names = [name for name in row.parts if not name.startswith("tokenizer")]
    windows = [facts.configs / name / "tokenizer_config.json" for name in row.parts if name.startswith("tokenizer")]
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    said = {
        "family": facts.family,
        "predicts": facts.prediction_type,
        "native resolution": facts.native_resolution,
        "configs": {name: _shape(facts.config(name)) for name in names},
        "tokenizers": [
            _shape(inputs.read_object(path, "", DiskError)) for path in windows if inputs.is_plain_file(path)
        ],
        "model": [precision, config.model.quantize],
        "one vector": OPTIMIZERS[chosen_name(config.optimizer, "cuda")].is_elementwise,
        "adapter": config.adapter.model_dump(mode="json", exclude={"continue_from"}),
        "word": config.subject.token if config.adapter.embedding != "none" else None,
        "objective": config.objective.model_dump(mode="json", exclude={"timestep_range", "background_weight"}),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what programs note down in it beside the model: their versions, and where it lay."""
    noted = ("transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in noted}


@cache
def stamp() -> str:
    """The versions under which figures count."""
    return ", ".join(f"{name} {(installed(name) or 'none').partition('+')[0]}" for name in PACKAGES)


@cache
def _own_stamp() -> str:
    """The same with a digest of lora_booth's own sources: whoever changes one counts anew."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return f"{stamp()}, lora_booth {digest.hexdigest()}"


def write(path: Path, stamped: str, groups: Mapping[str, Group]) -> None:
    """Write a file of figures, whole or not at all. Raises DiskError."""
    _write(path, stamped, {key: _to_line(group) for key, group in groups.items()})


def read(path: Path, stamped: str) -> dict[str, Group]:
    """All figures in a file; none where it is of others, damaged or missing."""
    return {key: _from_line(line) for key, line in _lines(path, stamped).items()}


def _write(path: Path, stamped: str, lines: Mapping[str, str]) -> None:
    body = "".join(f"{key} {line}\n" for key, line in lines.items())
    disk.write_text(path, json.dumps({"of": stamped, "sha256": _digest(body)}) + "\n" + body)


def _lines(path: Path, stamped: str) -> dict[str, str]:
    """Of each group in a file the line that holds its figures, which takes long to read where there are many."""
    try:
        head, _, body = inputs.read_text(path, "", DiskError).partition("\n")
        if json.loads(head) != {"of": stamped, "sha256": _digest(body)}:
            return {}
        pairs = (line.partition(" ") for line in body.splitlines())
        return {key: line for key, _, line in pairs}
    except (DiskError, ValueError, RecursionError):
        return {}


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _to_line(group: Group) -> str:
    return json.dumps({name: _to_json(figure) for name, figure in group.items()}, separators=(",", ":"))


def _from_line(line: str) -> Group:
    try:
        return {name: _from_json(value) for name, value in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _to_json(figure: Figure) -> int | list[Any]:
    return figure if isinstance(figure, int) else [figure.peak, figure.gradients, figure.work.rows]


def _from_json(value: Any) -> Figure:
    if isinstance(value, int):
        return value
    peak, gradients, rows = value
    return Pass(peak, Work.of_rows(rows), gradients)
