"""Cards are found by the names that drivers and people give them."""

from __future__ import annotations

import pytest

from lora_booth.errors import ConfigError
from lora_booth.models import cards


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("rtx 4060 ti 16GB", "RTX 4060 Ti"),
        ("3090", "RTX 3090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", None),  # slower than the card of that name
        ("NVIDIA GeForce RTX 3060 Ti", "RTX 3060 Ti"),
        ("RTX 306", None),
        ("", None),
    ],
)
def test_a_card_is_found_by_its_whole_name_and_by_no_other(name: str, found: str | None) -> None:
    card = cards.find(name)
    assert (card and card.name) == found


def test_an_unknown_card_is_told_with_all_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r'"Voodoo 2" is not a card whose speed is known.*RTX 3060, .*H100'):
        cards.named("Voodoo 2")


def test_names_are_unique_and_the_usual_ones_are_cards() -> None:
    names = [card.name for card in cards.CARDS]
    assert len(set(names)) == len(names)
    assert set(cards.USUAL) <= set(names)
    assert all(cards.find(name) is card for name, card in zip(names, cards.CARDS, strict=True))
