"""What a finished run says of itself, as summary.json keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Summary:
    """What a finished run made. `peak_gib`: most device memory of tensors; on a CPU, most memory of the process.

    `seconds`, and `seconds_of` its parts, are those of the process that finished it.
    """

    folder: str
    files: dict[str, str]
    before_and_after: str | None
    steps: int
    seconds: float
    peak_gib: float
    num_parameters: int
    validation_loss: float
    seconds_of: dict[str, float] = field(default_factory=dict)
    peak_gib_of: dict[str, float] | None = None
    """Most memory, as `peak_gib`, by the end of each part; None where an older version wrote it."""
    best_step: int | None = None
    """Of the kept checkpoints the one with the lowest validation loss."""
    exported_step: int | None = None
    exported_strength: float = 1.0
    """Of the checkpoint that was exported, by the choice of [evaluate]; None where none was made: the last, at 1."""
    reason: str = ""
    """Why that one, in one sentence."""
    scores: str = ""
    """Its likeness and what it forgot, in one line."""

    def moved(self, place: Callable[[str], str], folder: str) -> Summary:
        """The same in `folder`, each path as `place` has it."""
        shown = None if self.before_and_after is None else place(self.before_and_after)
        files = {name: place(path) for name, path in self.files.items()}
        return replace(self, folder=folder, files=files, before_and_after=shown)
