"""The config files that ship: each one parses, is complete, and the package finds them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lora_booth.cli.demo import MASCOT, demo_config
from lora_booth.config import presets, toml
from lora_booth.planning import budget
from tests.planning.test_memory import full_size

FILES = sorted(presets.FOLDER.glob("*.toml"))


def test_the_promised_files_are_there() -> None:
    names = {path.stem for path in FILES}
    expected = {f"{base}_{kind}_12gb" for base in ("sd15", "sd21", "sdxl") for kind in ("subject", "style")}
    expected |= {"sd15_subject_8gb", "sd21_subject_8gb", *(f"sdxl_subject_{gb}gb" for gb in (8, 16, 24))}
    derived = {f"{base}_character_12gb" for base in ("illustrious", "noobai_vpred", "pony")}
    assert names == {"demo", "sd15_word_8gb"} | expected | derived


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "demo"], ids=lambda path: path.stem)
def test_a_shipped_config_fits_the_card_in_its_name_by_prediction(path: Path) -> None:
    config = toml.load(path)
    assert config.memory.budget_gib == int(path.stem.rpartition("_")[2].removesuffix("gb"))
    kinds = {"sd15": "sd1", "sd21": "sd2"}
    kind = "sdxl" if config.model.base.endswith(".safetensors") else kinds.get(config.model.base, config.model.base)
    facts = full_size(kind)
    resolved = config.with_values({"data": {"bucket_step": 64}})
    assert budget.choose(resolved, facts, config.memory.budget_gib).too_large == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_names_its_base(path: Path) -> None:
    config = toml.load(path)
    name = {"demo": "booth-mini"}.get(path.stem, path.stem.split("_")[0])
    is_file = "_character_" in path.stem
    assert config.model.base.lower().startswith(name) if is_file else config.model.base == name
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
