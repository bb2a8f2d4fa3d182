"""Runs a script, or a module after `-m`, as `python` would, and writes what it took as JSON: device memory, and when.

python benchmarks/watched.py peak.json train.py --flag …
python benchmarks/watched.py peak.json -m lora_booth train …
python benchmarks/watched.py peak.json --set package.module:NAME=[1,2] train.py …     # a constant beside the script

`peak_device_mib`: most memory of its tensors on a CUDA card; `peak_reserved_mib`: most that torch's allocator held.
`outside_mib`: what the card holds at the end beyond that allocator, for everybody. `steps_s`: seconds from the start to
the end of each step of an optimizer, whosever loop it is.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()


def main() -> None:
    """Command line; the exit code is that of what was run."""
    out, words = Path(sys.argv[1]).absolute(), sys.argv[2:]
    constants = []
    while words[0] == "--set":
        constants.append(words[1])
        words = words[2:]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps: list[float] = []
    register_optimizer_step_post_hook(lambda *_: steps.append(time.perf_counter() - BEGAN))
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).absolute().parent))
            for constant in constants:
                _set(constant)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        out.write_text(json.dumps(_device_memory() | {"steps_s": steps}), encoding="utf-8")


def _set(constant: str) -> None:
    place, _, value = constant.partition("=")
    module, _, name = place.partition(":")
    setattr(importlib.import_module(module), name, json.loads(value))


def _device_memory() -> dict[str, float | None]:
    """In MiB; None without a CUDA card."""
    import torch

    if not torch.cuda.is_available():
        return dict.fromkeys(("peak_device_mib", "peak_reserved_mib", "outside_mib"))
    free, total = torch.cuda.mem_get_info()
    figures = {
        "peak_device_mib": torch.cuda.max_memory_allocated(),
        "peak_reserved_mib": torch.cuda.max_memory_reserved(),
        "outside_mib": total - free - torch.cuda.memory_reserved(),
    }
    return {name: value / 2**20 for name, value in figures.items()}


if __name__ == "__main__":
    main()
