"""Masks: where they are found, what is refused, and that they are cut, mirrored and counted as their pictures are."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_booth.data import images, masks, subject
from lora_booth.data.buckets import Bucket, assign
from lora_booth.errors import DataError, Interrupted
from lora_booth.run import identity
from lora_booth.run.report import Silent
from lora_booth.training import prepare
from lora_booth.training.batch import Batch
from lora_booth.training.objective import Draws
from lora_booth.verbs import plan, train
from tests.conftest import MakeConfig
from tests.support.runs import At, Recorder, assert_equal, session_of, trained

LEFT = (0, 0, 24, 48)


def half(size: tuple[int, int] = (48, 48), box: tuple[int, int, int, int] = LEFT) -> Image.Image:
    """White in `box`, else black."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three squares of noise, "a", "b" and "c"."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def found(folder: Path, masked_by: images.MaskedBy = "files") -> images.Found:
    return images.find(folder, max_megapixels=1, masked_by=masked_by)


def test_masks_lie_beside_their_pictures_or_in_a_folder(photos: Path) -> None:
    half().save(photos / "a.mask.png")
    (photos / "masks").mkdir()
    half().save(photos / "masks" / "b.PNG".lower())
    half().save(photos / "masks" / "z.png")
    (photos / "masks" / "notes.doc").write_text("none")
    pictures = found(photos).pictures
    assert [picture.path.name for picture in pictures] == ["a.png", "b.png", "c.png"]
    assert [None if p.mask is None else p.mask.path for p in pictures] == [
        photos / "a.mask.png",
        photos / "masks" / "b.png",
        None,
    ]
    told = [str(fault) for fault in (*found(photos).left_out, *found(photos).warnings)]
    assert [text.partition(" ")[0] for text in told] == ["masks/notes.doc", "masks/z.png"]
    assert all("is the mask of no picture" in text for text in told)
    assert [p.mask for p in found(photos, "off").pictures] == [None] * 3


def test_a_mask_beside_its_picture_comes_before_one_in_the_folder(photos: Path) -> None:
    (photos / "masks").mkdir()
    half().save(photos / "masks" / "a.png")
    half().save(photos / "a.mask.png")
    mask = found(photos).pictures[0].mask
    assert mask is not None and mask.path == photos / "a.mask.png"


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (half((48, 47)), "a.mask.png is a mask of 48×47 pixels, but its picture has 48×48, so its picture a.png"),
        (Image.new("L", (48, 48)), "a.mask.png is a mask that is black everywhere, so its picture a.png is left out"),
        (b"\x89PNG", "a.mask.png holds no picture that can be read"),
        (b"", "a.mask.png is empty (0 bytes); copy it again or remove it. Until then a.png is left out."),
    ],
)
def test_a_mask_that_cannot_be_used_leaves_its_picture_out(mask: Image.Image | bytes, told: str, photos: Path) -> None:
    path = photos / "a.mask.png"
    path.write_bytes(mask) if isinstance(mask, bytes) else mask.save(path)
    seen = found(photos)
    assert [picture.path.name for picture in seen.pictures] == ["b.png", "c.png"]
    assert told in str(seen.left_out[0]) and str(seen.left_out[0]).count("left out") == 1


def test_a_mask_whose_picture_is_gone_is_never_learnt_as_a_picture(photos: Path) -> None:
    half().save(photos / "z.mask.png")
    half().save(photos / "A.MASK.PNG")
    half().save(photos / "a.mask.mask.png")
    for masked_by in ("files", "off"):
        seen = found(photos, masked_by)
        assert [picture.path.name for picture in seen.pictures] == ["a.png", "b.png", "c.png"]
        assert [str(fault).partition(" ")[0] for fault in seen.left_out] == [
            "A.MASK.PNG",
            "a.mask.mask.png",
            "z.mask.png",
        ]
    for name in "abc":
        (photos / f"{name}.png").unlink()
    with pytest.raises(DataError, match="no usable picture"):
        found(photos)


def test_two_masks_of_a_picture_are_told_with_their_folder(photos: Path) -> None:
    (photos / "masks").mkdir()
    half().save(photos / "masks" / "a.png")
    half().save(photos / "a.mask.png")
    half((2, 2)).save(photos / "masks" / "b.png")
    told = [str(fault) for fault in found(photos).left_out]
    assert told[0].startswith("masks/a.png is a second mask of its picture")
    assert told[1].startswith("masks/b.png is a mask of 2×2 pixels")


