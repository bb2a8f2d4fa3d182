"""What is known of the card and the machine without torch, and which packages are missing."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_booth.run import versions

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"[A-Za-z0-9._-]+")
OPTIONAL = ("bitsandbytes", "matplotlib", "scipy", "pytest", "torchvision")
"""Without them some figures are missing: 8-bit Adam and NF4; the tests; diffusers' script."""
UNNAMED = {"name": "a card that nvidia-smi does not name", "driver": "unknown"}
_ASKED = {"name": "name", "driver": "driver_version", "compute_capability": "compute_cap", "memory": "memory.total"}


def missing() -> tuple[list[str], list[str]]:
    """Packages that are not installed: those that nothing works without, and those that some figures need, or that
    other packages ask for and may do without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [name[0] for line in project["dependencies"] if (name := _NAME.match(line))]
    absent = [name for name in _with_needs([*asked, *OPTIONAL]) if versions.installed(name) is None]
    needed = [name for name in absent if name in asked and name not in OPTIONAL]
    return needed, [name for name in absent if name not in needed]


def _with_needs(names: Sequence[str]) -> list[str]:
    """`names`, and all that those of them which are installed ask for here, as far as `packaging` is there to tell."""
    found, left = list[str](), list(names)
    while left:
        name = left.pop(0)
        if re.sub(r"[-_.]+", "-", name).lower() not in found:
            found.append(re.sub(r"[-_.]+", "-", name).lower())
            left += _needs(name)
    return found


def _needs(name: str) -> list[str]:
    try:
        from packaging.requirements import Requirement

        needs = [Requirement(line) for line in metadata.requires(name) or []]
        return [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    except (ImportError, ValueError):  # PackageNotFoundError among them: that is told already
        return []


def of_machine(device: str) -> dict[str, Any]:
    """Name, driver, compute capability and memory of the first card as its driver tells them; the machine; versions."""
    card = _card() if device == "cuda" else {"name": f"CPU, {os.cpu_count()} cores", "driver": "none"}
    known = versions.versions()
    machine = {"python": known.pop("python"), "platform": known.pop("platform"), "cores": os.cpu_count()}
    known.pop("lora-booth")
    return card | machine | {"versions": known | _others(), "missing": [*missing()[0], *missing()[1]]}


def _others() -> dict[str, str]:
    return {name: text for name in ("triton", "torchvision") if (text := versions.installed(name)) is not None}


def _card() -> dict[str, str]:
    """By nvidia-smi; without it a card has no name, and torch may find it all the same."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    words = ["nvidia-smi", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    words += [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return UNNAMED
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != len(_ASKED):
        return UNNAMED
    return dict(zip(_ASKED, values, strict=True))
