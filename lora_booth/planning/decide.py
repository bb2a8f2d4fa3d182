"""What a run will do, decided before it begins: every `None` gets its value.

No torch, except where memory is predicted (`memory.py`), which comes after everything else was found right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_booth.config import captions
from lora_booth.config.config import Config
from lora_booth.config.inputs import is_plain_file, why_unreadable
from lora_booth.config.resolved import Filled, Resolved
from lora_booth.data.buckets import Bucket
from lora_booth.data.subject import Pictures, crops_of, find_pictures, tell_small
from lora_booth.errors import ConfigError, LoraBoothError, ModelError
from lora_booth.models import abilities, loading
from lora_booth.models.at_once import PICTURES_AT_ONCE
from lora_booth.models.bases import sources
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.planning.naming import tell_token
from lora_booth.run import disk, identity
from lora_booth.run.report import Report
from lora_booth.training import trackers

if TYPE_CHECKING:
    import torch

    from lora_booth.planning.budget import Plan
    from lora_booth.planning.memory import Modules

log = logging.getLogger(__name__)

STEPS_PER_IMAGE = 100
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
    """Find and check pictures and base; what is wrong with them, or odd about the token, is told before torch or a
    model is loaded.

    Without `needs_weights`, those of a base that is not on this machine are not downloaded. Raises DataError or
    ModelError.
    """
    trackers.require(config)
    pictures = find_pictures(config, report)
    stored = identity.read(config.folder)
    pinned = {} if stored is None else stored["pinned"]
    home = sources.Found(Path(), pinned.get("repository"), pinned.get("revision"))
    facts = loading.facts(config.model, needs_weights=needs_weights, pinned=home)
    _require_objective(config, facts)
    tell_token(config, pictures.instances.pictures, facts, report)
    return Inputs(pictures, facts, pinned, continued_adapter(config))


def _require_objective(config: Config, facts: BaseFacts) -> None:
    """Raises ConfigError for a setting of [objective] that has no meaning for what the base predicts."""
    if config.objective.zero_terminal_snr and facts.prediction_type == "epsilon":
        raise ConfigError(
            f"objective.zero_terminal_snr is true, but {facts.path.name} predicts epsilon, which says nothing at pure "
            "noise; set it to false, or choose a v-prediction base."
        )
    of_diffusion = {
        "zero_terminal_snr": config.objective.zero_terminal_snr,
        "min_snr_gamma": config.objective.min_snr_gamma is not None,
        "debiased": config.objective.debiased,
    }
    is_set = [setting for setting, is_on in of_diffusion.items() if is_on]
    if is_set and facts.prediction_type == "flow":
        raise ConfigError(
            f"objective.{is_set[0]} is set, but {facts.path.name} is a rectified flow, whose levels have no SNR to "
            f"weigh or rescale; leave objective.{is_set[0]} out."
        )


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


def check(config: Filled, *, device_type: str | None, facts: BaseFacts) -> Modules | None:
    """The base's modules without weights, with the adapter of `config`, in which no fault was found; None where
    this version of torch cannot build them, which is logged and does not stop training.

    `device_type`: as `checks.check` has it.

    Raises ConfigError or ModelError for what would else be told after class images were drawn.
    """
    from lora_booth.planning import checks, memory

    try:
        modules = memory.Modules.of(config, facts, is_kept=True)
    except LoraBoothError:
        raise
    except Exception as error:
        log.warning("The config cannot be tried beforehand (%s: %s).", type(error).__name__, error)
        return None
    checks.check(config, modules, device_type=device_type)
    modules.counts.keep()
    return modules


def resolve(
    config: Config,
    inputs: Inputs,
    report: Report,
    *,
    device: torch.device,
    free_gib: float | None,
    modules: Modules | None = None,
) -> Resolved:
    """`config` with every choice made, for a run on `device`. `free_gib`: its free memory, None on a CPU.

    Within a budget, or free memory, `budget.choose` settles how steps are computed and pictures drawn, and what it
    chose is told; without one nothing is traced. `modules`: what `check` gave. Raises ConfigError or ModelError for an
    adapter that the base cannot take.
    """
    from lora_booth.models import devices

    decided = filled(abilities.decided(config, devices.abilities(device)), inputs)
    tell_small(decided, inputs.pictures, report)
    budget_gib = decided.memory.budget_gib or free_gib
    if budget_gib is not None:
        decided = _within(decided, inputs, budget_gib, report, modules)
    return completed(decided)


def completed(config: Filled) -> Resolved:
    """`config`, decided for a device, with what is usual where nothing was chosen for its memory."""
    values, memory, share = config.model_dump(), config.memory, config.train.gradient_checkpointing
    values["train"]["gradient_checkpointing"] = share or 0.0
    values["memory"] |= {
        "pictures_at_once": memory.pictures_at_once or PICTURES_AT_ONCE,
        "tiled_decoding": bool(memory.tiled_decoding),
        "offload_activations": bool(memory.offload_activations),
        "offload_denoiser": bool(memory.offload_denoiser),
    }
    return Resolved.model_validate(values)


def filled(config: Config, inputs: Inputs) -> Filled:
    """`config` with every choice made that does not depend on a device or its memory."""
    train, data, base = config.train, config.data, inputs.facts
    num_images = len(inputs.pictures.instances.pictures)
    low, high = base.architecture.step_limits
    steps = train.steps or min(max(STEPS_PER_IMAGE * num_images, low), high)
    warmup = config.optimizer.warmup_steps
    values = config.model_dump()
    values["data"] |= {
        "resolution": data.resolution or base.native_resolution,
        "bucket_step": data.bucket_step or base.bucket_step,
    }
    if config.has_model_prior:
        values["prior"]["captions"] = config.prior.captions or captions.generic()
    values["train"] |= {"steps": steps, "save_every_steps": train.save_every_steps or max(1, steps // 5)}
    values["optimizer"]["warmup_steps"] = min(MAX_WARMUP_STEPS, steps // 20) if warmup is None else warmup
    return Filled.model_validate(values)


def _within(config: Filled, inputs: Inputs, budget_gib: float, report: Report, modules: Modules | None) -> Filled:
    """`config` with what `budget.choose` finds, told to the user."""
    from lora_booth.planning import budget, memory

    try:
        bucket = largest_bucket(config, inputs.pictures)
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
        steps = "; ".join(f"{lever.settings} ({lever.price})" for lever in budget.levers(with_changes(config, found)))
        report.warn(f"{excess(found)}, so the run may end for want of memory. What would help: {steps}.")
    return with_changes(config, found)


def with_changes(config: Filled, found: Plan) -> Filled:
    """`config` computed as `found` says."""
    return config.with_values(found.changes)


def excess(found: Plan) -> str:
    """By how much a plan does not fit, in one clause."""
    from lora_booth.planning import memory

    largest = max(found.too_large, key=lambda phase: phase.gib)
    needed = memory.needed_gib([largest])
    return f'"{largest.name}" is predicted to need {needed:.1f} of {found.budget_gib:.1f} GiB'


def memory_advice(config: Filled, facts: BaseFacts | None = None) -> str:
    """What to change after the device ran out of memory, what costs least time first.

    With `facts` each change has its predicted saving. Never raises: the error that is being told matters more.
    """
    advice = [f"{setting} ({price})" for setting, price in _levers(config, facts)]
    advice.append("other programs on the card closed")
    changes = "\n".join(f"  {number}. {text}" for number, text in enumerate(advice, start=1))
    return f"the device ran out of memory; nothing that was saved is lost. Try, in this order:\n{changes}"


def _levers(config: Filled, facts: BaseFacts | None) -> list[tuple[str, str]]:
    """Setting and price of each lever, with its saving where that can be traced."""
    from lora_booth.planning import budget

    found = budget.levers(config)
    if facts is not None:
        try:
            found = budget.savings(config, facts)
        except Exception as error:  # see `memory_advice`
            log.debug("savings cannot be traced: %s", error)
    return [(lever.settings, lever.told) for lever in found]


def largest_bucket(config: Filled, pictures: Pictures) -> Bucket:
    """The size with the most pixels that a picture of the run is trained at."""
    buckets = [crop.bucket for crop in crops_of(config, pictures.instances.pictures)]
    return max(buckets, key=lambda bucket: bucket.width_px * bucket.height_px)


def described(config: Config, facts: BaseFacts) -> str:
    """A base in one line."""
    name = facts.path.name if sources.is_local(config.model) else config.model.base
    if facts.repository is not None:
        name += f" ({facts.repository} at {(facts.revision or '?')[:8]})"
    return f"{name}: {facts.family}, {facts.prediction_type}, {facts.native_resolution} px"
