"""Peak device memory as predicted and as it is, for the shipped configs and budgets.

    python -m benchmarks.peak_memory --budgets 8 12 16 24 --out build/peak_memory        # on a card
    python -m benchmarks.peak_memory                                                     # on a CPU: one step, counted

On a CUDA card every row is a whole run of a shipped config, on a base of real size with random weights: class images
where it has them, three steps, previews, files. The allocator is capped at the budget less the 0.8 GiB that lie outside
of it, so a row that comes to its end fits such a card. "measured" is torch.cuda.max_memory_allocated.

On a CPU the bytes of one real step's tensors are counted from birth to death and compared with the prediction, on a
base of a quarter of the widths.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.bases import kept_base, noise_pictures
from lora_booth.adapter import inject
from lora_booth.config import presets, toml
from lora_booth.config.resolved import Filled
from lora_booth.errors import DeviceMemoryError
from lora_booth.models import devices, loading
from lora_booth.planning import built, memory
from lora_booth.planning.tracing import held_bytes, tensors_of
from lora_booth.run import cache_folder
from lora_booth.run.report import Silent
from lora_booth.training import optimizers
from lora_booth.training.objective import objective_for
from lora_booth.verbs import train

ARCHITECTURE_OF = {"sd15": "sd1", "sd21": "sd2_v", "sdxl": "sdxl"}
GIB = 2**30
SHARES = (0.0, 0.5, 1.0)
FEW_STEPS: dict[str, object] = {
    "model.precision": "bf16",
    "subject.class_noun": "dog",
    "prior.num_images": 8,
    "prior.sampler_steps": 2,
    "train.steps": 3,
    "train.compile": "false",
    "preview.every_steps": 3,
    "preview.sampler_steps": 2,
    "evaluate.choose": "last",
}
"""What makes a run of a shipped config short and leaves its peaks as they are."""


@dataclass(frozen=True)
class Row:
    """One job. GiB without what lies outside of tensors; `measured_gib` None where it did not fit, or is unknown."""

    job: str
    predicted_gib: float
    measured_gib: float | None
    fits: bool = True
    reserved_gib: float | None = None
    """What the allocator held at most: tensors, and gaps between them."""
    chosen: str = ""
    """How the run was computed to stay within the budget."""


class SameAgain(Exception):
    """What is chosen within this budget was measured already; `chosen` as `Row` has it."""

    def __init__(self, chosen: str, predicted_gib: float) -> None:
        super().__init__(chosen)
        self.chosen, self.predicted_gib = chosen, predicted_gib


class _Prediction(Silent):
    """What a run tells of its memory before it begins."""

    def __init__(self, known: Mapping[str, object]) -> None:
        self._known = known
        self.gib, self.chosen = 0.0, ""

    def event(self, kind: str, text: str, **values: Any) -> None:
        """Raises SameAgain for what is known."""
        if kind == "memory" and "gib" in values:
            self.gib, self.chosen = values["gib"] - memory.OUTSIDE_GIB, text.rpartition(" with ")[2]
            if self.chosen in self._known:
                raise SameAgain(self.chosen, self.gib)


def run_within(
    preset: Path, budget_gib: float, settings: Mapping[str, object], folder: Path, known: Mapping[str, object]
) -> Row:
    """Train the config `preset` with `settings` in `folder`, its allocator capped; on a CPU nothing is measured.

    Raises SameAgain, before anything is computed, where what is chosen is among the `known`.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    cache_folder.remove(cache_folder.entries(folder / "cache"))  # all is made anew; what plan has counted stays
    places = {"memory.budget_gib": budget_gib, "run.folder": folder / "run", "run.cache": folder / "cache"}
    config = toml.load(preset, [f"{key}={value}" for key, value in (FEW_STEPS | dict(settings) | places).items()])
    told, measured, reserved, fits = _Prediction(known), None, None, True
    with _capped(config.memory.device, budget_gib - memory.OUTSIDE_GIB) as is_card:
        try:
            train.train(config, report=told)
        except DeviceMemoryError:
            fits = False
        if is_card:
            reserved = torch.cuda.max_memory_reserved() / GIB
            measured = torch.cuda.max_memory_allocated() / GIB if fits else None
    return Row(f"{preset.stem} within {budget_gib:g} GiB", told.gib, measured, fits, reserved, told.chosen)


@contextmanager
def _capped(device: str, gib: float) -> Iterator[bool]:
    """Inside, torch gets no more than `gib` of the card's memory; gives whether there is a card."""
    is_card = devices.here(device).type == "cuda"
    release_memory()
    if is_card:
        torch.cuda.reset_peak_memory_stats()
        share = gib * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield is_card
    finally:
        if is_card:
            torch.cuda.set_per_process_memory_fraction(1.0)
        release_memory()


def release_memory() -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def on_card(config: str, budget_gib: float, out: Path) -> Row:
    """Train a shipped config within a budget."""
    architecture = ARCHITECTURE_OF[config.partition("_")[0]]
    base = kept_base(out / architecture, architecture)
    pictures = noise_pictures(out / "pictures", 3, 1024)
    settings = {"model.base": base, "subject.images": pictures}
    return run_within(presets.FOLDER / f"{config}.toml", budget_gib, settings, out, {})


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
    trained = optimizers.flatten(parameters, config.optimizer, device_type="cpu")
    family.denoiser.train()
    family.prepare_denoiser_(gradient_checkpointing=share, attention="sdpa")
    rows = memory.rows_per_pass(config)
    batch = built.make_batch(family, rows, shape, family.encode_prompts([""]), device=torch.device("cpu"))
    family.release_text_encoders()
    known = tensors_of([family.denoiser])
    objective = objective_for(config.objective, family.schedule)
    gradients, others, _ = built.trace_step(family, objective, batch, trained, known)
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
        base = kept_base(out / "sd1_quarter", "sd1_quarter")
        rows = [on_cpu(base, share, arguments.side) for share in SHARES]
    for row in rows:
        measured = f"measured {row.measured_gib:.3f} GiB" if row.measured_gib is not None else "does not fit"
        print(f"{row.job:<40} predicted {row.predicted_gib:.3f} GiB, {measured}")
    record.write(out / "peak_memory.json", {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
