"""Disks that are full, vanish or refuse: the message says what to do, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

from lora_booth.config.config import Config
from tests.soak import crash
from tests.soak.bench import Bench, Result, differences, lost_checkpoint, made
from tests.soak.crash import Fate

REFUSALS = (errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
WAYS = (*map(os.strerror, REFUSALS), "at fsync", "too few open files", "vanished")


def full_disks(count: int, folder: Path, seed: int = 0) -> Result:
    """The disk of the run folder is full at byte k; then it gets space, and the same command to the end. Needs root."""
    bench, failures = Bench(folder), []
    needed = sum(path.stat().st_size for path in (folder / "straight/run").rglob("*") if path.is_file())
    codes: Counter[int] = Counter()
    for i in range(count):
        config = bench.config(f"full-{i}")
        disk = folder / f"full-{i}" / "run"
        disk.mkdir()
        size = 4096 + (i * needed * 2 // count)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
        try:
            outcome = crash.run(config)
            codes[outcome.code] += 1
            fault = _untold(outcome, ("no space for", "MiB free, but"))
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            fault = fault or lost_checkpoint(config, outcome.output)
            again = crash.run(config)
            fault = fault or ("" if again.code == 0 else f"did not go on: {again.output[-300:]}")
            fault = fault or differences(bench.expected, made(config))
        finally:
            subprocess.run(["umount", disk], check=True)
        if fault:
            failures.append(f"disk of {size} bytes: {fault}")
    return Result(count, tuple(failures), ", ".join(f"{n} ended with {code}" for code, n in sorted(codes.items())))


def refusals(count: int, folder: Path, seed: int = 0) -> Result:
    """The disk refuses from a random change on, or vanishes, or files run out: told; then the same command again."""
    bench, rng, failures = Bench(folder), random.Random(seed), []
    ended: Counter[str] = Counter()
    for i in range(count):
        way, config = WAYS[i % len(WAYS)], bench.config(f"refused-{i}")
        where = folder / f"refused-{i}"
        if way == "vanished":
            fault, what = _vanish(config, rng.uniform(0.1, bench.seconds))
        elif way == "at fsync":
            fault, what = _refuse(config, Fate(sabotage=partial(_refuse_sync, rng.randrange(40))), errno.EIO)
        elif way == "too few open files":
            fault, what = _refuse(config, Fate(sabotage=partial(_limit_files, rng.randrange(12))), errno.EMFILE)
        else:
            number, error = rng.randint(1, len(bench.changes)), REFUSALS[i % len(WAYS)]
            fault, what = _refuse(config, Fate(event="change", number=number, folder=where, error=error), error)
        ended[what] += 1
        fault = fault or bench.finish(config)
        if fault:
            failures.append(f"{way} {i}: {fault}")
    return Result(count, tuple(failures), ", ".join(f"{number} {what}" for what, number in ended.items()))


def _refuse(config: Config, fate: Fate, error: int) -> tuple[str, str]:
    """What is wrong with how a run of `config` took `error`, "" when nothing is, and how it ended."""
    outcome = crash.run(config, fate)
    words = ("no space for",) if error == errno.EDQUOT else (os.strerror(error),)
    return _untold(outcome, words) or lost_checkpoint(config, outcome.output), _how(outcome)


def _vanish(config: Config, seconds: float) -> tuple[str, str]:
    """The same for a run folder that goes away after `seconds` and comes back when the run has ended."""
    folder = config.run.folder
    assert folder is not None
    process, log = crash.start(config, crash.SURVIVES, {})
    process.join(seconds)
    while not (folder / "config.toml").exists():  # before, it is not yet the run's
        process.join(0.01)
    away = folder.rename(folder.with_name("away"))
    crash.join(process, 60.0)
    outcome = crash.Outcome(process.exitcode or 0, log.read_text(), 0.0)
    fault = _untold(outcome, (str(folder),))
    if folder.exists():
        return fault or f"made anew: {[path.name for path in folder.rglob('*')]}", _how(outcome)
    away.rename(folder)
    return fault or lost_checkpoint(config, outcome.output), _how(outcome)


def _untold(outcome: crash.Outcome, words: tuple[str, ...]) -> str:
    """Why the user cannot know from `outcome` what the disk did, "" when the run ended well or said one of `words`."""
    is_told = 0 < outcome.code < crash.BUG and any(word in outcome.output for word in words)
    return "" if outcome.code == 0 or is_told else f"ended with {outcome.code}: {outcome.output[-1200:]}"


def _how(outcome: crash.Outcome) -> str:
    return "ended well" if outcome.code == 0 else "told"


def _refuse_sync(number: int) -> None:
    """Let the `number`-th fsync and all after it fail as on a disk that dies."""
    honest, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(descriptor)

    os.fsync = fsync


def _limit_files(more: int) -> None:
    """Allow `more` open files than there are."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))  # there are gaps below, so some more
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def can_mount() -> bool:
    """Whether this process may mount a small disk."""
    return os.name == "posix" and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None
