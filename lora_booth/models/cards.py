"""Graphics cards by name: their peak rates and their memory.

What lives here: data. What does not: what a run asks of a card (`tracing.Work`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_booth.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """`tflops`: 10^12 floating-point operations a second of bf16 or fp16 matrix products that sum in float32, dense.

    `gb_per_s`: 10^9 bytes a second from and to its memory, of which it has `memory_gib`.
    """

    name: str
    tflops: float
    gb_per_s: float
    memory_gib: int


CARDS = (
    Card("RTX 3060", 25.5, 360, 12),
    Card("RTX 3060 Ti", 32.4, 448, 8),
    Card("RTX 3070", 40.6, 448, 8),
    Card("RTX 3080", 59.5, 760, 10),
    Card("RTX 3080 Ti", 68.2, 912, 12),
    Card("RTX 3090", 71.2, 936, 24),
    Card("RTX 3090 Ti", 80.0, 1008, 24),
    Card("RTX 4060", 30.2, 272, 8),
    Card("RTX 4060 Ti", 44.1, 288, 16),
    Card("RTX 4070", 58.3, 504, 12),
    Card("RTX 4070 SUPER", 71.0, 504, 12),
    Card("RTX 4070 Ti", 80.2, 504, 12),
    Card("RTX 4070 Ti SUPER", 88.2, 672, 16),
    Card("RTX 4080", 97.5, 717, 16),
    Card("RTX 4080 SUPER", 104.4, 736, 16),
    Card("RTX 4090", 165.2, 1008, 24),
    Card("RTX 5060 Ti", 47.4, 448, 16),
    Card("RTX 5070", 61.7, 672, 12),
    Card("RTX 5070 Ti", 87.9, 896, 16),
    Card("RTX 5080", 112.6, 960, 16),
    Card("RTX 5090", 209.5, 1792, 32),
    Card("A100", 312.0, 2039, 80),
    Card("H100", 989.0, 3350, 80),
    Card("H200", 989.0, 4800, 141),
)
"""NVIDIA's data sheets. GeForce cards: 512 operations for each multiprocessor and cycle at the boost clock."""
USUAL = ("RTX 3060", "RTX 4060 Ti", "RTX 3090", "RTX 4090", "RTX 5090")
"""Of `CARDS`, those that stand for the others where no card is known."""
_MAKERS = re.compile(r"\b(nvidia|geforce|tesla)\b|\d+ ?gb\b|-(sxm|pcie).*|\b(hbm3|pcie)\b", re.IGNORECASE)


def find(name: str) -> Card | None:
    """The card that a driver or a person calls `name`; None if it is not in `CARDS`, as those of laptops are not."""
    plain = " ".join(_MAKERS.sub(" ", name).split()).lower()
    return next((card for card in CARDS if plain in (card.name.lower(), card.name.lower().removeprefix("rtx "))), None)


def named(name: str) -> Card:
    """As `find`. Raises ConfigError, which lists the cards, for any other."""
    card = find(name)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise ConfigError(f'--card "{name}" is not a card whose speed is known here; choose one of: {known}.')
    return card
