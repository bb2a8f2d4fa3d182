"""The rates that a large matrix product and a large copy reach here: what bounds a step besides the data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import record
from lora_booth.models.cards import Card


def measured_card() -> Card:
    """What computes here, by the rates of one matrix product and one copy, each the best of five.

    On a CPU the product is in float32, of which a card has half the rate.
    """
    is_card = torch.cuda.is_available()
    device, dtype, side = ("cuda", torch.bfloat16, 8192) if is_card else ("cpu", torch.float32, 2048)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    num_bytes = 2**28 if is_card else 2**26  # main memory of this process would count as that of the runs it starts
    source, target = (torch.empty(num_bytes, device=device, dtype=torch.uint8) for _ in range(2))
    tflops = 2 * side**3 / _best_s(lambda: matrix @ matrix) / 1e12
    gb_per_s = 2 * source.nbytes / _best_s(lambda: target.copy_(source)) / 1e9
    memory_gib = torch.cuda.mem_get_info()[1] // 2**30 if is_card else 0
    return Card(record.device_name(), tflops * (1 if is_card else 2), gb_per_s, memory_gib)


def _best_s(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
