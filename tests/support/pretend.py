"""A device that is not there: tensors with real numbers that say, and keep to it, that they lie on it.

torch's own fake tensors (`FakeTensorMode`) have no numbers, so no whole run can be done with them; and where torch was
built for the CPU alone, autograd ends the process at the first one that says "cuda". Here each storage has a label,
which answers wherever Python asks a tensor for its device. What is computed is computed by the CPU.

What this proves: no operation mixes devices, nothing asks NumPy for what lies on a card, no float64 reaches MPS, random
numbers come from the CPU, copies that are not waited for come from pinned memory, and the numbers are those of a run on
the CPU. What it does not: that the device has a kernel for each operation, rounds alike, or has the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.state import PartialState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lora_booth.models import devices

CPU = torch.device("cpu")
_REAL_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
"""Operations whose tensors may lie on two devices."""
ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
"""Operations that give Python a number."""
KINDS = ("cpu", "cuda", "xpu", "mps")
LIKE = ("zeros", "ones", "empty", "full", "rand", "randn")
MADE = (*LIKE, "tensor", "as_tensor", "arange", "linspace", "eye", "randint", "empty_strided")
MADE = (*MADE, *(f"{name}_like" for name in LIKE))
NEW = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")


class Mixed(AssertionError):
    """What the device would refuse, or do wrong in silence."""


class Events:
    """A device's events: which were recorded, and waited for, in the order in which it came to that."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self._count = 0

    def make(self) -> SimpleNamespace:
        self._count += 1
        number = self._count
        record, synchronize = (partial(self._see, kind, number) for kind in ("recorded", "waited for"))
        return SimpleNamespace(record=record, synchronize=synchronize)

    def _see(self, kind: str, number: int) -> None:
        self.seen.append((kind, number))


