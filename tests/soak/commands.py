"""Commands run in this process and judged: an end that is documented, within its time, with one message.

Words: an *odd thing* is what can lie where a file is expected, and is none.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import psutil

from lora_booth.cli import app, crash
from lora_booth.errors import ConfigError, DataError, DiskError, ModelError, NumericError

REFUSALS = {kind.exit_code for kind in (ConfigError, DataError, ModelError, DiskError, NumericError)}
"""Not DeviceMemoryError: nothing that is tried needs much."""
MAX_PROCESSOR_SECONDS = 60.0
MAX_STILL_SECONDS = 60
"""In which neither the command nor a process that it began used the processor; on a busy machine each uses a little."""
STILL_SECONDS = 0.002
"""Of the processor in one second, below which nothing goes on."""
MAX_GROWTH_BYTES = 4 << 30
"""Of the address space while a command runs."""
MAX_MESSAGE = 20_000


@dataclass(frozen=True)
class Ended:
    """How a command ended. `fault`: what is wrong with that, "" when nothing is."""

    code: int
    out: str
    err: str
    fault: str


class Endless(BaseException):
    """A command did not end. No Exception, so that nothing takes it for a fault of what it was doing."""


def run(words: Sequence[str], folder: Path) -> Ended:
    """`lora-booth` with `words`, in `folder`, with a home of its own there."""
    reports, home = folder / ".reports", folder / ".home"
    for place in (reports, home):
        place.mkdir(parents=True, exist_ok=True)
    changed = {crash.REPORTS: str(reports), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before, code, endless = Path.cwd(), 0, ""
    os.chdir(folder)
    try:
        typed = patch.object(sys, "argv", ["lora-booth", *words])
        with patch.dict(os.environ, changed), typed, _limited(), redirect_stdout(out), redirect_stderr(err):
            app.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Endless as error:
        endless = str(error)
    finally:
        os.chdir(before)
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    report = next((path.read_text(encoding="utf-8") for path in reports.iterdir()), "")
    shutil.rmtree(reports)
    return Ended(code, *texts, endless or _fault(code, *texts, report))


def _fault(code: int, out: str, err: str, report: str) -> str:
    if report or code == crash.EXIT_CODE:
        return f"crashed: {report[-700:] or err}"
    if "Traceback" in out + err:
        return f"a traceback: {err[-500:]}"
    if code not in REFUSALS | {0}:
        return f"ended with {code}: {err[-300:]}"
    if code and not err.startswith("lora-booth: "):
        return f"ended with {code} and no message: {err[-300:]!r}"
    return f"a message of {len(err)} characters" if len(err) > MAX_MESSAGE else ""


@contextmanager
def _limited() -> Iterator[None]:
    """Inside, memory is bounded, and what never ends raises `Endless`: it uses the processor for too long, or waits.

    The clock alone never ends a command: beside other work all of them take as long as they must.
    """

    import resource

    began = time.process_time() + _seconds_of_children()
    own, children, still = time.process_time(), _seconds_of_children(), 0

    def tick(_number: int, _frame: FrameType | None) -> None:
        nonlocal own, children, still
        used, used_by_children = time.process_time(), _seconds_of_children()
        still = still + 1 if used - own + used_by_children - children < STILL_SECONDS else 0
        own, children = time.process_time(), used_by_children  # its own again, since asking takes a little too
        if still >= MAX_STILL_SECONDS:
            raise Endless(f"waits for {MAX_STILL_SECONDS} s and does nothing")
        if own + children - began > MAX_PROCESSOR_SECONDS:
            raise Endless(f"not done within {MAX_PROCESSOR_SECONDS:.0f} s of the processor")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_GROWTH_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _seconds_of_children() -> float:
    """Of the processor, used by all that this process began, ended ones too."""
    used = sum(os.times()[2:4])
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            used += sum(child.cpu_times()[:4])
    return used


def _socket(path: Path) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as made:  # a long path is none; then it is missing
        made.bind(str(path))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


ODD_THINGS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nothing/at/all"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "link to noise": lambda path: path.symlink_to("/dev/urandom"),
    "link to a full disk": lambda path: path.symlink_to("/dev/full"),
    "link to nowhere": lambda path: path.symlink_to("/dev/null"),
    "socket": _socket,
    "empty": Path.touch,
    "gigabytes of nothing": _sparse,
}


def odd_things(folder: Path) -> dict[str, Path]:
    """One of each kind, made anew in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, make in ODD_THINGS.items():
        make(folder / name)
    return {name: folder / name for name in ODD_THINGS}


def replace_(path: Path, make: Callable[[Path], None]) -> None:
    """Put what `make` makes in the place of the file `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of every file below `folder`, none of which is opened."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found
