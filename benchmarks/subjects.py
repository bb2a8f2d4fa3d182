"""The demo's settings on every held-out subject of the miniature: is each learnt, and is everything else kept?

    python -m tools.booth_mini.data --out build/booth_mini     # draws the subjects' pictures; needs npm
    python -m benchmarks.subjects --data build/booth_mini --out build/subjects

Trains one adapter for each subject with configs/demo.toml, nothing changed but pictures and class noun, and writes
table.json and sheet.png into --out. The same command again continues.

Likeness is the mean cosine, by the miniature's image tower, between each unseen picture on a plain colour and the
subject drawn on a background of that colour. Backgrounds weigh more in these features than subjects do: so both are
taken relative to the mean of many icons on that colour, which no subject is among. A change is 1 - cosine of the same
features before and after.

A subject counts as learnt when its likeness rises by 0.15 at least and ends 0.1 above that of the bare class noun on
the same backgrounds, that rises by less than 0.1, and no other prompt changes by more than 0.6 of what the subject's
do. The rule is strict where the base draws something like the subject already; sheet.png is there to be looked at.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.likeness import SEEDS, Drawn, draw_both, features
from lora_booth.cli.console import PlainReport
from lora_booth.cli.demo import MASCOT
from lora_booth.config import presets, toml
from lora_booth.data.grid import labelled_grid
from lora_booth.run import disk
from lora_booth.verbs import train
from tools.booth_mini.compose import COLOURS, article, paste
from tools.booth_mini.data import load_icons
from tools.booth_mini.subjects import SUBJECT_PX

OTHERS = ("a dog", "a cat", "a rocket")
NUM_ICONS = 150
JUDGED = ("white", "red", "green", "black")
"""Backgrounds of unseen pictures that are judged; none but white is among those trained on."""


@dataclass(frozen=True)
class Row:
    """Figures of one subject; likeness in [-1, 1], changes in [0, 2]."""

    subject: str
    class_noun: str
    likeness_before: float
    likeness_after: float
    class_likeness_before: float
    class_likeness_after: float
    subject_change: float
    largest_other_change: float
    seconds: float

    @property
    def is_learnt(self) -> bool:
        """The rules above."""
        return (
            self.likeness_after > self.likeness_before + 0.15
            and self.likeness_after > self.class_likeness_after + 0.1
            and self.class_likeness_after < self.class_likeness_before + 0.1
            and self.largest_other_change < 0.6 * self.subject_change
        )


def mean_features(data: Path) -> dict[str, Tensor]:
    """Colour to the mean features `[D]` of `NUM_ICONS` icons on it; the held-out ones are not in the data's icons."""
    names, masters = load_icons(data)
    known = [i for i, name in enumerate(names) if not name.subject]
    chosen = np.random.default_rng(0).choice(known, NUM_ICONS, replace=False)
    means = {}
    for colour in JUDGED:
        pictures = [Image.new("RGB", (SUBJECT_PX, SUBJECT_PX), COLOURS[colour]) for _ in chosen]
        for picture, i in zip(pictures, chosen, strict=True):
            paste(picture, Image.fromarray(masters[i], "RGBA"), 0.85, (0.5, 0.5))
        means[colour] = features(pictures).mean(dim=0)
    return means


