"""Writing files so that a crash at any moment leaves the old content or the new, never half of it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.errors import DiskError

if TYPE_CHECKING:
    from PIL.Image import Image

_REMEDIES = {
    errno.EACCES: "choose a folder you may write to",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EMFILE: "too many open files; raise `ulimit -n`",
}


@contextmanager
def replacing(path: Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is synced and takes the name `path`, on failure it is removed.

    Who may read and write it says the process's umask, or the folder's default ACL, as for every other new file.
    Raises DiskError, naming the file, when it cannot be written.
    """
    with writing(path, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which `remove_abandoned` knows; nothing is made."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")


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
        folder = next(parent for parent in path.absolute().parents if parent.exists())
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
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process was faster, or it is not ours to delete; it costs only space
            if abs(time.time() - path.stat().st_mtime) >= older_than_seconds:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _message(path: Path, needed_bytes: int | None, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
        return f"{path} cannot be written ({error.strerror or error}); {remedy}."
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    needed = "" if needed_bytes is None else f"it needs {needed_bytes} bytes and "
    free = shutil.disk_usage(folder).free
    return f"no space for {path}: {needed}{free} are free; free some space, or choose a folder on another disk."
