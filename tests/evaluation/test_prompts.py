"""Prompts: the shipped lists, files of the user's, and what is left when the token goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_booth.errors import ConfigError
from lora_booth.evaluation import prompts


@pytest.mark.parametrize("name", ["objects", "living"])
def test_the_shipped_lists_have_dreambooths_structure(name: str) -> None:
    found = prompts.read(prompts.FOLDER / f"{name}.txt")
    assert len(found) == len(set(found)) == 25
    assert all(line.count("{token} {class}") == 1 for line in found)
    outfits = [line for line in found if any(word in line for word in (" wearing ", "uniform", "dressed"))]
    assert len(outfits) == (0 if name == "objects" else 7)


def test_the_list_follows_the_base_and_the_class_noun_unless_the_user_says() -> None:
    ask = prompts.templates_for
    assert ask("booth-mini", "dog", is_living=True)[0] == "miniature"
    assert ask("sd15", "dog", is_living=None)[0] == ask(None, "old Man", is_living=None)[0] == "living"
    assert ask("sd15", "toy", is_living=None)[0] == ask("sd15", "dog", is_living=False)[0] == "objects"
    assert ask("sd15", "backpack", is_living=True)[0] == "living"


@pytest.mark.parametrize(
    ("template", "noun", "expected"),
    [
        ("a {token} {class} in the snow", "owl", "an owl in the snow"),
        ("a {token} {class}", "dog", "a dog"),
        ("an orange {token} {class}", "dog", "an orange dog"),
        ("photo of {token}  {class}", "dog", "photo of dog"),
    ],
)
def test_without_the_token_a_prompt_is_that_of_any_of_its_class(template: str, noun: str, expected: str) -> None:
    assert prompts.class_prompt(template, noun) == expected


def test_unrelated_prompts_never_name_the_class() -> None:
    found = prompts.filled(
        ["a {token} {class}"], ["a cat", "a DOG runs", "a hotdog stand"], token="emo", class_noun="dog"
    )
    assert found.subject == ("a emo dog",) and found.classes == ("a dog",)
    assert found.unrelated == ("a cat", "a hotdog stand")
    for base in ("booth-mini", "sd15"):
        assert len(prompts.unrelated_for(base)) >= 8


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# mine\n\n  a {token}   {class} at night \n", encoding="utf-8-sig")
    assert prompts.read(tmp_path / "p.txt") == ("a {token} {class} at night",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt"),
        (b"# only this\n", "holds no prompt"),
        (b"a {token} {class}\na dog\n", 'a dog" lacks'),
        (b"a {token} {clas}\n", "has the slot {clas}"),
        (b"a {token} {class\n", "broken slot"),
        (b"\xff\xfe", "cannot be read"),
        (b"a {token} {class}\n" * 1001, "at most 1000"),
        (b"a {token} {class} \0\n", "NUL"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        prompts.read(tmp_path / "p.txt")
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            prompts.read(path)
