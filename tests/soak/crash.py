"""Runs in processes of their own that die where they are told: after a time, at an event, or at a change on the disk.

The processes are forked from a server that has imported everything and loaded a base, so each costs its run alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import diffusers
import peft
import torch
import transformers.models.clip

from lora_booth.cli.console import Meter
from lora_booth.config.config import Config
from lora_booth.errors import LoraBoothError
from lora_booth.run.report import Silent
from lora_booth.verbs import train

BUG = 99
"""Exit code of a run that ended with a traceback."""
IMPORTED_ONCE = (bitsandbytes, peft, transformers.models.clip, diffusers.AutoencoderKL, diffusers.UNet2DConditionModel)
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")
"""Python's audit events that change the disk; of "open" only those that write."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([__name__, "tests.soak.warm"])


@dataclass(frozen=True)
class Fate:
    """What befalls a run: `signal_number` after `seconds`, which count from its start or from the `number`-th `event`.

    `event`: "change" for the moment before a change on the disk below `folder`, else a word of the report: "train",
    "saved" …, numbered from 1. With `number` 0 nothing befalls it, but its changes and what it reports are listed.
    With `error`, a change is not the end: it and all that follow are refused with that error number. `sabotage` is
    called in the process before it trains.
    """

    signal_number: int = signal.SIGKILL
    seconds: float | None = None
    event: str = ""
    number: int = 0
    folder: Path | None = None
    error: int = 0
    sabotage: Callable[[], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `code`: as multiprocessing has it, negative for a signal. `after_signal`: seconds it took."""

    code: int
    output: str
    seconds: float
    after_signal: float | None = None


SURVIVES = Fate()


def run(
    config: Config, fate: Fate = SURVIVES, *, limit: float = 120.0, environment: dict[str, str] | None = None
) -> Outcome:
    """Train `config` in a process of its own that meets `fate`."""
    process, log = start(config, fate, environment or {})
    began = time.monotonic()
    struck = None
    if fate.seconds is not None and not fate.event:
        process.join(fate.seconds)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, fate.signal_number)
            struck = time.monotonic()
    ended = join(process, limit)
    after = None if struck is None else ended - struck
    assert process.exitcode is not None
    return Outcome(process.exitcode, log.read_text() if log.exists() else "", ended - began, after)


def start(config: Config, fate: Fate, environment: dict[str, str], name: str = "0") -> tuple[Any, Path]:
    """The process, begun, and the file that gets what it prints, which `name` tells from those of others."""
    assert config.run.folder is not None
    log = config.run.folder.parent / f"{name}.log"
    process = _server.Process(target=_live, args=(config, fate, log, environment))
    process.start()
    return process, log


def join(process: Any, limit: float) -> float:
    """Wait for the end of `process`; returns when it was. Raises TimeoutError after `limit` seconds."""
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"a run did not end within {limit:g} s")
    return time.monotonic()


def _live(config: Config, fate: Fate, log: Path, environment: dict[str, str]) -> None:
    """The child: all that is printed goes to `log`; it leaves with the exit code of the error."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fate.event == "change":
        sys.addaudithook(_Changes(fate))
    if fate.sabotage is not None:
        fate.sabotage()
    code = 0
    try:
        train.train(config, report=Fated(fate))
    except LoraBoothError as error:
        print(error)
        code = error.exit_code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = BUG
    os._exit(code)


class _Changes:
    """An audit hook that ends the process before a change on the disk, refuses the change, or lists them all."""

    def __init__(self, fate: Fate) -> None:
        self.fate, self.count = fate, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or not isinstance(arguments[0], str | Path) or not self._is_change(event, arguments):
            return
        self.count += 1
        if self.fate.number == 0:
            os.write(1, f"change {event} {arguments[0]}\n".encode())
        elif self.fate.error:
            if self.count >= self.fate.number:
                raise OSError(self.fate.error, os.strerror(self.fate.error))
        elif self.count == self.fate.number:
            os.kill(os.getpid(), self.fate.signal_number)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        path = str(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # shutil.rmtree removes by names relative to an open folder
        if not path.startswith(str(self.fate.folder)):
            return False
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
        return os.path.lexists(path) == (event != "os.mkdir")


class Fated(Silent):
    """A report that prints, and strikes its own process at the event of `fate`."""

    def __init__(self, fate: Fate) -> None:
        self.fate, self.count, self.began, self.meter = fate, 0, time.monotonic(), Meter()

    def event(self, kind: str, text: str, **values: Any) -> None:
        print(text)
        self._meet(kind)

    def warn(self, text: str) -> None:
        print(f"warning: {text}")
        self._meet("warning")

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        self._meet(task)
        if task == "train" and self.fate.event == "eta":
            self.meter.update(done, values)
            print("seconds left", self.meter.seconds_left(total) or 0.0)
        if task == "train" and self.fate.event == "measure" and done % self.fate.number == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print("memory", pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(os.listdir("/proc/self/fd")))

    def _meet(self, word: str) -> None:
        if self.fate.event == "change" and self.fate.number == 0:
            print(f"moment {time.monotonic() - self.began:.3f} {word}")
        if word == self.fate.event:
            self.count += 1
            if self.count == self.fate.number:
                words = (os.getpid(), self.fate.signal_number)
                if self.fate.seconds:
                    threading.Timer(self.fate.seconds, os.kill, words).start()
                else:
                    os.kill(*words)
