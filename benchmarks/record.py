"""What every result says of its circumstances, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "lora-booth")


def circumstances() -> dict[str, Any]:
    """Device, threads, versions, and the commit of the checkout that the benchmark is in."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device_name(),
        "machine": platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "commit": commit or "unknown",
        **{name: version(name) for name in PACKAGES},
    }


def device_name() -> str:
    """The CUDA card, or the CPU with its number of cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def write(path: Path, result: dict[str, Any]) -> None:
    """`result` as JSON, with its circumstances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | circumstances(), indent=1) + "\n", encoding="utf-8")
