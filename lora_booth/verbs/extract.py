"""An adapter out of two models: the low-rank form of what fine-tuning changed.

Also how much of the change it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_booth.adapter.decompose import Approximation, approximate, require_choice, tell_errors, whole_error
from lora_booth.adapter.files import kohya, storage
from lora_booth.adapter.files.metadata import base_fields, base_name, network_fields
from lora_booth.adapter.inject import target_modules
from lora_booth.adapter.weights import plain_path
from lora_booth.config import names
from lora_booth.config.toml import base_named
from lora_booth.errors import ModelError
from lora_booth.models import loading
from lora_booth.models.bases.architectures import is_text
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import load_component
from lora_booth.run.report import Report, Silent

TEXT_TARGETS = r"regex:(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
"""Every layer of a text encoder that all programs have a name for."""


@dataclass
class Difference:
    """How two models differ. `parts`: component to module path to the low-rank change of a target layer. `outside`:
    `component.parameter` of what is no target to the squared norm of its change."""

    parts: dict[str, dict[str, Approximation]] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def extract(
    *,
    base: str,
    tuned: str,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    targets: str = "all-linear+conv",
    text_encoders: bool = True,
    format: str = "kohya",
    dtype: str = "fp16",
    report: Report | None = None,
) -> Path:
    """Write `out`, an adapter that makes `base` nearly `tuned`, of `rank` or of the smallest ranks that keep `energy`.

    `base`, `tuned`: as `model.base`, of one family; of a hub id the full-precision weights are fetched. `targets`: as
    `adapter.targets`, for the UNet; of the text encoders attention and mlp. Layers that did not change are left out;
    VAEs are not compared, since no adapter holds one.
    Reports the relative error of each block, and the share of the change that no target layer holds.
    Memory: both UNets in the types they are stored in. Returns `out`.
    Raises ConfigError for settings that contradict and an `out` that exists, ModelError for models that are not found,
    not alike, not finite, or the same.
    """
    report = report or Silent()
    require_choice(rank, energy)
    _check(out, format, dtype)
    named = [base_named(name, at, precision="fp32") for name, at in ((base, "--base"), (tuned, "--tuned"))]
    facts, tuned_facts = map(loading.facts, named)
    _require_alike(facts, tuned_facts, report)
    found = Difference()
    row = facts.architecture
    for component in row.adaptable if text_encoders else (row.denoiser,):
        pair = load_component(facts, component), load_component(tuned_facts, component)
        for is_target, name, change in _changes(component, pair, targets, row.targets, report):
            if is_target:
                found.parts.setdefault(component, {})[name] = approximate(change, rank=rank, energy=energy)
            else:
                found.outside[f"{component}.{name}"] = float(change.double().square().sum())
    _require_difference(found, base, tuned, text_encoders=text_encoders)
    tell_errors(found.parts, report)
    note = {"base": base_name(base), "tuned": base_name(tuned), "rank": rank, "energy": energy, "targets": targets}
    note |= {"error": round(_error(found), 6), "outside": round(_tell_outside(found, report), 6)}
    _write(out, found, facts, note, format=format, dtype=dtype, report=report)
    return out


def _check(out: Path, format: str, dtype: str) -> None:
    names.require_new(out, "--out")
    storage.require_choices([format], dtype)


def _require_alike(facts: BaseFacts, tuned: BaseFacts, report: Report) -> None:
    if facts.family != tuned.family:
        raise ModelError(
            f"{tuned.path} is a {tuned.family} model, but the base {facts.path} is {facts.family}; name the model that "
            "the fine-tuning began with."
        )
    if facts.prediction_type != tuned.prediction_type:
        report.warn(
            f"{tuned.path} predicts {tuned.prediction_type}, the base {facts.prediction_type}: with the adapter the "
            f"base predicts {tuned.prediction_type}, and programs must be told so."
        )


def _changes(
    component: str, pair: tuple[nn.Module, nn.Module], targets: str, presets: Mapping[str, str], report: Report
) -> Iterator[tuple[bool, str, Tensor]]:
    """Of every parameter that differs: if it is a target's weight, its name, its change in float32.

    The name is the module path of a target, else that of the parameter.
    Raises ModelError when the modules are not built alike or the change is not finite.
    """
    before, after = ({plain_path(name): p for name, p in module.named_parameters()} for module in pair)
    layers = target_modules(pair[0], TEXT_TARGETS if is_text(component) else targets, presets=presets)
    weights = {f"{plain_path(layer)}.weight" for layer in layers}
    strange = [name for name in before | after if _shape(before, name) != _shape(after, name)]
    if strange:
        raise ModelError(
            f"The two models are not built alike: {component}.{strange[0]} is {_shape(before, strange[0])} in the base "
            f"and {_shape(after, strange[0])} in the fine-tuned one; name the model that the fine-tuning began with."
        )
    for done, (name, parameter) in enumerate(before.items(), start=1):
        report.progress(component, done, len(before))
        if _is_same(parameter, after[name]):
            continue
        change = after[name].float() - parameter.float()
        if not torch.isfinite(change).all():
            raise ModelError(f"{component}.{name} holds NaN or infinity in one of the models; download that one again.")
        is_target = name in weights
        yield is_target, name.removesuffix(".weight") if is_target else name, change


def _shape(parameters: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(parameters[name].shape) if name in parameters else None


def _is_same(before: Tensor, after: Tensor) -> bool:
    """True when the weights are equal, or one is the other rounded to 16 bits: then storing made the difference."""
    if torch.equal(before.float(), after.float()):
        return True
    for dtype in (torch.float16, torch.bfloat16):
        rounded = before.to(dtype)
        if torch.equal(rounded, after.to(dtype)):
            return any(torch.equal(rounded.float(), tensor.float()) for tensor in (before, after))
    return False


def _require_difference(found: Difference, base: str, tuned: str, *, text_encoders: bool) -> None:
    if found.parts:
        return
    where = "UNets and text encoders" if text_encoders else "UNets"
    if not found.outside:
        raise ModelError(f"Nothing differs between the {where} of {base} and {tuned}; name two different models.")
    raise ModelError(
        f"Between the {where} of {base} and {tuned} only {len(found.outside)} tensors differ, first "
        f"{next(iter(found.outside))}, and none of them is a target; name other --targets."
    )


def _error(found: Difference) -> float:
    """The relative error of all target layers as one."""
    return whole_error(part for layers in found.parts.values() for part in layers.values())


def _tell_outside(found: Difference, report: Report) -> float:
    """The share of the squared norm of the whole change that lies in no target layer, which is reported too."""
    outside = sum(found.outside.values())
    inside = sum(part.norm**2 for layers in found.parts.values() for part in layers.values())
    share = outside / (inside + outside)
    if found.outside:
        largest = max(found.outside, key=lambda name: found.outside[name])
        text = (
            f"{share:.3%} of the change (squared norm) is not in the adapter: it lies in {len(found.outside)} tensors "
        )
        report.event("outside", f"{text}that are no targets, first {largest}", share=share, largest=largest)
    return share


def _write(
    out: Path,
    found: Difference,
    facts: BaseFacts,
    note: Mapping[str, object],
    *,
    format: str,
    dtype: str,
    report: Report,
) -> None:
    weights = {name: {path: part.low_rank for path, part in layers.items()} for name, layers in found.parts.items()}
    fields = base_fields(facts.family, facts.prediction_type, out.stem) | network_fields(weights)
    fields |= {
        "modelspec.resolution": f"{facts.native_resolution}x{facts.native_resolution}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "ss_sd_model_name": str(note["base"]),
        "lora_booth.extracted": json.dumps({key: value for key, value in note.items() if value is not None}),
    }
    storage.FORMATS[format].write(out, weights, facts.family, storage.DTYPES[dtype], fields)
    if format == "kohya":
        for fault in kohya.faults(weights, facts.family, storage.DTYPES[dtype]):
            report.warn(fault)
    report.event("extracted", f"{out}: {sum(map(len, weights.values()))} layers", path=str(out))
