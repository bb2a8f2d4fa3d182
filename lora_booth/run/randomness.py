"""Random streams by name: what is drawn never depends on what ran before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator_for(*words: int | str) -> torch.Generator:
    """A CPU generator that depends on `words` alone, whatever ran before."""
    import torch

    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
