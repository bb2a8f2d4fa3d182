"""Runs side by side: what is alike is compared, what is not is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_booth.report import compare, record
from tests.report.conftest import SCRIPT
from tests.report.reading import Page

Copied = Callable[..., Path]
ODD = "$x_1$ & co"
"""As a run's folder may be called."""


def changed(path: Path, *pairs: tuple[str, str]) -> Path:
    """A text file of a run with words replaced."""
    text = path.read_text()
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def compared(*folders: Path) -> tuple[str, Page]:
    text = compare.page([record.read(folder) for folder in folders])
    return text, Page(text)


def test_two_runs_stand_beside_each_other(run: Path, copied: Copied) -> None:
    other = copied("other")
    changed(other / "config.toml", ("rank = 2", "rank = 8"), ("seed = 0", "seed = 7"))
    _, found = compared(run, other)
    assert list(found.under)[1:] == [
        "At a glance",
        "The same prompts and seeds",
        "Curves",
        "Settings that differ",
        "Make them again",
    ]
    assert found.open == []
    assert found.under["Settings that differ"].split() == [
        *["setting", "run", "other"],
        *["adapter.rank", "2", "8"],
        *["train.seed", "0", "7"],
    ]
    alts = [image["alt"] for image in found.all("img")]
    assert alts[:3] == ["“a yql dog” by the base", "“a yql dog” with run", "“a yql dog” with other"]
    assert len(alts) == 6
    assert all("run: " in svg["aria-label"] and "other: " in svg["aria-label"] for svg in found.all("svg"))
    assert found.under["At a glance"].count("± 0.") >= 4


def test_words_of_strangers_are_words_here_too(run: Path, copied: Copied) -> None:
    text, found = compared(run, copied(ODD))
    assert "<script" not in text and f">{ODD}<" not in text and ODD in found.under["At a glance"]
    assert all(ODD in svg["aria-label"] for svg in found.all("svg"))
    assert SCRIPT.replace("{class}", "dog") in found.words


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"weights_sha256": "', '"weights_sha256": "f', "were measured by different encoders"),
        ('"seed": 1', '"seed": 2', "were drawn with another seed"),
        ('"is_in_sample": true', '"is_in_sample": false', "were compared with different real pictures"),
    ],
)
def test_scores_that_say_nothing_of_each_other_are_marked(
    old: str, new: str, why: str, run: Path, copied: Copied
) -> None:
    other = copied("other")
    changed(other / "scores.json", (old, new))
    assert why in compared(run, other)[1].under["At a glance"]
    assert why not in compared(run, copied("same"))[1].under["At a glance"]


def test_a_run_that_has_hardly_begun_stands_beside_a_finished_one(run: Path, copied: Copied) -> None:
    young = copied("young", without=("summary.json", "scores.*", "*.png", "yql_dog*", "*.jsonl", "notes.json"))
    _, found = compared(run, young)
    assert "Not a step is done yet." in found.under["At a glance"] and "–" in found.under["At a glance"]
    assert "The same prompts and seeds" not in found.under, "only one has pictures"
    assert found.under["Make them again"].count("lora-booth train") == 2


def test_runs_of_one_name_are_told_by_their_paths(run: Path, copied: Copied, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    other = copied("deep/run")
    assert compare.labels([record.read(run), record.read(other)]) == [str(run), str(other)]


def test_values_of_a_setting_may_hold_what_separates_them(run: Path, copied: Copied) -> None:
    other = copied("other")
    config = changed(other / "config.toml", ('prompt = "a photo of {token} {class}"', 'prompt = "a: b = {class}"'))
    assert "a: b" in config.read_text()
    assert '"a: b = {class}"' in compared(run, other)[1].under["Settings that differ"]


def test_the_scores_of_runs_are_whole_when_they_are_changed_here(run: Path) -> None:
    assert json.loads((run / "scores.json").read_text())["is_in_sample"] is True
