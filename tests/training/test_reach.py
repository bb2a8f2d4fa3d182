"""A run encodes and draws what its steps reach, and is the same as if everything had been encoded and drawn."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lora_booth.config.config import Config
from lora_booth.errors import Interrupted
from lora_booth.planning import decide, duration
from lora_booth.planning.memory import Modules
from lora_booth.run.report import Silent
from lora_booth.training.order import Item, Order
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import tiny
from tests.support.runs import At, Recorder, assert_equal, trained


def everything(order: Order, steps: Iterable[int]) -> frozenset[Item]:
    """In place of what is reached: all images, under all prompts that come within 300 steps."""
    rows = {row.item for step in range(300) for row in order.at(step)}
    return frozenset({*order.instances, *order.classes, *rows})


def made(config: Config) -> tuple[int, int, int]:
    """Pictures encoded, class images drawn, and prompts encoded, as the cache of a run holds them."""
    assert config.run.cache is not None
    latents, pictures, prompts = (config.run.cache / name for name in ("latents", "class_images", "prompts"))
    return len(list(latents.iterdir())), len(list(pictures.rglob("*.png"))), len(list(prompts.iterdir()))


def results(config: Config) -> list[Any]:
    """Losses of all steps, and validation losses of the kept checkpoints."""
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    states = sorted((config.folder / "checkpoints").rglob("state.json"))
    return [*steps, *(json.loads(path.read_text())["validation_loss"] for path in states)]


Sections = dict[str, dict[str, Any]]
KINDS: dict[str, Callable[[Path], Sections]] = {
    "buckets": lambda folder: {"data": {"resolution": 48}, "prior": {"num_images": 12}},
    "two prompts": lambda folder: {"prior": {"num_images": 12, "prompts": ["a {class}", "a photo of a {class}"]}},
    "several rows": lambda folder: {"prior": {"num_images": 30}, "train": {"images_per_step": 2}},
    "flip": lambda folder: {"data": {"flip": True}, "prior": {"mode": "none"}},
    "held out": lambda folder: {"subject": {"held_out": folder / "held_out"}, "prior": {"mode": "none"}},
    "own class images": lambda folder: {"prior": {"folder": folder / "classes"}},
    "model": lambda folder: {"prior": {"mode": "model", "captions": tuple(f"a thing {n}" for n in range(20))}},
    "text encoder": lambda folder: {"adapter": {"text_encoder": True}, "prior": {"num_images": 30}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_run_makes_less_and_learns_the_same(
    kind: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.tiny_pictures(tmp_path / "held_out", 2, sizes=[(40, 40)])
    tiny.tiny_pictures(tmp_path / "classes", 9, sizes=[(52, 52)])

    def config(name: str) -> Config:
        sections = KINDS[kind](tmp_path)
        short = {"steps": 3, "save_every_steps": 3, **sections.pop("train", {})}
        return make_config("ends", name, **sections, train=short, run={"cache": tmp_path / f"{name} cache"})

    few, many, recorder = config("few"), config("many"), Recorder()
    short = trained(few, recorder)
    with monkeypatch.context() as patch:
        patch.setattr(Order, "reached", everything)
        assert_equal(short, trained(many))
    assert results(few) == results(many)
    assert sum(made(few)) < sum(made(many)) and all(a <= b for a, b in zip(made(few), made(many), strict=True))
    if kind == "buckets":
        assert made(many)[1] == 12
        told = [text for name, text in recorder.events if name == "class_images"]
        assert [text.partition(",")[0] for text in told] == ["3 of 12 class images are reached in 3 steps"]
    inputs = decide.look(few, Silent())
    modules, filled = Modules.of(few, inputs.facts), decide.filled(few, inputs)
    predicted = duration.predict(modules, filled, inputs.pictures)
    each = modules.encode_work(modules.square(filled)).flops
    assert made(few)[:2] == (round(predicted.other[0].flops / each), predicted.num_drawn), "as `plan` counts"


def test_a_killed_run_makes_only_what_is_left_of_it(make_config: MakeConfig, tmp_path: Path) -> None:
    def config(name: str, cache: str) -> Config:
        short = {"steps": 5, "save_every_steps": 5}
        return make_config("ends", name, prior={"num_images": 40}, train=short, run={"cache": tmp_path / cache})

    straight, killed = config("straight", "one"), config("killed", "two")
    expected = trained(straight)
    with pytest.raises(Interrupted):
        train.train(killed, report=At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    shutil.rmtree(tmp_path / "two")  # nothing in a cache is ever needed
    assert_equal(trained(killed), expected)
    assert made(killed)[0] == 2 < made(straight)[0], "that which the validation looks at, and that of the last step"
    assert made(killed)[1] == 4 < made(straight)[1], "one batch, for the last step"


def test_a_longer_run_makes_what_a_shorter_one_left_out(make_config: MakeConfig, tmp_path: Path) -> None:
    def run(steps: int, cache: str) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
        lengths = {"steps": steps, "save_every_steps": steps}
        settings = {"data": {"flip": True}, "prior": {"num_images": 40}}
        config = make_config("ends", f"{steps} {cache}", **settings, train=lengths, run={"cache": tmp_path / cache})
        return trained(config), made(config)

    expected, made_alone = run(8, "alone")
    _, made_before = run(2, "shared")
    assert made_before[0] < made_alone[0] and made_before[1] < made_alone[1]
    longer, made_together = run(8, "shared")
    assert_equal(longer, expected)
    assert made_together == made_alone
