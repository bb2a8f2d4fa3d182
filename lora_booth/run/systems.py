"""Where operating systems differ, besides files (`disk.py`) and signals (`interrupts.py`).

What lives here: memory of processes, starting one, streams, and words that a user of this system would write. Each
difference is asked for by what a system has, not by its name, so that tests can give one the rules of another.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

MAX_WINDOWS_PATH = 259
"""Characters of a whole path that Windows takes where long paths are not switched on."""


def is_windows() -> bool:
    """Whether this is Windows, by a signal that only it has."""
    return hasattr(signal, "CTRL_C_EVENT")


def command_line(words: Sequence[str]) -> str:
    """`words` as a user would type them in this system's shell."""
    return subprocess.list2cmdline(words) if is_windows() else shlex.join(words)


def limits_advice() -> str:
    """What to do when the system grants no more processes or open files, in one clause."""
    return "close other programs" + ("" if is_windows() else ", or raise the limits that `ulimit -a` shows")


def peak_memory_bytes() -> int:
    """Most main memory that this process has held; what it holds now where the system does not keep the peak."""
    with suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    import psutil  # not at the top: the decoder does without

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def memory_bytes(pid: int) -> int:
    """Main memory that process `pid` holds now, 0 when it is gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def available_memory_bytes() -> int:
    """Main memory that a new program could have without others being moved to the disk."""
    import psutil

    return int(psutil.virtual_memory().available)


def bound_own_memory(max_bytes: int) -> None:
    """Let this process have no more address space than `max_bytes`, where the system can: Linux, not macOS or Windows.

    Elsewhere whoever started it must look at what it holds (`memory_bytes`).
    """
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def apart() -> dict[str, Any]:
    """Arguments for `Popen` that keep Ctrl-C in the terminal from the new process, and open no window for it."""
    if is_windows():
        names = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
        return {"creationflags": sum(getattr(subprocess, name, 0) for name in names)}
    return {"start_new_session": True}


def settle_streams() -> None:
    """Let no character that is printed end the program, whatever the terminal or file takes.

    A file or pipe gets UTF-8, which configs and logs are read as, unless PYTHONIOENCODING says otherwise; what a
    terminal cannot show becomes "?".
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # None under pythonw, and where a program has put its own stream
            is_settled = stream.isatty() or "PYTHONIOENCODING" in os.environ
            reconfigure(encoding=None if is_settled else "utf-8", errors=errors)


def lost_processes() -> bool:
    """Whether `accelerate launch` was asked for several processes and began this one alone.

    So it does without several cards (accelerate 1.15, commands/launch.py, `simple_launcher`). It has then named a place
    to meet, and no rank, which torchrun and MPI give each process.
    """
    names = os.environ.keys()
    ranks = {"RANK", "LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= names and not ranks & names
