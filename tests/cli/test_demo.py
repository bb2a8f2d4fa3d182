"""The demo does what it says: after two minutes the miniature draws the mascot, and everything else as before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from benchmarks.likeness import CLASS, IN_CONTEXT, OTHERS, SEEDS, SUBJECT, Drawn, change, draw_both, likeness
from lora_booth.cli.demo import demo_config
from lora_booth.config.config import Config
from lora_booth.evaluation import scores
from lora_booth.verbs import train

CORNERS = ((2, 2), (61, 2), (2, 61), (61, 61))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, train.Summary]:
    """The demo at half its length, after which the mascot is learnt, on one thread: two that share their cores with
    other tests take four times as long.

    Of several processes that run tests, the first trains, and the others find the run finished.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    half: dict[str, dict[str, Any]] = {"train": {"steps": 100}, "preview": {"images_per_prompt": 1}}
    half["evaluate"] = {"strengths": (1.0,)}
    config = demo_config(shared / "demo" / "run").with_values(half)
    with FileLock(shared / "demo.lock"):
        return config, train.train(config)


@pytest.fixture(scope="module")
def drawn(run: tuple[Config, train.Summary]) -> Drawn:
    """Pictures without the adapter and through the portable file."""
    config, summary = run
    return draw_both(Path(summary.files["kohya"]), config.preview, seeds=SEEDS[:2])


def test_the_demo_hands_over_both_files_and_a_comparison(run: tuple[Config, train.Summary]) -> None:
    _, summary = run
    assert set(summary.files) == {"kohya", "diffusers"}
    assert all(0 < Path(path).stat().st_size < 5e6 for path in summary.files.values())
    assert summary.before_and_after is not None
    assert Image.open(summary.before_and_after).width > 300, "two columns of pictures and their prompts"


def test_the_demo_ends_with_its_scores(run: tuple[Config, train.Summary]) -> None:
    _, summary = run
    (found,) = scores.read(Path(summary.folder) / "scores.json").encoders
    best = found.candidates[found.best]
    assert (best.step, best.strength) == (summary.exported_step, summary.exported_strength)
    assert summary.scores.startswith("likeness 0.") and summary.scores.endswith("; by miniature"), summary.scores
    assert best.metrics["subject_fidelity"].mean > found.base["subject_fidelity"].mean + 0.15
    assert best.metrics["drift"].mean < 0.1 and found.is_feasible


def test_the_subject_is_visibly_closer_to_its_unseen_pictures(drawn: Drawn) -> None:
    before, after = likeness(drawn["before", SUBJECT]), likeness(drawn["after", SUBJECT])
    assert after > before + 0.2, (before, after)


def test_the_bare_class_noun_still_looks_as_before(drawn: Drawn) -> None:
    before, after = likeness(drawn["before", CLASS]), likeness(drawn["after", CLASS])
    assert after < before + 0.15, (before, after)
    assert likeness(drawn["after", SUBJECT]) > after + 0.15


@pytest.mark.parametrize("prompt", [CLASS, *OTHERS])
def test_other_prompts_stay_near_the_base(prompt: str, drawn: Drawn) -> None:
    changed, subject_changed = change(drawn, prompt), change(drawn, SUBJECT)
    assert changed < 0.6 * subject_changed, (changed, subject_changed)


def test_a_background_that_was_not_in_the_pictures_is_drawn_when_asked(
    drawn: Drawn,
) -> None:
    corners = [p.convert("RGB").getpixel(at) for p in drawn["after", IN_CONTEXT] for at in CORNERS]
    greener = sum(g > r and g > b for r, g, b in corners)  # type: ignore[misc]
    assert greener > len(corners) / 2, corners


@pytest.mark.slow
def test_at_its_full_length_it_draws_the_mascot_and_no_other_dog(tmp_path: Path) -> None:
    config = demo_config(tmp_path / "run")
    summary = train.train(config)
    drawn = draw_both(Path(summary.files["kohya"]), config.preview)
    assert likeness(drawn["after", SUBJECT]) > 0.35
    assert likeness(drawn["after", CLASS]) < 0.1
