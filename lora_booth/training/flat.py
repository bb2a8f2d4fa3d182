"""Parameters as one vector, so that an update is a few operations.

SDXL's attention has 1,120 adapter parameters; the kernels of an update are short, and starting a thousand of them takes
a card longer than running them. Parts begin at multiples of 256 numbers, so that 8-bit moments are the same as for each
alone. Adafactor looks at shapes, so for it parameters stay apart.

In a base of two bytes a number, passes with gradients read a copy of the vector in that type, made at once for all
parts, instead of casting each part in every pass; its gradients are summed to float32 after each backward pass.
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
    vector. `read_in`: the type of the copy that passes with gradients read; None where they read the parts. `arrived`:
    where the gradients of one pass are gathered.
    """

    def __init__(self, parts: Sequence[nn.Parameter], read_in: torch.dtype | None = None) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        if len(self.parts) == 1:
            self.vector = first
        else:
            self.vector = nn.Parameter(first.new_zeros(sum(aligned(part.numel()) for part in self.parts)))
            for part, values in self._split(self.vector.data):
                values.copy_(part.data)
                part.data = values
        self._copy = None if read_in is None else torch.empty_like(self.vector.data, dtype=read_in)
        self._read: list[Tensor] = list(self.parts)
        if self._copy is not None:
            self._read = [values.requires_grad_() for _, values in self._split(self._copy)]
            self.refresh_()
        self.arrived = torch.zeros_like(self.vector.data, dtype=read_in)
        self._arrived_parts = [values for _, values in self._split(self.arrived)]

    @property
    def copies(self) -> dict[nn.Parameter, Tensor]:
        """What passes with gradients read in place of each part; empty where they read the parts."""
        return {} if self._copy is None else dict(zip(self.parts, self._read, strict=True))

    def refresh_(self) -> None:
        """Make the copy anew, after the vector has changed."""
        if self._copy is not None:
            self._copy.copy_(self.vector.data)

    def take(self) -> list[Tensor | None]:
        """The gradients of the last backward pass, of each part, which then has none."""
        gradients = []
        for part, read in zip(self.parts, self._read, strict=True):
            gradient, read.grad = read.grad, None
            if part is not self.vector:  # whose gradient is the sum
                gradient = part.grad if gradient is None else gradient  # where the part itself was read
                part.grad = None
            gradients.append(gradient)
        return gradients

    def add_(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one backward pass to the vector's, which begins with the first of a step. A part without
        one adds zeros."""
        found = [torch.zeros_like(to) if g is None else g for g, to in zip(gradients, self._arrived_parts, strict=True)]
        torch._foreach_copy_(self._arrived_parts, found)
        if self.vector.grad is None:
            self.vector.grad = self.arrived.to(self.vector.dtype, copy=True)
        else:
            self.vector.grad.add_(self.arrived)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each part with its gradient, once they are gathered."""
        assert self.vector.grad is not None, "gradients are not gathered"
        return self._split(self.vector.grad)

    def _split(self, vector: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        begin, flat = 0, vector.view(-1)
        for part in self.parts:
            yield part, flat[begin : begin + part.numel()].view_as(part)
            begin += aligned(part.numel())
