"""Fixtures shared by all tests: tiny bases on disk, built once, and no network for anybody."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from lora_booth.config.config import Config
from lora_booth.run import imports
from tests.support import tiny

imports.leave_out_("bitsandbytes")  # as the commands do: a second of every process
with imports.sparing():
    import diffusers  # noqa: F401  # looks for it once

CRASH_REPORTS = Path(tempfile.mkdtemp(prefix="lora-booth-reports-"))
os.environ["LORA_BOOTH_REPORTS"] = str(CRASH_REPORTS)
CACHE = tempfile.mkdtemp(prefix="lora-booth-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE  # of those who name none
for folder in (CRASH_REPORTS, CACHE):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


LONGEST = ("test_demo.py", "test_windows.py", "test_reliability.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that at the end no process works alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-exact comparisons need one order of summation; two test processes on two cores need no more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_crash() -> Iterator[None]:
    """A command that ends as nobody foresaw, in this process or another, fails its test and shows the report."""
    yield
    reports = crash_reports()
    assert not reports, reports[0]


def crash_reports() -> list[str]:
    """Takes the reports of commands that crashed; a test that expects some calls it."""
    reports = []
    for path in sorted(CRASH_REPORTS.iterdir()):
        reports.append(path.read_text(encoding="utf-8"))
        path.unlink()
    return reports


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name to a tiny base of it; "ends" is one of sd1 with its outermost blocks alone."""
    root = tmp_path_factory.mktemp("bases")
    makers = {"ends": tiny.tiny_ends, "sd1": tiny.tiny_sd, "sd2": tiny.tiny_sd2, "sdxl": tiny.tiny_sdxl}
    return {name: make(root / name) for name, make in makers.items()}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five small pictures of three aspects."""
    folder = tmp_path_factory.mktemp("pictures")
    tiny.tiny_pictures(folder, 5)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of the session, as users have it."""
    return tmp_path_factory.mktemp("cache")


MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(bases: dict[str, Path], pictures: Path, shared_cache: Path, tmp_path: Path) -> MakeConfig:
    """A config of a few fast steps on a tiny base; keyword arguments replace whole keys, e.g. train={"steps": 3}."""

    def make(family: str = "ends", name: str = "run", **sections: dict[str, Any]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "model": {"base": str(bases[family])},
            "subject": {"images": pictures, "class_noun": "dog"},
            "data": {"resolution": 32, "bucket_step": 16},
            "prior": {"mode": "images", "num_images": 3, "sampler_steps": 2, "sampler": "ddim"},
            "adapter": {"rank": 2},
            "optimizer": {"learning_rate": 1e-2},
            "train": {"steps": 4, "save_every_steps": 2},
            "preview": {"images_per_prompt": 0},
            "evaluate": {"choose": "last"},
            "run": {"folder": tmp_path / name, "cache": shared_cache, "report": False},  # a second of every run
        }
        for section, pairs in sections.items():
            values.setdefault(section, {}).update(pairs)
        return Config.model_validate(values)

    return make
