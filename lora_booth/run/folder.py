"""The run folder: what is where, who is using it, and which of its checkpoints is the newest.

```
config.toml            the resolved config
inputs.json            digests of all that was read, and what was found when the run began (`identity.py`)
notes.json             what was chosen and left out, and by which versions (`notes.py`)
metrics.jsonl          one line per step
warnings.txt           one line per warning of this run, each once
saves.jsonl            one line per checkpoint, also of those that were dropped: what was measured then
checkpoints/step-000400/   adapter.safetensors, optimizer.safetensors, state.json, manifest.json (written last)
previews/step-000400.png
summary.json           written once, when the run is finished
report.html            all of it as one page, made of these files alone
```

A run writes into its folder through `Run`, which asks first whether the folder is there and still its own. A disk
that is unmounted leaves an empty place; what would be written there would hide the run when it comes back.

The newest checkpoint is the whole one with the highest step, whatever the clock said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from filelock import FileLock, Timeout
from PIL import Image

from lora_booth.config import inputs, toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DiskError
from lora_booth.run import checkpoints, disk, identity, lines
from lora_booth.run.checkpoints import Checkpoint
from lora_booth.run.identity import Inputs
from lora_booth.run.summary import Summary

OWNER_FILE = ".owner.json"
OWN_BEFORE_CONFIG = re.compile(r"\.lock|(\.owner|inputs)\.json|\.(\.owner\.json|inputs\.json|config\.toml)\..+\.tmp")
"""What a run killed in its first moment may leave before its config is written."""
CHECKPOINT_NAME = re.compile("step-[0-9]{1,18}")


class Run:
    """An open run folder. One process at a time may hold its lock; closing it, or dying, lets it go.

    The other processes of a distributed run use `Run(folder)` without a lock, and only read.
    """

    def __init__(self, folder: Path, lock: FileLock | None = None) -> None:
        self.folder = folder
        self._lock = lock
        self._owner: dict[str, Any] = {}
        self._owner_seen: tuple[int, ...] | None = None

    @classmethod
    def open(cls, folder: Path, config: Config, given: Inputs, pinned: Mapping[str, Any] | None = None) -> Run:
        """Create `folder`, or continue in it if it holds a run of the same config that was `given` the same.

        `pinned`: what a new run keeps of what it found; words in `identity.py`.
        Raises ConfigError naming what differs, DiskError when another process holds the folder.
        """
        _require_own(folder)
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, _locked(folder))
        try:
            run._take()
            run._begin_or_require_same(config, given, pinned or {})
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Let other processes open the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line and step."""
        return self.folder / "metrics.jsonl"

    @property
    def saves_path(self) -> Path:
        """One JSON object per line and checkpoint."""
        return self.folder / "saves.jsonl"

    @property
    def warnings_path(self) -> Path:
        """One line per warning, each once."""
        return self.folder / "warnings.txt"

    @property
    def sheet_path(self) -> Path:
        """The contact sheet of the instance images as the model sees them."""
        return self.folder / "contact_sheet.png"

    @property
    def summary_path(self) -> Path:
        """Exists when the run is finished."""
        return self.folder / "summary.json"

    def preview_path(self, step: int) -> Path:
        """The preview grid drawn when `step` steps were done."""
        return self.folder / "previews" / f"step-{step:06d}.png"

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is, or would be."""
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def summary(self) -> Summary | None:
        """What a finished run wrote at its end, else None. Raises DiskError when it is damaged."""
        if not os.path.lexists(self.summary_path):
            return None
        remedy = "remove it, and the same command makes the end of the run again"
        stored = Summary(**inputs.read_fields(self.summary_path, get_type_hints(Summary), remedy, DiskError))
        return stored.moved(lambda name: str(self.folder / name), str(self.folder))

    def started_at(self) -> float:
        """When the run was begun, in seconds since 1970."""
        return float(self.stored()["started_at"])

    def stored(self) -> dict[str, Any]:
        """What inputs.json keeps: "inputs", "pinned" and "started_at". Raises DiskError when it is gone."""
        found = identity.read(self.folder)
        if found is None:
            raise DiskError(
                f"run folder {self.folder} has vanished, or lost its config.toml; bring it back, and the same command "
                "goes on from its last checkpoint."
            )
        return found

    def pin(self, name: str, value: Any) -> None:
        """Keep what has only now been found. Raises DiskError as `append_metrics`."""
        stored = self.stored()
        if stored["pinned"].get(name) != value:
            self.require_taken()
            stored["pinned"][name] = value
            disk.write_text(self.folder / "inputs.json", json.dumps(stored, indent=1))

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl. Raises DiskError when the folder vanished or was taken, or it is no file.

        At every step, so the owner's file is read again only when it is another than before.
        """
        if self._owner_seen is None or _signature(self.folder / OWNER_FILE) != self._owner_seen:
            self.require_taken()
        lines.append(self.metrics_path, values)

    def append_save(self, values: dict[str, Any]) -> None:
        """Add one line to saves.jsonl, before its checkpoint is written. Raises DiskError as `append_metrics`."""
        self.require_taken()
        lines.append(self.saves_path, values)

    def warnings(self) -> list[str]:
        """What was warned of so far. Raises DiskError where the file cannot be read."""
        path = self.warnings_path
        if inputs.why_unreadable(path) == inputs.MISSING:
            return []
        return inputs.read_text(path, "remove it; only the report misses it", DiskError).splitlines()

    def append_warning(self, text: str) -> None:
        """Keep a warning for those who look at the run later, without the names of its folder and the user's home.
        Raises DiskError as `append_metrics`."""
        self.require_taken()
        text = " ".join(text.replace(f"{self.folder}{os.sep}", "").replace(str(Path.home()), "~").split())
        known = self.warnings()
        if text not in known:
            disk.write_text(self.warnings_path, "\n".join([*known, text]) + "\n")

    def forget_metrics_after(self, step: int) -> int:
        """Drop the lines of steps after the checkpoint that is continued from; returns how many before it are lost.

        Raises DiskError as `append_metrics`.
        """
        self.require_taken()
        lines.forget_after(self.saves_path, step)
        if not os.path.lexists(self.metrics_path):
            return step
        return step - lines.forget_after(self.metrics_path, step)

    def has_picture(self, path: Path) -> bool:
        """Whether `path` holds a whole PNG; one that was damaged is drawn again."""
        try:
            with Image.open(inputs.require_plain_file(path, "", DiskError), formats=("PNG",)) as picture:
                picture.load()
        except (DiskError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
        return True

    def write_picture(self, path: Path, picture: Image.Image) -> None:
        """Write a PNG at `path` in the folder. Raises DiskError as `append_metrics`."""
        self.require_taken()
        disk.write_png(path, picture)

    def finish(self, summary: Summary) -> None:
        """Write `summary`, which marks the run as finished. Raises DiskError as `append_metrics`."""
        self.require_taken()
        stored = summary.moved(lambda path: Path(path).name, ".")  # the folder may be moved, and shown to others
        disk.write_text(self.summary_path, json.dumps(asdict(stored), indent=1))

    def save(self, checkpoint: Checkpoint, *, keep_last: int) -> Path:
        """Write `checkpoint` as a whole, then drop old ones except the last `keep_last` and the best.

        Raises DiskError when it cannot be written, or when the folder vanished or was taken.
        """
        self.require_taken()
        target = self.checkpoint_folder(checkpoint.step)
        try:
            with disk.writing(target):
                checkpoints.write(target, checkpoint)
        except DiskError:
            self.require_taken()  # else it was another process that removed what was half written
            raise
        self._prune(keep_last)
        return target

    def latest(self, on_damage: Callable[[str], None]) -> Checkpoint | None:
        """The newest valid checkpoint; `on_damage` is told of each newer one that had to be passed over.

        Raises ConfigError where none is left and another version wrote one: beginning anew would lose its work.
        """
        faults = []
        for folder in reversed(self._checkpoint_folders()):
            fault = checkpoints.fault(folder)
            if fault is None:
                return checkpoints.read(folder)
            on_damage(f"checkpoint {folder} is damaged ({fault}); going back to the one before.")
            faults.append(fault)
        if any(checkpoints.ANOTHER_VERSION in fault for fault in faults):
            raise ConfigError(
                f"run folder {self.folder} was trained by another version of lora_booth, whose checkpoints this one "
                "cannot continue; continue with that version, or choose a new folder with run.folder."
            )
        return None

    def best(self) -> tuple[int, float] | None:
        """Step and strength of what a finished run chose to export, if it is still kept; else the kept checkpoint with
        the lowest validation loss, at strength 1; None when there is none."""
        with suppress(DiskError):  # a damaged summary is told where it is needed
            summary = self.summary()
            if summary is not None and summary.exported_step in self.validation_losses():
                return summary.exported_step or 0, summary.exported_strength
        step = self.best_step()
        return None if step is None else (step, 1.0)

    def best_step(self) -> int | None:
        """Step of the kept checkpoint with the lowest validation loss, None when there is none."""
        losses = {s: loss for s, loss in self.validation_losses().items() if loss is not None}
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def validation_losses(self) -> dict[int, float | None]:
        """Validation loss of the kept checkpoints by step; None where none was measured."""
        losses: dict[int, float | None] = {}
        for folder in self._checkpoint_folders():
            with suppress(DiskError):  # it is told when it is to be continued from
                kinds = {"validation_loss": float | None}
                state = inputs.read_fields(folder / "state.json", kinds, "", DiskError)
                losses[_step_of_folder(folder)] = state.get("validation_loss")
        return losses

    def require_taken(self) -> None:
        """Raises DiskError when the folder has vanished, or when another process says that it holds it.

        Some network disks grant every lock; and what is written into a vanished folder would make it anew.
        """
        seen = _signature(self.folder / OWNER_FILE)
        if seen is None:
            raise DiskError(
                f"run folder {self.folder} has vanished, or lost its {OWNER_FILE}; bring it back, and the same command "
                "goes on from its last checkpoint."
            )
        owner = _owner_of(self.folder)
        if owner["id"] not in (None, self._owner["id"]):
            raise DiskError(
                f"run folder {self.folder} was taken by {_told(owner)}, so this run stops before the two mix; let "
                "only one of them go on."
            )
        self._owner_seen = seen

    def _take(self) -> None:
        """Say who holds the folder, and remove what a killed process left half written."""
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "id": uuid.uuid4().hex}
        disk.write_text(self.folder / OWNER_FILE, json.dumps(self._owner))
        for folder in (self.folder, self.folder / "previews"):
            disk.remove_abandoned(folder)
        for unfinished in (self.folder / "checkpoints").glob(".saving-*"):
            disk.remove_folder(unfinished)

    def _begin_or_require_same(self, config: Config, given: Inputs, pinned: Mapping[str, Any]) -> None:
        config_path, inputs_path = self.folder / "config.toml", self.folder / "inputs.json"
        if not config_path.exists():
            stored = {"schema": identity.SCHEMA, "started_at": time.time(), "inputs": given, "pinned": pinned}
            disk.write_text(inputs_path, json.dumps(stored, indent=1))
            disk.write_text(config_path, toml.to_toml(config, is_kept=True))
            return
        faults = toml.differing_keys(toml.load(config_path), config, ignore=identity.free(config))
        faults += identity.differences(self.stored()["inputs"], given)
        if faults:
            lines = "\n".join(f"  {line}" for line in faults)
            raise ConfigError(
                f"run folder {self.folder} holds a run of another config:\n{lines}\n"
                "Put the old values back to continue it, or choose a new folder with run.folder."
            )
        if not self.summary_path.exists():
            disk.write_text(config_path, toml.to_toml(config, is_kept=True))

    def _checkpoint_folders(self) -> list[Path]:
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted((f for f in folders if CHECKPOINT_NAME.fullmatch(f.name)), key=_step_of_folder)

    def _prune(self, keep_last: int) -> None:
        folders = self._checkpoint_folders()
        best = self.best_step()
        for folder in folders[:-keep_last]:
            if _step_of_folder(folder) != best:
                disk.remove_folder(folder)


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises DiskError when the disk of `folder` cannot hold `needed_bytes` more."""
    with disk.writing(folder):
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"{folder} has {free / 2**20:.0f} MiB free, but the run's checkpoints need about "
            f"{needed_bytes / 2**20:.0f} MiB; free some space, lower train.keep_last, or set run.folder."
        )


def _require_own(folder: Path) -> None:
    """Raises ConfigError, before anything is written, when `folder` is a file or holds something else than a run."""
    if os.path.exists(folder) and not folder.is_dir():
        raise ConfigError(f"run folder {folder} is a file; choose another folder with run.folder.")
    if not os.path.exists(folder):
        return
    with disk.writing(folder):  # it may not be entered, or not listed
        if (folder / "config.toml").exists():
            return
        strangers = sorted(p.name for p in folder.iterdir() if not OWN_BEFORE_CONFIG.fullmatch(p.name))
    if strangers:
        raise ConfigError(
            f"run folder {folder} holds other files ({', '.join(strangers[:5])}) and no run; "
            "choose an empty or new folder with run.folder."
        )


def _locked(folder: Path) -> FileLock:
    """The operating system's lock on `folder`; it falls with the process that holds it, so it cannot go stale."""
    lock = FileLock(folder / ".lock")
    with disk.writing(folder / ".lock"):
        try:
            lock.acquire(timeout=1, poll_interval=0.1)  # seconds in which a holder that has just begun says who it is
        except Timeout:
            raise DiskError(
                f"run folder {folder} is in use by {_told(_owner_of(folder))}; wait for it, stop it, or choose another "
                "folder with run.folder."
            ) from None
    return lock


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _owner_of(folder: Path) -> dict[str, Any]:
    """What the holder of `folder` wrote; None for what cannot be known."""
    try:
        owner = inputs.read_object(folder / OWNER_FILE, "", DiskError)
    except DiskError:
        owner = {}
    known = ((key, owner.get(key)) for key in ("pid", "host", "started", "id"))
    return {key: value if isinstance(value, str | int) else None for key, value in known}


def _told(owner: dict[str, Any]) -> str:
    pid, host, started = (inputs.shown(owner[key] or "?") for key in ("pid", "host", "started"))
    return f"process {pid} on {host} since {started}"


def _step_of_folder(folder: Path) -> int:
    return int(folder.name[5:])
