"""Files of many subjects: what becomes a run of its own, what is a grid, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_booth.config import many
from lora_booth.errors import ConfigError

HEAD = """
[defaults.model]
base = "booth-mini"

[defaults.train]
steps = 40

"""
REX = '[[subject]]\nimages = "photos/rex"\nclass_noun = "dog"\n'


def read(tmp_path: Path, text: str, *overrides: str, usual: many.Tables | None = None) -> list[many.NamedRun]:
    path = tmp_path / "pets.toml"
    path.write_text(text)
    return many.load(path, usual or {}, tmp_path / "out", overrides)


def test_a_subject_has_its_own_folder_and_sections_over_what_all_share(tmp_path: Path) -> None:
    mia = '[[subject]]\nname = "mia"\nimages = "photos/x"\nclass_noun = "cat"\ntoken = "wbv"\n'
    mia += "[subject.train]\nsteps = 9\n"
    rex, cat = read(tmp_path, HEAD + REX + mia)
    assert (rex.name, rex.config.folder, rex.config.train.steps) == ("rex", tmp_path / "out" / "rex", 40)
    assert (cat.name, cat.config.subject.class_noun, cat.config.subject.token) == ("mia", "cat", "wbv")
    assert cat.config.train.steps == 9 and cat.config.model.base == "booth-mini"
    assert cat.config.subject.images == Path("photos/x")


def test_lists_where_one_value_belongs_are_a_grid_and_lists_of_lists_where_a_list_does(tmp_path: Path) -> None:
    swept = "[subject.optimizer]\nlearning_rate = [1e-4, 2e-4]\n[subject.adapter]\nrank = [4, 8]\n"
    found = read(tmp_path, HEAD + REX + swept)
    told = {(run.config.optimizer.learning_rate, run.config.adapter.rank): run.name for run in found}
    assert len(found) == 4 and told[(2e-4, 4)] == "rex-learning_rate_0.0002-rank_4"
    assert {run.config.folder.name for run in found} == {run.name for run in found}

    one = read(tmp_path, HEAD + REX + 'templates = ["a {class}", "the {class}"]\n')
    assert len(one) == 1 and one[0].config.subject.templates == ("a {class}", "the {class}")
    two = read(tmp_path, HEAD + REX + 'templates = [["a {class}"], ["the {class}"]]\n')
    assert [run.config.subject.templates for run in two] == [("a {class}",), ("the {class}",)]


def test_words_of_the_command_win_over_all_and_usual_ones_over_nothing(tmp_path: Path) -> None:
    without_noun = '[[subject]]\nimages = "photos/mug"\n'
    usual = {"subject": {"class_noun": "mug", "token": "wbv"}}
    rex, mug = read(tmp_path, HEAD + REX + without_noun, "train.steps=7", usual=usual)
    assert (rex.config.subject.class_noun, mug.config.subject.class_noun) == ("dog", "mug")
    assert rex.config.subject.token == "wbv" and rex.config.train.steps == mug.config.train.steps == 7
    assert len(read(tmp_path, HEAD + REX, "train.seed=[1,2,3]")) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it names no subject; write a table [[subject]]"),
        (HEAD + "[[subjects]]\nimages = 'x'\n", '"subjects" has no meaning here; did you mean "subject"?'),
        ("defaults = 3\n" + REX, "defaults is no table"),
        (HEAD + '[[subject]]\nclass_noun = "dog"\n', "subject 1 has neither images nor a name"),
        (HEAD + REX + "tokn = 'x'\n", 'subject 1: "tokn" has no meaning here; did you mean "token"?'),
        (HEAD + REX + "[subject.train]\nsteps = -1\n", "subject rex has a fault:\n  train.steps is -1"),
        (HEAD + REX + "[subject.train]\nsteps = []\n", "train.steps is an empty list"),
        (HEAD + REX + REX, 'another run is called "rex" too'),
        (HEAD + REX + "[subject.run]\nfolder = 'x'\n", "run.folder is set, but each run has its own in --out"),
        (HEAD + REX.replace("images", 'name = "a/b"\nimages'), "holds '/', which some system refuses in names; rename"),
        (HEAD + REX + "train = 5\n", "subject 1: train is a section; write a table [subject.train]."),
        (HEAD + REX + "subject = 5\n", "subject 1: subject is a section; write its keys without it."),
        (HEAD + REX.replace("images", 'name = "CON"\nimages'), "is the device CON on Windows"),
        (HEAD + REX + "[subject.optimzer]\nlearning_rate = 1e-4\n", 'did you mean "optimizer"?'),
    ],
)
def test_what_is_wrong_is_told_with_the_subject_that_it_is_of(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert told in str(caught.value) and "pets.toml" in str(caught.value)


def test_faults_of_all_subjects_are_told_at_once_up_to_a_few(tmp_path: Path) -> None:
    subjects = "".join(f'[[subject]]\nimages = "p/{n}"\nclass_noun = "dog"\ntoken = ""\n' for n in range(9))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, HEAD + subjects)
    text = str(caught.value)
    assert text.count("subject.token is") == many.MAX_FAULTS and "And 4 more subjects with faults." in text


def test_an_override_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='"steps" is not an override'):
        read(tmp_path, HEAD + REX, "steps")


def test_the_file_of_the_readme_is_three_runs(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (text,) = (block for block in re.findall(r"```toml\n(.*?)```", readme, re.S) if "[[subject]]" in block)
    names = [run.name for run in read(tmp_path, text)]
    assert names == ["rex", "mia-learning_rate_0.0001", "mia-learning_rate_0.0002"]
