"""The main job on real sizes: SD 1.5 and SDXL with random weights, two steps at a small resolution, bf16 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bases import random_base
from lora_booth.adapter.files import storage
from lora_booth.config.config import Config
from lora_booth.verbs import train
from tests.support import tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("architecture", "family", "layers"), [("sd1", "sd1", 128), ("sdxl", "sdxl", 560)], ids=["sd15", "sdxl"]
)
def test_the_main_job_runs_end_to_end_on_a_full_size_base(
    architecture: str, family: str, layers: int, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", architecture)
    tiny.tiny_pictures(tmp_path / "pictures", 3, sizes=[(140, 140)])
    config = Config.model_validate(
        {
            "model": {"base": str(base), "precision": "bf16"},
            "subject": {"images": tmp_path / "pictures", "class_noun": "dog"},
            "data": {"resolution": 128},
            "prior": {"mode": "images", "num_images": 1, "sampler_steps": 1, "sampler": "ddim"},
            "train": {"steps": 2},
            "preview": {
                "prompts": ["a photo of {class}"],
                "images_per_prompt": 1,
                "sampler_steps": 1,
                "sampler": "ddim",
            },
            "run": {"folder": tmp_path / "run", "cache": tmp_path / "cache"},
        }
    )
    summary = train.train(config)
    for path in summary.files.values():
        weights = storage.read(Path(path))["unet"]
        assert len(weights) == layers
        assert max(float(low.up.abs().max()) for low in weights.values()) > 0
    assert summary.num_parameters == {"sd1": 3_188_736, "sdxl": 23_224_320}[family]
