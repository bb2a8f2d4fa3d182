"""The config files that ship: each one parses, is complete, and the package finds them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lora_booth import config_file, presets
from lora_booth.demo import MASCOT, demo_config

FILES = sorted(presets.FOLDER.glob("*.toml"))


def test_the_promised_files_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names == {"demo"} | {
        f"{base}_{kind}_12gb" for base in ("sd15", "sd21", "sdxl") for kind in ("subject", "style")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_names_its_base(path: Path) -> None:
    config = config_file.load(path)
    assert config.model.base == {"demo": "booth-mini"}.get(path.stem, path.stem.split("_")[0])
    assert tomllib.loads(path.read_text())["data" if path.stem != "demo" else "train"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_says_how_to_run_it(path: Path) -> None:
    head = path.read_text().split("[model]")[0]
    assert f"lora-booth {'demo' if path.stem == 'demo' else 'train configs/' + path.name}" in head


def test_the_demo_trains_on_the_mascot(tmp_path: Path) -> None:
    config = demo_config(tmp_path / "run")
    assert config.subject.images == MASCOT / "instance"
    assert config.run.folder == tmp_path / "run"


def test_only_the_miniature_has_a_preset_for_short_command_lines() -> None:
    assert presets.for_base("booth-mini") == presets.MINIATURE
    assert presets.for_base("sd15") is None
    assert presets.for_base(None) is None
