"""Class images and caches: sizes, seeds, sharing, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_booth import class_images, families, prepare, subject
from lora_booth.config import ModelConfig, PriorConfig
from lora_booth.data.buckets import Bucket
from lora_booth.errors import Interrupted
from lora_booth.interrupts import StopRequest
from lora_booth.report import Silent
from tests.conftest import MakeConfig
from tests.test_train import Recorder

SQUARE, WIDE = Bucket(32, 32), Bucket(48, 32)


def wanted(count: int = 6, root: Path = Path("root"), fingerprint: str = "f") -> list[class_images.ClassImage]:
    prior = PriorConfig(num_images=count, sampler_steps=2, sampler="ddim")
    return class_images.wanted(prior, ["a dog", "a cat"], [SQUARE, WIDE, SQUARE], fingerprint=fingerprint, root=root)


def test_class_images_follow_the_instance_sizes_and_take_prompts_in_turn() -> None:
    images = wanted(6)
    assert [image.prompt for image in images] == ["a dog", "a cat"] * 3
    assert [image.bucket for image in images] == [SQUARE, SQUARE, WIDE, WIDE, SQUARE, SQUARE]


def test_every_class_image_has_a_place_of_its_own_that_does_not_depend_on_how_many_there_are() -> None:
    few, many = wanted(4), wanted(12)
    assert [image.path for image in few] == [image.path for image in many[:4]]
    assert len({image.path for image in many}) == 12
    assert not {image.path for image in many} & {image.path for image in wanted(12, fingerprint="other")}


def test_an_interrupted_drawing_goes_on_where_it_was_and_gives_the_same_bytes(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    family = families.load(ModelConfig(base=str(bases["sd1"])), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        prompts = {text: family.encode_prompts([text]) for text in ("", "a dog", "a cat")}
    prior = PriorConfig(num_images=4, sampler_steps=2, sampler="ddim")
    straight, interrupted = wanted(4, tmp_path / "a"), wanted(4, tmp_path / "b")
    everything = {"report": Silent(), "stop": StopRequest()}
    assert class_images.draw_missing(straight, family, prior, prompts, **everything) == 4
    stop = StopRequest()
    stop.signal_number = 15
    with pytest.raises(Interrupted):
        class_images.draw_missing(interrupted, family, prior, prompts, report=Silent(), stop=stop)
    assert sum(image.path.exists() for image in interrupted) == 1
    assert class_images.draw_missing(interrupted, family, prior, prompts, **everything) == 3
    assert [i.path.read_bytes() for i in straight] == [i.path.read_bytes() for i in interrupted]
    assert len({image.path.read_bytes() for image in straight}) == 4


def test_a_second_preparation_reads_everything_from_the_cache(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"cache": tmp_path / "cache"})
    family = families.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())

    def prepared() -> prepare.Prepared:
        sheet = tmp_path / "sheet.png"
        return prepare.prepare(config, family, pictures, sheet_path=sheet, report=Silent(), stop=StopRequest())

    first = prepared()
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("not from the cache"))
    second = prepared()
    assert first.order == second.order
    assert all(torch.equal(first.latents[k].mean, second.latents[k].mean) for k in first.latents)
    assert all(torch.equal(first.prompts[p]["embeddings"], second.prompts[p]["embeddings"]) for p in first.prompts)


def test_a_damaged_cache_file_is_told_and_made_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(run={"cache": tmp_path / "cache"}, prior={"loss_weight": 0.0})
    family = families.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())
    recorder, sheet = Recorder(), tmp_path / "sheet.png"
    prepare.prepare(config, family, pictures, sheet_path=sheet, report=recorder, stop=StopRequest())
    victim = sorted((tmp_path / "cache" / "latents").iterdir())[0]
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prepare.prepare(config, family, pictures, sheet_path=sheet, report=recorder, stop=StopRequest())
    assert any(victim.name in text for text in recorder.warnings)
    assert victim.read_bytes() == good
