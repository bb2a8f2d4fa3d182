"""Stopping politely: the first signal asks, the second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_booth.errors import Interrupted

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Those that ask to stop, of which Windows has SIGINT (Ctrl-C) and SIGBREAK (Ctrl-Break, or the window is closed).

What ends a process of Windows in other ways, as the task manager does, asks nobody: to a run that is a kill.
"""


class StopRequest:
    """Whether somebody asked this process to stop, and how."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def check(self, message: str) -> None:
        """Raises Interrupted with `message` if a stop was asked for. Call where nothing is half done."""
        if self.signal_number is not None:
            raise Interrupted(message, signal_number=self.signal_number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch those of SIGNALS while inside; a second one ends the process at once with 128 + its number."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread only
        return

    def receive(number: int, _frame: FrameType | None) -> None:
        if request:
            os._exit(128 + number)
        request.signal_number = number

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_term() -> Iterator[None]:
    """Make SIGTERM, and Windows' SIGBREAK, an exception while inside, as SIGINT is: what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
