"""Peak device memory as predicted and as it is, for the shipped configs and budgets.

    python -m benchmarks.peak_memory --budgets 8 12 16 24 --out build/peak_memory        # on a card
    python -m benchmarks.peak_memory                                                     # on a CPU: one step, counted

On a CUDA card every row is a whole `lora-booth train` of a shipped config in a process of its own, on a base of real
size with random weights: class images, three steps, previews, files. The allocator is capped at the budget less the 0.8
GiB that lie outside of it, so a row that comes to its end fits such a card. "measured" is
torch.cuda.max_memory_allocated.

On a CPU the bytes of one real step's tensors are counted from birth to death and compared with the prediction, on a
base of a quarter of the widths.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.bases import noise_pictures, random_base
from lora_booth.adapter import inject
from lora_booth.config import presets
from lora_booth.config.resolved import Filled
from lora_booth.models import loading
from lora_booth.planning import built, memory
from lora_booth.planning.tracing import held_bytes, tensors_of
from lora_booth.training.flat import Flat
from lora_booth.training.objective import objective_for

ARCHITECTURE_OF = {"sd15": "sd1", "sd21": "sd2_v", "sdxl": "sdxl"}
GIB = 2**30
SHARES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """One job. GiB without what lies outside of tensors; `measured_gib` None where it did not fit."""

    job: str
    predicted_gib: float
    measured_gib: float | None


def on_card(config: str, budget_gib: float, out: Path) -> Row:
    """Train a shipped config within a budget. Raises RuntimeError when it fails for another reason than memory."""
    architecture = ARCHITECTURE_OF[config.partition("_")[0]]
    base = out / architecture
    if not base.exists():
        random_base(base, architecture)
    pictures, folder = noise_pictures(out / "pictures", 3, 1024), out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "model.base": base,
        "model.precision": "bf16",
        "subject.images": pictures,
        "subject.class_noun": "dog",
        "prior.mode": "images",
        "prior.num_images": 8,
        "prior.sampler_steps": 2,
        "train.steps": 3,
        "preview.every_steps": 2,
        "preview.sampler_steps": 2,
        "memory.budget_gib": budget_gib,
        "run.folder": folder,
        "run.cache": out / "cache",
    }
    words = [str(presets.FOLDER / f"{config}.toml"), *(f"{key}={value}" for key, value in settings.items())]
    shutil.rmtree(out / "cache", ignore_errors=True)
    watched = [sys.executable, str(Path(__file__).with_name("watched.py")), str(out / "peak.json")]
    watched += ["--cap-gib", str(budget_gib - memory.OUTSIDE_GIB)]
    done = subprocess.run(
        [*watched, "-m", "lora_booth", "train", *words, "--json"], capture_output=True, text=True, check=False
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    predicted = next(event["gib"] for event in events if event["kind"] == "memory") - memory.OUTSIDE_GIB
    measured = json.loads((out / "peak.json").read_text(encoding="utf-8"))["peak_device_mib"] / 1024
    is_out_of_memory = done.returncode == 5
    if done.returncode and not is_out_of_memory:
        raise RuntimeError(f"{config} within {budget_gib} GiB: {done.stderr[-2000:]}")
    return Row(f"{config} within {budget_gib:g} GiB", predicted, None if is_out_of_memory else measured)


def on_cpu(base: Path, share: float, side_px: int) -> Row:
    """One step on `base`: its tensors' bytes, beside those that are predicted."""
    values = {"model": {"base": str(base), "precision": "fp32"}, "subject": {"images": "x", "class_noun": "dog"}}
    values |= {"data": {"resolution": side_px, "bucket_step": 64}, "optimizer": {"warmup_steps": 0}}
    values |= {"train": {"gradient_checkpointing": share, "steps": 1, "save_every_steps": 1}}
    config = Filled.model_validate(values)
    modules = memory.Modules.of(config, loading.facts(config.model))
    step, shape = modules.step(config, None), modules.latent_shape(modules.square(config))
    predicted = sum(step.parts[part] for part in ("base", "adapter", "gradients", "inputs", "activations"))

    family = loading.load(config.model, device="cpu", dtype=torch.float32, needs_vae=False)
    parameters = inject.inject_({"unet": family.denoiser}, config.adapter)["unet"]
    family.denoiser.train()
    family.prepare_denoiser_(gradient_checkpointing=share, attention="sdpa")
    rows = memory.rows_per_pass(config)
    batch = built.make_batch(family, rows, shape, family.encode_prompts([""]), device=torch.device("cpu"))
    family.release_text_encoders()
    known = tensors_of([family.denoiser])
    objective = objective_for(config.objective, family.schedule)
    gradients, others, _ = built.trace_step(family, objective, batch, [Flat(parameters)], known)
    measured = gradients + others + held_bytes(known) + held_bytes(batch.tensors)
    return Row(f"one step at {side_px} px, share {share:g}", predicted / GIB, measured / GIB)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="*", default=["sd15_subject_12gb", "sd21_subject_12gb", "sdxl_subject_12gb"])
    parser.add_argument("--budgets", nargs="*", type=float, default=[8.0, 12.0, 16.0, 24.0], help="in GiB")
    parser.add_argument("--side", type=int, default=256, help="on a CPU, in pixels")
    parser.add_argument("--out", type=Path, default=Path("build/peak_memory"))
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    if torch.cuda.is_available():
        jobs = [(config, budget) for config in arguments.configs for budget in arguments.budgets]
        rows = [on_card(config, budget, out) for config, budget in jobs]
    else:
        base = out / "sd1_quarter"
        if not base.exists():
            random_base(base, "sd1_quarter")
        rows = [on_cpu(base, share, arguments.side) for share in SHARES]
    for row in rows:
        measured = "does not fit" if row.measured_gib is None else f"measured {row.measured_gib:.3f} GiB"
        print(f"{row.job:<40} predicted {row.predicted_gib:.3f} GiB, {measured}")
    record.write(out / "peak_memory.json", {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
