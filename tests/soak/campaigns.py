"""Every campaign with its two lengths: few tries for each change that is submitted, many before a release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.soak import (
    adapters,
    bases,
    changed,
    disks,
    hostile,
    kills,
    names,
    owners,
    pipes,
    run_files,
    sabotage,
    same,
    users,
    words,
)
from tests.soak.bench import Result


@dataclass(frozen=True)
class Campaign:
    """`run`: tries, folder and seed to what was found. `needs_root`: it mounts a small disk, or is other users."""

    run: Callable[[int, Path, int], Result]
    few: int
    many: int
    needs_root: bool = False


CAMPAIGNS = {
    "kills_at_random": Campaign(kills.kills_at_random, 4, 100),
    "kills_at_changes": Campaign(kills.kills_at_changes, 9, 321),
    "kills_in_phases": Campaign(kills.kills_in_phases, 8, 150),
    "signals": Campaign(kills.signals, 6, 50),
    "full_disks": Campaign(disks.full_disks, 6, 200, needs_root=True),
    "refusals": Campaign(disks.refusals, 7, 140),
    "shared_folders": Campaign(owners.shared_folders, 5, 50),
    "several_users": Campaign(users.several_users, 2, 60, needs_root=True),
    "cleared_caches": Campaign(users.cleared_caches, 2, 60),
    "names": Campaign(names.names, 8, 200),
    "not_finite": Campaign(sabotage.not_finite, 6, 100),
    "out_of_memory": Campaign(sabotage.out_of_memory, 2, 20),
    "clocks": Campaign(sabotage.clocks, 4, 24),
    "damaged_checkpoints": Campaign(kills.damaged_checkpoints, 200, 5_000),
    "same_result": Campaign(same.same_result, 1, 10),
    "resume_matrix": Campaign(kills.resume_matrix, 4, 280),
    "changed_inputs": Campaign(changed.changed_inputs, 6, 300),
    "lost_processes": Campaign(kills.lost_processes, 2, 25),
    "leaks": Campaign(kills.leaks, 200, 20_000),
    "adapters": Campaign(adapters.adapters, 150, 100_000),
    "configs": Campaign(hostile.configs, 2_000, 50_000),
    "pictures": Campaign(hostile.pictures, 500, 20_000),
    "bases": Campaign(bases.bases, 40, 4_000),
    "words": Campaign(words.words, 60, 20_000),
    "pipes": Campaign(pipes.pipes, 16, 1_500),
    "run_files": Campaign(run_files.run_files, 12, 1_000),
}
