"""What a run will do, decided before it does anything: every `None` of the config gets its value here.

No torch, except where memory is predicted (`memory.py`), which comes after everything else was found right.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_booth.config.inputs import is_plain_file, reason, why_unreadable
from lora_booth.config.settings import Config
from lora_booth.data.buckets import Bucket, Crop
from lora_booth.data.subject import Pictures, crops_of, find_pictures, tell_small
from lora_booth.errors import ConfigError, LoraBoothError, ModelError, lacks_memory
from lora_booth.models import cards, loading
from lora_booth.models.bases import sources
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.cards import Card
from lora_booth.run import disk, identity
from lora_booth.run.report import Report

if TYPE_CHECKING:
    from lora_booth.planning.budget import Plan
    from lora_booth.planning.duration import Duration
    from lora_booth.planning.memory import Modules, Phase

log = logging.getLogger(__name__)

STEPS_PER_IMAGE = 100
STEP_LIMITS = {"sd1": (400, 1200), "sd2": (400, 1200), "sdxl": (500, 1500)}
"""Fewest and most steps by family, where the recipes of other trainers and the DreamBooth paper meet."""
MAX_WARMUP_STEPS = 100


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the user's pictures and the base's facts."""

    pictures: Pictures
    facts: BaseFacts
    pinned: Mapping[str, Any] = field(default_factory=dict)
    """Of a run that is continued: what it found when it began (`run/identity.py`)."""
    continued: Mapping[str, str] = field(default_factory=dict)
    """What `continued_adapter` gave."""

    def identity(self) -> dict[str, dict[str, str]]:
        """What the result depends on besides the settings: digests of all that is read, by group and name."""
        files_of_base = {"files": sources.fingerprint(self.facts.path)}
        return {"base": files_of_base, **self.pictures.hashes(), "continued_adapter": dict(self.continued)}

    def to_pin(self) -> dict[str, Any]:
        """What a run that begins now keeps, because it may mean something else later."""
        base = self.facts
        found = {"repository": base.repository, "revision": base.revision}
        return {**found, "family": base.family, "prediction_type": base.prediction_type, **self.pinned}


def look(config: Config, report: Report, *, needs_weights: bool = True) -> Inputs:
    """Find and check pictures and base; what is wrong with them is told before torch or a model is loaded.

    Without `needs_weights`, those of a base that is not on this machine are not downloaded. Raises DataError or
    ModelError.
    """
    pictures = find_pictures(config, report)
    stored = identity.read(run_folder(config))
    pinned = {} if stored is None else stored["pinned"]
    home = sources.Found(Path(), pinned.get("repository"), pinned.get("revision"))
    facts = loading.facts(config.model, needs_weights=needs_weights, pinned=home)
    if config.objective.zero_terminal_snr and facts.prediction_type == "epsilon":
        raise ConfigError(
            f"objective.zero_terminal_snr is true, but {facts.path.name} predicts epsilon, which says nothing at pure "
            "noise; set it to false, or choose a v-prediction base."
        )
    return Inputs(pictures, facts, pinned, continued_adapter(config))


def continued_adapter(config: Config) -> dict[str, str]:
    """SHA-256 by name of the adapter that `adapter.continue_from` names, and of PEFT's config beside it.

    Raises ModelError when it cannot be read.
    """
    path = config.adapter.continue_from
    if path is None:
        return {}
    why = why_unreadable(path)
    if why is not None:
        raise ModelError(f"adapter.continue_from {path} cannot be read: {why}; correct it.")
    beside = path.with_name("adapter_config.json")
    return {p.name: disk.sha256(p) for p in (path, beside) if p == path or is_plain_file(p)}


def check(config: Config, inputs: Inputs, *, device_type: str) -> Modules | None:
    """The base's modules without weights, with the adapter of `config`, in which no fault was found; None where a
    version of torch cannot make them, which is told and keeps nobody from training.

    Raises ConfigError or ModelError for what would else be told after class images were drawn.
    """
    from lora_booth.planning import checks, memory

    config = filled(config, inputs)
    try:
        modules = memory.Modules.of(config, inputs.facts)
    except LoraBoothError:
        raise
    except Exception as error:
        log.warning("The config cannot be tried beforehand (%s: %s).", type(error).__name__, error)
        return None
    checks.check(config, modules, device_type=device_type)
    return modules


def resolve(
    config: Config, inputs: Inputs, report: Report, *, free_gib: float | None, modules: Modules | None = None
) -> Config:
    """`config` with every open choice made. `free_gib` is the device's free memory, None on a CPU.

    Within a budget, or free memory, `budget.choose` settles how steps are computed and pictures drawn, and what it
    chose is told; without one nothing is traced. `modules`: what `check` gave. Raises ConfigError or ModelError for an
    adapter that the base cannot take.
    """
    config = filled(config, inputs)
    tell_small(config, inputs.pictures, report)
    budget_gib = config.memory.budget_gib or free_gib
    if budget_gib is not None:
        config = _within(config, inputs, budget_gib, report, modules)
    return config.with_values({"train": {"gradient_checkpointing": config.train.gradient_checkpointing or 0.0}})


