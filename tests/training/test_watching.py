"""Looking at a run's progress takes little of its work, and looks at the same at every save."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.config import presets, toml
from lora_booth.config.config import Config
from lora_booth.config.resolved import Filled
from lora_booth.data.subject import Pictures
from lora_booth.errors import Interrupted
from lora_booth.models.cards import named
from lora_booth.planning import decide, duration
from lora_booth.planning.memory import Modules
from lora_booth.run.report import Silent
from lora_booth.training import watching
from lora_booth.verbs import plan, train
from tests.conftest import MakeConfig
from tests.planning.test_memory import full_size
from tests.support import tiny
from tests.support.runs import At, Recorder, session_of

FILES = sorted(presets.FOLDER.glob("*.toml"))
SHORT = [f"{base}, short command" for base in ("sd15", "sd21", "sdxl")]
FAMILIES = {"booth-mini": "sd1", "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


def family_of(base: str) -> str:
    """That of a preset's base; files are of SDXL's derivatives."""
    return "sdxl" if base.endswith(".safetensors") else FAMILIES[base]


def shipped(name: str, **sections: dict[str, Any]) -> Config:
    """A preset, or the short command's config, with settings replaced."""
    if name in SHORT:
        values = {"model": {"base": name.split(",")[0]}, "subject": {"class_noun": "dog", "images": "my_dog"}}
        return Config.model_validate(values).with_values(sections)
    return toml.load(presets.FOLDER / f"{name}.toml").with_values(sections)


def shares(modules: Modules, config: Filled, pictures: Pictures) -> list[float]:
    """Of operations, and of the seconds of two cards."""
    found = duration.predict(modules, config, pictures)
    cards = [named(name) for name in ("RTX 3060", "H100")]
    seconds = [sum(work.seconds(card) for work in found.watching) / found.total_s(card) for card in cards]
    return [found.watching_share, *seconds]


@pytest.mark.parametrize("num_pictures", [3, 5, 20])
@pytest.mark.parametrize("name", [*(path.stem for path in FILES), *SHORT])
def test_no_shipped_config_spends_more_than_three_percent_on_watching(
    name: str, num_pictures: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    tiny.tiny_pictures(tmp_path, num_pictures)
    family = family_of(shipped(name).model.base)
    here = {"model": {"base": str(bases[family])}, "subject": {"images": tmp_path}}
    config = shipped(name, **here, data={"resolution": 32, "bucket_step": 16}, preview={"images_per_prompt": 0})
    inputs = decide.look(config, Silent())
    filled, looked = decide.filled(config, inputs), watching.of(decide.filled(config, inputs))
    assert max(shares(Modules.of(filled, inputs.facts), filled, inputs.pictures)) <= watching.MAX_SHARE
    assert looked.rows >= 4 and looked.num_saves <= 6
    if "style" not in name:
        assert looked.has_drift
    without_choice = filled.with_values({"evaluate": {"choose": "last"}})
    assert not watching.of(without_choice).has_drift and watching.of(without_choice).rows >= looked.rows


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(path.stem for path in FILES if path.stem != "demo"), *SHORT])
def test_the_same_holds_for_bases_of_real_size(name: str, tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path, 4)
    facts = full_size(family_of(shipped(name).model.base))
    config = shipped(name, subject={"images": tmp_path}, preview={"images_per_prompt": 0})
    inputs = decide.look(config.with_values({"model": {"base": "booth-mini"}}), Silent())
    filled = decide.filled(config, decide.Inputs(facts, inputs.pictures, None))
    assert max(shares(Modules.of(filled, facts), filled, inputs.pictures)) <= watching.MAX_SHARE


def test_a_run_that_saves_often_looks_at_fewer_rows_and_never_at_less_than_every_level(make_config: MakeConfig) -> None:
    def looked(**train_settings: int) -> watching.Watch:
        config = make_config(train={"steps": 1000, **train_settings}, evaluate={"choose": "best"})
        return watching.of(decide.filled(config, decide.look(config, Silent())))

    assert looked(save_every_steps=1000) == watching.Watch(1, 16, True)
    assert looked(save_every_steps=100) == watching.Watch(10, 4, True)
    assert looked(save_every_steps=80) == watching.Watch(13, 9, False)
    assert looked(save_every_steps=1) == watching.Watch(1000, 4, False)
    assert looked(save_every_steps=1, images_per_step=200).has_drift


def test_a_run_goes_on_with_the_rows_that_it_began_with(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(every: int) -> Config:
        steps = {"steps": 20, "images_per_step": 8, "save_every_steps": every, "keep_last": 9}
        return make_config(train=steps, prior={"mode": "none"})

    with pytest.raises(Interrupted):
        train.train(config(20), report=At(1, signal_stop))
    pinned = json.loads((config(20).folder / "inputs.json").read_text())["pinned"]
    assert pinned["watched_rows"] == 9
    s = session_of(config(5), monkeypatch)
    assert sum(len(levels) for _, levels in s.prepared.validation) == 9
    fresh = make_config(name="fresh", **{"train": config(5).train.model_dump(), "prior": {"mode": "none"}})
    other = session_of(fresh, monkeypatch)
    assert sum(len(levels) for _, levels in other.prepared.validation) == 4
    (config(5).folder / "inputs.json").write_text(
        json.dumps(json.loads((config(5).folder / "inputs.json").read_text()) | {"pinned": {"watched_rows": -3}})
    )
    damaged = session_of(config(5), monkeypatch)
    assert sum(len(levels) for _, levels in damaged.prepared.validation) == 4


def signal_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_drift_at_saves_is_zero_for_the_base_and_the_same_when_asked_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_SHARE", 1.0)
    s = session_of(make_config(train={"steps": 40, "save_every_steps": 40}, evaluate={"choose": "best"}), monkeypatch)
    assert s.drift is not None and len(s.drift.at.rows) == s.drift.own.shape[0]
    with torch.no_grad():
        assert s.drift.of(s.family, s.condition(s.drift.prompts)) == 0
        for parameter in s.parameters:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        first, again = (s.drift.of(s.family, s.condition(s.drift.prompts)) for _ in range(2))
    assert first == again > 0


@pytest.mark.parametrize(("steps", "told"), [(4, "with drift it would be more than 3% of the training"), (900, None)])
def test_plan_says_what_is_looked_at_and_how_many_candidates_are_compared(
    steps: int, told: str | None, make_config: MakeConfig
) -> None:
    choice = {"choose": "best", "encoder": "miniature", "max_share": 2.0}
    few = {"mode": "none"}
    config = make_config(train={"steps": steps, "save_every_steps": steps // 2}, evaluate=choice, prior=few)
    recorder = Recorder()
    plan.show(config, recorder, named("RTX 3060"))
    lines = dict(recorder.events)
    assert lines["watching"].startswith("watching ") and "% of the work: " in lines["watching"]
    assert lines["watching"].endswith(told or " at each of 2 saves")
    compared = "0 of 6" if steps == 4 else "6 of 6"
    assert lines["choosing"].startswith(f"choosing {compared} candidates, kept checkpoints × strengths, are drawn")


def test_with_one_save_nothing_is_compared_and_few_rows_do(make_config: MakeConfig) -> None:
    def rows(steps: int, every: int) -> int:
        inputs = decide.look(config := make_config(train={"steps": steps, "save_every_steps": every}), Silent())
        return watching.of(decide.filled(config, inputs)).rows

    assert rows(5, 5) == 1 and rows(5, 4) == watching.MIN_ROWS
    assert 1 < rows(60, 60) <= watching.MAX_ROWS
