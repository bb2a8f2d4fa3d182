"""Whether recording steps as CUDA graphs pays, and compiling blocks, by a trial before a run.

Compiling *pays* when the steps that are left save more time than it takes. What a trial measured is kept beside the
caches, so that a later run of the same shape on the same machine knows beforehand. Recording takes no longer than a
step, so it is simply tried.

The trial compares seconds and gradients of real micro-steps, so a compiler that fails, errs or slows things down
costs a minute and no run, and numbers do not change in the middle of one. On a CPU nothing is tried: runs are the
same there bit for bit, and compiled blocks saved nothing of a step on 35 M parameters. No gain was measured on a card
yet.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_booth.config import inputs
from lora_booth.errors import DiskError
from lora_booth.models import devices
from lora_booth.models.families.components import has_compiler
from lora_booth.run import disk
from lora_booth.run.cache_folder import TRIALS, folder_of
from lora_booth.training import graphs, loop, session
from lora_booth.training.graphs import Graphs
from lora_booth.training.loop import MicroStep, Run
from lora_booth.training.order import Row
from lora_booth.training.session import Session

STEPS_LOOKED_AT = 50
"""From which a micro-step of each shape is taken."""
MIN_STEPS = 40
"""For which recording is tried; the trial takes as long as ten."""
ROUNDS = 3
ASSUMED_SAVING, ASSUMED_S = 0.2, 60.0
"""Share of a step, and seconds of compiling, where no trial was made yet: assumed, not measured."""
MAX_DIFFERENCE = 0.1
"""Between the gradients, relative to their norm. bf16 alone makes about 0.02."""
LOSS_SCALE = 1024.0
"""Keeps fp16 gradients from vanishing; the run's own scale begins higher, and finds by overflowing where it must be."""
MAX_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Trial:
    """Seconds of a step as it is, of one compiled, and of compiling."""

    eager_s: float
    compiled_s: float
    compiling_s: float

    @property
    def steps_to_pay(self) -> float:
        """Steps after which compiling has saved what it took; infinite where it saves nothing."""
        saved_s = self.eager_s - self.compiled_s
        return self.compiling_s / saved_s if saved_s > 0 else math.inf


@contextmanager
def where_it_pays(s: Session, start: int) -> Iterator[Run | None]:
    """Gives how micro-steps are run from step `start` on: as CUDA graphs, or None for one operation after the other.
    Inside, the denoiser's blocks are compiled if train.compile is "trial" and that pays.

    Only where the device can: on a CPU a run gives the same numbers bit for bit each time. Not with dropout, whose
    compiled form draws other numbers.
    """
    is_recorded = _records(s, start)
    stance = "default"
    if _is_open(s):
        stance = "default" if pays(s, start, is_recorded=is_recorded) else "force_eager"
    with torch.compiler.set_stance(stance):
        yield Graphs(s) if is_recorded else None


def _records(s: Session, start: int) -> bool:
    """Whether steps are recorded: where train.compile is "graph", or a trial finds that it saves time and keeps the
    gradient. What stands against "graph" is told."""
    why_not = graphs.why_not(s)
    if s.config.train.compile == "graph":
        if why_not is not None:
            s.report.warn(f'train.compile is "graph", but {why_not}; the run goes on without.')
        return why_not is None
    if s.config.train.compile != "trial" or why_not is not None or s.config.train.steps - start < MIN_STEPS:
        return False
    session.set_training_(s, True)
    passes, _ = _passes(s, start)
    plain, recorded = _run_of(s), Graphs(s, _scaled)
    _round(s, passes, plain)  # kernels are loaded
    eager_s, expected = _best_round(s, passes, plain)
    _round(s, passes, recorded)  # the first of a shape is no graph yet
    recorded_s, found = _best_round(s, passes, recorded)
    is_same = float((found - expected).norm() / expected.norm()) <= MAX_DIFFERENCE
    is_faster = _says_main(s, recorded.count == len(passes) and is_same and recorded_s < eager_s)
    told = f"recorded as a graph a step takes {recorded_s / eager_s:.0%} of its time without"
    s.report.event("recorded", told if is_faster else f"{told}; the run goes on without", is_faster=is_faster)
    return is_faster


def _is_open(s: Session) -> bool:
    can_compile = "compiling" not in devices.lacks(s.accelerator.device) and has_compiler()
    return can_compile and s.config.train.compile == "trial" and not s.config.adapter.dropout


def pays(s: Session, start: int, *, is_recorded: bool = False) -> bool:
    """Try, unless an earlier trial says that too few steps are left; whether the blocks, compiled now, are faster.
    `is_recorded`: steps are, compiled or not.

    What goes wrong meanwhile is told as a warning, and is a no.
    """
    train = s.config.train
    left, passes, scale = train.steps - start, *_passes(s, start)
    path, key = folder_of(s.config) / TRIALS, _key(s, passes) + (", recorded" if is_recorded else "")
    known = _known(path)
    is_open = left >= 1 and not (key in known and known[key].steps_to_pay >= left)
    if not _says_main(s, is_open):
        return False
    session.set_training_(s, True)
    run = _run_of(s, is_recorded=is_recorded)
    _round(s, passes, run)  # kernels are loaded
    eager_s, expected = _best_round(s, passes, run)
    guess = Trial(eager_s * scale, eager_s * scale * (1 - ASSUMED_SAVING), ASSUMED_S)
    if not _says_main(s, known.get(key, guess).steps_to_pay < left):
        return False
    s.report.event("compiling", "compiling the denoiser's blocks, once, for a minute or so")
    has_failed = False
    try:
        run = _run_of(s, is_recorded=is_recorded)
        compiling_s, compiled_s = _compile(s, passes, expected, run)
    except Exception as error:  # of a compiler, on code that it has never seen: anything may come
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:MAX_REASON_CHARACTERS]
        s.report.warn(f"compiling failed ({reason}); the run goes on without. Delete {path} to have it tried again.")
        compiling_s, compiled_s, has_failed = 0.0, eager_s, True
        _forget_gradients_(s)
    trial = Trial(eager_s * scale, compiled_s * scale, compiling_s)
    if s.accelerator.is_main_process:
        try:
            _keep(path, known | {key: trial})
        except DiskError as error:  # of another user, say: it is measured again next time, and no run ends for it
            s.report.warn(f"what the trial has measured is not kept: {error}")
    if compiling_s:
        s.report.event("compiled", _told(trial, left), **asdict(trial))
    is_faster = _says_main(s, trial.compiled_s < trial.eager_s)
    return is_faster and not _count(s, has_failed)


