"""A run's page written into its folder: kept up while it trains, or when it is asked for."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_booth.config.inputs import is_plain_file, reason
from lora_booth.errors import ConfigError
from lora_booth.report import page, record
from lora_booth.run import disk
from lora_booth.run.folder import Run
from lora_booth.run.report import Report

FILE_NAME = "report.html"
MAX_SHARE = 0.02
"""Of a run's time that its page takes while it trains; the last one is always made."""
HEAD_BYTES = 2048


def write(folder: Path) -> Path:
    """Make report.html of the run in `folder` anew; returns its path. Raises ConfigError where there is no run, or
    where a file of that name was not made here; DiskError."""
    path = folder / FILE_NAME
    text = page.page(record.read(folder))
    require_own(path)
    disk.write_text(path, text)
    return path


def require_own(path: Path) -> None:
    """Raises ConfigError where `path` is something that was not made here."""
    if path.is_symlink() or path.exists():
        head = path.read_bytes()[:HEAD_BYTES] if is_plain_file(path) and not path.is_symlink() else b""
        if page.MARK.encode() not in head:
            raise ConfigError(
                f"{path} exists, was not made by lora_booth and is not replaced; rename it, or name another with --out."
            )


class Refreshing:
    """A listener that hands on what it hears, and makes the run's page anew when something was saved or drawn.

    What goes wrong with the page is told once, and never reaches who trains.
    """

    def __init__(self, listener: Report, run: Run) -> None:
        self._listener, self._run = listener, run
        self._seconds, self._made_at, self._is_told = 0.0, float("-inf"), False

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Handed on; then the page, where it is its time."""
        self._listener.event(kind, text, **values)
        if kind in ("saved", "preview") and time.monotonic() - self._made_at > self._seconds / MAX_SHARE:
            self.refresh()

    def warn(self, text: str) -> None:
        """Handed on, and kept for the page."""
        self._listener.warn(text)
        with suppress(Exception):  # where the page cannot be written either, which is told
            self._run.append_warning(text)

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """Handed on."""
        self._listener.progress(task, done, total, **values)

    def refresh(self) -> None:
        """Make the page anew."""
        began = time.monotonic()
        try:
            self._run.require_taken()
            write(self._run.folder)
        except Exception as error:  # whatever it is, the run matters more than its page
            if not self._is_told:
                self.warn(f"{FILE_NAME} could not be made ({reason(error)}); training goes on without it.")
            self._is_told = True
        self._made_at = time.monotonic()
        self._seconds = self._made_at - began
