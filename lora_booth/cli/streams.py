"""Standard output and error that outlive their reader and their disk.

A run of hours must not end because a pager was closed, a terminal went away or the disk of a log is full: what is said
then goes nowhere, and the work goes on.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

READER_GONE = (errno.EPIPE, errno.EINVAL)
"""Of a pipe nobody reads any more: the second is what Windows says."""


class Lasting:
    """A text stream that never raises for want of a reader or of space; `error` is what the first failure was."""

    def __init__(self, stream: Any) -> None:
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Take `text`, also where it goes nowhere."""
        try:
            if self.error is None:
                self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hand over what was taken."""
        try:
            if self.error is None:
                self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # what still waits in its buffer is flushed when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting() -> Iterator[Lasting]:
    """Inside, standard output and error last; gives standard output."""
    _fill_closed()
    before = sys.stdout, sys.stderr
    streams = [Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = streams
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def lost(stream: Lasting) -> OSError | None:
    """Why what was said on `stream` is lost; None where nobody wanted it."""
    stream.flush()
    return None if stream.error is None or stream.error.errno in READER_GONE else stream.error


def _fill_closed() -> None:
    """Open what a caller has closed of 0, 1 and 2: else a file of ours takes the number, and a library writes to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
