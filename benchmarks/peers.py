"""The same jobs through peers' scripts and through lora_booth: time for a step, everything else, and peak memory.

    python -m benchmarks.peers                    # all three cases; begun again, it goes on where it was
    python -m benchmarks.peers --architecture sd1 --resolution 512 --precision bf16      # another case, as on a card

Peers' scripts are in checkouts of yours; nothing of them is part of this project. By default they are looked for in
`build/`, which git ignores:

    git clone https://github.com/huggingface/diffusers build/diffusers
    git clone https://github.com/kohya-ss/sd-scripts build/kohya

with the requirements of diffusers' examples/dreambooth in `build/diffusers/venv`, beside the versions that lora_booth
has, and kohya's in `build/kohya/venv`. Who is not there is left out.

Same model, pictures, class images, rank and precision: one instance and one class image a step, no text encoder, no
pictures on the way, no recomputed activations. There are as many class images as instance images, since kohya registers
no more. kohya adapts every linear layer of the transformer blocks, diffusers and lora_booth the attention alone; kohya
keeps its latents, and for SDXL its embeddings too. kohya's widths, constants of its modules, are set to the base's.
lora_booth runs with an empty cache and once more, warm, with a full one.

All run alternately, each with few and with many steps: the difference gives the time for a step, the rest is start-up,
caching and saving. Few are as many as there are instance images, so that both encode all of them. Seconds are the
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.bases import ARCHITECTURE_NAMES, noise_pictures, random_base
from benchmarks.peer_words import Job, diffusers_words, kohya_constants, kohya_words, our_words

NUM_INSTANCES = NUM_CLASSES = 5
BUILD = Path(__file__).parents[1] / "build"
RESULTS = Path(__file__).with_suffix(".json")
WARM = "lora_booth_warm"


@dataclass(frozen=True)
class Case:
    """One job. `few` and `many`: steps of the two runs whose difference is the time for a step."""

    name: str
    architecture: str
    resolution: int
    few: int
    many: int
    precision: str = "fp32"


CASES = (
    Case("small", "sd1_quarter", 256, 5, 25),
    Case("sd1", "sd1", 256, 5, 15),
    Case("sdxl_half", "sdxl_half", 256, 5, 15),
)


@dataclass(frozen=True)
class Run:
    """One process. Seconds by the clock and of the processor; most main memory, and most device memory of tensors."""

    who: str
    steps: int
    clock_s: float
    processor_s: float
    peak_mib: float
    peak_device_mib: float | None


Command = Callable[[int, Path], list[str]]
"""(steps, folder for the output) to the words of a process."""


def commands(arguments: argparse.Namespace, job: Job) -> dict[str, Command]:
    """What to run, by name; lora_booth last."""
    watched = Path(__file__).with_name("watched.py")

    def command(
        python: str, what: list[str], words: Callable[[Job, int, Path], list[str]], before: tuple[str, ...] = ()
    ) -> Command:
        return lambda steps, out: [python, str(watched), str(out) + ".json", *before, *what, *words(job, steps, out)]

    found = {}
    suffix = "_sdxl" if job.is_sdxl else ""
    diffusers = arguments.diffusers / f"train_dreambooth_lora{suffix}.py"
    kohya = arguments.kohya / f"{'sdxl_' if job.is_sdxl else ''}train_network.py"
    if diffusers.is_file():
        found["diffusers"] = command(arguments.diffusers_python, [str(diffusers)], diffusers_words)
    if kohya.is_file():
        found["kohya"] = command(arguments.kohya_python, [str(kohya)], kohya_words, kohya_constants(job))
    found["lora_booth"] = command(sys.executable, ["-m", "lora_booth"], our_words)
    found[WARM] = command(sys.executable, ["-m", "lora_booth"], partial(our_words, is_warm=True))
    if arguments.compiled:
        words = partial(our_words, is_compiled=True)
        found["lora_booth_compiled"] = command(sys.executable, ["-m", "lora_booth"], words)
    return found


def measure(who: str, command: Command, steps: int, out: Path) -> Run:
    """Run `command` to its end. Raises RuntimeError with its last words when it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
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
    """Medians by who ran: seconds for a step and for everything else, by processor and clock, and the peaks; of rounds
    that are whole.

    Of a step: in each round by itself, then the median of the rounds.
    """
    rows = {}
    for who in dict.fromkeys(run.who for run in runs):
        row: dict[str, float] = {}
        short, long = ([run for run in runs if (run.who, run.steps) == (who, steps)] for steps in (few, many))
        if not long:
            continue
        for kind in ("processor_s", "clock_s"):
            pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(short, long, strict=False)]
            step = statistics.median((b - a) / (many - few) for a, b in pairs)
            row[f"step_{kind}"] = round(step, 4)
            row[f"rest_{kind}"] = round(statistics.median(a for a, _ in pairs) - few * step, 2)
        row["peak_mib"] = max(run.peak_mib for run in (*short, *long))
        row["peak_device_mib"] = max(run.peak_device_mib or 0.0 for run in (*short, *long))
        rows[who] = row
    return rows


