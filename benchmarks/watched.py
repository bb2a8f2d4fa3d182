"""Runs a script, or a module after `-m`, as `python` would, and writes most device memory of its tensors as JSON.

python benchmarks/watched.py peak.json train.py --flag …
python benchmarks/watched.py peak.json --cap-gib 11.2 -m lora_booth train …     # the allocator gets no more
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Command line; the exit code is that of what was run."""
    out, words = Path(sys.argv[1]).absolute(), sys.argv[2:]
    if words[0] == "--cap-gib":
        _cap(float(words[1]))
        words = words[2:]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).absolute().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        import torch

        peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
        out.write_text(json.dumps({"peak_device_mib": peak}), encoding="utf-8")


def _cap(gib: float) -> None:
    import torch

    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    main()
