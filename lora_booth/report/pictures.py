"""Pictures of a run as a page holds them: small, inside of it, cut out of the run's grids."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_booth.config.inputs import require_plain_file
from lora_booth.data import grid
from lora_booth.errors import DiskError
from lora_booth.evaluation.sheet import MAX_SIDE_PX, SHOWN_PROMPTS
from lora_booth.report.record import Record

CELL_PX, WIDE_PX = 320, 1480
"""Longest side of a single picture, and width of a sheet."""
MAX_SHEET_PX = 6000
"""Height of a sheet; 120 crops are less."""
MAX_STEPS = 10
"""Columns of the grid of steps: the first, the last, and some between."""
MAX_PROMPTS = 8
Row = Sequence[Image.Image]


@dataclass(frozen=True)
class Shown:
    """A picture in the page: a data URI, its size in pixels, and whether its pixels are to be seen as they are."""

    uri: str
    width_px: int
    height_px: int
    is_pixels: bool


@dataclass(frozen=True)
class Captioned:
    """A picture, what stands under it, and what it is, for those who do not see it."""

    picture: Shown
    caption: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of one prompt."""

    prompt: str
    cells: Sequence[Captioned]


def shown(picture: Image.Image, *, side_px: int = CELL_PX) -> Shown:
    """`picture` no larger than `side_px`, as WebP."""
    small = picture.convert("RGB")
    is_pixels = max(small.size) < grid.MIN_SIDE
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="WEBP", quality=82, method=2, lossless=is_pixels)
    uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return Shown(uri, *small.size, is_pixels)


def sheet(path: Path) -> Shown | None:
    """A whole sheet of the run, as wide as a page; None where it is missing or damaged."""
    picture = _opened(path)
    if picture is None:
        return None
    picture = picture.crop((0, 0, picture.width, min(picture.height, MAX_SHEET_PX)))
    scale = min(1.0, WIDE_PX / picture.width)
    return shown(picture, side_px=max(1, round(max(picture.size) * scale)))


def before_and_after(record: Record) -> list[Gallery]:
    """For each preview prompt a gallery of pairs, each of one seed: without the adapter, and with it."""
    prompts, count = _prompts(record), record.config.preview.images_per_prompt
    rows = _cut(record, "before_after.png", len(prompts), 2 * count)
    found = []
    for prompt, row in list(zip(prompts, rows, strict=False))[:MAX_PROMPTS]:
        cells = []
        for place, picture in enumerate(row):
            kind, seed = ("before", "after")[place % 2], record.config.preview.seed + place // 2
            words = "without" if kind == "before" else "with"
            cells.append(Captioned(shown(picture), kind, f"“{prompt}” {words} the adapter, seed {seed}"))
        found.append(Gallery(prompt, cells))
    return found


def first_pair(record: Record) -> Row:
    """The first preview prompt without and with the adapter, by its first seed; empty where it was not drawn."""
    rows = _cut(record, "before_after.png", len(_prompts(record)), 2 * record.config.preview.images_per_prompt)
    return rows[0][:2] if rows else []


def by_step(record: Record) -> list[Gallery]:
    """For each prompt the first seed's picture at steps of the run, beginning with the base: those that were drawn on
    the way, else those of the checkpoints that were compared in the end; empty where there are neither."""
    prompts, count = _prompts(record), record.config.preview.images_per_prompt
    steps = [step for path in (record.folder / "previews").glob("step-*.png") if (step := _step_of(path)) is not None]
    drawn: dict[str, list[Row]] = {}
    for step in _spread(sorted(steps)):
        rows = _cut(record, f"previews/step-{step:06d}.png", len(prompts), count, has_columns=False)
        if rows:
            drawn["the base" if step == 0 else f"step {step}"] = [row[:1] for row in rows]
    if not drawn:
        return _of_scores(record)
    ends = _cut(record, "before_after.png", len(prompts), 2 * count)
    if ends:
        drawn = {"the base": [row[:1] for row in ends]} | drawn
        drawn[f"exported: {exported(record)}"] = [row[1:2] for row in ends]
    return _galleries(prompts, drawn)


def real(record: Record) -> Image.Image | None:
    """A real picture of the subject, as the sheet of the evaluation shows it first."""
    rows = _score_rows(record)
    return rows[0][0] if rows and record.scores is not None and record.scores.real else None


