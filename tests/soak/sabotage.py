"""Numbers that are not finite, memory that runs out and clocks that jump, put into the real run of a process."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lora_booth.config.config import Config
from lora_booth.errors import DeviceMemoryError, NumericError
from lora_booth.training import loop, session
from tests.soak import crash
from tests.soak.bench import STEPS, Bench, Result, lost_checkpoint
from tests.soak.crash import Fate

YEAR_SECONDS = 365 * 86_400
ADVICE = re.compile(
    r"ran out of memory; nothing that was saved is lost\. .*\n"
    r"  1\. train\.batch_size = \d+ \(saves \d+\.\d\d GiB of a step; same result"
)
VALUES = (float("nan"), float("inf"), float("-inf"))


def not_finite(count: int, folder: Path, seed: int = 0) -> Result:
    """NaN or infinity in latents, gradient, weights or optimizer at a step: told, never kept; then the same end."""
    bench, rng, failures = Bench(folder, preview={"images_per_prompt": 0}), random.Random(seed), []
    for i in range(count):
        config = bench.config(f"number-{i}")
        place, step, value = list(PLACES)[i % len(PLACES)], rng.randrange(STEPS), rng.choice(VALUES)
        outcome = crash.run(config, Fate(sabotage=partial(_poison, place, step, value, rng.random())))
        is_told = outcome.code == NumericError.exit_code and "not finite" in outcome.output
        fault = "" if is_told else f"ended with {outcome.code}: {outcome.output[-300:]}"
        fault = fault or _kept_harm(config) or lost_checkpoint(config, outcome.output) or bench.finish(config)
        if fault:
            failures.append(f"{value} in {place} at step {step + 1}: {fault}")
    return Result(count, tuple(failures), f"in {', '.join(PLACES)}")


def _kept_harm(config: Config) -> str:
    """A tensor of a checkpoint that is not finite, or a file handed over, "" when there is neither."""
    assert config.run.folder is not None
    for path in config.run.folder.glob("checkpoints/step-*/*.safetensors"):
        broken = [name for name, tensor in load_file(path).items() if not tensor.isfinite().all()]
        if broken:
            return f"{broken[0]} of {path.parent.name}/{path.name} is not finite"
    return ", ".join(f"{path.name} was handed over" for path in config.run.folder.glob("*.safetensors"))


def _in_latents(s: session.Session, value: float, at: float) -> None:
    for moments in s.prepared.latents.values():
        _put_(moments.mean, value, at)


def _in_gradient(s: session.Session, value: float, at: float) -> None:
    gradients = [gradient for flat in s.trained for _, gradient in flat.gradients()]
    _put_(gradients[int(at * len(gradients))], value, at)


def _in_weights(s: session.Session, value: float, at: float) -> None:
    _put_(s.parameters[int(at * len(s.parameters))].data, value, at)


def _in_optimizer(s: session.Session, value: float, at: float) -> None:
    states = [state["exp_avg_sq"] for state in s.optimizer.state.values()]
    if states:
        _put_(states[int(at * len(states))], value, at)
    else:  # before the first step there is none
        _in_weights(s, value, at)


def _put_(tensor: torch.Tensor, value: float, at: float) -> None:
    tensor.view(-1)[int(at * tensor.numel())] = value


PLACES: dict[str, tuple[str, Callable[[session.Session, float, float], None]]] = {
    "latents": ("_set_learning_rate_", _in_latents),
    "weights": ("_set_learning_rate_", _in_weights),
    "gradient": ("_reduce_and_clip_", _in_gradient),
    "optimizer": ("_reduce_and_clip_", _in_optimizer),
}
"""Which function of the loop, called once a step, it comes right before, and what puts it there."""


def _poison(place: str, step: int, value: float, at: float) -> None:
    """Put `value` into one number of `place` at `step`; `at`: which number, as a share of all."""
    name, put = PLACES[place]
    honest, calls = getattr(loop, name), 0

    def poisoned(s: session.Session, *words: Any) -> Any:
        nonlocal calls
        if calls == step:
            put(s, value, at)
        calls += 1
        return honest(s, *words)

    setattr(loop, name, poisoned)


def out_of_memory(count: int, folder: Path, seed: int = 0) -> Result:
    """Memory runs out at one of all operations of a run: told with what to change; then the same command to the end."""
    train = {"gradient_checkpointing": True}  # less to advise, which takes seconds each time
    bench = Bench(folder, train=train, memory={"pictures_at_once": 1})  # several are tried again in halves
    rng, failures = random.Random(seed), []
    listed = crash.run(bench.config("listed"), Fate(sabotage=partial(_run_out_of_memory, 0)))
    total = max(int(line.split()[1]) for line in listed.output.splitlines() if line.startswith("operation "))
    for i in range(count):
        config, number = bench.config(f"memory-{i}"), 1 + int((i + rng.random()) * total / count)
        outcome = crash.run(config, Fate(sabotage=partial(_run_out_of_memory, number)))
        is_told = outcome.code == DeviceMemoryError.exit_code and ADVICE.search(outcome.output)
        fault = "" if is_told else f"ended with {outcome.code}: {outcome.output[-1500:]}"
        fault = fault or lost_checkpoint(config, outcome.output) or bench.finish(config)
        if fault:
            failures.append(f"at operation {number} of {total}: {fault}")
    return Result(count, tuple(failures), f"of about {total:,} operations")


def _run_out_of_memory(number: int) -> None:
    OutOfMemory(number).__enter__()


ASK_FOR_NONE = (torch.ops.aten.set_.source_Storage, torch.ops.aten.view.dtype, torch.ops.aten.select.int)
"""Operations without memory of their own: how a weight file is read, where torch hides whatever is raised."""


class OutOfMemory(TorchDispatchMode):
    """Refuses the `number`-th operation as a full device does; with 0, tells now and then how many there were."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in ASK_FOR_NONE
        if self.count == self.number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if self.number == 0 and self.count % 500 == 0:
            print("operation", self.count)
        return func(*args, **(kwargs or {}))


