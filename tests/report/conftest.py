"""One finished run of a tiny base with everything a report shows, made once, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_booth.config.config import Config
from lora_booth.training import watching
from lora_booth.verbs import train

SCRIPT = '<script>alert("x")</script> & {class}'
STRANGE = "<img src=x onerror=alert(1)>.txt"
"""Words of strangers: in a prompt, and as the name of a file among the pictures."""
PROMPTS = ("a {token} {class}", SCRIPT)
STEPS = 4


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], pictures: Path, shared_cache: Path) -> Path:
    """Its folder."""
    home = tmp_path_factory.mktemp("reported")
    mine = home / "my_pictures"
    shutil.copytree(pictures, mine)
    (mine / STRANGE).write_text("a caption of no picture")
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(bases["ends"])},
        "subject": {"images": mine, "class_noun": "dog"},
        "data": {"resolution": 32, "bucket_step": 16},
        "prior": {"mode": "images", "num_images": 3, "sampler_steps": 2, "sampler": "ddim"},
        "adapter": {"rank": 2},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": STEPS, "save_every_steps": 1, "keep_last": 1},
        "preview": {
            "images_per_prompt": 2,
            "prompts": PROMPTS,
            "every_steps": 2,
            "sampler": "ddim",
            "sampler_steps": 2,
            "guidance_scale": 1.0,
        },
        "evaluate": {"choose": "best", "encoder": "miniature", "max_share": 100.0},
        "run": {"folder": home / "run", "cache": shared_cache},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "MAX_SHARE", 100.0)  # so short a run would not measure drift
        train.train(Config.model_validate(values))
    return home / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes copies of the run, to be damaged; those of `without` are left out."""

    def copy(name: str = "run", without: tuple[str, ...] = ()) -> Path:
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns(*without) if without else None)
        return tmp_path / name

    return copy
