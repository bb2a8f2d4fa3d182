"""booth-mini in SDXL's shape: the same pictures, so that the SDXL family is tried on a model that knows something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from benchmarks.likeness import CLASS, SUBJECT, change, draw_both, likeness
from lora_booth.cli.demo import MASCOT
from lora_booth.config import presets, toml
from lora_booth.verbs import train
from tools.booth_mini.sdxl import write_sdxl

MODEL = MASCOT.parent / "booth_mini"


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "booth_mini_xl"
    write_sdxl(MODEL, folder)
    return folder


def test_in_sdxls_shape_it_draws_the_same_pictures(xl: Path) -> None:
    pipes = StableDiffusionPipeline.from_pretrained(MODEL), StableDiffusionXLPipeline.from_pretrained(xl)
    pictures = [
        pipe(
            "a dog on a red background",
            num_inference_steps=6,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        for pipe in pipes
    ]
    assert pictures[0].std() > 0.1
    assert (pictures[0] - pictures[1]).abs().max() < 2e-3  # EPSILON is 6e-5, and there are twelve passes


def test_both_encoders_of_sdxls_shape_are_read(xl: Path) -> None:
    other = StableDiffusionXLPipeline.from_pretrained(xl)
    weights = [p for name, p in other.unet.named_parameters() if name.endswith("attn2.to_k.weight")]
    assert len(weights) > 4
    for weight in weights:
        first, second = weight.chunk(2, dim=1)
        assert first.abs().sum() > 0 and torch.equal(first, second)


@pytest.mark.slow
def test_the_sdxl_family_learns_the_mascot_on_it(xl: Path, tmp_path: Path) -> None:
    overrides = [
        f"model.base={xl}",
        f"subject.images={MASCOT / 'instance'}",
        f"run.folder={tmp_path / 'run'}",
        f"run.cache={tmp_path / 'cache'}",
        'export.formats=["diffusers"]',
    ]
    config = toml.load(presets.MINIATURE, overrides)
    summary = train.train(config)
    drawn = draw_both(Path(summary.files["diffusers"]), config.preview, base=str(xl))
    before, after = (likeness(drawn[when, SUBJECT]) for when in ("before", "after"))
    assert after > before + 0.2, (before, after)
    assert change(drawn, CLASS) < 0.6 * change(drawn, SUBJECT)