CLOCKS: dict[str, tuple[Callable[[float], float], float]] = {
    "a year later": (lambda now: now + YEAR_SECONDS, YEAR_SECONDS),
    "a year earlier": (lambda now: now - YEAR_SECONDS, -YEAR_SECONDS),
    "frozen": (lambda now: 1_900_000_000.0, 0.0),
    "an hour later, as in spring": (lambda now: now + 3_600, 3_600),
    "an hour earlier, as in autumn": (lambda now: now - 3_600, -3_600),
    "at random": (lambda now: now + random.uniform(-YEAR_SECONDS, YEAR_SECONDS), 0.0),
}
"""What the clock of the second process shows instead of `now`, and by how much the first one's files seem younger."""


def clocks(count: int, folder: Path, seed: int = 0) -> Result:
    """The clock jumps by a year or an hour or stands still between kill and resume: the newest step, and no orphan."""
    bench, rng, failures = Bench(folder, train={"keep_last": 2}), random.Random(seed), []
    renames = [number for number, line in enumerate(bench.changes, 1) if line.startswith("change os.rename")]
    shown = 0
    for i in range(count):
        name, config = list(CLOCKS)[i % len(CLOCKS)], bench.config(f"clock-{i}")
        struck = Fate(event="change", number=rng.choice(renames), folder=folder / f"clock-{i}")
        outcome = crash.run(config, struck)
        fault = lost_checkpoint(config, outcome.output)
        _shift_files(folder / f"clock-{i}", -CLOCKS[name][1])
        again = crash.run(config, Fate(event="eta", sabotage=partial(_set_clock, name)))
        left = re.findall(r"^seconds left (.+)$", again.output, re.MULTILINE)
        shown += len(left)
        fault = fault or ("" if again.code == 0 else f"ended with {again.code}: {again.output[-300:]}")
        fault = fault or ("" if all(float(seconds) >= 0 for seconds in left) else f"time left: {left}")
        fault = fault or bench.finish(config)
        if fault:
            failures.append(f"{name}, killed at change {struck.number}: {fault}")
    return Result(count, tuple(failures), f"{shown} times left, none below 0")


def _shift_files(folder: Path, seconds: float) -> None:
    """Make every file below `folder` look `seconds` younger."""
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_atime + seconds, path.stat().st_mtime + seconds))


def _set_clock(name: str) -> None:
    honest, shown = time.time, CLOCKS[name][0]
    time.time = lambda: shown(honest())