def test_white_on_nothing_is_white_on_black_and_white_everywhere_is_told(photos: Path) -> None:
    clear = Image.new("RGBA", (48, 48), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), LEFT)
    clear.save(photos / "a.mask.png")
    Image.new("L", (48, 48), 255).save(photos / "b.mask.png")
    seen = found(photos)
    mask = seen.pictures[0].mask
    assert mask is not None and np.array_equal(np.asarray(masks.read(mask)), np.asarray(half()))
    assert [str(fault) for fault in seen.warnings] == [
        "b.mask.png is a mask that is white everywhere, so it changes nothing; black leaves out."
    ]


def test_transparency_is_a_mask_where_it_is_asked_for(photos: Path) -> None:
    clear = Image.open(photos / "a.png").convert("RGBA")
    clear.putalpha(half())
    clear.save(photos / "a.png")
    Image.new("RGBA", (48, 48), (1, 2, 3, 255)).save(photos / "b.png")
    assert [p.mask for p in found(photos).pictures] == [None] * 3
    marked = found(photos, "alpha").pictures
    assert [p.mask is not None for p in marked] == [True, False, False]
    mask = marked[0].mask
    assert mask is not None and mask.is_alpha
    assert np.array_equal(np.asarray(masks.read(mask)), np.asarray(half()))
    Image.new("RGBA", (48, 48), (1, 2, 3, 0)).save(photos / "c.png")
    assert "c.png is transparent everywhere" in str(found(photos, "alpha").left_out[0])


def test_a_turned_photograph_with_a_mask_as_viewers_see_both(photos: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (48, 24), "red").save(photos / "a.jpg", exif=turned)
    (photos / "a.png").unlink()
    half((24, 48)).save(photos / "a.mask.png")
    assert found(photos).pictures[0].mask is not None


def test_a_mask_is_cut_and_shrunk_as_its_picture() -> None:
    window = assign(64, 32, [Bucket(32, 32)])
    cut = masks.crop(half((64, 32), (0, 0, 24, 32)), window, (4, 4))
    assert cut.tolist() == [[255, 0, 0, 0]] * 4  # columns 16 to 47 are kept
    assert masks.crop(half((64, 32), (0, 0, 20, 32)), window, (4, 4))[0].tolist() == [128, 0, 0, 0]


def test_a_mask_that_changed_since_is_told(photos: Path) -> None:
    half().save(photos / "a.mask.png")
    mask = found(photos).pictures[0].mask
    half(box=(0, 0, 10, 10)).save(photos / "a.mask.png")
    assert mask is not None
    with pytest.raises(DataError, match=r"a\.mask\.png has changed since"):
        masks.read(mask)


def masked_config(make_config: MakeConfig, photos: Path, name: str = "run", **sections: Any) -> Any:
    sections = {"subject": {"images": photos}, "prior": {"mode": "model"}, "data": {"flip": True}} | sections
    sections["data"] = {"resolution": 32, "bucket_step": 16, **sections["data"]}
    return make_config(name=name, **sections)


