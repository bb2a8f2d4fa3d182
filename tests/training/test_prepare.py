"""Class images and caches: sizes, seeds, sharing, and going on after an interruption."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_booth.config.settings import ModelConfig, PriorConfig
from lora_booth.data import images as user_images
from lora_booth.data import subject
from lora_booth.data.buckets import Bucket
from lora_booth.data.subject import crops_of, find_pictures
from lora_booth.errors import Interrupted
from lora_booth.models import at_once, loading
from lora_booth.models.families.family import Conditioning, Family
from lora_booth.models.sampling import Sampling, sample
from lora_booth.planning import decide
from lora_booth.run.interrupts import StopRequest
from lora_booth.run.report import Silent
from lora_booth.training import class_drawing, class_images, prepare
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import Recorder

SQUARE, WIDE = Bucket(32, 32), Bucket(48, 32)


def wanted(count: int = 6, root: Path = Path("root"), fingerprint: str = "f") -> list[class_images.ClassImage]:
    prior = PriorConfig(num_images=count, sampler_steps=2, sampler="ddim")
    made = {"fingerprint": fingerprint, "made_by": (), "root": root}
    return class_images.wanted(prior, ["a dog", "a cat"], [SQUARE, WIDE, SQUARE], **made)  # type: ignore[arg-type]


def test_class_images_follow_the_instance_sizes_and_take_prompts_in_turn() -> None:
    images = wanted(6)
    assert [image.prompt for image in images] == ["a dog", "a cat"] * 3
    assert [image.bucket for image in images] == [SQUARE, SQUARE, WIDE, WIDE, SQUARE, SQUARE]


def test_every_class_image_has_a_place_of_its_own_that_does_not_depend_on_how_many_there_are() -> None:
    few, many = wanted(4), wanted(12)
    assert [image.path for image in few] == [image.path for image in many[:4]]
    assert len({image.path for image in many}) == 12
    assert not {image.path for image in many} & {image.path for image in wanted(12, fingerprint="other")}


def drawn(images: list[class_images.ClassImage], *given: object, **words: object) -> int:
    """How many of `images` were drawn when all of them are reached."""
    reached = {image.name for image in images}
    return class_drawing.draw_missing(images, reached, *given, **words)[1]  # type: ignore[arg-type]


Prompts = dict[str, Conditioning]


@pytest.fixture
def family(bases: dict[str, Path]) -> Family:
    return loading.load(ModelConfig(base=str(bases["sd1"])), device="cpu", dtype=torch.float32)


@pytest.fixture
def prompts(family: Family) -> Prompts:
    with torch.no_grad():
        return {text: family.encode_prompts([text]) for text in ("", "a dog", "a cat")}


def test_an_interrupted_drawing_goes_on_where_it_was_and_gives_the_same_bytes(
    family: Family, prompts: Prompts, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(memory={"pictures_at_once": 2})
    straight, interrupted = wanted(8, tmp_path / "a"), wanted(8, tmp_path / "b")
    everything = {"together": 2, "report": Silent(), "stop": StopRequest()}
    assert drawn(straight, family, config, prompts, **everything) == 8

    class Killed(Silent):
        def progress(self, task: str, done: int, total: int, **values: object) -> None:
            if done == 4:  # a fifth was drawn together with the fourth
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(interrupted, family, config, prompts, together=2, report=Killed(), stop=StopRequest())
    assert sum(image.path.exists() for image in interrupted) == 4
    rows: list[int] = []
    family.denoiser.register_forward_pre_hook(lambda _, words: rows.append(len(words[0])))
    assert drawn(interrupted, family, config, prompts, **everything) == 4
    assert [i.path.read_bytes() for i in straight] == [i.path.read_bytes() for i in interrupted]
    assert all(torch.equal(a.latents(), b.latents()) for a, b in zip(straight, interrupted, strict=True))
    assert len({image.path.read_bytes() for image in straight}) == 8
    assert max(rows) == 2 * 2, "the fifth is drawn in the batch that it had, with both halves of guidance in a pass"


def test_a_stop_is_heeded_between_two_steps_of_the_solver(
    family: Family, prompts: Prompts, make_config: MakeConfig, tmp_path: Path
) -> None:
    stop = StopRequest()
    stop.signal_number = 15
    images = wanted(2, tmp_path)
    with pytest.raises(Interrupted):
        drawn(images, family, make_config(), prompts, together=4, report=Silent(), stop=stop)
    assert not any(image.path.exists() for image in images)


def test_a_picture_without_its_latents_or_with_damaged_ones_is_drawn_again(
    family: Family, prompts: Prompts, make_config: MakeConfig, tmp_path: Path
) -> None:
    recorder, config = Recorder(), make_config()
    listeners = {"together": 4, "report": recorder, "stop": StopRequest()}
    assert drawn(wanted(4, tmp_path), family, config, prompts, **listeners) == 4
    first, second, third, _ = wanted(4, tmp_path)
    files = [image.path.with_suffix(".safetensors") for image in (first, second)]
    before = [path.read_bytes() for path in files]
    files[0].unlink()
    files[1].write_bytes(before[1][:-1] + bytes([before[1][-1] ^ 1]))
    third.path.unlink()
    assert drawn(wanted(4, tmp_path), family, config, prompts, **listeners) == 3
    assert [path.read_bytes() for path in files] == before
    assert [text for text in recorder.warnings if str(files[1]) in text]


def test_what_is_trained_on_are_the_latents_that_the_solver_left(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("sd1", run={"cache": tmp_path / "cache"})
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())
    prepared = prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest())
    for item in prepared.order.classes:
        moments = prepared.latents[item.latent_key]
        assert not moments.std.any()
        decoded = (family.decode_latents(moments.mean[None])[0].permute(1, 2, 0) / 2 + 0.5) * 255
        with Image.open(tmp_path / "cache" / "class_images" / f"{item.latent_key}.png") as picture:
            assert torch.equal(decoded.round().byte(), torch.tensor(np.asarray(picture)))
    with pytest.raises(AssertionError, match="released"):
        family.text_encoders()


def test_the_denoiser_is_away_while_prompts_are_encoded_and_the_vae_works_and_back_afterwards(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"cache": tmp_path / "cache"}, memory={"offload_denoiser": True, "pictures_at_once": 2})
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    happened: list[str] = []
    encode, decode, read = family.encode_images, family.decode_latents, family.encode_prompts
    monkeypatch.setattr(family, "move_denoiser", lambda device: happened.append(f"to {device}"))
    monkeypatch.setattr(family, "encode_images", lambda pixels: happened.append("encode") or encode(pixels))
    monkeypatch.setattr(family, "decode_latents", lambda *x, **y: happened.append("decode") or decode(*x, **y))
    monkeypatch.setattr(family, "encode_prompts", lambda texts: happened.append("read") or read(texts))
    family.denoiser.register_forward_pre_hook(lambda *_: happened.append("denoise"))
    pictures = subject.find_pictures(config, Silent())
    prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest())
    assert [key for key, _ in itertools.groupby(happened)] == [
        *["to cpu", "read", "to cpu"],
        *["denoise", "to cpu", "decode", "to cpu"] * math.ceil(config.prior.num_images / 2),
        *["encode", "to cpu"],
    ]


@pytest.mark.parametrize(
    "lack", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_fewer_are_drawn_together_when_the_memory_does_not_suffice(
    lack: Exception, family: Family, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(32, 32, "ddim", 2, 1.0, batch_size=5)
    unet, seen = family.denoiser, []
    predict = type(unet).forward

    def full(self: object, sample: torch.Tensor, *arguments: object, **settings: object) -> object:
        seen.append(len(sample))
        if len(sample) > 2:
            raise lack
        return predict(self, sample, *arguments, **settings)  # type: ignore[arg-type]

    rows = {"seeds": list(range(5))}
    conditioning = [prompts["a dog"]] * 5
    expected = torch.cat(list(sample(family, conditioning, prompts[""], sampling, **rows)))
    monkeypatch.setattr(type(unet), "forward", full)
    found = list(sample(family, conditioning, prompts[""], sampling, **rows))
    assert [len(latents) for latents in found] == [2, 2, 1]
    assert seen == [5, 2, 2, 2, 2, 1, 1]
    assert torch.allclose(torch.cat(found), expected, atol=1e-5)
    monkeypatch.setattr(type(unet), "forward", lambda *_, **__: (_ for _ in ()).throw(lack))
    with pytest.raises(type(lack)):
        list(sample(family, conditioning[:1], prompts[""], sampling, seeds=[0]))


def test_another_error_while_drawing_is_not_taken_for_a_lack_of_memory(
    family: Family, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def broken(_: object, latents: torch.Tensor, *__: object, **___: object) -> None:
        seen.append(len(latents))
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(type(family.denoiser), "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(sample(family, [prompts["a dog"]] * 2, prompts[""], Sampling(32, 32, "ddim", 2, 1.0), seeds=[0, 1]))
    assert seen == [2], "it is not tried again with fewer"


def test_a_second_preparation_reads_everything_from_the_cache(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"cache": tmp_path / "cache"})
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())

    def prepared() -> prepare.Prepared:
        return prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest())

    first = prepared()
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("not from the cache"))
    second = prepared()
    assert first.order == second.order
    assert all(torch.equal(first.latents[k].mean, second.latents[k].mean) for k in first.latents)
    assert all(torch.equal(first.prompts[p]["embeddings"], second.prompts[p]["embeddings"]) for p in first.prompts)


def test_a_damaged_cache_file_is_told_and_made_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(run={"cache": tmp_path / "cache"}, prior={"loss_weight": 0.0})
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())
    recorder = Recorder()
    prepare.prepare(config, family, pictures, report=recorder, stop=StopRequest())
    victim = sorted((tmp_path / "cache" / "latents").iterdir())[0]
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prepare.prepare(config, family, pictures, report=recorder, stop=StopRequest())
    assert any(victim.name in text for text in recorder.warnings)
    assert victim.read_bytes() == good


@pytest.mark.parametrize(("wished", "together"), [(None, 4), (8, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_more_memory_does_not_draw_more_class_images_together(
    wished: int | None, together: int, make_config: MakeConfig
) -> None:
    assert at_once.class_images_at_once(make_config(memory={"pictures_at_once": wished})) == together


def test_class_images_of_another_type_schedule_or_company_are_others(
    make_config: MakeConfig, bases: dict[str, Path]
) -> None:
    base = ModelConfig(base=str(bases["sd2"]))
    single, half = (loading.load(base, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    plain, rescaled = make_config("sd2"), make_config("sd2", objective={"zero_terminal_snr": True})
    kinds = [(single, plain, 4), (half, plain, 4), (single, rescaled, 4), (single, plain, 2)]
    assert len({class_drawing.made_by(*kind) for kind in kinds}) == len(kinds)
    more = make_config("sd2", memory={"pictures_at_once": 8})
    assert class_drawing.made_by(single, more, 4) == class_drawing.made_by(single, plain, 4)


def test_a_run_stays_with_the_company_that_it_drew_class_images_in(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"cache": tmp_path / "cache"}, prior={"num_images": 4})
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    pictures = subject.find_pictures(config, Silent())
    honest = type(family.denoiser).forward

    def full(self: object, sample: torch.Tensor, *arguments: object, **settings: object) -> object:
        if len(sample) > 4:
            raise torch.OutOfMemoryError("full")
        return honest(self, sample, *arguments, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as narrow:
        narrow.setattr(type(family.denoiser), "forward", full)
        first = prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest())
    assert first.drawn_together == 2
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    again = prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest(), together=2)
    assert [item.latent_key for item in again.order.classes] == [item.latent_key for item in first.order.classes]
    monkeypatch.setattr(type(family.denoiser), "forward", full)
    shutil.rmtree(tmp_path / "cache")
    family = loading.load(config.model, device="cpu", dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError):  # other pictures than the run began with would be another run
        prepare.prepare(config, family, pictures, report=Silent(), stop=StopRequest(), together=4)


def test_a_picture_is_decoded_once_for_the_sheet_and_the_latents(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read, decoded = user_images.read, []
    monkeypatch.setattr(user_images, "read", lambda path, **given: (decoded.append(path.name), read(path, **given))[1])
    train.train(make_config(data={"flip": True}, prior={"loss_weight": 0.0}, run={"cache": tmp_path / "cache"}))
    assert len(decoded) == len(set(decoded)) == 5


def test_pictures_that_do_not_fit_into_memory_together_are_decoded_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, decoded = user_images.read, []
    monkeypatch.setattr(user_images, "read", lambda path, **given: (decoded.append(path.name), read(path, **given))[1])
    config = make_config(prior={"loss_weight": 0.0})
    pictures = find_pictures(config, Silent())
    first, second = pictures.instances.pictures[:2]
    crops = crops_of(decide.filled(config, decide.look(config, Silent())), [first, second])
    cuts = prepare.Cuts(max_bytes=crops[0].bucket.width_px * crops[0].bucket.height_px * 3)
    for picture, crop in zip((first, second) * 2, crops * 2, strict=True):
        assert cuts.of(picture, crop).shape == (crop.bucket.height_px, crop.bucket.width_px, 3)
    assert [decoded.count(picture.path.name) for picture in (first, second)] == [1, 2]
