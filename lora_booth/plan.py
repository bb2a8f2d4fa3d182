"""What a run will do, decided before it does anything: every `None` of the config gets its value here. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_booth.config import Config
from lora_booth.data.buckets import Crop
from lora_booth.errors import ConfigError
from lora_booth.families import sources
from lora_booth.families.identify import BaseFacts, identify
from lora_booth.families.sources import fingerprint
from lora_booth.report import Report
from lora_booth.subject import Pictures, crops_of, find_pictures

STEPS_PER_IMAGE = 100
STEP_LIMITS = {"sd1": (400, 1200), "sd2": (400, 1200), "sdxl": (500, 1500)}
"""Fewest and most steps by family, where the recipes of other trainers and the DreamBooth paper meet."""
MAX_WARMUP_STEPS = 100


@dataclass(frozen=True)
class DenoiserMemory:
    """GiB that a family's step needs, computed from tensor counts (rank 16, bf16, native resolution), not measured.

    `fixed`: weights, adapter, optimizer and a CUDA context. `per_row`: activations of one image, without and with
    gradient checkpointing.
    """

    fixed: float
    per_row: float
    per_row_checkpointed: float


MEMORY = {
    "sd1": DenoiserMemory(2.4, 0.80, 0.22),
    "sd2": DenoiserMemory(2.4, 1.70, 0.41),
    "sdxl": DenoiserMemory(5.8, 5.4, 0.53),
}


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the user's pictures and the base's facts."""

    pictures: Pictures
    facts: BaseFacts

    def identity(self) -> dict[str, Any]:
        """Fingerprint of the base and hashes of the pictures: what a result depends on besides its config."""
        return {"base": fingerprint(self.facts.path), **self.pictures.hashes()}


def look(config: Config, report: Report) -> Inputs:
    """Find and check pictures and base; what is wrong with them is told before torch or a model is loaded.

    Raises DataError or ModelError.
    """
    pictures, facts = find_pictures(config, report), identify(sources.resolve(config.model))
    if config.objective.zero_terminal_snr and facts.prediction_type == "epsilon":
        raise ConfigError(
            f"objective.zero_terminal_snr is true, but {facts.path.name} predicts epsilon, which says nothing at pure "
            "noise; set it to false, or choose a v-prediction base."
        )
    return Inputs(pictures, facts)


def resolve(config: Config, inputs: Inputs, *, free_gib: float | None) -> Config:
    """`config` with every open choice made. `free_gib` is the device's free memory, None on a CPU."""
    train, data, base = config.train, config.data, inputs.facts
    num_images = len(inputs.pictures.instances.pictures)
    low, high = STEP_LIMITS[base.family]
    steps = train.steps or min(max(STEPS_PER_IMAGE * num_images, low), high)
    warmup = config.optimizer.warmup_steps
    checkpointing = train.gradient_checkpointing
    if checkpointing is None:
        checkpointing = not fits(config, base, config.memory.budget_gib or free_gib)
    return config.with_values(
        {
            "data": {
                "resolution": data.resolution or base.native_resolution,
                "bucket_step": data.bucket_step or base.bucket_step,
            },
            "train": {
                "steps": steps,
                "gradient_checkpointing": checkpointing,
                "save_every_steps": train.save_every_steps or max(1, steps // 5),
            },
            "optimizer": {"warmup_steps": min(MAX_WARMUP_STEPS, steps // 20) if warmup is None else warmup},
            "adapter": {"alpha": config.adapter.alpha or float(config.adapter.rank)},
        }
    )


def fits(config: Config, base: BaseFacts, budget_gib: float | None) -> bool:
    """Whether a step without gradient checkpointing fits `budget_gib`; always, where there is no budget."""
    if budget_gib is None:
        return True
    memory = MEMORY[base.family]
    resolution = config.data.resolution or base.native_resolution
    area = (resolution / {"sd1": 512, "sd2": 768, "sdxl": 1024}[base.family]) ** 2
    return memory.fixed + memory.per_row * area * config.train.batch_size <= budget_gib


def memory_advice(config: Config) -> str:
    """What to change after the device ran out of memory, what costs least time first."""
    advice = []
    if config.train.batch_size > 1:
        advice.append("train.batch_size = 1 (same result, the class image in a pass of its own)")
    if not config.train.gradient_checkpointing:
        advice.append("train.gradient_checkpointing = true (same result, about a third slower)")
    if config.adapter.text_encoder:
        advice.append("adapter.text_encoder = false")
    advice.append(f"a data.resolution below {config.data.resolution}")
    advice.append("other programs on the card closed")
    changes = "\n".join(f"  {number}. {text}" for number, text in enumerate(advice, start=1))
    return f"the device ran out of memory; nothing that was saved is lost. Try, in this order:\n{changes}"


def show(config: Config, report: Report) -> None:
    """Tell what `train` would do with `config`; nothing is run or written."""
    inputs = look(config, report)
    config, pictures = resolve(config, inputs, free_gib=None), inputs.pictures
    crops = crops_of(config, pictures.instances.pictures)
    train, adapter = config.train, config.adapter
    assert train.steps is not None, "resolved just above"
    seen = train.steps * train.images_per_step / len(crops)
    lines = {
        "subject": f'"{config.fill("{token} {class}")}", {len(crops)} pictures in {_buckets(crops)}',
        "base": described(inputs.facts),
        "adapter": f"{adapter.targets}, rank {adapter.rank}, alpha {adapter.alpha:g}",
        "prior": _prior(config, pictures),
        "steps": f"{train.steps} of {train.images_per_step} instance images: each picture is seen {seen:.0f} times",
        "memory": "gradient checkpointing " + ("on" if train.gradient_checkpointing else "off"),
        "writes": f"{_state(run_folder(config))} {run_folder(config)}",
    }
    for name, text in lines.items():
        report.event(name, f"{name:<8} {text}")
    for picture, crop in zip(pictures.instances.pictures, crops, strict=True):
        size = f"{picture.width_px}×{picture.height_px}"
        note = ", enlarged" if crop.enlargement > 1 else ""
        text = f"         {picture.path.name}: {size} to {crop.bucket}, {crop.lost_fraction:.0%} cut off{note}"
        report.event("picture", text, name=picture.path.name)


def described(facts: BaseFacts) -> str:
    """A base in one line."""
    return f"{facts.path.name}: {facts.family}, {facts.prediction_type}, {facts.native_resolution} px"


def run_folder(config: Config) -> Path:
    """`run.folder`, or runs/<name> in the current folder."""
    return config.run.folder or Path("runs") / config.name


def _buckets(crops: Sequence[Crop]) -> str:
    counts = Counter(str(crop.bucket) for crop in crops)
    return ", ".join(f"{bucket} ({count})" for bucket, count in counts.most_common())


def _prior(config: Config, pictures: Pictures) -> str:
    if not config.has_prior:
        return "none (prior.loss_weight is 0)"
    weight = f"weight {config.prior.loss_weight:g}"
    if pictures.classes is not None:
        return f"{len(pictures.classes.pictures)} pictures of {config.prior.folder}, {weight}"
    prompts = ", ".join(f'"{config.fill(prompt)}"' for prompt in config.prior.prompts)
    return f"{config.prior.num_images} class images of {prompts}, {weight}"


def _state(folder: Path) -> str:
    if (folder / "summary.json").exists():
        return "nothing, since the run is finished:"
    return "a run that is continued:" if (folder / "config.toml").exists() else "a new run:"
