"""A CUDA graph without a card: operations are recorded once, and run again on the same memory, with no Python between.

What this proves: that nothing that a step depends on is decided, drawn or made outside of what was recorded, since it
would be the recorded step's for ever; that inputs, losses and gradients stay where they were; that Python asks for no
number. What it does not: that a card's kernels can be recorded, and how memory is used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ASKS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}


class Tape(TorchDispatchMode):
    """Keeps every operation inside with its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) in ASKS:
            raise RuntimeError(f"{func} would wait for the device while it is recorded")
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """All operations again, in their order, on the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, out in self.steps:
                if not any(returned.alias_info for returned in func._schema.returns):
                    _keep(out, func(*args, **kwargs))
                elif any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns):
                    func(*args, **kwargs)  # in place; a view of the same memory needs nothing


def _keep(kept: Any, found: Any) -> None:
    if isinstance(kept, Tensor):
        kept.detach().copy_(found)
    elif isinstance(kept, list | tuple):
        for one, other in zip(kept, found, strict=True):
            _keep(one, other)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """As `graphs.record`."""
    tape = Tape()
    with tape:
        run()
    return tape.replay
