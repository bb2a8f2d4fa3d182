"""What every result says of its circumstances, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from lora_booth.run import disk
from lora_booth.run.versions import installed

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "lora-booth")


def circumstances() -> dict[str, Any]:
    """Device, threads, versions (None of what is not installed), and the commit."""
    return {
        "device": device_name(),
        "machine": platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "commit": commit(),
        **{name: installed(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit of the checkout, "unknown" in a copy that git knows nothing of."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        found = ""
    return found or "unknown"


def device_name() -> str:
    """The CUDA card, or the CPU with its number of cores."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def write(path: Path, result: dict[str, Any]) -> None:
    """`result` as JSON, with its circumstances; the whole of it or, if this is killed, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, json.dumps(result | circumstances(), indent=1) + "\n")
