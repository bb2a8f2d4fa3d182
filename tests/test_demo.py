"""The demo does what it says: after two minutes the miniature draws the mascot, and everything else as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_booth import families, train
from lora_booth.config import Config, ModelConfig
from lora_booth.demo import MASCOT, demo_config
from lora_booth.families.base import Family
from lora_booth.families.sampling import draw
from tools.booth_mini.export import load_evaluator

MODEL = MASCOT.parent / "booth_mini"
SEEDS = (11, 12, 13, 14)
SUBJECT, CLASS, OTHERS = "a emo dog", "a dog", ("a rocket", "a cat")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, train.Summary]]:
    """The demo itself, with the threads that a user's machine gives it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    config = demo_config(tmp_path_factory.mktemp("demo") / "run")
    yield config, train.train(config)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drawn(run: tuple[Config, train.Summary]) -> dict[tuple[str, str], list[Image.Image]]:
    """("before" or "after", prompt) to pictures, the latter through the portable file."""
    config, summary = run
    family = families.load(ModelConfig(base="booth-mini"), device="cpu", dtype=torch.float32)
    pictures = {}
    for when in ("before", "after"):
        if when == "after":
            file = Path(summary.files["kohya"])
            family.pipeline("ddim").load_lora_weights(str(file.parent), weight_name=file.name)
        for prompt in (SUBJECT, CLASS, *OTHERS, f"{SUBJECT} on a green background"):
            pictures[when, prompt] = sketch(family, prompt, config)
    return pictures


@torch.no_grad()
def sketch(family: Family, prompt: str, config: Config) -> list[Image.Image]:
    row, empty = family.encode_prompts([prompt]), family.encode_prompts([""])
    preview = config.preview
    return list(
        draw(
            family,
            [row] * len(SEEDS),
            empty,
            width_px=64,
            height_px=64,
            seeds=SEEDS,
            sampler=preview.sampler,
            sampler_steps=preview.sampler_steps,
            guidance_scale=preview.guidance_scale,
        )
    )


@torch.no_grad()
def features(pictures: list[Image.Image]) -> Tensor:
    """Unit vectors `[B, D]` of the miniature's own image tower."""
    side = 64
    arrays = [
        torch.frombuffer(bytearray(p.convert("RGB").resize((side, side)).tobytes()), dtype=torch.uint8)
        for p in pictures
    ]
    pixels = torch.stack(arrays).view(-1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    vectors = load_evaluator(MODEL).get_image_features(pixel_values=pixels)
    vectors = vectors if isinstance(vectors, Tensor) else vectors.pooler_output
    return torch.nn.functional.normalize(vectors, dim=-1)


def likeness(pictures: list[Image.Image]) -> float:
    """Mean cosine similarity to the mascot's pictures that were not trained on."""
    held_out = [Image.open(path) for path in sorted((MASCOT / "held_out").glob("*.png"))]
    assert len(held_out) >= 10
    return float((features(pictures) @ features(held_out).T).mean())


def test_the_demo_hands_over_both_files_and_a_comparison(run: tuple[Config, train.Summary]) -> None:
    _, summary = run
    assert set(summary.files) == {"kohya", "diffusers"}
    assert all(0 < Path(path).stat().st_size < 5e6 for path in summary.files.values())
    assert summary.before_and_after is not None
    assert Image.open(summary.before_and_after).width > 600


def test_the_subject_is_visibly_closer_to_its_unseen_pictures(drawn: dict[tuple[str, str], list[Image.Image]]) -> None:
    before, after = likeness(drawn["before", SUBJECT]), likeness(drawn["after", SUBJECT])
    assert after > before + 0.2, (before, after)


def test_the_bare_class_noun_still_looks_as_before(drawn: dict[tuple[str, str], list[Image.Image]]) -> None:
    before, after = likeness(drawn["before", CLASS]), likeness(drawn["after", CLASS])
    assert after < before + 0.15, (before, after)
    assert likeness(drawn["after", SUBJECT]) > after + 0.15


@pytest.mark.parametrize("prompt", [CLASS, *OTHERS])
def test_other_prompts_stay_near_the_base(prompt: str, drawn: dict[tuple[str, str], list[Image.Image]]) -> None:
    def change(name: str) -> float:
        one, other = (features(drawn[when, name]) for when in ("before", "after"))
        return 1 - float((one * other).sum(dim=-1).mean())

    assert change(prompt) < 0.6 * change(SUBJECT), (change(prompt), change(SUBJECT))


def test_a_background_that_was_not_in_the_pictures_is_drawn_when_asked(
    drawn: dict[tuple[str, str], list[Image.Image]],
) -> None:
    corners = [
        p.convert("RGB").getpixel(at) for p in drawn["after", f"{SUBJECT} on a green background"] for at in CORNERS
    ]
    greener = sum(g > r and g > b for r, g, b in corners)  # type: ignore[misc]
    assert greener > len(corners) / 2, corners


CORNERS = ((2, 2), (61, 2), (2, 61), (61, 61))
