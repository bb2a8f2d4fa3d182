"""Files written so that a crash leaves the old content or the new, never half.

What is promised when the power fails: on Linux what was written is there. Windows gives no handle of a folder to wait
for, and keeps names in a journal, so the last names may be lost, with the old content under them; macOS waits for the
drive but not for the drive's own memory, so the last seconds may be lost in any order. What a run goes on from carries
digests, so there too it goes on from the newest checkpoint that is whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.errors import DiskError
from lora_booth.run import systems

if TYPE_CHECKING:
    from PIL.Image import Image

_REMEDIES = {
    errno.EACCES: "choose a folder you may write to",
    errno.EROFS: "the disk is read-only; choose another folder",
}
IN_USE = (5, 32, 33, 1224)
"""Windows' numbers for a file that some program has open: access denied, shared, locked, mapped into memory."""
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between tries to name a file that is in use: virus scanners and indexers open what is new for moments."""


@contextmanager
def replacing(path: Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is synced and takes the name `path`, on failure it is removed.

    Its permissions follow the process's umask, or the folder's default ACL, as for every other new file.
    Raises DiskError, naming the file, when it cannot be written.
    """
    with writing(path, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            sync(temporary)
            move(temporary, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):  # else the next start removes it
                temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which `remove_abandoned` knows; nothing is made."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")


def move(source: Path, target: Path) -> None:
    """Give the file or folder `source` the name `target`, in one step; a file of that name is replaced.

    On Windows nothing can be renamed or replaced while a program has it open, which is waited for a little.
    """
    for seconds in PAUSES:
        try:
            os.replace(source, target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IN_USE:
                raise
            time.sleep(seconds)
    os.replace(source, target)


def remove_folder(folder: Path) -> None:
    """Remove `folder` and all that is in it, as far as the system lets us: not what a program has open on Windows."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        for path in folder.rglob("*"):
            with suppress(OSError):
                path.chmod(stat.S_IRWXU)  # Windows keeps what is marked read-only
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a DiskError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DiskError(_message(path, needed_bytes, error)) from error


def require_space(path: Path, needed_bytes: int) -> None:
    """Raise DiskError when the disk that `path` will lie on has fewer than `needed_bytes` free."""
    with writing(path, needed_bytes=needed_bytes):
        folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path, needed_bytes=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_png(path: Path, picture: Image) -> None:
    """Write `picture` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def remove_abandoned(folder: Path, *, older_than_seconds: float = 0.0) -> None:
    """Remove the temporary files that killed writers have left in `folder`; the age tells them from living ones.

    A time ahead of the clock is as good as one behind it: clocks are set back.
    """
    found: list[Path] = []
    with suppress(OSError):  # a folder that is another user's alone
        found = list(folder.glob(".*.tmp"))
    for path in found:
        with suppress(OSError):  # another process was faster, or it is not ours to delete; it costs only space
            if abs(time.time() - path.stat().st_mtime) >= older_than_seconds:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until the content of the file `path` is on the disk."""
    descriptor = os.open(path, os.O_RDWR)  # Windows refuses handles that only read
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system has a way to wait for them: not Windows."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises OSError for what is no file, as a pipe or a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _message(path: Path, needed_bytes: int | None, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written ({error.strerror or error}); {_remedy(path, error)}."
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    needed = "" if needed_bytes is None else f"it needs {needed_bytes} bytes and "
    free = shutil.disk_usage(folder).free
    return f"no space for {path}: {needed}{free} are free; free some space, or choose a folder on another disk."


def _remedy(path: Path, error: OSError) -> str:
    """What to do about a refusal, in one clause."""
    length = len(str(path.absolute()))
    if systems.is_windows() and length > systems.MAX_WINDOWS_PATH:
        return (
            f"its path has {length} characters, of which Windows takes {systems.MAX_WINDOWS_PATH}: choose a folder "
            "nearer to the root of the drive, or switch on long paths in Windows"
        )
    if getattr(error, "winerror", None) in IN_USE and path.exists():
        return "another program has it open: close that program, and the same command goes on"
    if error.errno == errno.EMFILE:
        return f"too many files are open; {systems.limits_advice()}"
    return _REMEDIES.get(error.errno or 0, "choose another folder")