def goals(case: str, rows: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """What is to hold of a case, and whether it does, as far as whoever is compared was measured."""
    wanted = {
        "small": [("lora_booth", "rest_processor_s", "diffusers")],
        "sd1": [("lora_booth", "rest_processor_s", "kohya"), (WARM, "rest_processor_s", "diffusers")],
    }.get(case, [])
    wanted += [("lora_booth", key, peer) for key in ("step_processor_s", "peak_mib") for peer in ("diffusers", "kohya")]
    known = [(ours, key, peer) for ours, key, peer in wanted if ours in rows and peer in rows]
    return {f"{key} of {ours} at most that of {peer}": rows[ours][key] <= rows[peer][key] for ours, key, peer in known}


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases that are asked for."""
    if arguments.architecture is None and arguments.base is None:
        return [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    name = arguments.architecture if arguments.base is None else arguments.base.name
    side, few, many = arguments.resolution, NUM_INSTANCES, 5 * NUM_INSTANCES
    told = f"{name}, {side} px, {arguments.precision}"
    return [Case(told, str(arguments.architecture), side, few, many, arguments.precision)]


def job_of(case: Case, arguments: argparse.Namespace) -> Job:
    """The job of `case`, with the base and pictures that are not there yet."""
    base = arguments.base or arguments.out / case.architecture
    if not base.exists():
        random_base(base, case.architecture)
    side = case.resolution
    subject = arguments.subject or noise_pictures(arguments.out / f"subject_{side}", NUM_INSTANCES, side)
    classes = arguments.class_images or noise_pictures(arguments.out / f"class_{side}", NUM_CLASSES, side)
    return Job(base.absolute(), subject.absolute(), classes.absolute(), side, case.precision)


def measured(case: Case, arguments: argparse.Namespace, known: list[Run]) -> Iterator[Run]:
    """Every run of `case` that is not `known`, alternately, each round after the other."""
    job, few, many = job_of(case, arguments), arguments.few or case.few, arguments.many or case.many
    folder = arguments.out.absolute() / case.name
    found = commands(arguments, job)
    for number in range(arguments.rounds):
        for who, command in found.items():
            for steps in (few, many):
                if sum((run.who, run.steps) == (who, steps) for run in known) > number:
                    continue
                if who == WARM and not (folder / who / "run" / "summary.json").exists():
                    measure(who, command, many, folder / who)  # fills the cache
                known.append(measure(who, command, steps, folder / who))
                yield known[-1]


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, default=BUILD / "diffusers/examples/dreambooth", help="its folder")
    parser.add_argument("--diffusers-python", default=str(BUILD / "diffusers/venv/bin/python"), help="has its packages")
    parser.add_argument("--kohya", type=Path, default=BUILD / "kohya", help="its folder")
    parser.add_argument("--kohya-python", default=str(BUILD / "kohya/venv/bin/python"), help="has kohya's packages")
    parser.add_argument("--compiled", action="store_true", help="lora_booth once more, with train.compile")
    parser.add_argument("--cases", nargs="*", choices=[case.name for case in CASES], help="some in place of all")
    parser.add_argument("--architecture", choices=ARCHITECTURE_NAMES, help="random weights, in place of the cases")
    parser.add_argument("--base", type=Path, help="a base of yours in place of random weights")
    parser.add_argument("--subject", type=Path, help="folder of pictures in place of noise")
    parser.add_argument("--class-images", type=Path, help="folder of as many pictures in place of noise")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--few", type=int, help="steps of the shorter run")
    parser.add_argument("--many", type=int, help="steps of the longer run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="forget what was measured")
    parser.add_argument("--out", type=Path, default=BUILD / "peers", help="folder for bases, pictures and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.results.is_file() and not arguments.again:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))["cases"]
    for case in cases_of(arguments):
        steps = {"few": arguments.few or case.few, "many": arguments.many or case.many}
        about = asdict(case) | steps | {"instances": NUM_INSTANCES, "class images": NUM_CLASSES}
        before = results.get(case.name, {})
        known = [Run(**run) for run in before.get("runs", [])] if before.get("job") == about else []
        for run in measured(case, arguments, known):
            print(f"{case.name}: {run}", flush=True)
            results[case.name] = summary(about, known)
            record.write(arguments.results, {"cases": results})
        tell(case.name, results[case.name])


def summary(about: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """A case as the file of results has it: the job, medians, their ratios to ours, goals, and every run."""
    rows = table(runs, about["few"], about["many"])
    ours = rows.get("lora_booth", {})
    ratios = {
        who: {key: round(row[key] / ours[key], 2) for key in row if ours.get(key)}
        for who, row in rows.items()
        if who != "lora_booth"
    }
    figures = {"medians": rows, "other / lora_booth": ratios, "goals": goals(about["name"], rows)}
    return {"job": about, **figures, "runs": [asdict(run) for run in runs]}


def tell(name: str, found: dict[str, Any]) -> None:
    """Print the medians of a case, their ratios, and its goals."""
    rows, ratios = found["medians"], found["other / lora_booth"]
    for key, value in rows.get("lora_booth", {}).items():
        others = "   ".join(f"{who} {rows[who][key]} ({ratios[who].get(key, '-')}×)" for who in ratios)
        print(f"{name}: {key:<18} lora_booth {value}   {others}")
    for goal, holds in found["goals"].items():
        print(f"{name}: {'yes' if holds else 'NO '} {goal}")


if __name__ == "__main__":
    main()
