"""Two runs in one folder: one of them goes on, the other is told who has it, and nothing of the two is mixed."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from lora_booth.config.config import Config
from lora_booth.errors import DiskError
from tests.soak import crash
from tests.soak.bench import Bench, Result
from tests.soak.crash import Fate

OTHER_HOST = "the-other-host"
WAYS = ("at once", "later", "after a kill", "other host", "other host, the first asleep for a while")


def shared_folders(count: int, folder: Path, seed: int = 0) -> Result:
    """A second run in the folder of the first, also where a network disk grants both the lock; one result, unmixed."""
    bench = Bench(folder, train={"steps": 12, "save_every_steps": 6}, preview={"images_per_prompt": 0})
    rng, failures = random.Random(seed), []
    seen: Counter[str] = Counter()
    for i in range(count):
        way, config = WAYS[i % len(WAYS)], bench.config(f"shared-{i}")
        moment = 0.0 if way == "at once" else rng.uniform(0.1, bench.seconds)
        first, second = _two(config, moment, way)
        fault, what = _judged(way, config, first, second)
        seen[f"{way}: {what}"] += 1
        fault = fault or bench.finish(config)
        if fault:
            failures.append(f"{way} {i}, second begun after {moment:.2f} s: {fault}")
    return Result(count, tuple(failures), ", ".join(f"{n} × {what}" for what, n in sorted(seen.items())))


Ended = tuple[int, int, str]
"""Process number, exit code and output of a run."""


def _two(config: Config, moment: float, way: str) -> tuple[Ended, Ended]:
    """Begin a run of `config`, `moment` seconds later another one, and wait for both."""
    process, log = crash.start(config, crash.SURVIVES, {})
    process.join(moment)
    if way == "after a kill":
        process.kill()
    is_elsewhere = way.startswith("other host")
    if is_elsewhere:
        _lose_lock(config, process)
    if way.endswith("asleep for a while") and process.is_alive():
        os.kill(process.pid, signal.SIGSTOP)
    other, other_log = crash.start(config, Fate(sabotage=_move_to_other_host if is_elsewhere else None), {}, name="1")
    if way.endswith("asleep for a while") and process.is_alive():
        other.join(2 * moment)
        os.kill(process.pid, signal.SIGCONT)
    for running in (process, other):
        crash.join(running, 120.0)
    return tuple((p.pid, p.exitcode, at.read_text()) for p, at in ((process, log), (other, other_log)))  # type: ignore[return-value]


def _move_to_other_host() -> None:
    socket.gethostname = partial(str, OTHER_HOST)  # type: ignore[assignment]


def _lose_lock(config: Config, process: Any) -> None:
    """Remove the lock's file under its holder, so that the next one gets one of its own, as on some network disks."""
    assert config.run.folder is not None
    while process.is_alive() and not (config.run.folder / "config.toml").exists():
        time.sleep(0.005)
    (config.run.folder / ".lock").unlink(missing_ok=True)


def _judged(way: str, config: Config, first: Ended, second: Ended) -> tuple[str, str]:
    """What is wrong with how the two ended, "" when nothing is, and what happened."""
    is_elsewhere = way.startswith("other host")
    host, codes = socket.gethostname(), (first[1], second[1])
    ended = f"ended with {codes}: {first[2][-300:]} / {second[2][-300:]}"
    if way == "after a kill":
        return ("" if codes == (-signal.SIGKILL, 0) or codes == (0, 0) else ended), "went on"
    if codes == (0, 0):
        return "" if "is finished already" in first[2] + second[2] or is_elsewhere else ended, "both ended well"
    loser, winner = (first, second) if first[1] else (second, first)
    if is_elsewhere:
        expected = f"was taken by process {second[0]} on {OTHER_HOST} since "
    else:
        expected = f"is in use by process {winner[0]} on {host} since "
    is_told = winner[1] == 0 and loser[1] == DiskError.exit_code and expected in loser[2]
    is_right_one = way == "at once" or loser is (first if is_elsewhere else second)
    return "" if is_told and is_right_one else ended, "told"