def filled(config: Config, inputs: Inputs) -> Config:
    """`config` with every choice made that does not depend on memory."""
    train, data, base = config.train, config.data, inputs.facts
    num_images = len(inputs.pictures.instances.pictures)
    low, high = STEP_LIMITS[base.family]
    steps = train.steps or min(max(STEPS_PER_IMAGE * num_images, low), high)
    warmup = config.optimizer.warmup_steps
    return config.with_values(
        {
            "data": {
                "resolution": data.resolution or base.native_resolution,
                "bucket_step": data.bucket_step or base.bucket_step,
            },
            "train": {"steps": steps, "save_every_steps": train.save_every_steps or max(1, steps // 5)},
            "optimizer": {"warmup_steps": min(MAX_WARMUP_STEPS, steps // 20) if warmup is None else warmup},
        }
    )


def _within(config: Config, inputs: Inputs, budget_gib: float, report: Report, modules: Modules | None) -> Config:
    """`config` with what `budget.choose` finds, told to the user."""
    from lora_booth.planning import budget, memory

    try:
        bucket = _largest_bucket(config, inputs.pictures)
        found = budget.choose(config, inputs.facts, budget_gib, bucket=bucket, modules=modules)
    except LoraBoothError:
        raise
    except Exception as error:  # whatever a version of torch cannot trace must not keep anybody from training
        log.warning(
            "Memory cannot be predicted (%s: %s); saving as much of it as possible.", type(error).__name__, error
        )
        is_set = config.train.gradient_checkpointing is not None
        return config if is_set else config.with_values({"train": {"gradient_checkpointing": 1.0}})
    gib = memory.needed_gib(found.phases)
    report.event(
        "memory", f"memory: {gib:.1f} of {budget_gib:.1f} GiB predicted, with {budget.spelled(found.changes)}", gib=gib
    )
    if found.too_large:
        steps = "; ".join(f"{lever.settings} ({lever.price})" for lever in budget.levers(_changed(config, found)))
        report.warn(f"{_excess(found)}, so the run may end for want of memory. What would help: {steps}.")
    return _changed(config, found)


def _changed(config: Config, found: Plan) -> Config:
    return config.with_values({section: dict(pairs) for section, pairs in found.changes.items()})


def _excess(found: Plan) -> str:
    """By how much a plan does not fit, in one clause."""
    from lora_booth.planning import memory

    largest = max(found.too_large, key=lambda phase: phase.gib)
    needed = memory.needed_gib([largest])
    return f'"{largest.name}" is predicted to need {needed:.1f} of {found.budget_gib:.1f} GiB'


def memory_advice(config: Config, facts: BaseFacts | None = None) -> str:
    """What to change after the device ran out of memory, what costs least time first.

    With `facts` each change has its predicted saving. Never raises: the error that is being told matters more.
    """
    advice = [f"{setting} ({price})" for setting, price in _levers(config, facts)]
    advice.append("other programs on the card closed")
    changes = "\n".join(f"  {number}. {text}" for number, text in enumerate(advice, start=1))
    return f"the device ran out of memory; nothing that was saved is lost. Try, in this order:\n{changes}"


def _levers(config: Config, facts: BaseFacts | None) -> list[tuple[str, str]]:
    """Setting and price of each lever, with its saving where that can be traced."""
    from lora_booth.planning import budget

    found = budget.levers(config)
    if facts is not None:
        try:
            found = budget.savings(config, facts)
        except Exception as error:  # see `memory_advice`
            log.debug("savings cannot be traced: %s", error)
    return [(lever.settings, lever.told) for lever in found]


def show(config: Config, report: Report, card: Card | None = None) -> None:
    """Tell what `train` would do with `config`; nothing is run or written. Memory and time come last: they need torch.

    `card`: the one to plan for, whose memory is the budget where none is set; by default the one that is here.
    """
    inputs = look(config, report, needs_weights=False)
    config, pictures = filled(config, inputs), inputs.pictures
    tell_small(config, pictures, report)
    crops = crops_of(config, pictures.instances.pictures)
    train, adapter = config.train, config.adapter
    assert train.steps is not None, "filled just above"
    seen = train.steps * train.images_per_step / len(crops)
    lines = {
        "subject": f'"{config.fill("{token} {class}")}", {len(crops)} pictures in {_buckets(crops)}',
        "base": described(config, inputs.facts),
        "adapter": f"{adapter.targets}, rank {adapter.rank}, alpha {adapter.alpha or adapter.rank:g}",
        "prior": _prior(config, pictures),
        "steps": f"{train.steps} of {train.images_per_step} instance images: each picture is seen {seen:.0f} times",
        "writes": f"{_state(config)} {run_folder(config)}",
    }
    for name, text in lines.items():
        report.event(name, f"{name:<8} {text}")
    for picture, crop in zip(pictures.instances.pictures, crops, strict=True):
        size = f"{picture.width_px}×{picture.height_px}"
        note = ", enlarged" if crop.enlargement > 1 else ""
        text = f"         {picture.path.name}: {size} to {crop.bucket}, {crop.lost_fraction:.0%} cut off{note}"
        report.event("picture", text, name=picture.path.name)
    try:
        _show_prediction(config, inputs, report, card)
    except LoraBoothError:
        raise
    except Exception as error:  # as in `_within`: what cannot be traced must not keep anybody from planning
        if lacks_memory(error):
            raise
        report.warn(f"memory and time cannot be predicted ({reason(error)}); `train` will save as much as it can.")


def _show_prediction(config: Config, inputs: Inputs, report: Report, card: Card | None) -> None:
    """The predicted memory part by part; with a budget also what was chosen, and where it does not fit, what helps.

    Then the time: on `card`, or the one that is here, or on usual ones with enough memory.
    """
    from lora_booth.models import devices
    from lora_booth.planning import budget, duration, memory

    bucket, here = _largest_bucket(config, inputs.pictures), devices.here(config.memory.device)
    config = devices.without_moving(config, here) if card is None else config
    budget_gib = config.memory.budget_gib or (devices.free_gib(here) if card is None else card.memory_gib)
    checked = check(config, inputs, device_type=here.type)
    if budget_gib is None:
        modules, notes = checked or memory.Modules.of(config, inputs.facts), []
        phases = modules.phases(config, bucket)
    else:
        found = budget.choose(config, inputs.facts, budget_gib, bucket=bucket, modules=checked)
        config, modules, phases = _changed(config, found), found.modules, found.phases
        notes = [f"for {budget_gib:g} GiB: {reason}" for reason in found.reasons]
        if found.too_large:
            left = budget.savings(config, inputs.facts, bucket=bucket)
            notes += [f"{_excess(found)}; what would help, in this order:"]
            notes += [f"  {lever.settings} ({lever.told})" for lever in left]
    gib = memory.needed_gib(phases)
    outside = f"{memory.OUTSIDE_GIB:g} of them for the driver's context and workspaces (assumed)"
    head = f"predicted for a CUDA card, not measured: {gib:.1f} GiB, {outside}"
    report.event("memory", f"memory   {head}", gib=round(gib, 3))
    for line in [*_table(phases), *notes]:
        report.event("memory", f"         {line}")
    run = duration.predict(modules, config, inputs.pictures, bucket)
    known = devices.card(here) if card is None else card
    for fault in devices.faults_of(config, here) if card is None else ():
        report.warn(f"here this run would be refused: {fault}")
    usual = [other for other in map(cards.named, cards.USUAL) if other.memory_gib >= gib]
    _show_time(run, usual if known is None else [known], report)


def _show_time(run: Duration, shown: Sequence[Card], report: Report) -> None:
    """The least time that a run takes, a line for each card; nothing where there is none."""
    if not shown:
        return
    report.event(
        "time", "time     at least, computing at a card's peak rates; class images are drawn once for all runs"
    )
    columns = ("a step", "class images", "training", "other", "in all")
    report.event("time", f"         {'card':<18}" + "".join(f"{column:>14}" for column in columns))
    for card in shown:
        seconds = (run.class_images_s(card), run.training_s(card), run.other_s(card), run.total_s(card))
        cells = (f"{run.step_s(card):.3f} s", *(str(timedelta(seconds=round(s))) for s in seconds))
        line = f"         {card.name:<18}" + "".join(f"{cell:>14}" for cell in cells)
        report.event("time", line, card=card.name, step_s=round(run.step_s(card), 4), in_all_s=round(seconds[-1], 1))


def _table(phases: Sequence[Phase]) -> list[str]:
    """Aligned lines: a part each, a column for each phase, in GiB."""
    parts = list(dict.fromkeys(part for phase in phases for part in phase.parts))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<14}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [line("GiB", (phase.name for phase in phases))]
    for part in parts:
        found = (phase.parts.get(part) for phase in phases)
        lines.append(line(part, ("" if size is None else f"{size / 2**30:.2f}" for size in found)))
    return [*lines, line("in all", (f"{phase.gib:.2f}" for phase in phases))]


def _largest_bucket(config: Config, pictures: Pictures) -> Bucket:
    buckets = [crop.bucket for crop in crops_of(config, pictures.instances.pictures)]
    return max(buckets, key=lambda bucket: bucket.width_px * bucket.height_px)


def described(config: Config, facts: BaseFacts) -> str:
    """A base in one line."""
    name = facts.path.name if sources.is_local(config.model) else config.model.base
    if facts.repository is not None:
        name += f" ({facts.repository} at {(facts.revision or '?')[:8]})"
    return f"{name}: {facts.family}, {facts.prediction_type}, {facts.native_resolution} px"


def run_folder(config: Config) -> Path:
    """`run.folder`, or runs/<name> in the current folder."""
    return config.run.folder or Path("runs") / config.name


def is_begun(config: Config) -> bool:
    """Whether the run folder of `config` holds a run."""
    return os.path.exists(run_folder(config) / "config.toml")


def is_finished(config: Config) -> bool:
    """Whether the run folder of `config` holds a finished run."""
    return os.path.exists(run_folder(config) / "summary.json")


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


def _state(config: Config) -> str:
    if is_finished(config):
        return "nothing, since the run is finished:"
    return "a run that is continued:" if is_begun(config) else "a new run:"
