"""Runs that are killed, stopped or damaged, and what the same command makes of them afterwards."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_booth.config.config import Config
from lora_booth.errors import ProcessLostError
from lora_booth.run.checkpoints import CHECKPOINT_FILES
from lora_booth.run.folder import Run
from tests.soak import crash
from tests.soak.bench import STEPS, Bench, Result, differences, half_file, lost_checkpoint, made, materials
from tests.soak.crash import Fate
from tests.support import tiny

MAX_SECONDS_TO_STOP = 10.0
SIZES: tuple[tuple[Callable[[Path], Path], dict[str, dict[str, Any]]], ...] = (
    (tiny.tiny_sdxl, {}),
    (tiny.tiny_sd, {"adapter": {"rank": 4, "targets": "attention", "text_encoder": True}}),
    (tiny.tiny_sdxl, {"adapter": {"rank": 16, "targets": "attention+ff+conv"}}),
)
"""Base and settings of a small, a middle and a large adapter."""
PHASES = {
    "resume": (("base", 1), ("train", 1)),
    "class images": (("encode prompts", 3), ("class_images", 1)),
    "previews": (("saved", 1), ("preview", 2)),
    "export": (("saved", 2), ("trigger", 1)),
}
"""The words of the report, with their numbers, that a phase lies between."""
IN_TURN = ("resume", "class images", "export", "resume", "previews", "export")


def kills_at_random(count: int, folder: Path, seed: int = 0) -> Result:
    """SIGKILL at a random moment of the whole job, once or twice; then the same command to the end."""
    bench, rng, failures = Bench(folder), random.Random(seed), []
    for i in range(count):
        config = bench.config(f"kill-{i}")
        for _ in range(rng.choice((1, 2))):
            moment = rng.uniform(0, bench.seconds)
            outcome = crash.run(config, Fate(seconds=moment))
            if outcome.code not in (0, -signal.SIGKILL):
                failures.append(f"kill {i}: ended with {outcome.code} before its kill: {outcome.output[-300:]}")
        fault = lost_checkpoint(config, outcome.output) or bench.finish(config)
        if fault:
            failures.append(f"kill {i} at {moment:.2f} s: {fault}")
    return Result(count, tuple(failures), f"the straight run takes {bench.seconds:.1f} s")


def kills_at_changes(count: int, folder: Path, seed: int = 0) -> Result:
    """SIGKILL right before each change on the disk: files opened, renamed and removed, folders made and removed.

    `count`: how many changes, one at random in each of equal stretches of a run; when it has no more, of a larger one.
    """
    failures, tries, rng = [], [], random.Random(seed)
    for size, (make_base, sections) in enumerate(SIZES):
        if sum(tries) == count:
            break
        where = folder / str(size)
        bench = Bench(where, materials(where, make_base), **sections)
        tries.append(min(count - sum(tries), len(bench.changes)))
        stretch = len(bench.changes) / tries[-1]
        for i in range(tries[-1]):
            number = 1 + int((i + rng.random()) * stretch)
            config = bench.config(f"change-{number}")
            outcome = crash.run(config, Fate(event="change", number=number, folder=where / f"change-{number}"))
            fault = "" if outcome.code == -signal.SIGKILL else f"ended with {outcome.code}: {outcome.output[-300:]}"
            fault = fault or lost_checkpoint(config, outcome.output) or bench.finish(config)
            if fault:
                failures.append(f"size {size}, change {number} ({bench.changes[number - 1]}): {fault}")
    note = f"{', '.join(map(str, tries))} of {len(bench.changes)} changes in a run, by size"
    return Result(sum(tries), tuple(failures), note)


def kills_in_phases(count: int, folder: Path, seed: int = 0) -> Result:
    """SIGKILL while a run resumes, draws class images or previews, or exports; then the same command to the end."""
    bench, rng, failures = Bench(folder), random.Random(seed), []
    killed: Counter[str] = Counter()
    for i in range(count):
        config, phase = bench.config(f"phase-{i}"), IN_TURN[i % len(IN_TURN)]
        if phase == "resume":
            assert crash.run(config, Fate(event="train", number=3)).code == -signal.SIGKILL
        (word, number), end = PHASES[phase]
        moment = rng.uniform(0.001, bench.moments[end] - bench.moments[word, number])
        outcome = crash.run(config, Fate(event=word, number=number, seconds=moment))
        killed[phase] += outcome.code == -signal.SIGKILL
        fault = "" if outcome.code in (0, -signal.SIGKILL) else f"ended with {outcome.code}: {outcome.output[-300:]}"
        fault = fault or half_file(config, bench.expected)
        fault = fault or lost_checkpoint(config, outcome.output) or bench.finish(config)
        if fault:
            failures.append(f"{phase} {i}, {moment:.2f} s into it: {fault}")
    failures += [f"never killed in {phase}" for phase in PHASES if count >= len(IN_TURN) and not killed[phase]]
    return Result(count, tuple(failures), ", ".join(f"{number} in {phase}" for phase, number in killed.items()))


def signals(count: int, folder: Path, seed: int = 0) -> Result:
    """SIGINT, SIGTERM or SIGUSR1 at a random moment: saved, told, the right exit code, soon; then the same command."""
    bench, rng, failures, slowest = Bench(folder), random.Random(seed), [], 0.0
    codes: Counter[int] = Counter()
    for i in range(count):
        config = bench.config(f"signal-{i}")
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[i % 3]
        outcome = crash.run(config, Fate(number, seconds=rng.uniform(0.1, bench.seconds)))
        codes[outcome.code] += 1
        slowest = max(slowest, outcome.after_signal or 0.0)
        if outcome.code == 128 + number:
            fault = "" if "same command" in outcome.output else f"no word on how to go on: {outcome.output[-300:]}"
        else:  # finished before the signal, or struck before the first line of ours ran
            is_early = outcome.code in (-number, crash.BUG) and not (config.run.folder or folder).exists()
            fault = "" if outcome.code == 0 or is_early else f"ended with {outcome.code}: {outcome.output[-300:]}"
        fault = fault or lost_checkpoint(config, outcome.output) or bench.finish(config)
        if fault:
            failures.append(f"signal {i} ({signal.Signals(number).name}): {fault}")
    if slowest > MAX_SECONDS_TO_STOP:
        failures.append(f"the slowest stop took {slowest:.1f} s")
    counted = ", ".join(f"{number} with {code}" for code, number in sorted(codes.items()))
    return Result(count, tuple(failures), f"slowest stop {slowest:.1f} s; ended {counted}")


def damaged_checkpoints(count: int, folder: Path, seed: int = 0) -> Result:
    """A bit, a cut, zeros or more bytes in a file of the newest checkpoint: told, and the one before is taken."""
    bench = Bench(folder, train={"save_every_steps": 2, "keep_last": 2})
    run = Run(folder / "straight" / "run")
    newest, rng, failures, harmless = run.folder / "checkpoints" / f"step-{4:06d}", random.Random(seed), [], 0
    originals = {name: (newest / name).read_bytes() for name in (*CHECKPOINT_FILES, "manifest.json")}
    sound = run.latest(failures.append)
    assert sound is not None and sound.step == 4 and bench.expected
    for i in range(count):
        name = rng.choice(list(originals))
        (newest / name).write_bytes(_damaged(originals[name], rng))
        told: list[str] = []
        found = run.latest(told.append)
        if found is None or found.step not in (2, 4):
            failures.append(f"damage {i} to {name}: no checkpoint was found")
        elif found.step == 4:
            is_same = (
                all(found.adapter[k].equal(sound.adapter[k]) for k in sound.adapter) and found.state == sound.state
            )
            harmless += 1
            if name != "manifest.json" or not is_same:
                failures.append(f"damage {i} to {name}: taken as sound")
        elif len(told) != 1 or newest.name not in told[0]:
            failures.append(f"damage {i} to {name}: told {told}")
        (newest / name).write_bytes(originals[name])
    return Result(count, tuple(failures), f"{harmless} in words of the manifest that nothing depends on")


def _damaged(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.choice(("bit", "bit", "cut", "zeros", "longer")), rng.randrange(len(data))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "zeros" and any(data[at : at + 512]):
        return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]
    return data[:at] if kind == "cut" else data + rng.randbytes(1 + at)


OPTIMIZERS = ("adamw", "adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree")
PRECISIONS, PRIORS = ("fp32", "bf16"), ("images", "model", "weights", "none")
SCHEDULES = ("constant", "cosine")
LAYERS, TEXT, WORD, AVERAGES = "layers", "layers of the text encoders too", "a word too", "averages of layers"
MATRIX = [
    *itertools.product(OPTIMIZERS, SCHEDULES, PRECISIONS, PRIORS, (LAYERS, TEXT)),
    *itertools.product(OPTIMIZERS, SCHEDULES[:1], PRECISIONS, PRIORS, (WORD,)),
    *itertools.product(OPTIMIZERS[:-1], SCHEDULES[:1], PRECISIONS, PRIORS, (AVERAGES,)),
]
"""Optimizer, schedule, precision, what keeps the base, what is trained: what must resume exactly."""


def resume_matrix(count: int, folder: Path, seed: int = 0) -> Result:
    """Stopped at step 1 and killed at step 3 under every kind of run; then the same bytes as the straight run."""
    failures, read = [], materials(folder)
    rows = MATRIX if count >= len(MATRIX) else random.Random(seed).sample(MATRIX, count)
    for i, (optimizer, schedule, precision, prior, trained) in enumerate(rows):
        rates = {"text_encoder_learning_rate": 1e-2, "embedding_learning_rate": 1e-2}
        bench = Bench(
            folder / str(i),
            read,
            model={"precision": precision},
            optimizer={"name": optimizer, "schedule": schedule, **rates}
            | ({"ema_decay": 0.5} if trained == AVERAGES else {}),
            adapter={"rank": 64, "text_encoder": trained == TEXT, "dropout": 0.1}
            | ({"embedding": "too"} if trained == WORD else {}),
            prior={"mode": prior, "norm_weight": 1e-3 if prior == "weights" else 0.0, "captions": ["a cat", "a tree"]},
            train={"save_every_steps": 1},
            preview={"images_per_prompt": 0},
            run={"cache": folder / "cache"},
        )
        is_8bit = any(tensor.dtype == torch.uint8 for tensor in _optimizer_tensors(bench.straight))
        assert is_8bit == optimizer.endswith("8bit"), optimizer  # a tensor below 4,096 numbers keeps 32 bits
        config = bench.config("interrupted")
        stopped = crash.run(config, Fate(signal.SIGTERM, event="train", number=1))
        killed = crash.run(config, Fate(event="train", number=2))
        fault = "" if (stopped.code, killed.code) == (143, -9) else f"ended with {stopped.code}, {killed.code}"
        fault = fault or bench.finish(config)
        if fault:
            failures.append(f"{optimizer}, {schedule}, {precision}, prior {prior}, {trained}: {fault}")
        shutil.rmtree(folder / str(i))
    return Result(len(rows), tuple(failures), f"of {len(MATRIX)} combinations")


def _optimizer_tensors(config: Config) -> list[torch.Tensor]:
    assert config.run.folder is not None
    newest = max((config.run.folder / "checkpoints").glob("step-*"))
    return list(load_file(newest / "optimizer.safetensors").values())


def lost_processes(count: int, folder: Path, seed: int = 0) -> Result:
    """One of the two processes of a run is killed: the other ends soon, and the same command goes on."""
    bench, rng, failures, slowest, both_ended = Bench(folder), random.Random(seed), [], 0.0, 0
    straight = bench.config("together")
    began = time.monotonic()
    assert [outcome.code for outcome in _both(straight)[0]] == [0, 0]
    seconds, expected = time.monotonic() - began, made(straight)
    for i in range(count):
        config, victim, moment = bench.config(f"lost-{i}"), i % 2, rng.uniform(0.0, 0.7 * seconds)
        outcomes, after = _both(config, victim, moment)
        codes = [outcome.code for outcome in outcomes]
        slowest, both_ended = max(slowest, after), both_ended + (codes == [0, 0])
        fault = lost_checkpoint(config, outcomes[0].output)
        has_trained = (bench.folder / f"lost-{i}" / "run" / "checkpoints" / f"step-{STEPS:06d}").exists()
        is_told = codes[victim] == -signal.SIGKILL and codes[1 - victim] == ProcessLostError.exit_code
        if not is_told and not (has_trained and codes[1 - victim] == 0):
            fault = f"ended with {codes}: {outcomes[1 - victim].output[-400:]}"
        again = [outcome.code for outcome in _both(config)[0]]
        fault = fault or ("" if again == [0, 0] else f"did not go on: {again}")
        fault = fault or differences(expected, made(config))
        if fault:
            failures.append(f"process {victim} lost after {moment:.1f} s: {fault}")
    note = f"the other one ended at most {slowest:.1f} s later; {both_ended} had finished before"
    return Result(count, tuple(failures), note)


def _both(config: Config, victim: int = 0, moment: float | None = None) -> tuple[list[crash.Outcome], float]:
    """How the two processes of one run end, and how long after `victim` is killed the last one does.

    It is killed `moment` seconds after the two have met: before, one would wait for the other as launchers let it.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "ACCELERATE_USE_CPU": "true"}
    begun = [
        crash.start(config, crash.SURVIVES, shared | {"RANK": rank, "LOCAL_RANK": rank}, name=rank) for rank in "01"
    ]
    struck = time.monotonic()
    if moment is not None:
        first, log = begun[0]
        while first.is_alive() and not (log.exists() and "base " in log.read_text()):  # told once they have met
            time.sleep(0.02)
        begun[victim][0].join(moment)
        begun[victim][0].kill()
        struck = time.monotonic()
    ended = max(crash.join(process, 60.0) for process, _ in begun)
    outcomes = [crash.Outcome(process.exitcode or 0, log.read_text(), ended) for process, log in begun]
    return outcomes, ended - struck


