"""One checkpoint on the disk: written whole or not at all.

It is trusted only if nothing of it has changed since.

It counts only with a manifest, written last, whose SHA-256 sums match. No pickle: tensors are safetensors, the rest is
JSON.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from lora_booth.config import inputs
from lora_booth.errors import DiskError
from lora_booth.run import disk

CHECKPOINT_SCHEMA = 2
ANOTHER_VERSION = "written by another version"
PASSED_OVER = "it is passed over"
CHECKPOINT_FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `adapter`: float32 tensors by name; `optimizer`: the optimizer's state_dict."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def write(target: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` beside `target`, then let it take that name."""
    folder = target.parent
    folder.mkdir(exist_ok=True)
    temporary = folder / f".saving-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        _write_files(temporary, checkpoint)
        if target.exists():
            disk.remove_folder(target)
        disk.move(temporary, target)
        disk.sync_folder(folder)
    finally:
        disk.remove_folder(temporary)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    tensors: dict[str, Tensor] = {}
    optimizer = _without_tensors(checkpoint.optimizer, "optimizer", tensors)
    # By Python, whose OSError tells of a full disk; safetensors' own writing raises an error of its own for it.
    (folder / "adapter.safetensors").write_bytes(save(checkpoint.adapter))
    (folder / "optimizer.safetensors").write_bytes(save(tensors))
    state = {"schema": CHECKPOINT_SCHEMA, "step": checkpoint.step, **checkpoint.state, "optimizer": optimizer}
    (folder / "state.json").write_bytes(json.dumps(state).encode())
    for name in CHECKPOINT_FILES:
        disk.sync(folder / name)
    manifest = {n: {"sha256": disk.sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in CHECKPOINT_FILES}
    (folder / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())
    disk.sync(folder / "manifest.json")
    disk.sync_folder(folder)


def fault(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be trusted, None when it can."""
    for name in (*CHECKPOINT_FILES, "manifest.json"):
        if not os.path.lexists(folder / name):
            return f"{name} is missing"
    try:
        manifest = inputs.read_object(folder / "manifest.json", PASSED_OVER, DiskError)
        for name in CHECKPOINT_FILES:
            is_whole = (folder / name).stat().st_size == manifest[name]["bytes"]
            if not is_whole or disk.sha256(folder / name) != manifest[name]["sha256"]:
                return f"{name} is not what was written"
        schema = inputs.read_object(folder / "state.json", PASSED_OVER, DiskError)["schema"]
    except (OSError, KeyError, TypeError, DiskError) as error:
        return f"unreadable: {error}".removesuffix(".")
    return None if schema == CHECKPOINT_SCHEMA else f"{ANOTHER_VERSION} (schema {schema})"


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, in which `fault` finds none."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    optimizer = _with_tensors(state.pop("optimizer"), _tensors(folder / "optimizer.safetensors"))
    return Checkpoint(state.pop("step"), _tensors(folder / "adapter.safetensors"), optimizer, state)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read, not mapped: the optimizer keeps what it is given, and Windows removes no file that is mapped."""
    return load_file(path, backend="pread")


def _without_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` as JSON values, its tensors moved into `tensors` under path-like names. `_with_tensors` is its inverse."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, _without_tensors(value, f"{name}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_without_tensors(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]}
    assert tree is None or isinstance(tree, (bool, int, float, str)), f"{name} is a {type(tree)}"
    return tree


def _with_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _with_tensors(item, tensors) for key, item in value}
    items = [_with_tensors(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
