"""Time of a training step and peak memory, lever by lever, on a base of real size with random weights or on your own.

    python -m benchmarks.step_time --architecture sd1 --resolution 512 --out build/step_time     # sd2_v 768, sdxl 1024
    python -m benchmarks.step_time --base booth-mini --resolution 64 --steps 40

Every row is a whole `lora-booth train` in a process of its own: two instance and two class images a step, adapter rank
16 on attention, no pictures on the way, pictures of noise. Seconds are the median over all steps but the first three,
as the run's metrics.jsonl has them; memory is the device's peak of tensors, on a CPU the process's. "at least" is the
time that the step's operations, counted on tensors without data, need at the rates that a large matrix product and a
large copy reach here (`lora_booth.planning.tracing.Work.seconds`).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import rates, record
from benchmarks.bases import ARCHITECTURE_NAMES, kept_base, noise_pictures
from lora_booth.config import toml
from lora_booth.data import charts
from lora_booth.models import loading
from lora_booth.models.cards import Card
from lora_booth.planning import memory

LEVERS: dict[str, dict[str, object]] = {
    "plain": {},
    "one row a pass": {"train.batch_size": 1},
    "checkpointing": {"train.gradient_checkpointing": "true"},
    "8-bit Adam": {"optimizer.name": "adamw8bit"},
    "int8 base": {"model.quantize": "int8"},
    "nf4 base": {"model.quantize": "nf4"},
    "text encoder too": {"adapter.text_encoder": "true"},
    "half checkpointed": {"train.gradient_checkpointing": 0.5},
    "compiled": {"train.compile": "true"},
}
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One lever: seconds of a step, GiB at most, and the mean loss over the steps, which shows that it trained."""

    lever: str
    step_s: float
    peak_gib: float
    mean_loss: float
    tflop: float
    """Floating-point operations of a step, in 10^12."""
    least_s: float
    """Seconds that they need, or moving their bytes, at the rates measured here."""
    warm_up_s: float
    """What the first steps took beyond the time of later ones: compiling, mostly."""


def measure(lever: str, base: str, card: Card, arguments: argparse.Namespace) -> Row:
    """Train once, on what computes at the rates of `card`. Raises RuntimeError with the run's last words."""
    folder = arguments.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings: dict[str, object] = {
        "model.base": base,
        "model.precision": arguments.precision,
        "subject.images": arguments.out / "pictures",
        "subject.class_noun": "dog",
        "prior.mode": "images",
        "prior.folder": arguments.out / "class",
        "data.resolution": arguments.resolution,
        "adapter.rank": 16,
        "train.steps": arguments.steps,
        "train.save_every_steps": arguments.steps,
        "train.images_per_step": 2,
        "train.batch_size": 4,
        "train.gradient_checkpointing": "false",
        "train.compile": "false",
        "preview.images_per_prompt": 0,
        "run.folder": folder,
        "run.cache": arguments.out / "cache",
    }
    words = [f"{key}={value}" for key, value in (settings | LEVERS[lever]).items()]
    command = [sys.executable, "-m", "lora_booth", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{lever}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = statistics.median(line["seconds"] for line in lines[WARM_UP_STEPS:])
    warm_up = sum(line["seconds"] - seconds for line in lines[:WARM_UP_STEPS])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    loss = statistics.mean(line["instance_loss"] for line in lines)
    config = toml.load(None, words)
    work = memory.Modules.of(config, loading.facts(config.model)).step_work(config, None)
    peak, tflop, least = round(summary["peak_gib"], 2), round(work.flops / 1e12, 4), round(work.seconds(card), 4)
    return Row(lever, round(seconds, 4), peak, round(loss, 4), tflop, least, round(warm_up, 2))


def break_even(row: Row, plain: Row) -> int | None:
    """Steps after which a lever that takes longer to begin has paid for it; None when its steps are not faster."""
    saved = plain.step_s - row.step_s
    return None if saved <= 0 else max(0, math.ceil((row.warm_up_s - plain.warm_up_s) / saved))


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURE_NAMES, default="sd1")
    parser.add_argument("--base", help="a base of yours, or booth-mini, in place of random weights")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--levers", nargs="*", choices=sorted(LEVERS), default=[*LEVERS][:-1])
    parser.add_argument("--out", type=Path, default=Path("build/step_time"))
    arguments = parser.parse_args()
    assert arguments.steps > WARM_UP_STEPS, "no step is left to be measured"
    for name in ("pictures", "class"):
        noise_pictures(arguments.out / name, 3, arguments.resolution)
    base = arguments.base or str(arguments.out / arguments.architecture)
    if arguments.base is None:
        kept_base(Path(base), arguments.architecture)
    card, rows = rates.measured_card(), list[Row]()
    for lever in arguments.levers:
        rows.append(measure(lever, base, card, arguments))
        print(
            f"{lever:<18} {rows[-1].step_s:9.4f} s   {rows[-1].peak_gib:7.2f} GiB   loss {rows[-1].mean_loss}   "
            f"at least {rows[-1].least_s:.4f} s{_payment(rows)}",
            flush=True,
        )
    write(rows, card, arguments)


def _payment(rows: list[Row]) -> str:
    """After how many steps compiling has paid, where that can be said."""
    if rows[-1].lever != "compiled" or rows[0].lever != "plain":
        return ""
    steps = break_even(rows[-1], rows[0])
    return "   never pays" if steps is None else f"   pays after {steps} steps"


def write(rows: list[Row], card: Card, arguments: argparse.Namespace) -> None:
    """step_time.json with job, machine and versions, and a bar picture each of time and memory."""
    base, side = arguments.base or arguments.architecture, arguments.resolution
    job = {"base": base, "resolution": side, "steps": arguments.steps, "precision": arguments.precision}
    job["rates"] = asdict(card)
    record.write(arguments.out / "step_time.json", job | {"rows": [asdict(row) for row in rows]})
    for name, unit in (("step_s", "seconds of a step"), ("peak_gib", "GiB at most")):
        values = {row.lever: getattr(row, name) for row in rows}
        title = f"{base} at {side} px on {record.device_name()}"
        charts.save_bars(values, arguments.out / f"{name}.png", title=title, unit=unit)


if __name__ == "__main__":
    main()
