"""Captions of tags: the orders that they come in, and that a run of them is exact."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lora_booth.data.subject import tag_orders
from lora_booth.errors import Interrupted
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At, assert_equal, session_of, trained
from tests.support.tiny import tiny_pictures

CAPTION = "{token}, dog, red hat,  toy , on the beach"


def test_the_first_order_is_the_caption_itself_and_kept_tags_stay_first() -> None:
    orders = tag_orders(CAPTION, 5, kept=2, seed=0)
    assert orders[0] == CAPTION and len(set(orders)) == 5
    for order in orders[1:]:
        tags = order.split(", ")
        assert tags[:2] == ["{token}", "dog"] and sorted(tags[2:]) == ["on the beach", "red hat", "toy"]
    assert orders == tag_orders(CAPTION, 5, kept=2, seed=0) != tag_orders(CAPTION, 5, kept=2, seed=1)
    assert tag_orders(CAPTION, 3, kept=2, seed=0) == orders[:3]


@pytest.mark.parametrize(
    ("caption", "kept", "number"),
    [("a dog on a sofa", 0, 1), ("a, b", 1, 1), ("a, b", 0, 2), ("a, b, c", 0, 6), ("a, a, a, b", 0, 2), (",,", 0, 1)],
)
def test_there_are_no_more_orders_than_there_can_be(caption: str, kept: int, number: int) -> None:
    orders = tag_orders(caption, 100, kept=kept, seed=0)
    assert len(orders) == len(set(orders)) == number
    assert orders[0] == caption


def test_pictures_come_under_all_orders_in_turn_and_a_killed_run_goes_on_to_the_same_bytes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for picture in tiny_pictures(folder, 3):
        picture.with_suffix(".txt").write_text("{token} dog, red, hat, toy")

    def config(name: str, **subject: Any) -> Any:
        return make_config(name=name, subject={"images": folder, **subject}, train={"steps": 18})

    order = session_of(config("looked at", tag_orders=6), monkeypatch).prepared.order
    prompts = {row.item.prompt for step in range(18) for row in order.at(step) if row.item.role == "instance"}
    assert len(prompts) == 6 and all(prompt.startswith("yql dog, ") for prompt in prompts)
    straight, interrupted = trained(config("straight", tag_orders=6)), config("interrupted", tag_orders=6)
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))
    as_written = session_of(config("as written"), monkeypatch).prepared.order
    assert {row.item.prompt for row in as_written.at(0) if row.item.role == "instance"} == {"yql dog, red, hat, toy"}
