"""From pictures to the exported file: how long each part of the whole job takes, with an empty cache and a full one.

    python -m benchmarks.time_to_adapter                                           # the demo's job, on any machine
    python -m benchmarks.time_to_adapter configs/sdxl_subject_12gb.toml --architecture sdxl --out build/time
    python -m benchmarks.time_to_adapter my.toml train.steps=400                    # a base and pictures of your own

With `--architecture` the base has random weights and the pictures are noise. Start-up is what the clock says beyond the
parts that the run itself counts: starting Python, importing, checking the pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import record
from benchmarks.bases import ARCHITECTURE_NAMES, kept_base, noise_pictures
from lora_booth.config import presets
from lora_booth.data import charts


def measure(words: list[str], out: Path, name: str) -> dict[str, float]:
    """Seconds of each part of one job. Raises RuntimeError with its last words when it fails."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "lora_booth", "train", *words, f"run.folder={folder}"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    parts: dict[str, float] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seconds_of"]
    return {"start-up": seconds - sum(parts.values()), **parts}


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as `lora-booth train` takes them; default: the demo's config")
    parser.add_argument("--architecture", choices=ARCHITECTURE_NAMES, help="random weights, and pictures of noise")
    parser.add_argument("--pictures", type=int, default=5, help="of noise")
    parser.add_argument("--side", type=int, default=1024, help="of a picture of noise, in pixels")
    parser.add_argument("--out", type=Path, default=Path("build/time_to_adapter"))
    arguments = parser.parse_args()
    out = arguments.out
    words = arguments.words or [str(presets.FOLDER / "demo.toml")]
    words = [*words, f"run.cache={out / 'cache'}"]
    if arguments.architecture is not None:
        base = kept_base(out / arguments.architecture, arguments.architecture)
        pictures = noise_pictures(out / "pictures", arguments.pictures, arguments.side)
        words += [f"model.base={base}", f"subject.images={pictures}", "subject.class_noun=dog"]
    shutil.rmtree(out / "cache", ignore_errors=True)
    times = {name: measure(words, out, name) for name in ("empty cache", "full cache")}
    for name, parts in times.items():
        told = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
        print(f"{name}: {sum(parts.values()):.1f} s: {told}")
        charts.save_bars(parts, out / f"{name}.png", title=f"{name}, on {record.device_name()}", unit="seconds")
    record.write(out / "time_to_adapter.json", {"words": words, "seconds": times})


if __name__ == "__main__":
    main()
