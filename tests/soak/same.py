"""The same config gives the same bytes, and how a step is split into passes changes them by rounding alone."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_booth.config.config import Config
from tests.soak import crash
from tests.soak.bench import Bench, Result, materials
from tests.support import tiny

MAX_RELATIVE_DISTANCE = 1e-3
"""Of what two runs learnt, as a share of its norm. Sums in another order differ by 1e-6, and Adam divides."""


def same_result(count: int, folder: Path, seed: int = 0) -> Result:
    """One seed twice: equal bytes; batch against accumulation: equal up to rounding; another seed: another adapter."""
    rng, failures, furthest = random.Random(seed), [], 0.0
    bases = [materials(folder / name, make) for name, make in (("sdxl", tiny.tiny_sdxl), ("sd", tiny.tiny_sd))]
    for i in range(count):
        step: dict[str, Any] = {"images_per_step": rng.choice((2, 3)), "seed": rng.randrange(1 << 30)}
        bench = Bench(
            folder / str(i),
            bases[i % 2],
            train=step | {"batch_size": 8},
            adapter={"rank": rng.choice((2, 8)), "text_encoder": rng.random() < 0.5, "init": rng.choice(INITS)},
            objective={"loss": rng.choice(("mse", "huber"))},
            preview={"images_per_prompt": 0},
        )
        fault = bench.finish(bench.config("again"))
        split = bench.config("split", train={"batch_size": rng.choice((1, 2))})
        other = bench.config("other", train={"seed": step["seed"] + 1})
        codes = [crash.run(config).code for config in (split, other)]
        fault = fault or ("" if codes == [0, 0] else f"ended with {codes}")
        if not fault:
            near, far = (_distance(bench.straight, config) for config in (split, other))
            furthest = max(furthest, near)
            fault = "" if near < MAX_RELATIVE_DISTANCE < far / 10 else f"{near:.1e} when split, {far:.1e} by the seed"
        if fault:
            failures.append(f"{i} ({json.dumps(step)}): {fault}")
        shutil.rmtree(folder / str(i))
    return Result(count, tuple(failures), f"{furthest:.0e} of the adapter's norm between batch and accumulation")


INITS = ("default", "gaussian")


def _distance(one: Config, other: Config) -> float:
    """Norm of the difference of what two runs learnt, of B, which begins at 0, over the norm of the first's."""
    first, second = (_adapter(config) for config in (one, other))
    return float((first - second).norm() / first.norm())


def _adapter(config: Config) -> torch.Tensor:
    assert config.run.folder is not None
    newest = max((config.run.folder / "checkpoints").glob("step-*"))
    tensors = load_file(newest / "adapter.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_B" in name])
