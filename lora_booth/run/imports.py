"""Large libraries imported without the packages that they look for and do not need.

What lives here: what is hidden while transformers, PEFT and diffusers are imported. They look for it once and then hold
it for absent, so only a command of our own hides anything: code of somebody else that imports lora_booth finds all.

bitsandbytes loads torch's compiler, a second of a processor; PEFT and diffusers import it to know its layers when they
meet one. scipy takes half a second; diffusers needs it for sigmas of a beta distribution, which no solver here has.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LEFT_OUT: set[str] = set()


def leave_out_(*packages: str) -> None:
    """From now on `sparing` hides `packages`: this process is a command that needs none of them, or imports what it
    needs itself."""
    _LEFT_OUT.update(packages)


@contextmanager
def sparing() -> Iterator[None]:
    """Inside, transformers, PEFT and diffusers are imported without what the command leaves out.

    What is loaded already stays in sight, and what diffusers has found installed. Garbage is not looked for: a seventh
    of the time went there, and imports make hardly any.
    """
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with hidden(*(name for name in _LEFT_OUT if not _is_counted_on(name))):
            yield
    finally:
        if is_collecting:
            gc.enable()


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Inside, `packages` seem not to be installed, but for those that are loaded already."""
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is how it knows what is not there
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _is_counted_on(package: str) -> bool:
    """Whether diffusers, which looks once, has found `package`: what it imports later would miss it."""
    answer = getattr(sys.modules.get("diffusers.utils"), f"is_{package}_available", None)
    return answer is not None and bool(answer())
