"""The same job through peers' scripts and through lora_booth: time for a step, start-up and caching, peak memory.

    python -m benchmarks.peers --diffusers ../diffusers/examples/dreambooth/train_dreambooth_lora.py \\
        --kohya ../sd-scripts/train_network.py --kohya-python ../sd-scripts/venv/bin/python \\
        --architecture sd1 --resolution 512 --precision bf16

`--diffusers` is the DreamBooth-LoRA example for SD 1.x and 2.x, or the one for SDXL; `--kohya` is train_network.py or
sdxl_train_network.py. Both are in checkouts of yours; nothing of them is part of this project. Same model, pictures,
class images, rank and precision: one instance and one class image a step, no text encoder, no pictures on the way, no
recomputed activations. kohya adapts every linear layer of the transformer blocks, diffusers and lora_booth the
attention alone; kohya keeps its latents, and for SDXL its embeddings too. All run alternately, each with few and with
many steps: the difference gives the time for a step, the rest is start-up, caching and saving. Seconds are the
processor's time (of all cores) and the clock's; memory is the process's, and on a GPU that of its tensors.
For Linux and macOS (`os.wait4`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import record
from benchmarks.bases import ARCHITECTURE_NAMES, noise_pictures, random_base

RANK = 8
LEARNING_RATE = "1e-4"
NUM_INSTANCES, NUM_CLASSES = 5, 20


@dataclass(frozen=True)
class Job:
    """What all of them are to do. `subject` and `classes`: folders of pictures."""

    base: Path
    subject: Path
    classes: Path
    resolution: int
    precision: str


@dataclass(frozen=True)
class Run:
    """One process. Seconds by the clock and of the processor; most main memory, and most device memory of tensors."""

    who: str
    steps: int
    clock_s: float
    processor_s: float
    peak_mib: float
    peak_device_mib: float | None


def diffusers_words(job: Job, steps: int, out: Path) -> list[str]:
    """Flags of diffusers' script."""
    flags = {
        "pretrained_model_name_or_path": job.base,
        "instance_data_dir": job.subject,
        "class_data_dir": job.classes,
        "instance_prompt": "a sks dog",
        "class_prompt": "a dog",
        "num_class_images": len(list(job.classes.iterdir())),
        "output_dir": out,
        "resolution": job.resolution,
        "train_batch_size": 1,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "checkpointing_steps": 10 * steps,
        "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
        "dataloader_num_workers": 0,
        "report_to": "all",
        "seed": 0,
    }
    return ["--with_prior_preservation", *_as_flags(flags)]


def kohya_words(job: Job, steps: int, out: Path) -> list[str]:
    """Flags of kohya's script, with the pictures in the folders that it reads: repeats and words in their names."""
    data = out.parent / "kohya_data"
    for kind, folder, name in (("train", job.subject, "1_sks dog"), ("reg", job.classes, "1_dog")):
        if not (data / kind / name).exists():
            shutil.copytree(folder, data / kind / name)
    flags = {
        "pretrained_model_name_or_path": job.base,
        "train_data_dir": data / "train",
        "reg_data_dir": data / "reg",
        "output_dir": out,
        "resolution": job.resolution,
        "train_batch_size": 2,
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": RANK,
        "learning_rate": LEARNING_RATE,
        "optimizer_type": "AdamW",
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
        "max_data_loader_n_workers": 0,
        "save_model_as": "safetensors",
        "seed": 0,
    }
    switches = ["--network_train_unet_only", "--sdpa", "--cache_latents", "--enable_bucket"]
    if (job.base / "text_encoder_2").exists():
        switches.append("--cache_text_encoder_outputs")  # a flag of the script for SDXL alone
    return [*switches, *_as_flags(flags)]


def our_words(job: Job, steps: int, out: Path, *, is_compiled: bool = False) -> list[str]:
    """The same through lora_booth, with a cache of its own, so that it pays for caching too."""
    settings = {
        "subject.images": job.subject,
        "subject.class_noun": "dog",
        "subject.prompt": "a {token} {class}",
        "subject.captions": "off",
        "model.base": job.base,
        "model.precision": job.precision,
        "prior.mode": "images",
        "prior.folder": job.classes,
        "prior.prompts": '["a {class}"]',
        "data.resolution": job.resolution,
        "adapter.targets": "attention",
        "adapter.rank": RANK,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": LEARNING_RATE,
        "train.steps": steps,
        "train.save_every_steps": steps,
        "train.images_per_step": 1,
        "train.batch_size": 2,
        "train.gradient_checkpointing": "false",
        "train.compile": str(is_compiled).lower(),
        "preview.images_per_prompt": 0,
        "run.folder": out / "run",
        "run.cache": out / "cache",
    }
    return ["train", *(f"{key}={value}" for key, value in settings.items())]


