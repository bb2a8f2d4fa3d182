"""Parameters as one vector, so that an update is a few operations.

SDXL's attention has 1,120 adapter parameters; the kernels of an update are short, and starting a thousand of them takes
a card longer than running them. Parts begin at multiples of 256 numbers, so that 8-bit moments are the same as for each
alone. Adafactor looks at shapes, so for it parameters stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Numbers after which a part may begin: 8-bit optimizers scale blocks of as many, which so never span two parts."""


def aligned(numel: int) -> int:
    """Numbers that a part of `numel` takes up in a vector."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


class Flat:
    """`parts`, whose numbers lie in one `vector` that an optimizer updates; zeros lie between them.

    From now on each parameter is a view into the vector, so they may only be changed in place. A single part is its own
    vector.
    """

    def __init__(self, parts: Sequence[nn.Parameter]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        zeros = torch.zeros(ALIGNMENT, dtype=first.dtype, device=first.device)
        self._gaps = [zeros[: aligned(part.numel()) - part.numel()] for part in self.parts]
        if len(self.parts) == 1:
            self.vector = first
            return
        self.vector = nn.Parameter(self._joined([part.data for part in self.parts]))
        for part, values in self._split(self.vector.data):
            part.data = values

    def collect_(self) -> nn.Parameter:
        """Move the gradients of the parts into the vector's, and return the vector. A part without one gives zeros."""
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in self.parts]
        for part in self.parts:
            part.grad = None
        self.vector.grad = gradients[0] if len(gradients) == 1 else self._joined(gradients)
        return self.vector

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each part with its gradient, once they are collected."""
        assert self.vector.grad is not None, "gradients are not collected"
        return iter([(self.vector, self.vector.grad)]) if len(self.parts) == 1 else self._split(self.vector.grad)

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(tensors, self._gaps, strict=True)
        return torch.cat([piece for tensor, gap in pairs for piece in (tensor.reshape(-1), gap)])

    def _split(self, vector: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        begin = 0
        for part in self.parts:
            yield part, vector[begin : begin + part.numel()].view_as(part)
            begin += aligned(part.numel())
