"""The user's pictures: found, checked, and cut to pixels.

Nothing is written.

What lives here: folders, captions, faults. What does not: file formats and colours (`decode.py`), decoding within
limits (`worker.py`), which size a picture is trained at (`buckets.py`), and torch: a fault in the data is told before
anything slow is imported.

Words: a picture's *size* is that of the upright picture, after its EXIF orientation; a *fault* is a file and a reason.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_booth.data import concepts, masks, worker
from lora_booth.data.buckets import Crop
from lora_booth.data.concepts import Concept
from lora_booth.data.decode import ENDINGS, TAKEN, Unusable, file_bytes
from lora_booth.data.duplicates import Look, alike, is_background_shared
from lora_booth.data.masks import Mask
from lora_booth.errors import DataError

MAX_CAPTION_BYTES = 64 * 2**10
MAX_CAPTION_WORDS = 75

OF_NO_PICTURE = "is the mask of no picture; give it the name of its picture, or remove it."
MaskedBy = Literal["files", "alpha", "off"]

_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx")


@dataclass(frozen=True)
class Picture:
    """One readable picture. `sha256` is of the file's bytes, the size is the upright one, `caption` is one line;
    `concept`: of which subject it is, where there are several."""

    path: Path
    sha256: str
    width_px: int
    height_px: int
    caption: str | None
    mask: Mask | None = None
    concept: Concept | None = None

    @property
    def name(self) -> str:
        """By which a run knows it: its file's, with the sub-folder where there are several subjects."""
        return self.path.name if self.concept is None else f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Fault:
    """A file that was left out or looks suspicious, and why, with what to do about it."""

    path: Path
    reason: str

    def __str__(self) -> str:
        folder = f"{masks.FOLDER}/" if self.path.parent.name == masks.FOLDER else ""
        return f"{folder}{shown(self.path)} {self.reason}"


@dataclass(frozen=True)
class Found:
    """What a folder holds: pictures sorted by name, files that are not used, and remarks on files that are.

    `is_background_shared`: nearly, as far as their edges tell.
    """

    pictures: tuple[Picture, ...]
    left_out: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    is_background_shared: bool = False


@dataclass
class _Listing:
    """A folder's entries, sorted into kinds. `captions` and `masks`: stem of the picture to file."""

    candidates: list[Path] = field(default_factory=list)
    captions: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    strangers: list[Fault] = field(default_factory=list)
    folders: list[Fault] = field(default_factory=list)


def find(
    folder: Path,
    *,
    max_megapixels: float,
    captions: bool = True,
    masked_by: MaskedBy = "off",
    concepts_are_used: bool = False,
    remedy: str = "Put 3 or more pictures there",
) -> Found:
    """All pictures directly in `folder`, each decoded once to prove that it can be. `masked_by`: `subject.masks`;
    `concepts_are_used`: whether sub-folders of subjects are looked at by the caller, and need no remark.

    Left out: what cannot be read, has too many pixels, or has a caption file or a mask that cannot be used. Warned
    about: duplicates, long or empty captions, animations, sub-folders with pictures, JPEGs that seem to end early.
    Raises DataError if there is no such folder, and with `remedy` if there is no usable picture in it.
    """
    listing = _list(folder)
    used = set(concepts.in_folder(folder)) if concepts_are_used else set()
    left_out, remarks = list(listing.strangers), [fault for fault in listing.folders if fault.path not in used]
    pictures: list[Picture] = []
    looks: list[Look] = []
    for path in listing.candidates:
        beside = listing.captions.get(path.stem) if captions else None
        drawn = listing.masks.get(path.stem) if masked_by != "off" else None
        blamed = path
        try:
            sha256, size, seen, noted = worker.inspect(path, max_megapixels)
            blamed = beside or path
            caption, caption_notes = (None, []) if beside is None else _caption(beside, path)
            blamed = drawn or path
            mask = None
            if drawn is not None:
                mask, mask_notes = masks.checked(drawn, path, size, max_megapixels)
                remarks += [Fault(drawn, note) for note in mask_notes]
            elif masked_by == "alpha" and worker.has_alpha(path, sha256):
                mask = masks.of_alpha(path, sha256)
        except Unusable as fault:
            left_out.append(Fault(blamed, str(fault)))
            continue
        pictures.append(Picture(path, sha256, *size, caption, mask))
        looks.append(seen)
        remarks += [Fault(path, note) for note in noted]
        remarks += [Fault(beside or path, note) for note in caption_notes]
    if not pictures and not used:
        raise DataError(_nothing(folder, left_out + listing.folders, remedy))
    if not pictures:  # but in sub-folders
        return Found((), tuple(left_out), tuple(remarks))
    remarks += _duplicates(pictures, looks)
    return Found(tuple(pictures), tuple(left_out), tuple(remarks), is_background_shared(looks))


def read(picture_path: Path, *, sha256: str | None = None) -> Image.Image:
    """The picture: RGB, upright, in sRGB, transparent parts on white, without metadata.

    16-bit values are scaled, CMYK and grey converted, of an animation the first frame is taken. A colour profile that
    cannot be used is ignored. Raises DataError if the file cannot be read or if its bytes do not have `sha256`; pixels
    are capped by Pillow alone (179 million), so pass pictures that `find` has seen.
    """
    try:
        return worker.decode(picture_path, sha256)
    except Unusable as fault:
        raise DataError(f"{shown(picture_path)} {fault}") from fault