def _as_flags(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


Command = Callable[[int, Path], list[str]]
"""(steps, folder for the output) to the words of a process."""


def commands(arguments: argparse.Namespace, job: Job) -> dict[str, Command]:
    """What to run, by name; lora_booth last."""
    watched = Path(__file__).with_name("watched.py")

    def command(python: str, what: list[str], words: Callable[[Job, int, Path], list[str]]) -> Command:
        return lambda steps, out: [python, str(watched), str(out) + ".json", *what, *words(job, steps, out)]

    found = {}
    if arguments.diffusers is not None:
        found["diffusers"] = command(sys.executable, [str(arguments.diffusers)], diffusers_words)
    if arguments.kohya is not None:
        found["kohya"] = command(arguments.kohya_python, [str(arguments.kohya)], kohya_words)
    found["lora_booth"] = command(sys.executable, ["-m", "lora_booth"], our_words)
    if arguments.compiled:
        words = partial(our_words, is_compiled=True)
        found["lora_booth_compiled"] = command(sys.executable, ["-m", "lora_booth"], words)
    return found


def measure(who: str, command: Command, steps: int, out: Path) -> Run:
    """Run `command` to its end. Raises RuntimeError with its last words when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    words = command(steps, out)
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{who} failed:\n{said[-3000:].decode(errors='replace')}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    clock = time.perf_counter() - began
    device = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))["peak_device_mib"]
    processor = round(usage.ru_utime + usage.ru_stime, 2)
    return Run(who, steps, round(clock, 2), processor, round(usage.ru_maxrss / unit), device)


def table(runs: list[Run], few: int, many: int) -> dict[str, dict[str, float]]:
    """Medians by who ran: seconds for a step and for everything else, by processor and clock, and the peaks.

    Of a step: in each round by itself, then the median of the rounds.
    """
    rows = {}
    for who in dict.fromkeys(run.who for run in runs):
        row: dict[str, float] = {}
        short, long = ([run for run in runs if (run.who, run.steps) == (who, steps)] for steps in (few, many))
        for kind in ("processor_s", "clock_s"):
            pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(short, long, strict=True)]
            step = statistics.median((b - a) / (many - few) for a, b in pairs)
            row[f"step_{kind}"] = round(step, 4)
            row[f"rest_{kind}"] = round(statistics.median(a for a, _ in pairs) - few * step, 2)
        row["peak_mib"] = max(run.peak_mib for run in (*short, *long))
        row["peak_device_mib"] = max(run.peak_device_mib or 0.0 for run in (*short, *long))
        rows[who] = row
    return rows


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, help="train_dreambooth_lora.py or train_dreambooth_lora_sdxl.py")
    parser.add_argument("--kohya", type=Path, help="train_network.py or sdxl_train_network.py")
    parser.add_argument("--kohya-python", default=sys.executable, help="the interpreter that has kohya's packages")
    parser.add_argument("--compiled", action="store_true", help="lora_booth once more, with train.compile")
    parser.add_argument("--architecture", choices=ARCHITECTURE_NAMES, default="sd1_quarter")
    parser.add_argument("--base", type=Path, help="a base of yours in place of random weights")
    parser.add_argument("--subject", type=Path, help="folder of pictures in place of noise")
    parser.add_argument("--class-images", type=Path, help="folder of pictures in place of noise")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--many", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.base or arguments.out / arguments.architecture
    if not base.exists():
        random_base(base, arguments.architecture)
    side = arguments.resolution
    subject = arguments.subject or noise_pictures(arguments.out / "subject", NUM_INSTANCES, side)
    classes = arguments.class_images or noise_pictures(arguments.out / "class", NUM_CLASSES, side)
    job = Job(base.absolute(), subject.absolute(), classes.absolute(), side, arguments.precision)
    runs = []
    for _ in range(arguments.rounds):
        for who, command in commands(arguments, job).items():
            for steps in (arguments.few, arguments.many):
                runs.append(measure(who, command, steps, arguments.out.absolute() / who))
                print(runs[-1], flush=True)
    write(runs, arguments)


def write(runs: list[Run], arguments: argparse.Namespace) -> None:
    """peers.json with job, machine, versions and every run; prints the medians and their ratios."""
    rows = table(runs, arguments.few, arguments.many)
    ours = rows["lora_booth"]
    ratios = {
        who: {key: round(row[key] / ours[key], 2) for key in row if ours[key]}
        for who, row in rows.items()
        if who != "lora_booth"
    }
    job = {"base": str(arguments.base or arguments.architecture), "resolution": arguments.resolution}
    job |= {"precision": arguments.precision, "medians": rows, "peer / lora_booth": ratios}
    record.write(arguments.out / "peers.json", job | {"runs": [asdict(run) for run in runs]})
    for key, value in ours.items():
        others = "   ".join(f"{who} {rows[who][key]} ({ratios[who].get(key, '-')}×)" for who in ratios)
        print(f"{key:<18} lora_booth {value}   {others}")


if __name__ == "__main__":
    main()
