"""What can be wrong with a config, an adapter or a caption is told before anything is computed or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DataError, LoraBoothError, ModelError
from lora_booth.planning import decide
from lora_booth.run.report import Silent
from lora_booth.verbs import plan, train
from tests.conftest import MakeConfig
from tests.support import tiny
from tests.support.runs import Recorder

MINIMAL = {"model": {"base": "booth-mini"}, "subject": {"images": "x", "class_noun": "dog"}}

CPU = torch.device("cpu")


def build(section: str, **pairs: Any) -> Config:
    return toml.build({**MINIMAL, section: MINIMAL.get(section, {}) | pairs}, source="test")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_of_a_config_may_be_nan_or_infinite(value: float) -> None:
    checked = 0
    for section, model in Config.model_fields.items():
        for key, field in model.annotation.model_fields.items():  # type: ignore[union-attr]
            if "float" in str(field.annotation):
                as_given = {"x": value} if "dict" in str(field.annotation) else value
                given = [0.9, value] if "tuple" in str(field.annotation) else as_given
                with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
                    build(section, **{key: given})
                checked += 1
    assert checked >= 18


@pytest.mark.parametrize("betas", [[0.9, 1.0], [0.9, 1.5], [-0.1, 0.9], [0.9]])
def test_moments_decay_by_shares_below_one(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        build("optimizer", betas=betas)


@pytest.mark.parametrize("name", ["a.", "a "])
def test_a_name_whose_end_windows_drops_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"export\.name .* ends with .*, which Windows drops"):
        build("export", name=name)


@pytest.mark.parametrize("key", ["token", "class_noun"])
@pytest.mark.parametrize("word", ["x" * 260, "犬" * 70])
def test_words_that_make_too_long_a_file_name_are_refused(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=r"subject\.token and class_noun make .* long, .*set export\.name"):
        build("subject", **{key: word})


@pytest.mark.parametrize("caption", ["a {tokn} dog", "a {token", "token} dog", "{token:>9}", "{}", "{{token}"])
def test_a_caption_with_a_typing_error_is_refused_by_its_file(
    caption: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    _, second, _ = tiny.tiny_pictures(tmp_path / "captioned", 3)
    second.with_suffix(".txt").write_text(caption)
    config = make_config(subject={"images": tmp_path / "captioned"})
    with pytest.raises(DataError, match=r"picture_01\.txt .* slot.*the slots are \{class\}, \{token\}"):
        train.train(config)
    assert not config.folder.exists()


@pytest.mark.parametrize("key", ["subject.prompt", "preview.negative_prompt"])
def test_a_prompt_with_a_typing_error_is_refused_by_its_key(key: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"{section}\.{name} .* has the slot \{{clas\}}"):
        build(section, **{name: "a {class} {clas}"})


LATE: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "targets": ({"adapter": {"targets": "regex:nothing"}}, r'adapter\.targets = "regex:nothing" matches none'),
    "rank": ({"adapter": {"rank_pattern": {"nothing": 2}}}, r'rank_pattern .* has "nothing", which matches no'),
    "alpha": ({"adapter": {"alpha_pattern": {"nothing": 2.0}}}, r'alpha_pattern has "nothing", which matches no'),
    "odd": ({"adapter": {"init": "orthogonal", "rank": 3}}, r"needs an even rank"),
    "token": (
        {"subject": {"token": "zqxjkvwy" * 5}},
        r"subject\.token and subject\.class_noun .* the text encoder does not see",
    ),
}


@pytest.mark.parametrize("what", LATE)
def test_what_does_not_fit_the_base_is_told_before_anything_is_written(what: str, make_config: MakeConfig) -> None:
    sections, told = LATE[what]
    config = make_config(**sections)
    with pytest.raises(LoraBoothError, match=told):
        train.train(config)
    assert not config.folder.exists(), "a mended config can begin in this folder"
    with pytest.raises(LoraBoothError, match=told):
        plan.show(config, Silent())


def test_an_adapter_that_cannot_be_continued_is_told_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    small = {"adapter": {"rank": 2, "targets": r"regex:.*attn2\.to_k"}, "train": {"steps": 1}}
    for family in ("sd1", "sdxl"):
        train.train(make_config(family, name=family, **small))
    start = tmp_path / "sd1" / "yql_dog_diffusers.safetensors"
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no adapter")
    cases = [
        (start, {"rank": 4}, "has rank 2, expected 4; change adapter.rank"),
        (start, {"rank": 2, "dora": True}, "is plain LoRA; change adapter.dora"),
        (start, {"targets": "attention"}, "lacks 112 of 128"),
        (tmp_path / "sdxl" / "yql_dog.safetensors", {"rank": 2}, "is of sdxl, but model.base is of sd1"),
        (junk, {"rank": 2}, "not a whole safetensors file"),
        (tmp_path, {"rank": 2}, "adapter.continue_from .* cannot be read: it is a folder"),
    ]
    for path, settings, told in cases:
        config = make_config("sd1", adapter=small["adapter"] | settings | {"continue_from": path})
        with pytest.raises((ConfigError, ModelError), match=told):
            train.train(config)
        assert not config.folder.exists()


def test_a_picture_that_must_be_enlarged_is_told_with_its_size(make_config: MakeConfig, tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path / "small", 3, sizes=[(20, 24), (48, 48)])
    recorder, config = Recorder(), make_config(subject={"images": tmp_path / "small"})
    decide.resolve(config, decide.look(config, recorder), recorder, device=CPU, free_gib=None)
    told = [text for text in recorder.warnings if "enlarged" in text]
    assert [text.partition(" pixels")[0] for text in told] == ["picture_00.png has 20×24", "picture_02.png has 20×24"]