def judge(folder: Path, class_noun: str, out: Path, means: Mapping[str, Tensor]) -> tuple[Row, list[Image.Image]]:
    """Train on `folder`/instance, judge by `folder`/held_out; the figures, and a row of the sheet."""
    overrides = [
        f"subject.images={folder / 'instance'}",
        f"subject.class_noun={class_noun}",
        f"run.folder={out / folder.name}",
        f"run.cache={out / 'cache'}",
    ]
    config = toml.load(presets.MINIATURE, overrides)
    summary = train.train(config, report=PlainReport())
    subject, plain = f"a {config.subject.token} {class_noun}", article(class_noun)
    others = [prompt for prompt in OTHERS if prompt.removeprefix("a ") not in class_noun]
    unseen = {path: match[1] for path in sorted((folder / "held_out").glob("*.png"))
              if (match := re.search(r"_on_([a-z]+)$", path.stem)) and match[1] in JUDGED}  # fmt: skip
    assert len(unseen) >= len(JUDGED), f"{folder} has pictures on {sorted(set(unseen.values()))} only"
    in_front = {(who, colour): f"{who} on a {colour} background" for who in (subject, plain) for colour in JUDGED}
    prompts = (subject, plain, *others, *in_front.values())
    drawn = draw_both(Path(summary.files["kohya"]), config.preview, prompts, seeds=SEEDS[:2])

    def relative(pictures: list[Image.Image], colour: str) -> Tensor:
        return normalize(features(pictures) - means[colour], dim=-1)

    def mean_likeness(who: str, when: str) -> float:
        values = [
            relative(drawn[when, in_front[who, colour]], colour) @ relative([Image.open(path)], colour).T
            for path, colour in unseen.items()
        ]
        return round(float(torch.cat(values).mean()), 3)

    def change(prompt: str, colour: str = "white") -> float:
        before, after = (relative(drawn[when, prompt], colour) for when in ("before", "after"))
        return 1 - float((before * after).sum(dim=-1).mean())

    on_colours = [change(in_front[subject, colour], colour) for colour in JUDGED]
    row = Row(
        subject=folder.name,
        class_noun=class_noun,
        likeness_before=mean_likeness(subject, "before"),
        likeness_after=mean_likeness(subject, "after"),
        class_likeness_before=mean_likeness(plain, "before"),
        class_likeness_after=mean_likeness(plain, "after"),
        subject_change=round(sum(on_colours) / len(on_colours), 3),
        largest_other_change=round(max(change(prompt) for prompt in (*others, plain)), 3),
        seconds=round(summary.seconds),
    )
    return row, _pictures(list(unseen), drawn, subject, in_front[subject, "red"], plain)


def _pictures(unseen: list[Path], drawn: Drawn, subject: str, in_context: str, plain: str) -> list[Image.Image]:
    shown = [Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for path in unseen[:2]]
    for key in (("before", subject), ("after", subject), ("after", in_context)):
        shown += drawn[key][:2]
    return [*shown, drawn["before", plain][0], drawn["after", plain][0]]


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--out", type=Path, default=Path("build/subjects"))
    parser.add_argument("--only", nargs="*", help="names of subjects")
    arguments = parser.parse_args()
    folders = {MASCOT: "dog"}
    for record in sorted((arguments.data / "subjects").glob("*/subject.json")):
        folders[record.parent] = json.loads(record.read_text(encoding="utf-8"))["class_noun"]
    assert len(folders) >= 7, f"only {len(folders)} subjects; run tools.booth_mini.data first"
    chosen = {folder: noun for folder, noun in folders.items() if not arguments.only or folder.name in arguments.only}
    means = mean_features(arguments.data)
    judged = [judge(folder, noun, arguments.out, means) for folder, noun in chosen.items()]
    rows = [row for row, _ in judged]
    table = [asdict(row) | {"is_learnt": row.is_learnt} for row in rows]
    (arguments.out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    columns = ("unseen", "unseen", "before", "before", "after", "after", "on red", "on red", "class before", "after")
    sheet = [(f"{row.subject}: a emo {row.class_noun}", pictures) for row, pictures in judged]
    grid = labelled_grid(sheet, columns=columns, title="The demo's settings on every held-out subject")
    disk.write_png(arguments.out / "sheet.png", grid)
    for row in rows:
        print(
            f"{row.subject:<12} likeness {row.likeness_before:+.3f} -> {row.likeness_after:+.3f}  class "
            f"{row.class_likeness_before:+.3f} -> {row.class_likeness_after:+.3f}  change {row.subject_change:.3f}, "
            f"others at most {row.largest_other_change:.3f}  {'learnt' if row.is_learnt else 'NOT learnt'}"
        )
    print(f"{sum(row.is_learnt for row in rows)} of {len(rows)} learnt")


if __name__ == "__main__":
    main()
