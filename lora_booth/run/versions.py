"""Which versions of packages are installed, and which ones are asked for.

None of them is imported.

What lives here: what the packages' own metadata says. What does not: whether they work (`verbs/doctor.py`).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

VERSION = "0.1.0"
"""Of lora_booth itself; pyproject.toml has the same."""
CORE = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
"""Looked for even where lora_booth runs from a folder that was never installed, and nothing says what it needs."""
FOR_DEVELOPERS = ("dev", "miniature")
"""Extras that no user needs."""
_PACKAGE = Path(__file__).parents[1]
CONSTRAINTS = next(
    (path for path in (_PACKAGE / "constraints.txt", _PACKAGE.parent / "constraints.txt") if path.is_file()), None
)
"""The exact versions that the tests were run with: inside an installed package, or beside it in a checkout."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"""extra *== *["']([^"']+)["']""")


@dataclass(frozen=True)
class Need:
    """A package that lora_booth asks for: versions as ">=2,<3"; `extra`: the option of pip that asks, "" for always."""

    name: str
    versions: str
    extra: str = ""


def versions() -> dict[str, str]:
    """Name to version: lora-booth, python, platform, and each installed package that a run can depend on."""
    found = {"lora-booth": VERSION, "python": platform.python_version(), "platform": platform.platform()}
    asked_for = [line for line in _requirements() if not set(_EXTRA.findall(line)) & set(FOR_DEVELOPERS)]
    names = dict.fromkeys([*CORE, *(name[0] for line in asked_for if (name := _NAME.match(line)))])
    return found | {name: text for name in names if (text := installed(name)) is not None}


def installed(name: str) -> str | None:
    """The version of a package as its metadata has it; None where there is none that can be read."""
    try:
        found: str | None = metadata.version(name)
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, AttributeError):  # damaged metadata
        return None
    return found


def is_torch_for_cpus_alone() -> bool:
    """Whether the installed torch was built without any other device, as the name of its version says."""
    return (installed("torch") or "").endswith("+cpu")


def needs() -> list[Need]:
    """What the installed lora_booth asks for here, extras of developers left out; empty where it is not installed.

    Raises ImportError without the package "packaging".
    """
    from packaging.requirements import Requirement

    found = []
    for line in _requirements():
        wanted = Requirement(line)
        asking = [x for x in ("", *_EXTRA.findall(line)) if not wanted.marker or wanted.marker.evaluate({"extra": x})]
        if asking and asking[0] not in FOR_DEVELOPERS:
            found.append(Need(wanted.name, str(wanted.specifier), asking[0]))
    return found


def is_allowed(version: str, need: Need) -> bool:
    """Whether `version` is one that `need` asks for; preliminary ones too. Raises ImportError as `needs` does."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(need.versions).contains(version, prereleases=True)


def tested() -> dict[str, str]:
    """Package to the exact version that the tests were run with; empty where `CONSTRAINTS` is not there."""
    if CONSTRAINTS is None:
        return {}
    lines = (re.split("[#;]", line)[0] for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    pairs = (line.strip().partition("==") for line in lines)
    return {name.strip().lower().replace("_", "-"): text.strip() for name, _, text in pairs if text}


def _requirements() -> list[str]:
    """The lines of lora_booth's own metadata."""
    try:
        return metadata.requires("lora-booth") or []
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return []
