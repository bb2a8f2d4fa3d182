"""The ablations: every arm is a recipe that can be trained, and the page says what its numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import page
from benchmarks.ablations.arms import (
    ARMS,
    CAPTIONS,
    END,
    NUM_SEEDS,
    OTHERS,
    STRENGTHS,
    WRONG_NOUNS,
    Run,
    State,
    Subject,
    schedule,
)
from benchmarks.ablations.claims import claims
from benchmarks.ablations.statistics import Difference, Table, likeness_at
from benchmarks.ablations.store import Outcome, Results
from lora_booth.cli.demo import MASCOT
from tools.booth_mini.compose import article
from tools.booth_mini.nouns import DENOISER
from tools.booth_mini.subjects import SUBJECTS

MASCOT_SUBJECT = Subject("mascot", "dog", MASCOT)
NAMES = ("mascot", *(subject.name for subject in SUBJECTS))


def made_up(arms: dict[str, tuple[float, float]], seeds: int = NUM_SEEDS) -> dict[str, Any]:
    """Results in which each arm has a likeness and a drift, at each strength in proportion."""
    runs = {}
    for arm, (likeness, drift) in arms.items():
        for number, name in enumerate(NAMES):
            for seed in range(seeds):
                figures = {
                    state.name: {
                        "likeness": likeness * state.strength + 0.01 * number,
                        "likeness_before": 0.0,
                        "leak": 0.1,
                        "other_change": drift * state.strength,
                        "largest_other_change": 2 * drift,
                        "diversity": 0.2,
                        "diversity_before": 0.3,
                        "subject_change": 0.5,
                        "prediction_change": 0.02,
                        "update_norm": 2.0,
                    }
                    for state in ARMS[arm].states
                }
                runs[f"{arm}/{name}/{seed}"] = {"digest": "0", "circumstances": 0, "figures": figures}
    subjects = {name: {"class_noun": "dog", "ceiling": 0.8, "others": []} for name in NAMES}
    where = {"commit": "0123456", "torch": "2", "device": "CPU"}
    return {"circumstances": [where], "subjects": subjects, "runs": runs}


def test_every_arm_is_a_config_and_no_two_are_the_same(tmp_path: Path) -> None:
    runs = [Run(arm, MASCOT_SUBJECT, seed) for arm in ARMS.values() for seed in range(NUM_SEEDS)]
    configs = {run.key: run.config(tmp_path) for run in runs}
    assert len(ARMS) > 15
    assert len({run.digest(tmp_path, "base") for run in runs}) == len(configs) == len(ARMS) * NUM_SEEDS
    assert all(config.optimizer.schedule == "constant" for config in configs.values()), "else steps cannot be read off"
    for run in runs:
        every = configs[run.key].train.save_every_steps
        assert every is not None and all(state.step % every == 0 for state in run.states)


def test_another_noun_is_in_the_captions_alone(tmp_path: Path) -> None:
    for noun, caption in (("wrong", f"a {{token}} {WRONG_NOUNS[0]} on a"), ("none", "a {token} on a")):
        config = Run(ARMS[f"noun-{noun}"], MASCOT_SUBJECT, 0).config(tmp_path)
        texts = [path.read_text() for path in config.subject.images.glob("*.txt")]
        assert len(texts) == 5 and sum(text.startswith(caption) for text in texts) == 3
        assert config.fill(config.prior.prompts[0]) == "a dog"


def test_what_must_not_change_is_named_by_nothing_that_is_trained() -> None:
    named = {*CAPTIONS, *map(article, WRONG_NOUNS)}
    assert not named & set(map(article, OTHERS))
    assert {*OTHERS, *WRONG_NOUNS, *(c.partition(" ")[2] for c in CAPTIONS)} <= {*DENOISER}
    for subject in SUBJECTS:
        others = Subject(subject.name, subject.class_noun, MASCOT).others
        assert len(others) == 8 and not set(others) & set(subject.class_noun.split())


def test_whenever_it_is_stopped_what_is_done_is_balanced() -> None:
    everyone = [Subject(name, "dog", MASCOT) for name in NAMES]
    order = list(schedule(everyone))
    assert len(order) == len(ARMS) * len(NAMES) * NUM_SEEDS
    assert {(run.arm.name, run.seed) for run in order[:21]} == {(arm, 0) for arm in ("images", "model", "none")}
    assert {run.seed for run in order[: len(ARMS) * len(NAMES)]} == {0}


def test_a_run_whose_recipe_has_changed_is_measured_again(tmp_path: Path) -> None:
    results, run = Results(tmp_path / "likeness.json"), Run(ARMS["none"], MASCOT_SUBJECT, 0)
    assert not results.has(run, "one")
    results.add(run, "one", Outcome({"200@1": {"likeness": 0.5}}, 60.0, 20.0))
    assert results.has(run, "one") and not results.has(run, "other")
    results.add(run, "other", Outcome({"200@1": {"likeness": 0.6}}, 60.0, 20.0))
    found = json.loads(results.path.read_text())
    assert found["runs"]["none/mascot/0"]["figures"]["200@1"]["likeness"] == 0.6
    assert len(found["circumstances"]) == 1


def test_fronts_are_compared_at_equal_drift() -> None:
    assert likeness_at([(0.0, 0.0), (0.2, 0.4), (0.4, 0.6)], 0.1) == pytest.approx(0.2)
    assert likeness_at([(0.0, 0.0), (0.2, 0.4)], 0.3) == pytest.approx(0.4)
    table = Table(made_up({"images": (0.8, 0.2), "model": (0.8, 0.1)}))
    found = table.at_equal_drift(("model", STRENGTHS), ("images", STRENGTHS))
    assert found.num_pairs == 21
    assert found.by_subject["mascot"] == pytest.approx(0.8 - 0.4), "images draws half of it at a drift of .1"


def test_verdicts_follow_from_intervals() -> None:
    def verdict(expected: str, *values: float) -> str:
        return Difference(dict(zip(NAMES, values, strict=False)), 7).verdict(expected)

    up, mixed = (0.2, 0.3, 0.2, 0.25, 0.3, 0.2, 0.2), (0.2, -0.2, 0.1, -0.1, 0.3, -0.3, 0.0)
    assert verdict("+", *up) == "came out"
    assert verdict("-", *up) == "the reverse came out"
    assert verdict("0", *up) == "did not come out"
    assert verdict("0", *(value / 100 for value in up)) == "came out"
    assert verdict("+", *mixed) == "not decided"
    assert verdict("+", *up[:6]) == "not yet measured"


def test_the_page_says_what_is_measured_and_what_is_not(tmp_path: Path) -> None:
    page.write(made_up({"images": (0.7, 0.1), "model": (0.8, 0.05), "none": (0.5, 0.6)}), tmp_path)
    text = (tmp_path / "likeness.md").read_text()
    assert "| model | 21 of 21 |" in text
    assert "| rank-64 | 0 of 21 | not yet measured |" in text
    row = next(line for line in text.splitlines() if line.startswith("| The model prior beats class images |"))
    assert row.endswith("| 21 of 21 | came out |")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("likeness_fronts.png", "likeness_arms.png"))
    partial = made_up({"images": (0.7, 0.1), "none": (0.5, 0.6)}, seeds=1)
    del partial["runs"]["none/tabby/0"], partial["runs"]["none/mascot/0"]["figures"]["200@0.2"]
    page.write(partial, tmp_path)
    row = next(
        line for line in (tmp_path / "likeness.md").read_text().splitlines() if line.startswith("| Class images pay")
    )
    assert row.endswith("| | | 5 of 21 | not yet measured |"), "one is missing, one is of an older recipe"
    page.write({"circumstances": [], "subjects": {}, "runs": {}}, tmp_path)
    assert "came out |" not in (tmp_path / "likeness.md").read_text()


def test_every_claim_compares_states_that_its_arms_have() -> None:
    count = 0
    for claim in claims():
        for arm, states in (claim.a, claim.b):
            compared = {states} if isinstance(states, State) else {*states}
            assert compared <= {*ARMS[arm].states}, claim.text
            count += 1
    assert count > 40
    assert all(END in arm.states for arm in ARMS.values())
