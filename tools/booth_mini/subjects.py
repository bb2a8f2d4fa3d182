"""The held-out subjects as folders of pictures on varied backgrounds, as photographs of one thing would be.

OUT/subjects/<name>/instance/*.png (5, to train on, with captions), held_out/*.png (5 to 7, to judge by) and
subject.json. None of their icons enters training (names.HELD_OUT); red and green backgrounds occur only in the judging
pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.booth_mini.compose import COLOURS, Pixels, article, paste
from tools.booth_mini.names import IconName

SUBJECT_PX = 128
TRAIN_COLOURS = ("white", "blue", "yellow", "pink", "gray", "orange")
JUDGE_COLOURS = ("white", "red", "green", "purple", "black", "teal")


@dataclass(frozen=True)
class Subject:
    """One held-out thing: its folder's name and the class noun a base model knows it by."""

    name: str
    class_noun: str
    is_face: bool = False


SUBJECTS = (
    Subject("tabby", "cat face"),
    Subject("noto_monkey", "monkey face"),
    Subject("fx_monkey", "monkey face"),
    Subject("moon_face", "full moon face", is_face=True),
    Subject("mailbox", "mailbox"),
    Subject("police_car", "car"),
)


def write_subjects(out: Path, names: list[IconName], masters: Pixels) -> None:
    """Draws every subject's pictures from the held-out icons of `names`, [N, 128, 128, 4] in `masters`."""
    for number, subject in enumerate(SUBJECTS):
        icons = [index for index, name in enumerate(names) if name.subject == subject.name]
        if not icons:
            raise ValueError(f"no icon is held out for {subject.name}; names.HELD_OUT matches no slug of its set.")
        rng = np.random.default_rng([77, number])
        order = [int(icon) for icon in rng.permutation(icons)]
        train_icons, judge_icons = (order[:5], order[5:]) if len(order) >= 9 else (order, order)
        folder = out / "subjects" / subject.name
        train = _write_pictures(folder / "instance", train_icons, masters, rng, TRAIN_COLOURS, count=5)
        _write_captions(folder / "instance", TRAIN_COLOURS)
        count = max(5, min(7, len(judge_icons)))
        judge = _write_pictures(folder / "held_out", judge_icons, masters, rng, JUDGE_COLOURS, count=count)
        record = {
            "class_noun": subject.class_noun,
            "set": names[icons[0]].set_name,
            "instance": train,
            "held_out": judge,
            "held_out_drawings_are_new": train_icons != judge_icons,
        }
        (folder / "subject.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(SUBJECTS)} subjects in {out / 'subjects'}", flush=True)


def _write_pictures(
    folder: Path,
    icons: list[int],
    masters: Pixels,
    rng: np.random.Generator,
    colours: tuple[str, ...],
    *,
    count: int,
) -> list[str]:
    """Writes `count` pictures, going round the icons and the colours; few drawings are varied by tilt and size."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(count):
        colour = colours[index % len(colours)]
        canvas = Image.new("RGB", (SUBJECT_PX, SUBJECT_PX), COLOURS[colour])
        icon = Image.fromarray(masters[icons[index % len(icons)]], "RGBA")
        is_repeat = index >= len(icons)
        icon = icon.rotate(rng.uniform(-14, 14) if is_repeat else 0.0, Image.Resampling.BICUBIC)
        if is_repeat and rng.random() < 0.5:
            icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        size = rng.uniform(0.68, 0.85) if is_repeat else rng.uniform(0.8, 0.95)
        paste(canvas, icon, size, (rng.uniform(0.46, 0.54), rng.uniform(0.46, 0.54)))
        files.append(f"{index:02d}_on_{colour}.png")
        canvas.save(folder / files[-1])
    return files


def _write_captions(folder: Path, colours: tuple[str, ...]) -> None:
    """Beside every picture in `folder`: a caption that names the background, as the mascot's pictures have it."""
    for picture in sorted(folder.glob("*.png")):
        colour = colours[int(picture.name[:2]) % len(colours)]
        picture.with_suffix(".txt").write_text(f"a {{token}} {{class}} on {article(colour)} background\n")