class Places:
    """Which storage lies on which device; those that are not known lie where they really are."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def of(self, tensor: Tensor) -> torch.device:
        really: torch.device = _REAL_DEVICE(tensor)
        if really.type != "cpu" or tensor.layout != torch.strided:
            return really
        return self._found.get(tensor.untyped_storage()._cdata, (None, CPU))[1]

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        if device.type == "mps" and tensor.dtype in (torch.float64, torch.complex128):
            raise Mixed(f"{tensor.dtype} on MPS, which has none")
        storage = tensor.untyped_storage()
        self._found[storage._cdata] = (StorageWeakRef(storage), device)  # its address is not used again while this is
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned


class _Operations(TorchDispatchMode):
    """Every operation, forward and backward: its tensors lie on one device, and what it makes lies there too."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places, self.count = places, 0
        self.waits: list[str] = []
        """Operations that gave numbers of the device to Python, which waits for all that it was given to do."""
        self.events = Events()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(_tensors((*args, *(kwargs or {}).values())))
        at = {place for tensor in inputs if (place := self.places.of(tensor)) != CPU or tensor.ndim}
        if len(at) > 1 and func not in MOVES:
            raise Mixed(f"{func} of tensors on {' and '.join(sorted(map(str, at)))}")
        if func in ASKING and at - {CPU} | {self.places.of(tensor) for tensor in inputs} - {CPU}:
            self.waits.append(str(func))
        output = func(*args, **(kwargs or {}))
        self.count += bool(at - {CPU})
        if at and at != {CPU}:
            known = {tensor.untyped_storage()._cdata for tensor in inputs}
            for tensor in _tensors((output,)):
                if _REAL_DEVICE(tensor) == CPU and tensor.untyped_storage()._cdata not in known:
                    self.places.put(tensor, next(iter(at)))
        return output


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among `values`, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Questions:
    """What Python asks of a tensor's place, and what moves or makes tensors, in place of torch's own."""

    def __init__(self, device: torch.device, operations: _Operations) -> None:
        self.device, self.operations, self.places = device, operations, operations.places
        self._to, self._copy, self._numpy, self._tolist = Tensor.to, Tensor.copy_, Tensor.numpy, Tensor.tolist

    def patches(self) -> list[Any]:
        answers: dict[str, Any] = {
            "device": property(self.places.of),
            **{f"is_{kind}": property(partial(self._is, kind)) for kind in KINDS},
        }
        answers |= {
            name: _method(getattr(self, name))
            for name in ("to", "cpu", "pin_memory", "is_pinned", "numpy", "copy_", "tolist")
        }
        answers |= {name: _method(partial(self._made, getattr(Tensor, name))) for name in NEW}
        made = {name: partial(self._made, getattr(torch, name)) for name in MADE}
        return [mock.patch.object(Tensor, name, answer) for name, answer in answers.items()] + [
            mock.patch.object(torch, name, answer) for name, answer in made.items()
        ]

    def _is(self, kind: str, tensor: Tensor) -> bool:
        return self.places.of(tensor).type == kind

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms."""
        copy, before = bool(kwargs.pop("copy", False)), self.places.of(tensor)
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if other is not None:
            device, dtype, is_queued, layout = self.places.of(other), other.dtype, False, None
        else:
            device, dtype, is_queued, layout = torch._C._nn._parse_to(*args, **kwargs)
        device = self._full(device) if device is not None else before
        settings: dict[str, Any] = {"dtype": dtype or tensor.dtype}
        settings |= {} if layout is None else {"memory_format": layout}
        if "meta" in (device.type, before.type):
            return self._to(tensor, device=device, copy=copy, **settings)
        if is_queued:
            self._require_pinned(tensor, device, tensor)
        elif before != device == CPU:
            self.operations.waits.append("a copy to main memory")
        moved = self._to(tensor, copy=copy or before != device, **settings)
        return moved if before == device else self.places.put(moved, device)

    def cpu(self, tensor: Tensor) -> Tensor:
        return self.to(tensor, CPU)

    def numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        if self.places.of(tensor) != CPU:
            raise Mixed(f"NumPy is asked for a tensor on {self.places.of(tensor)}")
        return self._numpy(tensor, **kwargs)

    def tolist(self, tensor: Tensor) -> Any:
        if self.places.of(tensor) != CPU:
            self.operations.waits.append("tolist")
        return self._tolist(tensor)

    def copy_(self, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            self._require_pinned(source, self.places.of(tensor), tensor)
        return self._copy(tensor, source)

    def pin_memory(self, tensor: Tensor) -> Tensor:
        if self.places.of(tensor) != CPU or self.device.type == "mps":
            raise Mixed(f"a tensor on {self.places.of(tensor)} is pinned for {self.device}")
        return self.places.pin(tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        return self.places.is_pinned(tensor)

    def _made(
        self, make: Callable[..., Any], *args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any
    ) -> Any:
        """A tensor that is made on a device, if one is named."""
        if device is None:
            return make(*args, **kwargs)
        place = self._full(device)
        if place.type not in (self.device.type, "cpu"):
            return make(*args, device=device, **kwargs)
        if kwargs.get("generator") is not None and place != CPU:
            raise Mixed(f"a generator of the CPU draws on {place}")
        made = self.places.put(make(*args, device=CPU, **kwargs), place)
        return self.pin_memory(made) if pin_memory else made

    def _require_pinned(self, source: Tensor, to: torch.device, target: Tensor) -> None:
        """Of a copy that is not waited for, the side in main memory."""
        aside = source if self.places.of(source) == CPU else target
        if to != self.places.of(source) and not self.places.is_pinned(aside):
            raise Mixed(f"a copy to {to} is not waited for, and what lies in main memory is not pinned")

    def _full(self, device: torch.device | str) -> torch.device:
        device = torch.device(device)
        return torch.device(device.type, 0) if device.type == self.device.type else device


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that becomes a method of the class that it is put into, as bound ones do not."""

    def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(tensor, *args, **kwargs)

    return method


@contextmanager
def device(name: str, **driver: Any) -> Iterator[_Operations]:
    """Inside, torch has one device of this type. `driver`: what it answers in place of what is usual, by name."""
    found, operations = torch.device(name), _Operations(Places())
    module = getattr(torch, name)
    answers: dict[str, Any] = {
        "get_device_name": f"pretended {name}",
        "get_device_capability": (8, 6),
        "get_device_properties": SimpleNamespace(has_fp64=True, has_bfloat16_conversions=True),
        "device_count": 1,
        "current_device": 0,
        "synchronize": None,
        "max_memory_allocated": 2**30,
        "mem_get_info": (8 * 2**30, 16 * 2**30),
        "driver_allocated_memory": 2**30,
        "recommended_max_memory": 16 * 2**30,
        "empty_cache": None,
        **driver,
    }
    patches = [
        mock.patch.object(module, key, return_value=answer) for key, answer in answers.items() if hasattr(module, key)
    ]
    if hasattr(module, "Event"):
        patches.append(mock.patch.object(module, "Event", operations.events.make))
    # That the device is available is told to accelerate and us alone: other libraries would remember it.
    patches.append(mock.patch.object(torch.backends.mps, "is_macos_or_newer", return_value=True))
    patches.append(mock.patch.object(PartialState, "default_device", found))
    patches.append(mock.patch.object(devices, "here", return_value=found))
    with torch.device("cpu"):
        torch.empty(0)  # torch notes, once, which functions make tensors
    with ExitStack() as stack:
        for patch in [*patches, *_Questions(found, operations).patches()]:
            stack.enter_context(patch)
        yield stack.enter_context(operations)
