"""What is found in a folder, what is said about it, and what is cut out of a picture."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_booth.data import images
from lora_booth.data.images import Found, find, read, shown
from lora_booth.errors import DataError


def scene(seed: int = 0, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth picture that differs from that of every other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def encoded(format: str = "JPEG", seed: int = 0) -> bytes:
    file = io.BytesIO()
    scene(seed).save(file, format)
    return file.getvalue()


def put(path: Path, seed: int = 0, format: str = "JPEG") -> Path:
    path.write_bytes(encoded(format, seed))
    return path


def look(folder: Path, **options: float) -> Found:
    return find(folder, **({"max_megapixels": 64.0} | options))  # type: ignore[arg-type]


def names(found: Found) -> list[str]:
    return [picture.path.name for picture in found.pictures]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def test_pictures_come_sorted_with_hash_and_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(1).save(tmp_path / "b.jpg", exif=exif)
    for name, format, seed in [
        ("c.PNG", "PNG", 2),
        ("a.JpEg", "JPEG", 3),
        ("d.webp", "WEBP", 4),
        ("e.avif", "AVIF", 5),
    ]:
        put(tmp_path / name, seed, format)
    found = look(tmp_path)
    assert names(found) == ["a.JpEg", "b.jpg", "c.PNG", "d.webp", "e.avif"]
    assert [(p.width_px, p.height_px) for p in found.pictures] == [(96, 72), (72, 96)] + [(96, 72)] * 3
    assert [p.sha256 for p in found.pictures] == [
        hashlib.sha256(p.path.read_bytes()).hexdigest() for p in found.pictures
    ]
    assert [p.caption for p in found.pictures] == [None] * 5
    assert (found.left_out, found.warnings) == ((), ())
    assert [read(p.path).size for p in found.pictures] == [(p.width_px, p.height_px) for p in found.pictures]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere.jpg")


def content(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data()) and None


FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("cut.jpg", content(lambda: encoded("JPEG")[:-300]), "is damaged"),
    ("cut.png", content(lambda: encoded("PNG")[:-300]), "is damaged"),
    ("cut.webp", content(lambda: encoded("WEBP")[:-300]), "damaged"),
    ("cut.avif", content(lambda: encoded("AVIF")[:-300]), "damaged"),
    ("head.jpg", content(lambda: encoded("JPEG")[:100]), "damaged"),
    ("zero.jpg", content(lambda: b""), "is empty (0 bytes)"),
    ("text.jpg", content(lambda: b"hello"), "holds no picture that can be read"),
    ("anim.gif", content(lambda: encoded("GIF")), "is not a picture that is read"),
    ("gif.jpg", content(lambda: encoded("GIF")), "holds no picture that can be read"),
    ("scan.tiff", content(lambda: encoded("TIFF")), "is not a picture that is read"),
    ("clip.mp4", content(lambda: b"x"), "is not a picture that is read"),
    ("notes.txt", content(lambda: b"x"), "is the caption of no picture"),
    ("dog.jpg.txt", content(lambda: b"x"), "is the caption of no picture"),
    ("noending", content(lambda: encoded("PNG")), "is not a picture that is read"),
    ("pipe.jpg", fifo, "is not a file but a folder, pipe or device"),
    ("loop.png", loop, "cannot be read (Too many levels of symbolic links)"),
    ("gone.png", dangling, "cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("name", "make", "reason"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_a_bad_file_is_left_out_with_its_reason_and_the_rest_is_used(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    put(tmp_path / "dog.jpg")
    make(tmp_path / name)
    with at_most(10):
        found = look(tmp_path)
    assert names(found) == ["dog.jpg"]
    assert [fault.path.name for fault in found.left_out] == [name]
    assert reason in str(found.left_out[0])
    assert str(found.left_out[0]).startswith(f"{name} ")


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._dog.jpg", ".hidden.jpg", "Thumbs.db", "desktop.ini", "Icon\r", "dog.txt", "dog.TXT"],
)
def test_junk_and_captions_are_passed_over_quietly(tmp_path: Path, name: str) -> None:
    put(tmp_path / "dog.jpg")
    (tmp_path / name).write_bytes(b"a dog")
    found = look(tmp_path)
    assert (names(found), found.left_out, found.warnings) == (["dog.jpg"], (), ())


def test_a_picture_above_the_cap_is_left_out_with_its_size(tmp_path: Path) -> None:
    put(tmp_path / "small.jpg")
    scene(1, 400, 300).save(tmp_path / "large.png")
    (fault,) = look(tmp_path, max_megapixels=0.1).left_out
    assert "large.png has 0.1 megapixels (400×300), above the limit of 0.1" in str(fault)
    assert "data.max_megapixels" in fault.reason
    assert look(tmp_path, max_megapixels=0.12).left_out == ()


def test_a_raised_cap_admits_what_pillow_only_warns_about(tmp_path: Path) -> None:
    Image.new("1", (9000, 10000)).save(tmp_path / "dog.png")
    Image.new("1", (13000, 14000)).save(tmp_path / "larger.png")
    found = find(tmp_path, max_megapixels=1000)
    assert [picture.path.name for picture in found.pictures] == ["dog.png"]
    assert found.warnings == ()
    assert "more than 178 megapixels" in str(found.left_out[0])


def test_symlinks_to_pictures_are_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dog.jpg").symlink_to(put(tmp_path / "elsewhere.jpg"))
    assert names(look(tmp_path / "in")) == ["dog.jpg"]


def test_sub_folders_with_pictures_are_named_and_not_entered(tmp_path: Path) -> None:
    put(tmp_path / "dog.jpg")
    for name in ("10_yql dog", "empty", "x.png"):
        (tmp_path / name).mkdir()
    put(tmp_path / "10_yql dog" / "a.jpg")
    put(tmp_path / "10_yql dog" / "._a.jpg")
    put(tmp_path / "10_yql dog" / "b.PNG", 1, "PNG")
    (tmp_path / "self").symlink_to(".")
    found = look(tmp_path)
    assert names(found) == ["dog.jpg"]
    assert [str(fault).split(",")[0] for fault in found.warnings] == [
        "10_yql dog is a sub-folder with 2 pictures",
        "self is a sub-folder with 2 pictures",
        "x.png is a folder with the name of a picture; rename or remove it.",
    ]


UNUSUAL = [
    "ünï çødé 漢字 🐕.jpg",
    "-rf.jpg",
    "a\nb.jpg",
    "with  spaces .jpg",
    "x" * 251 + ".jpg",
    "50%d{0}.jpg",
    "*.jpg",
]
UNUSUAL += [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")] + ["Case.jpg", "case.jpg", "a.b.c.jpg"]


def test_unusual_names_work_with_their_captions(tmp_path: Path) -> None:
    all_names = [*UNUSUAL, os.fsdecode(b"not\xffutf8.jpg")]
    for i, name in enumerate(all_names):
        put(tmp_path / name, i)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {i}")
    found = look(tmp_path)
    assert sorted(names(found)) == sorted(all_names)
    assert {p.path.name: p.caption for p in found.pictures} == {n: f"caption {i}" for i, n in enumerate(all_names)}
    assert all(read(p.path, sha256=p.sha256).size == (96, 72) for p in found.pictures)
    assert all(shown(p.path).isprintable() for p in found.pictures)
    assert shown(Path("a\nb.jpg")) == r"'a\nb.jpg'"


@pytest.mark.parametrize(("picture", "caption"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_caption_from_another_system_finds_its_picture(tmp_path: Path, picture: str, caption: str) -> None:
    names = {"NFC": "caf\u00e9", "NFD": "cafe\u0301"}
    Image.new("RGB", (48, 48)).save(tmp_path / f"{names[picture]}.png")
    (tmp_path / f"{names[caption]}.txt").write_text("on a table")
    found = find(tmp_path, max_megapixels=64)
    assert [p.caption for p in found.pictures] == ["on a table"]
    assert not found.left_out
    (tmp_path / f"{names[picture]}.txt").write_text("its own")
    found = images.find(tmp_path, max_megapixels=64)
    assert [p.caption for p in found.pictures] == ["its own"]
    assert len(found.left_out) == 1


def test_captions_are_read_as_one_line(tmp_path: Path) -> None:
    put(tmp_path / "dog.jpg")
    (tmp_path / "dog.txt").write_bytes(b"\xef\xbb\xbf a photo of {token} {class},\r\n on grass \xc3\xa9 \n")
    assert look(tmp_path).pictures[0].caption == "a photo of {token} {class}, on grass é"


def test_captions_can_be_turned_off(tmp_path: Path) -> None:
    put(tmp_path / "dog.jpg")
    (tmp_path / "dog.txt").write_bytes(b"\xff")
    found = find(tmp_path, max_megapixels=64, captions=False)
    assert (found.pictures[0].caption, found.left_out, found.warnings) == (None, (), ())


@pytest.mark.parametrize(
    ("data", "reason"), [(b"caf\xe9", "is not UTF-8 text (byte 3)"), (b"x" * 70_000, "70000 bytes")]
)
def test_an_unreadable_caption_leaves_its_picture_out_and_names_both(tmp_path: Path, data: bytes, reason: str) -> None:
    put(tmp_path / "dog.jpg")
    put(tmp_path / "other.jpg", 1)
    (tmp_path / "dog.txt").write_bytes(data)
    found = look(tmp_path)
    assert names(found) == ["other.jpg"]
    (fault,) = found.left_out
    assert fault.path.name == "dog.txt"
    assert reason in fault.reason
    assert "picture dog.jpg is left out" in fault.reason


def test_a_caption_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    put(tmp_path / "dog.jpg")
    put(tmp_path / "other.jpg", 1)
    os.mkfifo(tmp_path / "dog.txt")
    with at_most(10):
        found = look(tmp_path)
    assert names(found) == ["other.jpg"]
    assert "picture dog.jpg is left out" in str(found.left_out[0])


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_caption_is_warned_about_and_the_prompt_used(tmp_path: Path, text: str) -> None:
    put(tmp_path / "dog.jpg")
    (tmp_path / "dog.txt").write_text(text, encoding="utf-8")
    found = look(tmp_path)
    assert found.pictures[0].caption is None
    assert [str(fault) for fault in found.warnings] == ["dog.txt is an empty caption; the prompt is used instead."]


def test_captions_above_75_words_are_warned_about_and_kept(tmp_path: Path) -> None:
    for count in (75, 76):
        put(tmp_path / f"{count}.jpg", count)
        (tmp_path / f"{count}.txt").write_text("word " * count)
    found = look(tmp_path)
    assert [len((p.caption or "").split()) for p in found.pictures] == [75, 76]
    assert [str(fault)[:20] for fault in found.warnings] == ["76.txt has 76 words;"]


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0, "optimize": True}])
@pytest.mark.parametrize("side", [256, 7900])
def test_a_jpeg_whose_header_names_more_pixels_than_it_holds_is_told(
    side: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    scene(1).resize((128, 128)).save(tmp_path / "dog.jpg", quality=60, **settings)
    assert look(tmp_path).warnings == ()
    data = bytearray((tmp_path / "dog.jpg").read_bytes())
    frame = next(at for at in range(len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC2))
    data[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    (tmp_path / "dog.jpg").write_bytes(data)
    (fault,) = look(tmp_path).warnings
    assert re.match(r"dog\.jpg ends early: (69|72|100)% ", str(fault))
    assert f"of the {side}×{side} pixels that its header names are missing" in str(fault)


def test_animations_give_their_first_frame_and_a_warning(tmp_path: Path) -> None:
    for ending in ("png", "webp", "avif"):
        scene(1).save(tmp_path / f"moving.{ending}", save_all=True, append_images=[scene(2)], duration=100)
    found = look(tmp_path)
    assert [str(f) for f in found.warnings if "animated" in str(f)] == [
        f"moving.{ending} is animated; its first frame is used." for ending in ("avif", "png", "webp")
    ]
    difference = np.asarray(read(tmp_path / "moving.png"), int) - np.asarray(scene(1), int)
    assert not difference.any()


def test_a_phones_mpo_is_not_called_animated(tmp_path: Path) -> None:
    scene(1).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[scene(2)])
    assert look(tmp_path).warnings == ()


def test_a_picture_whose_file_is_slightly_off_is_used_and_reported(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    (fault,) = look(tmp_path).warnings
    assert str(fault).startswith("a.jpg is used, but its file is not quite right (Corrupt EXIF data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "a.jpg").size == (96, 72)


def test_copies_are_named_with_the_first_of_them(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.jpg", 1)
    put(tmp_path / "c.jpg")
    found = look(tmp_path)
    assert names(found) == ["a.jpg", "b.jpg", "c.jpg"], "reported, not dropped"
    assert [str(f) for f in found.warnings] == ["c.jpg is the same file as a.jpg, so it counts twice; remove one."]


def test_pictures_that_look_alike_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.jpg", 1)
    scene().resize((48, 36)).save(tmp_path / "c.png")
    expected = "c.png looks almost like a.jpg; if it is a copy, remove one."
    assert [str(f) for f in look(tmp_path).warnings] == [expected]


def folder_state(folder: Path) -> list[tuple[str, bytes, int, int]]:
    return [
        (p.name, p.read_bytes() if p.is_file() else b"", p.lstat().st_mtime_ns, p.lstat().st_mode)
        for p in [folder, *sorted(folder.rglob("*"))]
    ]


def test_the_users_folder_is_not_touched(tmp_path: Path) -> None:
    for i, format in enumerate(("JPEG", "PNG", "WEBP", "AVIF", "GIF")):
        put(tmp_path / f"{i}.{format.lower()}", i, format)
    (tmp_path / "0.txt").write_text("a dog")
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub" / "x.jpg")
    before = folder_state(tmp_path)
    for picture in look(tmp_path).pictures:
        read(picture.path)
    assert folder_state(tmp_path) == before
    assert len(before) == 10


def test_a_missing_folder_a_file_and_an_empty_folder_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; check its spelling"):
        look(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dog\.jpg is a file; give the folder"):
        look(put(tmp_path / "dog.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no usable picture in .*empty; it is empty\nPut 3 or more pictures there: JPEG, PNG"
    ):
        look(tmp_path / "empty")


def test_a_folder_without_a_picture_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "5_dog").mkdir()
    put(tmp_path / "5_dog" / "a.jpg")
    with pytest.raises(DataError, match="5_dog is a sub-folder with 1 picture, which is not used; move it up"):
        look(tmp_path)
    for i in range(7):
        (tmp_path / f"{i}.gif").write_bytes(encoded("GIF"))
    with pytest.raises(DataError, match=r"(?s)there is:\n  0\.gif is not.*4\.gif is not.*\n  and 3 more\n"):
        look(tmp_path)


def test_reading_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    picture = look(put(tmp_path / "dog.jpg").parent).pictures[0]
    put(picture.path, 1)
    assert read(picture.path).size == (96, 72)
    with pytest.raises(DataError, match=r"dog\.jpg has changed since this run looked at it"):
        read(picture.path, sha256=picture.sha256)


def test_reading_a_bad_file_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encoded()[:-300])
    with pytest.raises(DataError, match=r"^cut\.jpg is damaged"):
        read(tmp_path / "cut.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_damaged_bytes_never_raise_anything_but_a_fault_and_what_is_found_can_be_read(
    tmp_path: Path, format: str
) -> None:
    draw = np.random.default_rng(7)
    whole = encoded(format)
    put(tmp_path / "whole.jpg", 1)
    for i in range(60):
        data = bytearray(whole)
        for at in draw.integers(0, min(len(data), [60, len(data)][i % 2]), 1 + i % 5):
            data[at] = draw.integers(0, 256)
        (tmp_path / f"{i:03}.{format.lower()}").write_bytes(data[: len(data) if i % 3 else draw.integers(1, len(data))])
    found = look(tmp_path)
    assert len(found.pictures) + len(found.left_out) == 61
    assert len(found.left_out) >= 10
    for picture in found.pictures:
        assert read(picture.path).size == (picture.width_px, picture.height_px)


def test_images_are_found_without_importing_torch() -> None:
    code = f"import sys, {images.__name__}, lora_booth.data.sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