def _free_port() -> str:
    """Below those that the system hands out itself, so that nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return str(port)


def leaks(count: int, folder: Path, seed: int = 0) -> Result:
    """`count` steps with saves and pictures: the memory of the process and its open files stay what they are."""
    every = max(10, count // 20)
    bench = Bench(folder)
    config = bench.config(
        "long",
        train={"steps": count, "save_every_steps": every},
        preview={"every_steps": every},
        run={"report": count >= 1000},  # a page is made by the clock, and of a short run what draws it is read late
    )
    outcome = crash.run(config, Fate(event="measure", number=every), limit=3600)
    lines = [line.split() for line in outcome.output.splitlines() if line.startswith("memory ")]
    late = [(int(mib), int(descriptors)) for _, mib, descriptors in lines[len(lines) // 2 :]]
    growth = late[-1][0] - late[0][0]
    failures = [] if outcome.code == 0 else [f"ended with {outcome.code}: {outcome.output[-300:]}"]
    allowed = 2 + count / 2000
    if growth > allowed:
        failures.append(f"grew by {growth} MiB over the second half of {count} steps")
    if late[-1][1] > late[0][1]:
        failures.append(f"open files went from {late[0][1]} to {late[-1][1]}")
    return Result(
        count, tuple(failures), f"{growth:+d} MiB and {late[-1][1] - late[0][1]:+d} open files over the second half"
    )
