"""A store of tensors on disk under keys that name everything they were computed from.

What lives here: keys, reading, writing, checks. What does not: computing the tensors (`training/prepare.py`). A cached
file is never trusted: it carries a digest of its key, metadata and tensors, and one that does not match is as good as
absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_booth.errors import DiskError, NumericError
from lora_booth.run import disk, headers
from lora_booth.run.cache_folder import DIGEST, digest_and_words, with_words

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 2**30
"""Of a file of the cache; latents of 4096 px take 34 MB."""
ABANDONED_SECONDS = 24 * 3600.0
"""Age of a temporary file in a shared cache from which on nobody is thought to be writing it."""


def key(*parts: str | int | float | bool) -> str:
    """SHA-256, 64 hex digits, of `parts`: other values, other types, another order, another split: another key."""
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise NumericError if a tensor holds NaN or infinity. `what` names the source, e.g. "latents of dog1.jpg"."""
    import torch

    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NumericError(
                f"{what}: {bad} of {tensor.numel()} values of {name} are NaN or infinite, so nothing was stored. "
                "Look at that input first and leave it out if it is odd; if every input fails, the base's weights are "
                "damaged or the device is at fault."
            )


class TensorCache:
    """A folder of safetensors files, one for each key. Any number of processes may use the same folder at once.

    `damaged` lists the files that `get` refused, for the caller to report; the next `put` replaces them. `about`: words
    that are written into each new file, for whoever asks what the cache holds. Files of other users that may not be
    read are as good as absent, and those that may not be replaced serve if they are whole.
    """

    def __init__(self, folder: Path, about: Mapping[str, str] | None = None) -> None:
        self.folder, self.about = folder, dict(about or {})
        self.damaged: list[Path] = []
        disk.remove_abandoned(folder, older_than_seconds=ABANDONED_SECONDS)

    def path(self, key: str) -> Path:
        """Where the tensors of `key` are, or would be."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of `key` on the CPU, or None if they are not there or their file is damaged."""
        path = self.path(key)
        try:
            if path.exists() and (not path.is_file() or path.stat().st_size > MAX_FILE_BYTES):
                self.damaged.append(path)
                return None
            data = path.read_bytes()
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            raise DiskError(
                f"cannot read the cache file {path} ({error.strerror}); delete it, or set run.cache to another folder."
            ) from error
        tensors = _checked(data, key)
        if tensors is None:
            self.damaged.append(path)
        else:
            self.touch(key)
        return tensors

    def touch(self, key: str) -> None:
        """Note that the tensors of `key` are used now, by their file's time, where the file is there and ours."""
        with suppress(OSError):
            os.utime(self.path(key))

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store `tensors` under `key`, all or nothing: a reader sees the old file or the whole new one."""
        import safetensors.torch

        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        path, digest = self.path(key), _digest(key, plain, self.about)
        data = safetensors.torch.save(plain, {DIGEST: with_words(digest, self.about)})
        with writing(path):
            try:
                disk.write_bytes(path, data)
            except DiskError as error:
                is_anothers = isinstance(error.__cause__, PermissionError)
                if not is_anothers or self.get(key) is None:  # else another user was faster, and it may not be replaced
                    raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds to a DiskError about a file of the cache which setting says where the cache is."""
    try:
        yield
    except DiskError as error:
        raise DiskError(f"{str(error).rstrip('.')}. It is a file of the cache, whose folder run.cache sets.") from error


def _digest(key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 over the key, the words, and name, type, shape and bytes of every tensor."""
    import torch

    digest = hashlib.sha256(json.dumps([key, sorted(about.items())]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked(data: bytes, key: str) -> dict[str, Tensor] | None:
    """The tensors in a file's `data`, or None unless it is whole and was written for `key`."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        # Copies, because views into the file's bytes are not aligned, and CPU kernels round by alignment.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
        stored, words = digest_and_words(headers.unchecked(data).get("__metadata__", {}))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    return tensors if stored == _digest(key, tensors, words) else None