def _says_main(s: Session, value: bool) -> bool:
    """What the main process says: processes that decide by their own clocks and files would compute different sums."""
    return bool(_count(s, value and s.accelerator.is_main_process))


def _count(s: Session, value: bool) -> int:
    """Of how many processes `value` is true."""
    if s.accelerator.num_processes == 1:
        return int(value)
    counted = s.accelerator.reduce(torch.tensor([float(value)], device=s.accelerator.device), "sum")
    return round(float(counted[0]))


def _compile(s: Session, passes: Sequence[MicroStep], expected: Tensor, run: Run) -> tuple[float, float]:
    """Seconds of compiling, and of a round from then on. Raises whatever a compiler does, and RuntimeError when the
    gradient is not what is `expected`."""
    began = time.perf_counter()
    s.family.compile_denoiser_()
    _round(s, passes, run)
    compiling_s = time.perf_counter() - began
    compiled_s, found = _best_round(s, passes, run)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"it changes the gradient by {difference:.0%}")
    return compiling_s, compiled_s


def _told(trial: Trial, left: int) -> str:
    seconds = f"{trial.compiled_s:.3g} s instead of {trial.eager_s:.3g} s"
    if trial.compiled_s >= trial.eager_s:
        return f"compiled, a step would take {seconds}; the run goes on without"
    return (
        f"compiled in {trial.compiling_s:.0f} s: a step takes {seconds}, which pays after {trial.steps_to_pay:.0f} of "
        f"{left} steps"
    )


def _passes(s: Session, start: int) -> tuple[list[MicroStep], float]:
    """A micro-step of each shape that comes soon, and how many times as long as all of them together a step takes."""
    train, count = s.config.train, 0
    found: dict[object, tuple[Sequence[Row], int]] = {}
    steps = range(start, min(start + STEPS_LOOKED_AT, train.steps))
    for step in steps:
        for rows in loop.micro_rows(s, step):
            count += 1
            found.setdefault((len(rows), rows[0].item.shape), (rows, step))
    passes = [loop.micro_step(s, rows, step) for rows, step in found.values()]
    return passes, count / max(1, len(steps) * len(passes))


def _run_of(s: Session, *, is_recorded: bool = False) -> Run:
    """How the micro-steps of a trial are run."""
    return Graphs(s, _scaled) if is_recorded else partial(loop.run_pass, s, scale=_scaled)


def _scaled(loss: Tensor) -> Tensor:
    return loss * LOSS_SCALE


def _best_round(s: Session, passes: Sequence[MicroStep], run: Run) -> tuple[float, Tensor]:
    """The fastest of several rounds."""
    return min((_round(s, passes, run) for _ in range(ROUNDS)), key=lambda found: found[0])


def _round(s: Session, passes: Sequence[MicroStep], run: Run) -> tuple[float, Tensor]:
    """Seconds of one pass each, and the gradient times `LOSS_SCALE`, float32 `[parameters]`; nothing of it stays."""
    began = time.perf_counter()
    for micro in passes:
        run(micro)
    gradient = torch.cat([g.reshape(-1) for flat in s.trained for _, g in flat.gradients()])
    _forget_gradients_(s)
    gradient[0].item()  # waits for the device
    return time.perf_counter() - began, gradient


def _forget_gradients_(s: Session) -> None:
    for flat in s.trained:
        flat.take()
    s.optimizer.zero_grad(set_to_none=True)


def _key(s: Session, passes: Sequence[MicroStep]) -> str:
    """What a trial's seconds depend on."""
    device, model, train = s.accelerator.device, s.config.model, s.config.train
    shapes = sorted(tuple(micro.batch.latents.shape) for micro in passes)
    size = sum(parameter.numel() for parameter in s.family.denoiser.parameters())
    words = [devices.name(device), torch.__version__, s.family.name, size]
    words += [model.precision, model.quantize, model.attention]
    saving = (train.gradient_checkpointing, s.config.memory.offload_activations)
    return ", ".join(map(str, [*words, s.config.adapter.targets, s.config.adapter.rank, *saving, *shapes]))


def _known(path: Path) -> dict[str, Trial]:
    """Trials that were kept; none where the file cannot be read."""
    try:
        return {key: Trial(**trial) for key, trial in inputs.read_object(path, "", DiskError).items()}
    except (DiskError, TypeError):
        return {}


def _keep(path: Path, trials: dict[str, Trial]) -> None:
    with disk.replacing(path) as temporary:
        text = json.dumps({key: asdict(trial) for key, trial in trials.items()}, indent=1)
        temporary.write_text(text, encoding="utf-8")
