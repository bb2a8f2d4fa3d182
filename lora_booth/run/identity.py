"""What the result of a run depends on, in one list.

Resuming, processes that share a run, and the header use it.

Words: *inputs* are digests of what the user gives besides settings, by group ("pictures", "captions" …) and name; a
setting is *free* when it changes how a run is computed or kept, not what it computes; what is *pinned* was open when
the run began and stays as it was found then, as the commit of a base on the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_booth.config import inputs
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DiskError

Inputs = Mapping[str, Mapping[str, str]]
"""Group to name to digest."""
SCHEMA = 3
"""Of inputs.json."""
OPEN = "auto"
"""A choice that depends on the device. Of a finished run it stays open, since nothing is computed any more."""
FREE_TO_CHANGE = (
    "train.batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.save_every_steps",
    "train.keep_last",
    "memory.device",
    "memory.budget_gib",
    "memory.pictures_at_once",
    "memory.tiled_decoding",
    "memory.offload_activations",
    "memory.offload_denoiser",
    "run.folder",
    "run.cache",
    "run.cache_limit_gib",
    "run.trackers",
    "run.report",
    "subject.images",
    "evaluate.choose",
    "evaluate.encoder",
    "evaluate.strengths",
    "evaluate.max_share",
    "export.formats",
    "export.dtype",
    "export.name",
    "export.cover",
    "export.author",
    "export.license",
)
"""Settings that may differ when a run is continued."""
_YEAR_3000 = 32_503_680_000
"""In seconds since 1970."""
_BASE = "the files of the base have changed since the run began"


def free(config: Config) -> tuple[str, ...]:
    """Settings that are ignored when `config` is compared with that of a stored run."""
    bound = ("train.compile",) if config.adapter.dropout else ()  # compiled, dropout draws other numbers
    pairs = ((f"{name}.{key}", value) for name, section in config for key, value in section)
    still_open = [key for key, value in pairs if value == OPEN and key in ("optimizer.name", "model.precision")]
    return (*(key for key in FREE_TO_CHANGE if key not in bound), *still_open)


def settings(config: Config) -> dict[str, Any]:
    """The settings that the result depends on, as JSON values by section and key."""
    ignored = set(free(config))
    values = config.model_dump(mode="json")
    return {s: {k: v for k, v in pairs.items() if f"{s}.{k}" not in ignored} for s, pairs in values.items()}


def digest(config: Config, given: Inputs) -> str:
    """SHA-256, 64 hex digits, of all that the result of the resolved `config` depends on; of a path the name counts."""
    values = settings(config)
    for section, pairs in config:
        for key, value in pairs:
            if isinstance(value, Path) and key in values[section]:
                values[section][key] = value.name
    values["model"]["base"] = Path(config.model.base).name
    text = json.dumps([values, {group: dict(names) for group, names in given.items()}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Inputs, new: Inputs) -> list[str]:
    """A line for each group of inputs that is not what it was, with the names of the first five."""
    lines = []
    for group in dict.fromkeys((*old, *new)):
        before, now = old.get(group, {}), new.get(group, {})
        changes = [f"{name} is new" for name in now if name not in before]
        changes += [f"{name} is gone" for name in before if name not in now]
        changes += [f"{name} has changed" for name in now if name in before and now[name] != before[name]]
        if changes and group == "base":
            lines.append(f"model.base: {_BASE}")
        elif changes:
            lines.append(f"{group.replace('_', ' ')}: " + ", ".join(changes[:5]) + (", …" if len(changes) > 5 else ""))
    return lines


def read(folder: Path) -> dict[str, Any] | None:
    """inputs.json of the run in `folder`: "inputs", "pinned" and "started_at"; None where there is no run yet.

    Raises DiskError when it is damaged, ConfigError when another version wrote it.
    """
    path = folder / "inputs.json"
    if not os.path.exists(folder / "config.toml"):
        return None
    remedy = "put it back from a copy, or train in a new run.folder"
    if inputs.read_object(path, remedy, DiskError).get("schema") != SCHEMA:
        raise ConfigError(
            f"run folder {folder} was begun by another version of lora_booth, which kept less of what its result "
            "depends on; continue with that version, or choose a new folder with run.folder."
        )
    kinds = {"inputs": dict[str, dict[str, str]], "pinned": dict[str, str | int | None], "started_at": float}
    fields = inputs.read_fields(path, kinds, remedy, DiskError)
    if not 0 <= fields["started_at"] < _YEAR_3000:
        raise DiskError(f'{inputs.shown_path(path)} is damaged: "started_at" is no time; {remedy}.')
    return {"schema": SCHEMA, **fields}
