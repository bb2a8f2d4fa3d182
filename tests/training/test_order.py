"""The order of images: pure, complete, weighted by role, in micro-batches that lose nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_booth.training.order import VALIDATION_QUANTILES, Item, Order, Role, micro_batches, validation_levels

SQUARE, WIDE = (4, 8, 8), (4, 4, 8)


def item(role: Role, name: str, shape: tuple[int, int, int] = SQUARE) -> Item:
    return Item(role, name, name, shape, "a dog", (64, 64, 0, 0, 64, 64))


def order(num_instances: int = 5, num_classes: int = 4, images_per_step: int = 2, loss_weight: float = 0.5) -> Order:
    instances = [item("instance", f"i{n}", WIDE if n % 3 == 2 else SQUARE) for n in range(num_instances)]
    classes = [item("class", f"c{n}", WIDE if n % 2 else SQUARE) for n in range(num_classes)]
    return Order(instances, classes, images_per_step, loss_weight, seed=0)


def test_an_epoch_sees_every_instance_image_once() -> None:
    names = [
        row.item.name for step in range(5) for row in order(images_per_step=1).at(step) if row.item.role == "instance"
    ]
    assert sorted(names) == ["i0", "i1", "i2", "i3", "i4"]
    assert names != sorted(names)


def test_epochs_carry_over_step_borders_and_no_image_is_dropped() -> None:
    steps = order(num_instances=5, images_per_step=2)
    seen = Counter(row.item.name for step in range(50) for row in steps.at(step) if row.item.role == "instance")
    assert seen == {f"i{n}": 20 for n in range(5)}, "100 draws over 5 images"


def test_weights_are_one_over_n_and_lambda_over_n() -> None:
    rows = order(images_per_step=4, loss_weight=0.5).at(0)
    assert [row.weight for row in rows] == [0.25] * 4 + [0.125] * 4
    assert [row.position for row in rows] == list(range(8))
    assert [row.item.role for row in rows] == ["instance"] * 4 + ["class"] * 4


def test_without_class_items_there_is_no_class_row() -> None:
    rows = order(num_classes=0).at(0)
    assert {row.item.role for row in rows} == {"instance"}


def test_a_step_is_a_function_of_seed_and_step() -> None:
    assert order().at(7) == order().at(7)
    other = Order(order().instances, order().classes, 2, 0.5, seed=1)
    assert [other.at(s) for s in range(5)] != [order().at(s) for s in range(5)]


def test_a_class_row_comes_from_the_bucket_of_its_instance_row() -> None:
    for step in range(30):
        rows = order(images_per_step=1).at(step)
        assert rows[0].item.shape == rows[1].item.shape


def test_class_images_of_a_bucket_take_turns() -> None:
    seen = Counter(row.item.name for step in range(60) for row in order(images_per_step=1).at(step)[1:])
    # 60 draws, 48 square (i0 i1 i3 i4) and 12 wide (i2); two class images of each shape.
    assert seen == {"c0": 24, "c2": 24, "c1": 6, "c3": 6}


def test_class_images_of_no_common_bucket_are_still_used() -> None:
    only_wide = [item("class", "c0", WIDE), item("class", "c1", WIDE)]
    rows = [Order([item("instance", "i0")], only_wide, 1, 1.0, 0).at(step) for step in range(4)]
    assert Counter(row[1].item.name for row in rows) == {"c0": 2, "c1": 2}


def test_a_share_of_the_rows_has_no_prompt_and_the_same_rows_whatever_ran_before() -> None:
    plain, dropping = order(), replace(order(), dropout=0.3)
    rows = [row for step in range(500) for row in dropping.at(step) if row.item.role == "instance"]
    share = sum(row.item.prompt == "" for row in rows) / len(rows)
    assert 0.24 < share < 0.36  # four standard deviations
    assert [row.item.name for row in rows] == [
        row.item.name for step in range(500) for row in plain.at(step) if row.item.role == "instance"
    ]
    classes = [[row for row in each.at(7) if row.item.role == "class"] for each in (plain, dropping)]
    assert classes[0] == classes[1] and dropping.at(7) == replace(order(), dropout=0.3).at(7)
    assert "" in {item.prompt for item in dropping.reached(range(500))}
    assert "" not in {item.prompt for item in plain.reached(range(500))}


def test_prompts_take_turns_and_the_prior_has_the_plain_one_of_its_row() -> None:
    pairs = (("a yql dog", "a dog"), ("one yql dog", "one dog"), ("dog", None))
    turning = replace(item("instance", "i0"), in_turn=pairs)
    captioned = replace(item("instance", "i1"), prompt="a yql dog on a sofa", plain_prompt="a dog on a sofa")
    steps = Order([turning, captioned], [], 1, 1.0, seed=0, captions=("a cat",))
    rows = [steps.at(step) for step in range(600)]
    seen = Counter(own.item.prompt for own, _ in rows if own.item.name == "i0")
    assert seen.keys() == {prompt for prompt, _ in pairs} and min(seen.values()) > 60
    assert {own.item.prompt for own, _ in rows if own.item.name == "i1"} == {"a yql dog on a sofa"}
    for step, (own, prior) in enumerate(rows):
        plain = dict(pairs).get(own.item.prompt) if own.item.name == "i0" else "a dog on a sofa"
        assert prior.item.prompt == (plain if step % 2 == 0 and plain is not None else prior.item.prompt)
        assert (prior.item.prompt in ("", "a cat")) or step % 2 == 0
    reached = {found.prompt for found in steps.reached(range(600))}
    assert reached >= {row.item.prompt for step in rows for row in step}


def test_what_steps_reach_are_the_items_of_their_rows() -> None:
    steps = order(num_instances=5, num_classes=12, images_per_step=1)
    assert {i.name for i in steps.reached(range(2))} == {row.item.name for s in (0, 1) for row in steps.at(s)}
    assert len(steps.reached(range(2))) == 4 and steps.reached(range(2, 2)) == frozenset()
    assert steps.reached(range(100)) == {*steps.instances, *steps.classes}
    asked = iter(range(10**9))
    assert steps.reached(asked) == {*steps.instances, *steps.classes} and next(asked) < 100, "all are reached early"


@given(num_instances=st.integers(1, 7), num_steps=st.integers(0, 60), is_captioned=st.booleans())
def test_no_row_of_the_steps_needs_an_image_or_a_prompt_that_is_not_reached(
    num_instances: int, num_steps: int, is_captioned: bool
) -> None:
    plain = [None if n % 3 == 1 else f"plain {n % 2}" for n in range(num_instances)]
    instances = [replace(item("instance", f"i{n}"), plain_prompt=plain[n]) for n in range(num_instances)]
    classes = [] if is_captioned else [replace(item("class", f"c{n}"), prompt=f"class {n % 3}") for n in range(9)]
    captions = ["a cat", "a house", "a tree"] if is_captioned else []
    steps = Order(instances, classes, 2, 1.0, seed=3, captions=captions)
    found = steps.reached(range(num_steps))
    rows = [row.item for step in range(num_steps) for row in steps.at(step)]
    assert {i.latent_key for i in found} == {i.latent_key for i in rows}
    assert {i.prompt for i in found} == {i.prompt for i in rows}


@given(
    images_per_step=st.integers(1, 9),
    batch_size=st.integers(1, 8),
    num_processes=st.integers(1, 4),
    step=st.integers(0, 1000),
)
def test_micro_batches_hold_every_row_once_in_one_shape(
    images_per_step: int, batch_size: int, num_processes: int, step: int
) -> None:
    rows = order(images_per_step=images_per_step).at(step)
    shares = [
        micro_batches(rows, batch_size, process=process, num_processes=num_processes)
        for process in range(num_processes)
    ]
    micros = [micro for share in shares for micro in share]
    assert sorted(row.position for micro in micros for row in micro) == [row.position for row in rows]
    assert all(0 < len(micro) <= batch_size for micro in micros)
    assert all(len({row.item.shape for row in micro}) == 1 for micro in micros)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("images_per_step", [1, 3])
def test_weights_of_a_step_sum_to_one_and_lambda(images_per_step: int) -> None:
    rows = order(images_per_step=images_per_step, loss_weight=0.3).at(11)
    by_role = {role: sum(row.weight for row in rows if row.item.role == role) for role in ("instance", "class")}
    assert by_role == pytest.approx({"instance": 1.0, "class": 0.3})


@given(count=st.integers(1, 40), rows=st.integers(4, 16))
def test_validation_shares_its_rows_among_images_and_noise_levels(count: int, rows: int) -> None:
    levels = [validation_levels(number, count, rows) for number in range(count)]
    assert sum(map(len, levels)) == min(rows, 4 * count)
    assert all(len(set(row)) == len(row) for row in levels), "no image has a level twice"
    together = Counter(level for row in levels for level in row)
    assert set(together) == set(VALIDATION_QUANTILES), "every level is looked at"
    assert max(together.values()) - min(together.values()) <= 1
    sizes = [len(row) for row in levels]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - min(sizes) <= 1


@given(
    num_instances=st.integers(1, 9),
    num_classes=st.integers(0, 12),
    per_step=st.integers(1, 4),
    steps=st.integers(0, 30),
)
def test_what_counting_says_is_reached_is_reached(
    num_instances: int, num_classes: int, per_step: int, steps: int
) -> None:
    made = order(num_instances, num_classes, per_step)
    found = {item.latent_key for item in made.reached(range(steps))}
    everything = {item.latent_key for item in (*made.instances, *made.classes)}
    assert not made.has_all(steps) or found == everything
    if num_instances >= 3:  # then every class image has instance images of its size
        assert made.has_all(9 * 12), "sooner or later it says yes"
