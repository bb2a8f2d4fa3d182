"""Names that every system takes: what is written on one can be copied to another.

What lives here: why Windows, macOS or Linux would refuse or change a name of a file or folder, and whether a result may
be written under one. What does not: the writing. Source: "Naming Files, Paths, and Namespaces", learn.microsoft.com.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from lora_booth.config.inputs import shown, shown_path
from lora_booth.errors import ConfigError

MAX_UNITS = 255
"""Of one name: bytes of UTF-8 on Linux, units of UTF-16 on Windows, and on macOS of its decomposed form."""
MAX_ENDING = 55
"""Of them kept free for what is put behind a name: `_diffusers.safetensors`, a number."""
FORBIDDEN = '<>:"/\\|?*'
_NUMBERS = "0123456789\u00b9\u00b2\u00b3"
RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {f"{d}{n}" for d in ("com", "lpt") for n in _NUMBERS}
"""Devices of Windows; `con.safetensors` is one too."""

OF_A_RUN = {"before_after", "contact_sheet", "inputs", "scores", "summary"}
"""Names that other files of a run folder have, with the endings of an adapter's sidecar and cover."""


def fault(name: str, *, room: int = MAX_ENDING) -> str | None:
    """Why some system refuses or changes `name`, in one clause; None when all take it as it is.

    `room`: how many bytes are to be put behind it.
    """
    strange = [letter for letter in name if letter in FORBIDDEN or ord(letter) < 32]
    if strange:
        return f"holds {strange[0]!r}, which some system refuses in names"
    if name.strip(" .") == "":
        return "has no letter"
    if name.endswith((" ", ".")):
        return f"ends with {name[-1]!r}, which Windows drops"
    if name.split(".")[0].rstrip(" ").casefold() in RESERVED:
        return f"is the device {name.split('.')[0].rstrip(' ').upper()} on Windows"
    length = max(len(name.encode("utf-8", "surrogatepass")), _utf16_units(unicodedata.normalize("NFD", name)))
    return None if length <= MAX_UNITS - room else f"is {length} long, and {MAX_UNITS - room} is the most a name takes"


def require(name: str, key: str) -> str:
    """`name` itself. Raises ConfigError, naming the setting `key`, when some system would refuse or change it."""
    why = fault(name)
    if why is not None:
        raise ConfigError(f'{key} "{shown(name)}" {why}; choose another name.')
    return name


def require_new(out: Path, key: str) -> None:
    """Raises ConfigError, naming the option `key`, when something is at `out`, or some system would refuse its name."""
    if os.path.lexists(out):
        raise ConfigError(
            f"{key} {shown_path(out)} exists and is not replaced; choose another name, or remove it first."
        )
    why = fault(out.name, room=0)
    if why is not None:
        raise ConfigError(f'{key} "{shown(out.name)}" {why}; choose another name.')


def folder_fault(folder: Path) -> str | None:
    """`fault` of a folder's own name; None for `.` and `..`, and for a root."""
    return None if folder.name in ("", ".", "..") else fault(folder.name, room=0)


def _utf16_units(name: str) -> int:
    return len(name.encode("utf-16-le", "surrogatepass")) // 2
