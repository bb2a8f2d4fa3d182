"""Counts that are kept or ship are those that tracing gives, and nothing else is ever believed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_booth.config.resolved import Filled
from lora_booth.models import cards, loading
from lora_booth.planning import budget, counts, decide, duration
from lora_booth.planning.built import Built
from lora_booth.planning.counts import Counts
from lora_booth.planning.memory import Modules
from lora_booth.run.cache_folder import COUNTS
from lora_booth.run.report import Silent
from lora_booth.verbs import cache, plan
from tests.conftest import MakeConfig
from tests.support.runs import Recorder
from tools import counts as shipping

CARD = cards.named("RTX 3060")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Families of the bases that were built since."""
    found, build = [], Built.of

    def counted(config: Filled, facts: Any) -> Built:
        found.append(facts.family)
        return build(config, facts)

    monkeypatch.setattr(Built, "of", counted)
    return found


@pytest.fixture
def alone(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """`make_config` with a cache that nobody else has."""

    def make(family: str = "ends", **sections: dict[str, Any]) -> Any:
        return make_config(family, **{"run": {"cache": tmp_path / "cache"}, **sections})

    return make


def told(config: Any) -> list[tuple[str, str]]:
    """All that a plan says."""
    report = Recorder()
    plan.show(config, report, CARD)
    return report.events


@pytest.mark.parametrize("family", ["ends", "sdxl"])
def test_a_plan_of_known_counts_says_the_same_and_builds_nothing(
    family: str, alone: MakeConfig, built: list[str]
) -> None:
    sections: dict[str, Any] = {"preview": {"images_per_prompt": 1}, "prior": {"mode": "model"}}
    config = alone(family, adapter={"text_encoder": True}, **sections)
    first = told(config)
    assert len(built) == 1 and any(kind == "time" for kind, _ in first)
    assert told(config) == first and len(built) == 1
    larger = alone(family, adapter={"text_encoder": True}, data={"resolution": 64, "bucket_step": 16}, **sections)
    assert told(larger) != first and len(built) == 2, "of another size"


def test_counts_do_not_depend_on_what_was_counted_before(make_config: MakeConfig) -> None:
    wished = make_config(preview={"images_per_prompt": 1})
    config = decide.filled(wished, decide.look(wished, Silent()))
    facts = loading.facts(config.model)
    one, other = Modules.of(config, facts), Modules.of(config, facts)
    asked = [
        lambda modules: modules.step(config, None),
        lambda modules: modules.step(config.with_values({"train": {"batch_size": 1}}), None),
        lambda modules: modules.draw(config, None),
        lambda modules: modules.prepare(config, None),
        lambda modules: modules.comparison_work(config.with_values({"prior": {"mode": "model"}}), None),
    ]
    for ask in asked:
        ask(one)
    for ask in reversed(asked):
        ask(other)
    assert len(one.counts.figures) > 12
    assert as_kept(one.counts) == as_kept(other.counts)


def as_kept(found: Counts) -> dict[str, Any]:
    return {name: counts._to_json(figure) for name, figure in sorted(found.figures.items())}


def damages(text: str) -> Iterator[str | bytes]:
    head, _, body = text.partition("\n")
    (key,) = (line.split()[0] for line in body.splitlines())
    figure = re.search(r'"base":(\d+)', body)
    assert figure is not None
    yield ""
    yield text[: len(text) // 2]
    yield b"\x00\xff" * 100
    yield "[" * 100_000 + text
    yield json.dumps({**json.loads(head), "of": "torch 1.0"}) + "\n" + body
    yield text.replace(figure[0], f'"base":{int(figure[1]) + 1}')
    for strange in ("", "no figures\n", f"{key} 5\n", f"{key} {{}}\n", f'{key} {{"base": [1]}}\n', f"{key}\n"):
        yield json.dumps({"of": json.loads(head)["of"], "sha256": counts._digest(strange)}) + "\n" + strange


def test_a_file_that_is_damaged_or_of_others_is_not_believed_and_made_again(
    alone: MakeConfig, built: list[str], tmp_path: Path
) -> None:
    config, path = alone(), tmp_path / "cache" / COUNTS
    first, sound, tries = told(config), path.read_text(encoding="utf-8"), 1
    for damaged in damages(sound):
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        assert told(config) == first
        tries += 1
        assert len(built) == tries and path.read_text(encoding="utf-8").endswith(sound.partition("\n")[2])
    path.unlink()
    path.mkdir()
    assert told(config) == first, "where it cannot be written nothing is kept"


def test_counts_are_of_these_sources_and_versions(
    alone: MakeConfig, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = alone()
    told(config)
    for name in ("_own_stamp", "stamp"):
        with monkeypatch.context() as patch:
            patch.setattr(counts, name, lambda: "others")
            if name == "stamp":
                counts._own_stamp.cache_clear()
            told(config)
    counts._own_stamp.cache_clear()
    assert len(built) == 3
    assert counts.stamp() in counts._own_stamp() and "torch 2" in counts.stamp() and "+" not in counts.stamp()


def test_the_key_is_of_all_that_a_pass_depends_on_and_of_no_more(
    make_config: MakeConfig, bases: dict[str, Path]
) -> None:
    config = decide.filled(make_config(), decide.look(make_config(), Silent()))
    facts = loading.facts(config.model)

    def key(**sections: dict[str, Any]) -> str:
        return counts.key_of(config.with_values(sections), facts)

    others = [
        key(adapter={"rank": 4}),
        key(adapter={"dora": True}),
        key(adapter={"targets": "attention+ff"}),
        key(adapter={"text_encoder": True}),
        key(objective={"noise_offset": 0.1}),
        key(model={"precision": "fp32"}),
        key(model={"quantize": "nf4"}),
        counts.key_of(config, replace(facts, scheduler_changes={"beta_end": 0.5})),
        counts.key_of(config, loading.facts(config.model.model_copy(update={"base": str(bases["sdxl"])}))),
    ]
    assert len({key(), *others}) == 1 + len(others)
    same = [
        key(train={"steps": 9, "batch_size": 1}),
        key(subject={"class_noun": "cat"}),
        key(adapter={"continue_from": Path("other.safetensors")}),
        key(model={"precision": "bf16"}),
        counts.key_of(config, replace(facts, path=Path("elsewhere"))),
    ]
    assert {key(), *same} == {key()}


def test_only_so_many_groups_are_kept_and_clearing_the_cache_takes_them(
    alone: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counts, "MAX_GROUPS", 2)
    path, keys = tmp_path / "cache" / COUNTS, []
    for number in range(3):
        group = Counts(f"group-{number}", tmp_path / "cache")
        group.add("base", number)
        group.keep()
        keys.append(list(counts._lines(path, counts._own_stamp())))
    assert keys[1:] == [["group-0", "group-1"], ["group-1", "group-2"]]
    cache.cache(tmp_path / "cache", Silent(), clear=True)
    assert not path.exists()


@pytest.mark.parametrize("inside", [".", "cache"])
def test_a_cache_in_the_runs_own_folder_is_left_alone_before_the_run_begins(
    inside: str, alone: MakeConfig, tmp_path: Path
) -> None:
    config = alone(run={"folder": tmp_path / "run", "cache": tmp_path / "run" / inside})
    told(config)
    decide.check(
        decide.filled(config, decide.look(config, Silent())), device_type="cpu", facts=loading.facts(config.model)
    )
    assert not (tmp_path / "run").exists()


def test_words_that_may_be_cut_are_looked_at_by_the_tokenizer(alone: MakeConfig, built: list[str]) -> None:
    told(alone())
    told(alone(subject={"class_noun": "cat"}))
    assert len(built) == 1
    told(alone(subject={"class_noun": "犬"}))
    assert len(built) == 2, "letters that are none of ASCII may be several tokens"


SHIPPED = counts.read(counts.SHIPPED, counts.stamp())
needs_tested_versions = pytest.mark.skipif(
    not SHIPPED, reason="what ships is of the versions in constraints.txt, and others are installed"
)


@needs_tested_versions
def test_every_config_and_short_command_is_planned_from_what_ships(built: list[str], tmp_path: Path) -> None:
    checked = 0
    for case in shipping.cases():
        config = case.config.with_values({"run": {"cache": tmp_path}})
        modules = Modules.of(config, case.inputs.facts, is_kept=True)
        for budget_gib in (None, *shipping.BUDGETS_GIB):
            gib, seconds = case.ask(modules, budget_gib)
            assert gib > 1 and seconds > 1, case.name
            checked += 1
        assert not modules.counts.has_new, case.name
    assert built == [] and checked >= 500


def compared(name: str) -> None:
    """What ships against new counts, for the case of that name, without a budget and with one that is small."""
    case = next(case for case in shipping.cases() if case.name == name)
    modules = Modules.of(case.config, case.inputs.facts)
    for budget_gib in (None, *shipping.BUDGETS_GIB):
        case.ask(modules, budget_gib)
    known = SHIPPED[modules.counts.key]
    assert {n: counts._to_json(f) for n, f in modules.counts.figures.items()} == {
        n: counts._to_json(known[n]) for n in modules.counts.figures
    }


@needs_tested_versions
def test_what_ships_of_sd15_equals_new_counts() -> None:
    compared("sd15, 2048×2048")


@needs_tested_versions
@pytest.mark.slow
def test_all_that_ships_equals_new_counts() -> None:
    new = shipping.fresh()
    assert new.keys() == SHIPPED.keys()
    for key, group in new.items():
        assert as_kept(Counts(key, figures=group)) == as_kept(Counts(key, figures=SHIPPED[key]))


def test_levers_of_other_adapters_are_counted_in_groups_of_their_own(alone: MakeConfig, built: list[str]) -> None:
    config = decide.filled(alone(), decide.look(alone(), Silent())).with_values({"adapter": {"text_encoder": True}})
    facts = loading.facts(config.model)
    found = budget.savings(config, facts, modules=Modules.of(config, facts, is_kept=True))
    count = len(built)
    assert count > 1
    again = budget.savings(config, facts, modules=Modules.of(config, facts, is_kept=True))
    assert again == found and len(built) == count


def test_the_time_of_a_run_comes_from_kept_figures_unchanged(alone: MakeConfig) -> None:
    config = decide.filled(alone(), decide.look(alone(), Silent()))
    inputs, facts = decide.look(config, Silent()), loading.facts(config.model)
    seconds = []
    for _ in range(2):
        modules = Modules.of(config, facts, is_kept=True)
        seconds.append(duration.predict(modules, config, inputs.pictures).total_s(CARD))
        modules.counts.keep()
    assert seconds[0] == seconds[1] > 0
