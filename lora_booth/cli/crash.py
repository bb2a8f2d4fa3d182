"""What nobody foresaw: one sentence for the user, a report for the developers.

The report holds versions, the command and the traceback. It names no path of the user's but those of the command: where
programs, the home and the current folder lie is cut off. It is written whole or not at all, and replaces nothing.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lora_booth.config import inputs
from lora_booth.run import versions

EXIT_CODE = 1
REPORTS = "LORA_BOOTH_REPORTS"
"""Environment variable: the folder that reports are written into, instead of the current one."""
_ABSOLUTE = re.compile(
    r"""(?<=['"])(?:/|\\\\|[A-Za-z]:[/\\])[^'"\n]*[/\\]"""  # in quotes, where a name may hold spaces
    r"""|(?<![\w.~:/\\<-])(?:/|[A-Za-z]:[/\\])(?:[^/\\\s'":*?<>|]+[/\\])+"""
)
"""The folder part of an absolute path."""


def told(error: BaseException, words: Sequence[str]) -> str:
    """Write the report of `error`, which ended `words`; returns what the user is told.

    Of several processes of a run that end alike, all but the first get "". Never raises an Exception.
    """
    try:
        name = type(error).__name__
        what = inputs.reason(error)
        what = f"an unexpected {name}" if what == name else f"an unexpected {name} ({what})"
    except Exception:  # its own words are broken too
        what = "an unexpected error"
    try:
        path = _written(_report(error, words))
    except FileExistsError:
        return ""
    except Exception as fault:
        return f"{what}, and no report of it could be written ({inputs.reason(fault)}); run the same command again."
    return (
        f"{what}. This is a fault of lora_booth. A report with versions, command and traceback is in {path}: read it, "
        "and attach it to an issue of lora_booth; the same command may go on from what was saved."
    )


def _report(error: BaseException, words: Sequence[str]) -> str:
    command = shlex.join(["lora-booth", *words])
    lines = [
        "lora_booth ended in a way that nobody foresaw.",
        "",
        f"command   {command}",
        f"time      {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        *(f"version   {name} {number}" for name, number in versions.versions().items()),
        "",
        *_without_places("".join(traceback.format_exception(error)), command).splitlines(),
    ]
    return "\n".join(lines) + "\n"


def _without_places(text: str, command: str) -> str:
    """`text` with the folders of programs, home and work cut off, and of other paths all but the name."""
    cut = {str(Path(__file__).parents[2]): "", tempfile.gettempdir(): "<temp>"}
    cut |= {sysconfig.get_path(kind): "" for kind in ("purelib", "platlib", "stdlib")}
    with suppress(OSError, RuntimeError):  # no home, or a current folder that is gone
        cut |= {str(Path.home()): "~", str(Path.cwd()): "."}
    cut |= {os.path.realpath(folder): mark for folder, mark in cut.items()}
    for folder in sorted(cut, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder + os.sep, f"{cut[folder]}{os.sep}" if cut[folder] else "")
    return _ABSOLUTE.sub(lambda found: found[0] if found[0] in command else "…" + os.sep, text)


def _written(report: str) -> Path:
    """The new file that holds `report`. Raises OSError, FileExistsError where another process of the run was first."""
    chosen = os.environ.get(REPORTS)
    folders = [Path(chosen)] if chosen else [Path(), Path(tempfile.gettempdir())]
    for number, folder in enumerate(folders, start=1):
        try:
            return _new_file(folder, report)
        except FileExistsError:
            raise
        except OSError:
            if number == len(folders):
                raise
    raise AssertionError("there is always a folder")


def _new_file(folder: Path, text: str) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=".lora-booth-crash.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        for path in _paths(folder):
            with suppress(FileExistsError):
                _name(Path(name), path)
                return path.absolute()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    finally:
        with suppress(OSError):
            os.unlink(name)


def _name(temporary: Path, path: Path) -> None:
    """Give the file `temporary` the name `path`. Raises FileExistsError where that is taken."""
    try:
        os.link(temporary, path)  # which, unlike renaming, replaces nothing
    except FileExistsError:
        raise
    except OSError:  # not every disk has links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(temporary, path)


def _paths(folder: Path) -> Iterator[Path]:
    """Names for the report, of which the first free one is taken.

    All processes of a run on several devices have one name for theirs: one report is enough.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield folder / f"lora-booth-crash-{time.strftime('%Y%m%d')}-{os.getppid()}.txt"
        return
    stem = f"lora-booth-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    yield from (folder / f"{stem}{ending}.txt" for ending in ("", *(f"-{n}" for n in range(2, 100))))
