"""Kill it at any moment, run the same command, get the same bytes; and hostile input of every kind.

The campaigns of tests/soak with few tries each; `make soak` runs them long and writes docs/reliability.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak import adapters, hostile, kills
from tests.soak.bench import Result

SEED = int(os.environ.get("LORA_BOOTH_SEED", "0"))
FEW: dict[str, tuple[Callable[[int, Path, int], Result], int]] = {
    "kills at random": (kills.kills_at_random, 10),
    "kills at changes": (kills.kills_at_changes, 10),
    "signals": (kills.signals, 4),
    "damaged checkpoints": (kills.damaged_checkpoints, 200),
    "resume matrix": (kills.resume_matrix, 6),
    "lost processes": (kills.lost_processes, 3),
    "leaks": (kills.leaks, 200),
    "adapters": (adapters.adapters, 300),
    "configs": (hostile.configs, 2000),
    "pictures": (hostile.pictures, 500),
    "bases": (hostile.bases, 40),
}


@pytest.mark.parametrize("name", FEW)
def test_nothing_fails(name: str, tmp_path: Path) -> None:
    campaign, count = FEW[name]
    result = campaign(count, tmp_path, SEED)
    assert result.failures == ()
    assert result.tries >= count


@pytest.mark.skipif(not kills.can_mount(), reason="only root may mount a small disk")
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(tmp_path: Path) -> None:
    assert kills.full_disks(5, tmp_path, SEED).failures == ()