def crop(image: Image.Image, window: Crop) -> npt.NDArray[np.uint8]:
    """The part of `image` that is trained on, uint8 `[H, W, 3]`, resized with an antialiasing filter (Lanczos).

    Equal to resizing the whole picture and cutting, but only what is kept is computed: a picture of 1 × 4000 pixels
    would otherwise be enlarged to hundreds of megapixels first.
    """
    assert image.size == (window.original_width_px, window.original_height_px), "a crop of another picture"
    size = (window.bucket.width_px, window.bucket.height_px)
    return np.array(image.resize(size, Image.Resampling.LANCZOS, box=window.box))


def to_pixels(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 `[H, W, 3]` to float32 `[3, H, W]`: 0 becomes -1, 255 becomes 1."""
    return np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32) / np.float32(127.5) - np.float32(1)


def shown(path: Path) -> str:
    """The file's name for a message: as it is, or quoted with escapes if it would garble the line."""
    return path.name if path.name.isprintable() else repr(path.name)


def _list(folder: Path) -> _Listing:
    """What lies in `folder`, hidden files and junk of file managers aside."""
    try:
        entries = sorted((Path(entry.path) for entry in os.scandir(folder)), key=lambda path: path.name)
    except FileNotFoundError:
        raise DataError(f"there is no folder {folder}; check its spelling, or copy your pictures there.") from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file; give the folder that holds the pictures.") from None
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); mend that first.") from error
    entries = [path for path in entries if not path.name.startswith(".") and path.name.lower() not in _JUNK]
    listing = _Listing()
    stems = {path.stem for path in entries if path.suffix.lower() in ENDINGS}
    written_otherwise = {_composed(stem): stem for stem in stems if folder / f"{stem}.txt" not in entries}
    spelled = {**{_composed(stem): stem for stem in stems}, **{stem: stem for stem in stems}}
    listing.masks, others = masks.in_folder(folder, spelled)
    listing.strangers += [Fault(path, OF_NO_PICTURE) for path in others]
    for path in entries:
        ending = path.suffix.lower()
        masked = masks.pictured(path, spelled)
        if os.path.isdir(path):  # Unlike Path.is_dir, False when the answer is refused.
            listing.folders += [] if path.name == masks.FOLDER and listing.masks else _sub_folder(path)
        elif masked is not None:
            if masked in listing.masks:
                listing.strangers.append(Fault(listing.masks[masked], "is a second mask of its picture; remove one."))
            listing.masks[masked] = path
        elif masks.is_named_mask(path):
            listing.strangers.append(Fault(path, OF_NO_PICTURE))
        elif ending in ENDINGS:
            listing.candidates.append(path)
        elif ending == ".txt" and path.stem in stems:
            listing.captions[path.stem] = path
        elif ending == ".txt" and _composed(path.stem) in written_otherwise:
            listing.captions[written_otherwise[_composed(path.stem)]] = path
        elif ending == ".txt":
            reason = "is the caption of no picture; give it the name of its picture with .txt as ending, or remove it."
            listing.strangers.append(Fault(path, reason))
        else:
            listing.strangers.append(
                Fault(path, f"is not a picture that is read ({TAKEN}); save it as PNG or remove it.")
            )
    return listing


def _composed(name: str) -> str:
    """The one spelling of `name` in Unicode: macOS writes é as two signs, other systems as one."""
    return unicodedata.normalize("NFC", name)


def _sub_folder(path: Path) -> list[Fault]:
    """A remark if pictures lie in a sub-folder, or if a folder is named like a picture."""
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError:
        names = []
    count = sum(Path(name).suffix.lower() in ENDINGS for name in names)
    if count == 1:
        return [Fault(path, "is a sub-folder with 1 picture, which is not used; move it up to use it.")]
    if count:
        return [Fault(path, f"is a sub-folder with {count} pictures, which are not used; move them up to use them.")]
    if path.suffix.lower() in ENDINGS:
        return [Fault(path, "is a folder with the name of a picture; rename or remove it.")]
    return []


def _nothing(folder: Path, faults: Sequence[Fault], remedy: str) -> str:
    seen = "it is empty" if not faults else "there is:\n" + "\n".join(f"  {fault}" for fault in faults[:5])
    more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"no usable picture in {folder}; {seen}{more}\n{remedy}: {TAKEN}."


def _caption(path: Path, picture_path: Path) -> tuple[str | None, list[str]]:
    """The caption on one line, None if it is blank, and remarks on it."""
    without = f"its picture {shown(picture_path)} is left out."
    try:
        words = file_bytes(path, MAX_CAPTION_BYTES).decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise Unusable(f"is not UTF-8 text (byte {error.start}), so {without} Save it as UTF-8.") from error
    except Unusable as fault:
        raise Unusable(f"{fault} Until then {without}") from fault
    if not words:
        return None, ["is an empty caption; the prompt is used instead."]
    notes = [f"has {len(words)} words; text encoders read about {MAX_CAPTION_WORDS} and ignore the rest."]
    return " ".join(words), notes if len(words) > MAX_CAPTION_WORDS else []


def _duplicates(pictures: Sequence[Picture], looks: Sequence[Look]) -> list[Fault]:
    """A remark on each picture that equals an earlier one, in its bytes or nearly in its look."""
    faults: list[Fault] = []
    first: dict[str, Path] = {}
    for picture, near in zip(pictures, alike(looks), strict=True):
        same = first.setdefault(picture.sha256, picture.path)
        if same != picture.path:
            faults.append(Fault(picture.path, f"is the same file as {shown(same)}, so it counts twice; remove one."))
        elif near is not None:
            other = shown(pictures[near].path)
            faults.append(Fault(picture.path, f"looks almost like {other}; if it is a copy, remove one."))
    return faults
