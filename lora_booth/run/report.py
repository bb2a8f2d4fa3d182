"""How verbs tell what they do, without knowing who listens.

A terminal, a log, a program, or nobody.
"""

from __future__ import annotations

from typing import Any, Protocol


class Report(Protocol):
    """A listener. Calls must be cheap: `progress` comes every step."""

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Something worth keeping: `kind` is one word for programs, `text` one sentence for people."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know, with its remedy."""
        ...

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """`task` has come to `done` of `total`; `values` are numbers to show beside it."""
        ...


class Silent:
    """A report that nobody listens to."""

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        """Nothing."""
