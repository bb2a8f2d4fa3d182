"""How many bytes an optimizer keeps for its parameters, by stepping a real one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from lora_booth.config.settings import OptimizerConfig
from lora_booth.planning.tracing import rounded
from lora_booth.training import optimizers
from lora_booth.training.flat import aligned

SAMPLE_SIZE = 2**20
AVERAGE_BYTES = 4
"""Of a number's average."""


def state_bytes(shapes: Iterable[Sequence[int]], config: OptimizerConfig, *, device_type: str) -> int:
    """Bytes that the optimizer of `config` keeps on the device for float32 parameters of these shapes, flattened.

    Found by really stepping it on the CPU: once for each different shape where shapes matter, else on a vector of
    `SAMPLE_SIZE` numbers. Paged moments count as if none had moved to main memory. Raises as `make` does.
    """
    name = optimizers.chosen_name(config, device_type)
    config = config.model_copy(update={"name": name.removeprefix("paged_")})
    counts = Counter(map(tuple, shapes))
    total = sum(count * aligned(math.prod(shape)) for shape, count in counts.items())
    averages = 0 if config.ema_decay is None else rounded(total * AVERAGE_BYTES)
    config = config.model_copy(update={"ema_decay": None})
    if optimizers.OPTIMIZERS[name].is_elementwise:
        return averages + rounded(total * _state_bytes_of_one((SAMPLE_SIZE,), config) // SAMPLE_SIZE)
    return averages + sum(count * _state_bytes_of_one(shape, config) for shape, count in counts.items())


def _state_bytes_of_one(shape: tuple[int, ...], config: OptimizerConfig) -> int:
    """Of two alike parameters, what the second adds: tables that all share do not count."""
    first, second = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizer = optimizers.make([{"params": [first, second], "lr": 1e-6}], config, device_type="cpu")
    first.grad, second.grad = torch.ones(shape), torch.ones(shape)
    optimizers.set_mode_(optimizer, training=True)
    optimizer.step()
    states = ([t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)] for p in (first, second))
    shared, own = ({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors} for tensors in states)
    return sum(rounded(size) for key, size in own.items() if key not in shared)
