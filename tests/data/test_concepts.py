"""Several subjects in one run, each in a sub-folder that says its words and how often it comes."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_booth.adapter.files import storage
from lora_booth.data import concepts, subject
from lora_booth.data.concepts import Concept
from lora_booth.errors import DataError, Interrupted
from lora_booth.run.report import Silent
from lora_booth.training import choosing
from lora_booth.verbs import plan, train
from lora_booth.verbs.evaluated import Asked, target_of
from tests.conftest import MakeConfig
from tests.support.runs import At, Recorder, assert_equal, session_of, trained
from tests.support.tiny import tiny_pictures


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three pictures of a dog that come once, two of a cat that come three times."""
    folder = tmp_path / "pets"
    tiny_pictures(folder / "1_yql dog", 3)
    for path in tiny_pictures(tmp_path / "more", 5)[3:]:
        (folder / "3_wbv cat").mkdir(exist_ok=True)
        shutil.copy(path, folder / "3_wbv cat" / path.name.replace("03", "00").replace("04", "01"))
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10_yql dog", Concept("yql", "dog", 10)),
        ("1_yql red fox", Concept("yql", "red fox", 1)),
        ("10_yql", None),
        ("yql dog", None),
        ("0_yql dog", None),
        ("1001_yql dog", None),
        ("99999_yql dog", None),
        ("1_{token} dog", None),
        ("masks", None),
        ("-3_yql dog", None),
    ],
)
def test_a_name_says_repeats_token_and_noun(name: str, expected: Concept | None) -> None:
    assert concepts.of_name(name) == expected


def test_pictures_come_as_often_as_their_folder_says_under_their_own_words(
    pets: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pets / "3_wbv cat" / "picture_00.txt").write_text("a {token} {class} on a sofa")
    prior = {"mode": "images", "num_images": 4, "prompts": ["a photo of {class}"]}
    config = make_config(
        subject={"images": pets, "templates": ["the {token} {class}"]}, prior=prior, train={"steps": 9}
    )
    order = session_of(config, monkeypatch).prepared.order
    rows = [row.item for step in range(9 * 4) for row in order.at(step)]
    names = Counter(item.name.partition("/")[0] for item in rows if item.role == "instance")
    assert names == {"1_yql dog": 3 * 4, "3_wbv cat": 6 * 4}
    prompts = {item.prompt for item in rows if item.role == "instance"}
    assert prompts == {
        "a photo of yql dog", "the yql dog", "a wbv cat on a sofa", "a photo of wbv cat", "the wbv cat",
    }  # fmt: skip
    assert {item.prompt for item in rows if item.role == "class"} == {"a photo of dog", "a photo of cat"}


def test_the_prior_of_the_model_leaves_out_each_subjects_own_word(
    pets: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"mode": "model", "captions": ["a {class} outside"]}
    order = session_of(make_config(subject={"images": pets}, prior=prior), monkeypatch).prepared.order
    prompts = {row.item.prompt for step in range(60) for row in order.at(step) if row.item.role == "prior"}
    assert prompts == {"a photo of dog", "a photo of cat", "", "a dog outside", "a cat outside"}


def test_a_killed_run_goes_on_to_the_same_bytes_and_a_change_in_a_folder_is_told(
    pets: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(name: str) -> Any:
        return make_config(name=name, subject={"images": pets})

    straight = trained(config("straight"))
    with pytest.raises(Interrupted):
        train.train(config("run"), report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    os.rename(pets / "3_wbv cat", pets / "4_wbv cat")
    with pytest.raises(Exception, match="4_wbv cat/picture_00"):
        train.train(config("run"))
    os.rename(pets / "4_wbv cat", pets / "3_wbv cat")
    assert_equal(straight, trained(config("run")))
    header = storage.read_metadata(tmp_path / "run" / "yql_dog.safetensors")
    assert header["modelspec.trigger_phrase"] == "yql dog, wbv cat"
    assert '"yql dog, wbv cat"' in (tmp_path / "run" / "yql_dog.json").read_text()


def test_likeness_is_measured_of_the_one_that_subject_names(pets: Path, make_config: MakeConfig) -> None:
    config = make_config("sd1", subject={"images": pets}, evaluate={"choose": "best", "encoder": "miniature"})
    pictures = subject.find_pictures(config, Silent())
    resolved: Any = config.with_values({"evaluate": {"max_share": 100.0}, "data": {"resolution": 32}})
    judge = choosing.judge(resolved, pictures, Silent())
    assert judge is not None and set(judge.real) == {
        f"1_yql dog/picture_0{n}.{e}" for n, e in enumerate(("png", "jpg", "png"))
    }
    train.train(make_config(subject={"images": pets}))
    target = target_of(make_config().folder, Asked(), {}, Silent())
    assert target.pictures == pets / "1_yql dog"


def test_plan_shows_each_subject_and_its_pictures(pets: Path, make_config: MakeConfig) -> None:
    recorder = Recorder()
    plan.show(make_config(subject={"images": pets}), recorder)
    told = [text for _, text in recorder.events]
    assert "3_wbv cat: 2 pictures of wbv cat" in told
    assert any("3_wbv cat/picture_01" in text for text in told)
    assert not any("sub-folder" in text for text in recorder.warnings)


def test_plain_pictures_beside_folders_are_those_of_subject(pets: Path, make_config: MakeConfig) -> None:
    tiny_pictures(pets, 1)
    recorder = Recorder()
    found = subject.find_pictures(make_config(subject={"images": pets, "token": "zzz"}), recorder)
    assert sum('is taken for another subject, "' in text for text in recorder.warnings) == 2
    assert len(found.instances.pictures) == 6
    assert found.instances.pictures[0].concept is None and "picture_00.png" in found.hashes()["pictures"]


def test_words_that_name_none_of_the_subjects_are_refused_with_those_there_are(
    pets: Path, make_config: MakeConfig
) -> None:
    with pytest.raises(DataError, match='"yql fox" is none of the subjects'):
        subject.find_pictures(make_config(subject={"images": pets, "class_noun": "fox"}), Silent())
    word = {"subject": {"images": pets}, "adapter": {"embedding": "too"}}
    with pytest.raises(DataError, match="one word alone can be learnt as vectors"):
        subject.find_pictures(make_config(**word), Silent())
