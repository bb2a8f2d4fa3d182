"""The cache folder as a whole: what lies in it, which runs used it, what may go.

What lives here: listing, removing, and the limit, without torch. What does not: keys and the tensors themselves
(`cache.py`). Nothing is ever wrong for being removed, at any moment: a run makes again what it misses. Removing only
avoids what a live run has touched, so that it need not.

```
latents/<key>.safetensors                  a picture of the user's; it can be decoded back to what it shows
prompts/<key>.safetensors                  the conditioning of a prompt
class_images/<group>/00000.png .safetensors   a class image, and its latents, which are trained on
compiling.json                             what trials of compiling have measured
counts.txt                                 what planning has counted of passes
runs/<id>.json <id>.lock                   a run that used the cache; the lock is held while it prepares
```

Words: an *entry* is what is removed together; it was *used* when it was last read or written, as its file's time says.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from lora_booth.config import inputs
from lora_booth.config.config import Config
from lora_booth.errors import DiskError, LoraBoothError
from lora_booth.run import disk, headers

KINDS = ("latents", "prompts", "class_images")
TRIALS, COUNTS = "compiling.json", "counts.txt"
DIGEST = "digest"
"""The field of an entry's metadata; of what older versions wrote it holds no words."""
_NAMES = {
    "latents": re.compile(r"([0-9a-f]{64})\.safetensors"),
    "prompts": re.compile(r"([0-9a-f]{64})\.safetensors"),
    "class_images": re.compile(r"([0-9]{5,})\.(?:png|safetensors)"),
}
"""What our files are called; anything else in the folder is not ours, and stays."""
_GROUP = re.compile(r"[0-9a-f]{24}")
UNTESTED_DAYS = 7.0
"""For so long a run counts as live whose lock belongs to another user and cannot be tried."""
DAY_S = 86_400.0


@dataclass(frozen=True)
class Entry:
    """What is removed together: one file, or a class image and its latents. `used_at`: seconds since 1970."""

    kind: str
    paths: tuple[Path, ...]
    num_bytes: int
    used_at: float

    def base(self) -> tuple[str, str]:
        """Name and fingerprint of the base that it was made with; empty where its file does not say."""
        for path in self.paths:
            if path.suffix == ".safetensors":
                with suppress(LoraBoothError, ValueError):
                    _, words = digest_and_words(headers.read(path).metadata)
                    return words.get("base", ""), words.get("fingerprint", "")
        return "", ""


@dataclass(frozen=True)
class Use:
    """A run that used the cache. `began_at`: when it last began to, in seconds since 1970."""

    folder: str
    base: str
    began_at: float
    is_live: bool


def folder_of(config: Config) -> Path:
    """Where latents, embeddings and class images are kept between runs."""
    return config.run.cache or default_folder()


def default_folder() -> Path:
    """Where they are kept if `run.cache` does not say."""
    return user_cache_path("lora_booth")


def with_words(digest: str, words: Mapping[str, str]) -> str:
    """The one field of an entry's metadata: safetensors does not fix the order of fields, and equal runs must give
    equal bytes."""
    return f"{digest} {json.dumps(words, sort_keys=True)}" if words else digest


def digest_and_words(metadata: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What `with_words` made the field of. Raises ValueError when it is none such."""
    digest, _, text = metadata.get(DIGEST, "").partition(" ")
    words = json.loads(text) if text else {}
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise ValueError("no words")
    return digest, words


def entries(root: Path) -> list[Entry]:
    """Everything in the cache, least recently used first."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for kind in KINDS:
        folders = [f for f in _listed(root / kind) if _GROUP.fullmatch(f.name)] if "_" in kind else [root / kind]
        for folder in folders:
            for path in _listed(folder):
                if match := _NAMES[kind].fullmatch(path.name):
                    found.setdefault((folder, match[1]), []).append(path)
    made = (_entry(folder.relative_to(root).parts[0], paths) for (folder, _), paths in found.items())
    return sorted((entry for entry in made if entry is not None), key=lambda entry: (entry.used_at, entry.paths))


def uses(root: Path) -> list[Use]:
    """The runs that used the cache, the newest first."""
    found = []
    for path in _listed(root / "runs"):
        if path.suffix == ".json":
            with suppress(LoraBoothError, OSError):
                words, began_at = inputs.read_object(path, "", DiskError), path.stat().st_mtime
                is_live = _is_held(path.with_suffix(".lock"), began_at)
                found.append(Use(str(words.get("folder", "")), str(words.get("base", "")), began_at, is_live))
    return sorted(found, key=lambda use: (-use.began_at, use.folder))


@contextmanager
def in_use(root: Path, *, run_folder: Path, base: str) -> Iterator[None]:
    """Inside, what this process reads or writes in the cache is kept by whoever clears it.

    Where the cache cannot be written, nothing says so; a run that finds all it needs may go on there.
    """
    where = str(run_folder.absolute())
    path = root / "runs" / f"{hashlib.sha256(where.encode(errors='surrogateescape')).hexdigest()[:16]}.json"
    lock = FileLock(path.with_suffix(".lock"))
    with suppress(OSError, DiskError, Timeout):  # Timeout: another process of the same run holds it
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1, poll_interval=0.1)  # seconds in which one who asks whether it is held lets it go
    with suppress(DiskError, UnicodeError):
        disk.write_text(path, json.dumps({"folder": where, "base": base}))
    try:
        yield
    finally:
        lock.release()


def removable(root: Path, found: Iterable[Entry]) -> list[Entry]:
    """Those of `found` that no live run has used since it began."""
    began = min((use.began_at for use in uses(root) if use.is_live), default=float("inf"))
    return [entry for entry in found if entry.used_at < began]


def remove(found: Iterable[Entry]) -> tuple[int, int]:
    """Remove entries; how many went, and their bytes. What belongs to others and may not be removed stays."""
    count = num_bytes = 0
    for entry in found:
        with suppress(OSError):  # another process was faster, or it is another user's
            for path in entry.paths:
                path.unlink(missing_ok=True)
            count, num_bytes = count + 1, num_bytes + entry.num_bytes
    return count, num_bytes


def trim(root: Path, limit_bytes: float, told: Callable[[str], None]) -> None:
    """Remove what was not used for the longest until the rest is within `limit_bytes`; `told` what went, if any."""
    found = entries(root)
    excess = sum(entry.num_bytes for entry in found) - limit_bytes
    going = []
    for entry in removable(root, found) if excess > 0 else ():
        if excess <= 0:
            break
        going.append(entry)
        excess -= entry.num_bytes
    count, num_bytes = remove(going)
    if count:
        size = f"{num_bytes / 2**20:.0f} MiB"
        told(f"the cache {root} has reached run.cache_limit_gib; {count} entries ({size}) longest unused were removed")


def age_s(entry: Entry) -> float:
    """Seconds since the entry was used; none where its time lies ahead of the clock."""
    return max(0.0, time.time() - entry.used_at)


def _entry(kind: str, paths: list[Path]) -> Entry | None:
    """None when all of it has just gone."""
    stats = []
    for path in paths:
        with suppress(OSError):
            stats.append(path.lstat())
    if not stats:
        return None
    return Entry(kind, tuple(sorted(paths)), sum(s.st_size for s in stats), max(s.st_mtime for s in stats))


def _is_held(lock: Path, began_at: float) -> bool:
    """Whether a process holds the lock; trying it makes no file."""
    if not lock.exists():
        return False
    trial = FileLock(lock)
    try:
        trial.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return time.time() - began_at < UNTESTED_DAYS * DAY_S
    trial.release()
    return False


def _listed(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted; nothing where it is not there or may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
