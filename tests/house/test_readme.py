"""README and the guide keep their promises: their commands parse, its files exist, its numbers agree with the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from lora_booth import errors
from lora_booth.cli import app, crash
from tests.house.test_floors import LAW
from tools import tree

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("lora-booth ")
]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
COMMANDS += [code.replace("\n", " ") for code in re.findall(r"`(lora-booth \w+\s[^`]+)`", GUIDE)]


def test_the_first_twenty_lines_show_the_two_commands() -> None:
    head = README.splitlines()[:20]
    assert any(line.startswith("make demo") for line in head)
    assert any(line.startswith("make test") for line in head)


def test_make_knows_the_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documents_is_understood(command: str) -> None:
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app.app)
    verb = group.commands[words[0]]  # type: ignore[attr-defined]
    context = verb.make_context(words[0], words[1:])
    if words[0] in ("train", "plan"):
        names = ("settings", "subject", "class_noun", "token", "base", "prior", "vram", "out")
        config = app._config(*(context.params[name] for name in names))
        assert config.subject.class_noun == "dog"


def test_enough_commands_were_checked() -> None:
    assert len(COMMANDS) >= 4


def test_the_map_is_made_of_the_first_lines_of_the_docstrings() -> None:
    assert tree.placed(README) == README, "run: python -m tools.tree --write"
    assert tuple(name for names in LAW[1:] for name in names) == tree.ORDER, "the map is in the order of the law"
    mapped = README.split(tree.BEGIN)[1].split(tree.END)[0].splitlines()
    files = [path for path in (ROOT / "lora_booth").rglob("*.py") if path.name != "__init__.py"]
    assert len(mapped) == len(files) + len({path.parent for path in files}) >= 100
    for line in mapped:
        assert re.fullmatch(r" *[a-z_]+(/|\.py) +\S.*", line) and len(line) <= tree.MAX_COLUMNS, line


def test_names_of_files_in_the_documents_are_those_of_files() -> None:
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    checked = 0
    for document in ("README.md", "CONTRIBUTING.md"):
        for name in re.findall(r"`([\w/]+\.py)`", (ROOT / document).read_text()):
            known = (
                name in names if "/" not in name else any((ROOT / at / name).is_file() for at in (".", "lora_booth"))
            )
            assert known, f"{document}: {name}"
            checked += 1
    for name in re.findall(r"`((?:lora_booth|configs|tools|tests|benchmarks)/[^`]*)`", README):
        assert (ROOT / name).exists(), name
        checked += 1
    assert checked >= 15


def test_exit_codes_are_those_of_the_errors() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.M)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoraBoothError)
    ]
    assert table == {0, crash.EXIT_CODE} | {kind.exit_code for kind in kinds if kind is not errors.LoraBoothError}


def test_pictures_of_the_readme_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 1
    assert all((ROOT / name).stat().st_size > 10_000 for name in pictures)
