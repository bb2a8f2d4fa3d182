"""One cache for several users and runs: whole bytes, or one message that names the setting; also when it is cleared."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lora_booth.config.config import Config
from lora_booth.errors import DiskError
from lora_booth.run import cache_folder
from lora_booth.verbs import train
from tests.soak import crash
from tests.soak.bench import Bench, Result, differences, made
from tests.soak.crash import Fate

UMASKS = (0o002, 0o007, 0o022, 0o027, 0o077)
MODES = (0o777, 0o1777, 0o775, 0o2775, 0o755)
"""Of the folder that the cache is made in, which belongs to the first user and the group of both."""
USERS, GROUP = (5001, 5002), 4242


def several_users(count: int, folder: Path, seed: int = 0) -> Result:
    """Two users with umasks of their own train with one cache, at once or in turn: whole bytes, or told. Needs root."""
    rng, failures, seen = random.Random(seed), [], Counter[str]()
    with _open_to_all() as place:
        bench = Bench(place)
        for path in place.rglob("*"):  # what libraries write is their user's alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        for i in range(count):
            umasks, mode = (rng.choice(UMASKS), rng.choice(UMASKS)), rng.choice(MODES)
            cache, at_once = _place_of(place / f"cache-{i}", mode), rng.random() < 0.5
            configs = [bench.config(f"user-{i}-{n}", run={"cache": cache / "cache"}) for n in range(2)]
            warm = [bench.config(f"warm-{i}-{n}", train={"steps": 1}) for n in range(2)]
            codes = []
            for number, umask, outcome in zip(USERS, umasks, _both(configs, warm, umasks, at_once), strict=True):
                code, output = outcome
                codes.append(code)
                config = configs[USERS.index(number)]
                if code == 0:
                    fault = differences(bench.expected, made(config)) or _open_files(config, number, umask)
                else:
                    is_told = code == DiskError.exit_code and "run.cache" in output and "Traceback" not in output
                    fault = "" if is_told and (at_once or number != USERS[0]) else f"ended with {code}: {output[-400:]}"
                if fault:
                    told = f"umasks {umasks[0]:03o} {umasks[1]:03o}, folder {mode:o}, at once {at_once}"
                    failures.append(f"user {number} of try {i} ({told}): {fault}")
            seen[" and ".join("went on" if code == 0 else "was told" for code in codes)] += 1
    return Result(count, tuple(failures), ", ".join(f"{n} × {what}" for what, n in sorted(seen.items())))


def cleared_caches(count: int, folder: Path, seed: int = 0) -> Result:
    """All of a cache is removed again and again under two runs that share it, in use or not: the same bytes."""
    bench, rng, failures, cleared = Bench(folder), random.Random(seed), [], 0
    for i in range(count):
        root = folder / f"cache-{i}"
        configs = [bench.config(f"cleared-{i}-{n}", run={"cache": root}) for n in range(2)]
        running = [crash.start(config, crash.SURVIVES, {}) for config in configs]
        while any(process.is_alive() for process, _ in running):
            cleared += cache_folder.remove(cache_folder.entries(root))[0]
            running[0][0].join(rng.uniform(0.0, 0.1))
        for config, (process, log) in zip(configs, running, strict=True):
            crash.join(process, 120.0)
            again = crash.run(config) if process.exitcode == 0 else None  # finished: it must say so
            if process.exitcode != 0 or again is None or again.code != 0:
                failures.append(f"run {i} ended with {process.exitcode}: {log.read_text()[-400:]}")
                continue
            fault = differences(_without_class_images(bench.expected), _without_class_images(made(config)))
            failures += [f"run {i}: {fault}"] if fault else []
    return Result(count, tuple(failures), f"{cleared} entries removed")


def _both(configs: list[Config], warm: list[Config], umasks: tuple[int, int], at_once: bool) -> list[tuple[int, str]]:
    """Exit code and output of each user's run."""
    running: list[tuple[Any, Path]] = []
    for config, number, umask, first in zip(configs, USERS, umasks, warm, strict=True):
        assert config.run.folder is not None
        os.chown(config.run.folder.parent, number, GROUP)
        running.append(crash.start(config, Fate(sabotage=partial(_become, number, umask, first)), {}))
        if not at_once:
            crash.join(running[-1][0], 120.0)
    for process, _ in running:
        crash.join(process, 120.0)
    return [(process.exitcode, log.read_text()) for process, log in running]


def _become(number: int, umask: int, warm: Config) -> None:
    """Make this process another user's, as far as files go.

    It trains `warm` before, so that all of Python and the decoder is loaded, which may lie where only root can read.
    """
    train.train(warm)
    os.umask(umask)
    os.setgroups([GROUP])
    os.setegid(GROUP)
    os.seteuid(number)


def _open_files(config: Config, number: int, umask: int) -> str:
    """Files of a run folder that others may read or write though its owner's umask forbids it, "" when none."""
    assert config.run.folder is not None and config.run.cache is not None
    found = [path for path in config.run.folder.rglob("*") if path.stat().st_mode & umask]
    found += [
        path for path in config.run.cache.rglob("*") if path.stat().st_uid == number and path.stat().st_mode & umask
    ]
    return f"umask {umask:03o} does not hold for {', '.join(path.name for path in found[:5])}" if found else ""


def _place_of(folder: Path, mode: int) -> Path:
    folder.mkdir()
    os.chown(folder, USERS[0], GROUP)
    folder.chmod(mode)
    return folder


def _without_class_images(names: dict[str, str]) -> dict[str, str]:
    """What `made` gave, but for what lies in the cache."""
    return {name: digest for name, digest in names.items() if not name.removesuffix(".png").isdigit()}


@contextmanager
def _open_to_all() -> Iterator[Path]:
    """A folder that every user can enter; the tests' own are root's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