def exported(record: Record) -> str:
    """Which checkpoint at which strength was exported, in words."""
    summary = record.summary
    step = record.steps_done if summary is None or summary.exported_step is None else summary.exported_step
    strength = 1.0 if summary is None else summary.exported_strength
    return f"step {step}" + (f" at strength {strength:g}" if strength != 1 else "")


def _of_scores(record: Record) -> list[Gallery]:
    """Steps and prompts of the evaluation's sheet, each step at the strength that was chosen."""
    found = record.scores
    rows = _score_rows(record)
    if found is None or not rows:
        return []
    first, templates = found.encoders[0], found.drawing["templates"]
    candidates = first.candidates
    strengths = sorted({one.strength for one in candidates})
    wanted = candidates[first.best].strength
    steps = list(dict.fromkeys(one.step for one in candidates))
    before = 1 if found.real else 0
    prompts = [str(text).replace("{token}", found.token) for text in templates][:SHOWN_PROMPTS]
    drawn: dict[str, list[Row]] = {"the base": [[row[before]] for row in rows[: len(prompts)]]}
    for step in sorted(steps):
        if any((one.step, one.strength) == (step, wanted) for one in candidates):
            start = steps.index(step) * len(prompts)
            column = before + 1 + strengths.index(wanted)
            name = (f"step {step}" if step else "the adapter") + (f" at strength {wanted:g}" if wanted != 1 else "")
            drawn[name] = [[row[column]] for row in rows[start : start + len(prompts)]]
    return _galleries(prompts, drawn)


def _score_rows(record: Record) -> list[Row]:
    """The evaluation's sheet, cut: rows of steps and prompts; empty where it cannot be."""
    found = record.scores
    if found is None or not isinstance(found.drawing.get("templates"), list):
        return []
    candidates = found.encoders[0].candidates
    steps, strengths = {one.step for one in candidates}, {one.strength for one in candidates}
    num_prompts = min(SHOWN_PROMPTS, len(found.drawing["templates"]))
    columns = (1 if found.real else 0) + 1 + len(strengths)
    return _cut(record, "scores.png", len(steps) * num_prompts, columns)


def _galleries(prompts: Sequence[str], drawn: dict[str, list[Row]]) -> list[Gallery]:
    found = []
    for place, prompt in list(enumerate(prompts))[:MAX_PROMPTS]:
        cells = [
            Captioned(shown(rows[place][0], side_px=CELL_PX * 2 // 3), name, f"“{prompt}”, {name}")
            for name, rows in drawn.items()
            if place < len(rows)
        ]
        found.append(Gallery(prompt, cells))
    return found


def _cut(record: Record, name: str, rows: int, columns: int, *, has_columns: bool = True) -> list[Row]:
    """The single pictures of a grid of the run; empty where it is missing, damaged, or another grid."""
    picture = _opened(record.folder / name) if rows and columns else None
    if picture is None:
        return []
    cells = grid.cut(picture, rows=rows, columns=columns, has_columns=has_columns)
    side = min(record.config.data.resolution or MAX_SIDE_PX, *(cells[0][0].size if cells else (MAX_SIDE_PX,)))
    return [[_as_drawn(cell, side) for cell in row] for row in cells]


def _as_drawn(cell: Image.Image, side_px: int) -> Image.Image:
    """`cell` without the whole factor by which a grid enlarges small pictures."""
    if side_px >= grid.MIN_SIDE or cell.width % side_px or cell.width != cell.height:
        return cell
    return cell.resize((side_px, side_px), Image.Resampling.NEAREST)


def _opened(path: Path) -> Image.Image | None:
    """A PNG of the run; None where it is missing or damaged."""
    try:
        with Image.open(require_plain_file(path, "", DiskError), formats=("PNG",)) as picture:
            return picture.convert("RGB")
    except (DiskError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _prompts(record: Record) -> list[str]:
    return [record.config.fill(prompt) for prompt in record.config.preview.prompts]


def _step_of(path: Path) -> int | None:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `MAX_STEPS` of `steps`, the first and the last among them, evenly."""
    if len(steps) <= MAX_STEPS:
        return list(steps)
    places = [round(number * (len(steps) - 1) / (MAX_STEPS - 1)) for number in range(MAX_STEPS)]
    return [steps[place] for place in places]