def test_the_loss_is_the_mean_over_what_the_mask_leaves(
    make_config: MakeConfig, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half().save(photos / "a.mask.png")
    s = session_of(masked_config(make_config, photos), monkeypatch)
    held = s.prepared.masks
    assert len(held) == 2  # as it is, and mirrored
    plain, mirrored = sorted(held.values(), key=lambda mask: float(mask[0, 0, 0]), reverse=True)
    assert torch.equal(plain, mirrored.flip(2))
    size = plain.shape[-1]
    assert plain[0, 0].tolist() == pytest.approx([1.0] * (size // 2) + [0.1] * (size - size // 2))
    latents = torch.zeros(2, 4, size, size)
    noise = torch.ones_like(latents)
    noise[..., size // 2 :] = 3  # of the background
    draws = Draws(torch.tensor([500, 500]), noise, torch.zeros(2, 4, 1, 1))
    weighed = torch.stack([plain, torch.ones_like(plain)])
    losses = s.objective.loss(lambda noisy, t: torch.zeros_like(noisy), latents, draws, None, weighed)
    assert losses.tolist() == pytest.approx([(1 + 0.1 * 9) / 1.1, (1 + 9) / 2])
    rows = {row.item for step in range(6) for row in s.prepared.order.at(step)}
    with_mask = {item for item in rows if item.mask_key is not None}
    assert with_mask and all(item.role == "instance" and item.name.startswith("a.png") for item in with_mask)
    assert {item.role for item in rows} == {"instance", "prior"}


def test_what_the_background_shows_is_learnt_only_where_it_counts(make_config: MakeConfig, photos: Path) -> None:
    for name in "abc":
        half(box=(0, 0, 16, 48)).save(photos / f"{name}.mask.png")
    other = photos.with_name("other")
    shutil.copytree(photos, other)
    summaries = {}
    for weight in (0.0, 1.0):
        settings: dict[str, Any] = {"objective": {"background_weight": weight}, "prior": {"mode": "none"}}
        summaries[weight] = train.train(masked_config(make_config, photos, f"run{weight}", **settings))
    off = {"subject": {"images": photos, "masks": "off"}, "prior": {"mode": "none"}}
    without = train.train(masked_config(make_config, photos, "off", **off))
    assert summaries[1.0].validation_loss == pytest.approx(without.validation_loss, rel=1e-5)
    assert abs(summaries[0.0].validation_loss - without.validation_loss) > 1e-4


def test_a_run_with_masks_and_all_that_is_drawn_by_step_resumes_bit_for_bit(
    make_config: MakeConfig, photos: Path
) -> None:
    half().save(photos / "a.mask.png")

    def config(name: str) -> Any:
        templates = ("a close-up of {token} {class}", "the {class}")
        subject = {"images": photos, "templates": templates, "caption_dropout": 0.3}
        objective = {"timestep_range": (0.2, 0.9), "debiased": True}
        return masked_config(make_config, photos, name, subject=subject, objective=objective, train={"steps": 6})

    straight, interrupted = trained(config("straight")), config("interrupted")
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))


def test_a_mask_is_a_part_of_what_a_run_depends_on(make_config: MakeConfig, photos: Path) -> None:
    config = masked_config(make_config, photos)
    before = subject.find_pictures(config, Silent()).hashes()
    half().save(photos / "a.mask.png")
    after = subject.find_pictures(config, Silent()).hashes()
    assert "masks" not in before and set(after["masks"]) == {"a.png"}
    assert identity.digest(config, before) != identity.digest(config, after)


def test_plan_and_the_contact_sheet_show_masks(make_config: MakeConfig, photos: Path) -> None:
    half().save(photos / "a.mask.png")
    heard, config = Recorder(), masked_config(make_config, photos)
    plan.show(config, heard)
    told = [text for name, text in heard.events if name == "picture"]
    assert [text.endswith("masked") for text in told] == [True, False, False]
    found_again = subject.find_pictures(config, Silent()).instances.pictures
    window, cuts = assign(48, 48, [Bucket(32, 32)]), prepare.Cuts()
    shown = [prepare._seen(picture, window, cuts).astype(int) for picture in found_again]
    whole = [cuts.of(picture, window).astype(int) for picture in found_again]
    assert np.array_equal(shown[1], whole[1])
    assert np.array_equal(shown[0][:, :15], whole[0][:, :15])
    faded = 255 - (255 - whole[0][:, 17:]) * prepare.FADED
    assert np.abs(shown[0][:, 17:] - faded).max() <= 1


def test_what_is_done_with_all_tensors_of_a_batch_is_done_with_masks() -> None:
    draws = Draws(*(torch.zeros(1) for _ in range(3)))
    batch = Batch(torch.zeros(1), draws, torch.zeros(1), None, ["a"], None, torch.zeros(1))
    assert len(batch.tensors) == 6
    moved = batch.mapped(lambda tensor: tensor + 1)
    assert all(tensor.item() == 1 for tensor in moved.tensors) and len(moved.tensors) == 6


def test_a_crop_that_cuts_the_subject_off_is_told(make_config: MakeConfig, photos: Path) -> None:
    wide = np.random.default_rng(1).integers(0, 256, (32, 96, 3), dtype=np.uint8)
    Image.fromarray(wide).save(photos / "a.png")
    half((96, 32), (0, 0, 4, 32)).save(photos / "a.mask.png")
    settings = {"objective": {"background_weight": 0.0}, "data": {"max_aspect": 1.0}}
    with pytest.raises(DataError, match=r"of a\.mask\.png nothing is left where its picture is cropped to 32×32"):
        train.train(masked_config(make_config, photos, **settings))


def test_a_background_that_all_pictures_share_is_told_unless_captions_or_masks_name_it(
    make_config: MakeConfig, photos: Path
) -> None:
    for seed, name in enumerate("abc"):
        Image.open(photos / "a.png").resize((48, 48)).save(photos / f"{name}.png")
        with Image.open(photos / f"{name}.png") as picture:
            picture.paste((80 * seed, 10, 10), (16, 16, 32, 44))
            picture.save(photos / f"{name}.png")

    def told() -> bool:
        heard = Recorder()
        subject.find_pictures(masked_config(make_config, photos), heard)
        return any("share their background" in text for text in heard.warnings)

    assert told()
    half().save(photos / "a.mask.png")
    assert not told()
    (photos / "a.mask.png").unlink()
    (photos / "b.txt").write_text("a {token} {class} on a carpet")
    assert not told()
