"""Batches drawn by other processes while the device trains; the same batches as drawn in line."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Batch = TypeVar("Batch")


class _Drawn(Dataset[Any]):
    """A batch for each step."""

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> Any:
        return self.draw(step)


def drawn_ahead(draw: Callable[[int], Batch], steps: range, workers: int) -> Iterator[Batch]:
    """`draw(step)` for every step in order; `draw` must depend on the step only."""
    loader = DataLoader(
        _Drawn(draw),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_unchanged,
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def _unchanged(batch: Any) -> Any:
    return batch
