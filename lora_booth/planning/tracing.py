"""Counting bytes of living tensors and work of operations, on any device, meta included.

What lives here: the counts, and attention as the fused CUDA kernels allocate it. What does not: what is run under the
count (`memory.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lora_booth.planning.work import Operation, Work

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


@cache
def moves_nothing(func: Any) -> bool:
    """Whether an operation looks at its inputs in another shape, or allocates without writing."""
    if func.overloadpacket.__name__ in ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"):
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@cache
def _flop_count(packet: Any) -> Any:
    """The registered formula of an operation; in place, as `addmm_`, it is that of the plain one."""
    return flop_registry.get(packet, flop_registry.get(getattr(torch.ops.aten, packet.__name__.rstrip("_"), None)))


def _operation(func: Any, args: Any, kwargs: Any, out: Any) -> Operation:
    """What `func` asked for; FLOPs of matrix products and convolutions alone, by torch.utils.flop_counter."""
    count = _flop_count(func.overloadpacket)
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
    tensors = [*_tensors_in(args), *_tensors_in(out)]
    num_bytes = sum(map(_touched_bytes, tensors))
    return Operation(flops, num_bytes, any(t.dtype == torch.float32 for t in tensors))


def _touched_bytes(tensor: Tensor) -> int:
    """Those that reading it moves: what is expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)


_Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor on the meta device."""
_Kept = tuple[_Like | None, ...] | Literal["the first input"] | None
"""What an operation gives; None where it has to be run each time."""


class _Known(NamedTuple):
    """What is remembered of an operation: how its results are made again, and what it asks of a card, if anything."""

    kept: _Kept
    operation: Operation | None


_KNOWN: dict[Hashable, _Known] = {}
MAX_KNOWN = 100_000
"""Remembered operations; a plan of SDXL needs some thousands."""


def _without_numbers(func: Any, args: Any, kwargs: Any) -> tuple[Any, Operation | None]:
    """`func(*args, **kwargs)` on the meta device and what it asks of a card, from memory where it was asked before.

    torch works out shapes there in Python, a tenth of a millisecond or more for each operation, and blocks of a network
    repeat the same ones. Kept are operations that write to nothing and give new tensors which fill their storages, and
    those that write to their first input alone and give it back.
    """
    if not _is_pure(func) and not _is_in_place(func):
        return _run(func, args, kwargs)
    try:
        key = func, _like(args), _like(tuple(kwargs.items())) if kwargs else None
        known = _KNOWN.get(key)
    except TypeError:  # of an input that is not on the meta device, or has no hash
        return _run(func, args, kwargs)
    if known is None:
        out, operation = _run(func, args, kwargs)
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
        inputs = [*_tensors_in(args), *_tensors_in(tuple(kwargs.values()))]
        kept: _Kept = _results(out, inputs) if _is_pure(func) else None
        if not _is_pure(func) and out is args[0]:
            kept = "the first input"
        _KNOWN[key] = _Known(kept, operation)
        return out, operation
    if known.kept is None:
        return func(*args, **kwargs), known.operation
    if known.kept == "the first input":
        return args[0], known.operation
    made = [None if like is None else _empty(*like) for like in known.kept]
    return tuple(made) if len(func._schema.returns) > 1 else made[0], known.operation


def _run(func: Any, args: Any, kwargs: Any) -> tuple[Any, Operation | None]:
    out = func(*args, **kwargs)
    return out, None if moves_nothing(func) else _operation(func, args, kwargs, out)


@cache
def _is_pure(func: Any) -> bool:
    """Whether an operation only makes tensors, each of its returns being one."""
    values = (*func._schema.arguments, *func._schema.returns)
    makes = all(str(returned.type) == "Tensor" for returned in func._schema.returns)
    return makes and bool(func._schema.returns) and all(value.alias_info is None for value in values)


@cache
def _is_in_place(func: Any) -> bool:
    """Whether an operation only writes to its first input, and gives that back."""
    written = [value.alias_info is not None and value.alias_info.is_write for value in func._schema.arguments]
    return (
        len(func._schema.returns) == 1 and written[:1] == [True] and sum(written) == 1 and func._schema.name[-1] == "_"
    )


def _like(value: Any) -> Hashable:
    """What results and work depend on. Raises TypeError for a tensor that has numbers."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("a tensor with numbers")
        return value.shape, value.stride(), value.dtype, _touched_bytes(value)
    if isinstance(value, tuple | list):
        return tuple(map(_like, value))
    return type(value), value  # 1 and 1.0 and True are equal, and give other types


def _results(out: Any, inputs: Sequence[Tensor]) -> tuple[_Like | None, ...] | None:
    """What to make again; None where the results are no new tensors that fill their storages."""
    results = (out,) if isinstance(out, Tensor) else tuple(out)
    taken, found = {tensor.untyped_storage()._cdata for tensor in inputs}, list[_Like | None]()
    for result in results:
        if result is None:  # a gradient that nobody asked for
            found.append(None)
            continue
        like, storage = (tuple(result.shape), result.stride(), result.dtype), result.untyped_storage()
        if result.device.type != "meta" or storage._cdata in taken:
            return None
        if _empty(*like).untyped_storage().nbytes() != storage.nbytes():
            return None
        taken.add(storage._cdata)
        found.append(like)
    return tuple(found)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


class LiveBytes(TorchDispatchMode):
    """Counts the storages on one device that come out of operations inside, until they die, and the operations' work.

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
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _without_numbers if self._device_type == "meta" else _run
        out, operation = run(func, args, kwargs or {})
        for tensor in _tensors_in(out):
            self._count(tensor)
        if operation is not None:
            self.work.add(operation)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap each call in what keeps its compiler out, a tenth of the time; nothing is compiled here."""
        return False

    def at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those of `tensors` that were counted here and born before the peak; they must still be alive."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors} & self._seen.keys()
        return sum(size for _, size, birth in (self._seen[key] for key in keys) if birth <= self._births_at_peak)

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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, work: Work) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.work = work
        work.add(_attending(query, key, products=2, passes=1))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.work.add(_attending(query, key, products=5, passes=2))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attending(query: Tensor, key: Tensor, *, products: int, passes: int) -> Operation:
    """`products` of N×D and D×M matrices for each head, in a kernel that moves two of each for each of `passes`."""
    flops = 2 * products * query.numel() * key.shape[-2]
    num_bytes = 2 * passes * (query.numel() + key.numel()) * query.element_size()
    return Operation(flops, num_bytes, query.dtype == torch.float32)


@contextmanager
def fused_attention(work: Work) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` allocates what the fused CUDA kernels do, and computes nothing.

    On the meta device it would else be matrix products that hold N×N scores. Not counted: the backward kernel's own
    float32 sum of the query's gradient, which dies with it. Its operations are added to `work`.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _FusedAttention.apply(query, key, value, work)  # type: ignore[no-untyped-call]

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
