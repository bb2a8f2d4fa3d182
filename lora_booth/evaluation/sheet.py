"""The picture of an evaluation: checkpoints at their strengths, with scores under each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from lora_booth.data.grid import labelled_grid
from lora_booth.evaluation.intervals import Interval
from lora_booth.evaluation.scores import SHORT, ByEncoder, Scored

SHOWN_PROMPTS = 3
"""Of the subject's prompts: the others are only measured."""
MAX_SIDE_PX = 256
UNDER = (("subject_fidelity", "share"), ("leak", "drift"))
"""The metrics on each line under a picture."""

Cell = tuple[Image.Image, str]


def sheet(
    title: str,
    prompts: Sequence[str],
    real: Sequence[Image.Image],
    base: Sequence[Image.Image],
    candidates: Sequence[tuple[Scored, Sequence[Image.Image]]],
    found: ByEncoder,
) -> Image.Image:
    """A row for each checkpoint and prompt: a real picture, the base's, and one for each strength.

    `base`, and the pictures of each of `candidates`, are one for each of `prompts`; `real` may be empty. Scores are
    those of `found`, over all prompts, and so the same in each row of a checkpoint. What was not drawn stays white.
    """
    side = min(MAX_SIDE_PX, *base[0].size)
    ceiling = "" if found.ceiling is None else f"to each other {found.ceiling.mean:z.3f}"
    strengths = sorted({scored.strength for scored, _ in candidates})
    rows: list[tuple[str, list[Cell]]] = []
    for step in dict.fromkeys(scored.step for scored, _ in candidates):
        drawn = {scored.strength: (scored, pictures) for scored, pictures in candidates if scored.step == step}
        for number, prompt in enumerate(prompts):
            cells = [(_fitted(real[number % len(real)], side), ceiling)] if real else []
            cells.append((_fitted(base[number], side), _caption(found.base)))
            for strength in strengths:
                scored, pictures = drawn.get(strength, (None, ()))
                cells.append(
                    (Image.new("RGB", (side, side), "white"), "")
                    if scored is None
                    else (_fitted(pictures[number], side), _caption(scored.metrics))
                )
            rows.append((f"step {step}: {prompt}" if step else prompt, cells))
    return labelled_grid(
        [(label, [picture for picture, _ in cells]) for label, cells in rows],
        columns=[*(["real"] if real else []), "base", *(f"strength {strength:g}" for strength in strengths)],
        title=f"{title}; best: {found.candidates[found.best].told}",
        captions=[[caption for _, caption in cells] for _, cells in rows],
    )


def _fitted(picture: Image.Image, side_px: int) -> Image.Image:
    """`picture` whole, on a white square."""
    if picture.size == (side_px, side_px):
        return picture
    small, square = picture.convert("RGB"), Image.new("RGB", (side_px, side_px), "white")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    square.paste(small, ((side_px - small.width) // 2, (side_px - small.height) // 2))
    return square


def _caption(metrics: Mapping[str, Interval]) -> str:
    lines = ["  ".join(f"{SHORT[m]} {metrics[m].mean:z.3f}" for m in line if m in metrics) for line in UNDER]
    return "\n".join(lines)
