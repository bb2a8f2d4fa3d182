"""Names of what is written are taken by every system, or refused on every system."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lora_booth.config import names
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError
from lora_booth.verbs import export as verb_export
from tests.soak.names import NAMES
from tests.support import windows_rules


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a:b", "holds ':'"),
        ("what?", "holds '?'"),
        ("../x", "holds '/'"),
        ("..\\x", "holds '\\\\\\\\'"),
        ("a\nb", "holds '\\\\n'"),
        ("con", "is the device CON on Windows"),
        ("Aux.v2", "is the device AUX on Windows"),
        ("com¹", "is the device COM¹ on Windows"),
        ("nul .x", "is the device NUL on Windows"),
        ("dog.", "ends with '.', which Windows drops"),
        ("dog ", "ends with ' ', which Windows drops"),
        ("..", "has no letter"),
        ("", "has no letter"),
        ("x" * 201, "is 201 long, and 200 is the most"),
        ("é" * 101, "is 202 long"),
    ],
)
def test_a_name_that_some_system_refuses_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"--name .*{why}.*; choose another name"):
        names.require(name, "--name")


@pytest.mark.parametrize(
    "name", ["dog", "yql dog", ".hidden", "console", "com10", "a.b", "é" * 100, "漢字", "-rf", "~"]
)
def test_other_names_are_taken(name: str) -> None:
    assert names.require(name, "--name") == name


def test_windows_refuses_no_name_that_is_taken() -> None:
    taken = [name for name in NAMES if names.fault(name, room=0) is None]
    assert 20 < len(taken) < len(NAMES)
    for name in taken:
        windows_rules.judge_new(f"/{name}")


def test_the_places_of_the_shell_are_no_names() -> None:
    assert [names.folder_fault(Path(text)) for text in (".", "..", "/", "a/..")] == [None] * 4
    assert names.folder_fault(Path("runs/con")) is not None


@pytest.mark.parametrize("name", ["../x", "con", "", "a:b"])
def test_an_export_is_not_written_under_such_a_name_nor_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="--name"):
        verb_export.export(file=tmp_path / "a.safetensors", out=tmp_path / "out", name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("run", "folder", "runs/a:b", """run.folder "a:b" holds ':'"""),
        ("run", "folder", "runs/aux", 'run.folder "aux" is the device AUX'),
        ("run", "folder", "runs/a\nb", 'run.folder "a'),
        ("run", "folder", "runs/dog. ", """run.folder "dog. " ends with ' '"""),
        ("export", "name", "summary", 'the result would be called "summary", as another file of a run is'),
        ("export", "name", "Before_After", 'would be called "Before_After"'),
        ("export", "name", "dog.", """export.name "dog." ends with '.'"""),
    ],
)
def test_a_run_is_not_written_under_such_a_name(section: str, key: str, value: str, told: str) -> None:
    values: dict[str, dict[str, str]] = {
        "model": {"base": "sd15"},
        "subject": {"images": "a:b", "class_noun": "dog"},  # of what is only read, every name is right
    }
    with pytest.raises(ValidationError) as refused:
        Config.model_validate({**values, section: {key: value}})
    assert told in str(refused.value)
    Config.model_validate(values)
