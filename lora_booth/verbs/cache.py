"""What the cache holds, and clearing it: how much, of which bases, which runs used it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from lora_booth.config.inputs import shown, shown_path, word
from lora_booth.errors import ConfigError
from lora_booth.run import cache_folder
from lora_booth.run.cache_folder import Entry
from lora_booth.run.report import Report

UNKNOWN = "unknown base"
"""Of what an older version wrote, or what is damaged."""
MAX_RUNS_SHOWN = 20
_UNITS_S = {"h": 3600.0, "d": cache_folder.DAY_S, "w": 7 * cache_folder.DAY_S}


def cache(
    folder: Path | None, report: Report, *, clear: bool = False, older_than: str | None = None, base: str | None = None
) -> None:
    """Tell what the cache in `folder` (default: the user's) holds, of `base` and `older_than` alone if given.

    `clear`: remove just that instead, but for what a live run has used since it began.

    Nothing that a run needs is lost: it makes again what it misses. Raises ConfigError for a base that is not there or
    an age that is none.
    """
    root = cache_folder.default_folder() if folder is None else folder
    seconds = 0.0 if older_than is None else parse_age(older_than)
    named = {entry: entry.base() for entry in cache_folder.entries(root)}
    if base is not None:
        named = _of_base(named, word(base, "--base"))
    chosen = [entry for entry in named if cache_folder.age_s(entry) >= seconds]
    if not clear:
        _tell(root, chosen, named, report)
        return
    going = cache_folder.removable(root, chosen)
    count, num_bytes = cache_folder.remove(going)
    if base is None and older_than is None:
        for name in (cache_folder.TRIALS, cache_folder.COUNTS):
            with suppress(OSError):
                (root / name).unlink(missing_ok=True)
    report.event(
        "cleared",
        f"cleared  {count} entries, {_size(num_bytes)}, of {shown_path(root)}",
        entries=count,
        bytes=num_bytes,
    )
    if len(going) < len(chosen):
        kept = len(chosen) - len(going)
        report.event("kept", f"kept     {kept} entries that a live run has used since it began", entries=kept)
    if count < len(going):
        report.warn(f"{len(going) - count} entries belong to another user and may not be removed; ask their owner.")


def parse_age(text: str) -> float:
    """Seconds of "12h", "30d" or "4w". Raises ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", text)
    if match is None:
        raise ConfigError(f'--older-than "{shown(text)}" is no age; write hours, days or weeks as 12h, 30d or 4w.')
    return int(match[1]) * _UNITS_S[match[2]]


def _of_base(named: dict[Entry, tuple[str, str]], base: str) -> dict[Entry, tuple[str, str]]:
    """The entries of the base with that name, or whose fingerprint begins so."""
    found = {
        entry: (name, fingerprint)
        for entry, (name, fingerprint) in named.items()
        if base == (name or UNKNOWN) or (len(base) >= 8 and fingerprint.startswith(base))
    }
    if not found:
        known = ", ".join(sorted({name or UNKNOWN for name, _ in named.values()})) or "none"
        raise ConfigError(f'--base "{shown(base)}" is no base in this cache; those in it are: {known}.')
    return found


def _tell(root: Path, chosen: Sequence[Entry], named: dict[Entry, tuple[str, str]], report: Report) -> None:
    total = sum(entry.num_bytes for entry in chosen)
    text = f"cache    {shown_path(root)}: {len(chosen)} entries, {_size(total)}"
    report.event("cache", text, folder=str(root), entries=len(chosen), bytes=total)
    by_base: dict[tuple[str, str], list[Entry]] = {}
    for entry in chosen:
        by_base.setdefault(named[entry], []).append(entry)
    if by_base:
        head = f"{'latents':>9}{'prompts':>9}{'class images':>14}{'size':>11}   last used"
        report.event("head", f"         {'base':<32}{head}")
    for (name, fingerprint), found in sorted(by_base.items()):
        counts, size = Counter(entry.kind for entry in found), sum(entry.num_bytes for entry in found)
        used_at = max(entry.used_at for entry in found)
        known = f"{name} ({fingerprint[:8]})" if name else UNKNOWN
        numbers = f"{counts['latents']:>9}{counts['prompts']:>9}{counts['class_images']:>14}{_size(size):>11}"
        values = {kind: counts[kind] for kind in cache_folder.KINDS}
        report.event(
            "base",
            f"         {known:<32}{numbers}   {_day(used_at)}",
            name=name,
            fingerprint=fingerprint,
            bytes=size,
            used_at=used_at,
            **values,
        )
    uses = cache_folder.uses(root)
    for use in uses[:MAX_RUNS_SHOWN]:
        state = "uses it now" if use.is_live else f"used it on {_day(use.began_at)}"
        text = f"run      {shown_path(Path(use.folder))} ({shown(use.base)}) {state}"
        report.event("run", text, folder=use.folder, base=use.base, began_at=use.began_at, is_live=use.is_live)
    if len(uses) > MAX_RUNS_SHOWN:
        report.event("runs", f"         and {len(uses) - MAX_RUNS_SHOWN} runs before them")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _day(seconds: float) -> str:
    """The local date of a file's time, which may be any number."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return "?"
