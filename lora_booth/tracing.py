"""Counting the bytes of tensors from their birth to their death, on any device, the meta device among them.

What lives here: the count, and attention as the fused CUDA kernels allocate it. What does not: what is run under the
count (`memory.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_BYTES = 512
"""What the CUDA caching allocator rounds up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


def rounded(num_bytes: int) -> int:
    """`num_bytes` in whole blocks of the CUDA allocator."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once and rounded."""
    storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(map(rounded, storages.values()))


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages on one device that come out of operations inside, until they die.

    `live` and `peak` are bytes beyond `known`, the tensors that were there before. A storage counts once, however many
    tensors look at it. What an operation allocates and frees within itself is not seen.
    """

    def __init__(self, device_type: str, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._device_type = device_type
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no address is used again
        self._known_keys = {storage._cdata for storage in self._known}
        self._seen: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._births, self._births_at_peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._look_at(out)
        return out

    def at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of `tensors` that were counted here and born before the peak; they must still be alive."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors} & self._seen.keys()
        return sum(size for _, size, birth in (self._seen[key] for key in keys) if birth <= self._births_at_peak)

    def _look_at(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self._count(out)
        elif isinstance(out, tuple | list):
            for item in out:
                self._look_at(item)

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in self._known_keys:
            return
        size = rounded(storage.nbytes())
        self._births += 1
        self._seen[key] = (weakref.ref(storage, partial(self._forget, key)), size, self._births)
        self.live += size
        if self.live > self.peak:
            self.peak, self._births_at_peak = self.live, self._births

    def _forget(self, key: int, _: Any) -> None:
        self.live -= self._seen.pop(key)[1]


class _FusedAttention(torch.autograd.Function):
    """The memory of FlashAttention-2 and its like (arXiv 2307.08691, section 3), not its numbers.

    Forward makes and keeps the output and each row's float32 log-sum-exp, backward makes three gradients; nothing of
    N×N is ever made. The output lies in memory as `[B, N, H, D]`, so that merging the heads copies nothing.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` allocates what the fused CUDA kernels do, and computes nothing.

    On the meta device it would else be matrix products that hold N×N scores. Not counted: the backward kernel's own
    float32 sum of the query's gradient, which dies with it.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
