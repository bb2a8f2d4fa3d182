"""What the operations of a pass ask of a card, and how long that takes at its peak rates.

What lives here: the figures, without torch. What does not: counting them (`tracing.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

from lora_booth.models.cards import Card


class Operation(NamedTuple):
    """What one operation asks of a card: floating-point operations, and bytes read and written.

    `is_single`: some of it is float32, for which tensor cores have half the rate (TF32) or are not used at all.
    """

    flops: int
    num_bytes: int
    is_single: bool


class Work:
    """Operations, and how often each was run or, scaled, is expected to."""

    def __init__(self, operations: Counter[Operation] | None = None, times: float = 1.0) -> None:
        self._operations = Counter[Operation]() if operations is None else operations
        self._times = times

    def __mul__(self, times: float) -> Work:
        return Work(self._operations, self._times * times)

    def add(self, operation: Operation) -> None:
        """Count `operation` once."""
        self._operations[operation] += 1

    @property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """Of each operation its figures, and how often it was run; unscaled, for a file."""
        assert self._times == 1.0, "what is kept was counted, not scaled"
        return sorted((op.flops, op.num_bytes, int(op.is_single), count) for op, count in self._operations.items())

    @staticmethod
    def of_rows(rows: Sequence[Sequence[int]]) -> Work:
        """The work that gave these `rows`."""
        return Work(Counter({Operation(flops, size, bool(single)): count for flops, size, single, count in rows}))

    @property
    def num_operations(self) -> float:
        """How many there are."""
        return self._times * self._operations.total()

    @property
    def flops(self) -> float:
        """Floating-point operations in all."""
        return self._times * sum(op.flops * count for op, count in self._operations.items())

    def seconds(self, card: Card) -> float:
        """The time that `card` needs at its peak rates: for each operation that of computing or of moving its bytes,
        whichever is longer (the roofline model, doi 10.1145/1498765.1498785). Starting operations takes none."""
        per_flop, per_byte = 1 / (card.tflops * 1e12), 1 / (card.gb_per_s * 1e9)
        return self._times * fsum(  # the same in whatever order they were counted
            count * max(op.flops * per_flop * (2 if op.is_single else 1), op.num_bytes * per_byte)
            for op, count in self._operations.items()
        )
