"""The same job through a peer's script and through lora_booth: time for a step, start-up and caching, peak memory.

    python -m benchmarks.peers --script ../diffusers/examples/dreambooth/train_dreambooth_lora.py \\
        --base build/sd15 --subject pictures --class-images class --resolution 512 --out build/peers

`--script` is diffusers' DreamBooth-LoRA example (SD 1.x, 2.x), or its SDXL one, in a checkout of yours; nothing of it
is part of this project. Same model, pictures, class images, rank, targets, precision and steps: one instance and one
class image a step, no text encoder, no pictures on the way. Both run alternately, each with few and with many steps:
the difference gives the time for a step, the rest is start-up, caching and saving. Seconds are the processor's time (of
all cores) and the clock's; memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

RANK = 8
LEARNING_RATE = "1e-4"


@dataclass(frozen=True)
class Run:
    """One process. Seconds by the clock and of the processor; `peak_mib`: most main memory."""

    who: str
    steps: int
    clock_s: float
    processor_s: float
    peak_mib: float


def peer_command(arguments: argparse.Namespace, steps: int, out: Path) -> list[str]:
    """diffusers' script with the job's flags."""
    precision = {"fp32": "no"}.get(arguments.precision, arguments.precision)
    flags = {
        "pretrained_model_name_or_path": arguments.base,
        "instance_data_dir": arguments.subject,
        "class_data_dir": arguments.class_images,
        "instance_prompt": f"a sks {arguments.class_noun}",
        "class_prompt": f"a {arguments.class_noun}",
        "num_class_images": len(list(Path(arguments.class_images).iterdir())),
        "output_dir": out,
        "resolution": arguments.resolution,
        "train_batch_size": 1,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "checkpointing_steps": 10 * steps,
        "mixed_precision": precision,
        "dataloader_num_workers": 0,
        "report_to": "all",
        "seed": 0,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(arguments.script), "--with_prior_preservation", *words]


def our_command(arguments: argparse.Namespace, steps: int, out: Path) -> list[str]:
    """The same through lora_booth, with a cache of its own, so that it pays for caching too."""
    settings = {
        "subject.images": arguments.subject,
        "subject.class_noun": arguments.class_noun,
        "subject.prompt": "a {token} {class}",
        "subject.captions": "off",
        "model.base": arguments.base,
        "model.precision": arguments.precision,
        "prior.folder": arguments.class_images,
        "prior.prompts": '["a {class}"]',
        "data.resolution": arguments.resolution,
        "adapter.targets": "attention",
        "adapter.rank": RANK,
        "optimizer.learning_rate": LEARNING_RATE,
        "train.steps": steps,
        "train.save_every_steps": steps,
        "train.images_per_step": 1,
        "train.batch_size": 2,
        "train.gradient_checkpointing": "false",
        "preview.images_per_prompt": 0,
        "run.folder": out / "run",
        "run.cache": out / "cache",
    }
    return [sys.executable, "-m", "lora_booth", "train", *(f"{key}={value}" for key, value in settings.items())]


def measure(who: str, command: list[str], steps: int) -> Run:
    """Run `command` to its end. Raises RuntimeError with its last words when it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{who} failed:\n{said[-3000:].decode(errors='replace')}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    clock = time.perf_counter() - began
    return Run(who, steps, round(clock, 2), round(usage.ru_utime + usage.ru_stime, 2), round(usage.ru_maxrss / unit))


def table(runs: list[Run], few: int, many: int) -> dict[str, dict[str, float]]:
    """Medians by who ran: seconds for a step and for everything else, by processor and clock, and the peak."""
    rows = {}
    for who in ("peer", "lora_booth"):
        row: dict[str, float] = {}
        for kind in ("processor_s", "clock_s"):
            short, long = (
                statistics.median(getattr(run, kind) for run in runs if (run.who, run.steps) == (who, steps))
                for steps in (few, many)
            )
            row[f"step_{kind}"] = round((long - short) / (many - few), 4)
            row[f"rest_{kind}"] = round(short - few * (long - short) / (many - few), 2)
        row["peak_mib"] = max(run.peak_mib for run in runs if run.who == who)
        rows[who] = row
    return rows


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("script", "base", "subject", "class-images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--class-noun", default="dog")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    arguments = parser.parse_args()
    runs = []
    commands = {"peer": peer_command, "lora_booth": our_command}
    for _ in range(arguments.rounds):
        for steps in (arguments.few, arguments.many):
            for who, command in commands.items():
                out = arguments.out / who
                shutil.rmtree(out, ignore_errors=True)
                runs.append(measure(who, command(arguments, steps, out), steps))
                print(runs[-1], flush=True)
    rows = table(runs, arguments.few, arguments.many)
    ratios = {key: round(rows["peer"][key] / rows["lora_booth"][key], 2) for key in rows["peer"]}
    packages = {name: version(name) for name in ("torch", "diffusers", "peft", "lora-booth")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")}
    result = {"rows": rows, "peer / lora_booth": ratios, **machine, **packages, "runs": [asdict(run) for run in runs]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for key, ratio in ratios.items():
        print(f"{key:<18} peer {rows['peer'][key]:>9}   lora_booth {rows['lora_booth'][key]:>9}   ratio {ratio}")


if __name__ == "__main__":
    main()
