"""What a job is, and the ways in which it ends without its figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]
Job = tuple[str, Callable[[], Figures]]
"""Name, and what measures it."""


class NotOffered(Exception):
    """This code or this device does not offer what was to be measured; the message says why."""


class Unfinished(RuntimeError):
    """A job that ended badly after some of its figures were known."""

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures
