"""An adapter of another rank, with how near it is.

Any kind of adapter file in, the nearest plain LoRA out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_booth.adapter.decompose import Approximation, approximate, require_choice, tell_errors, whole_error
from lora_booth.adapter.files import embedding, kohya, storage
from lora_booth.adapter.files.family import family_of
from lora_booth.adapter.files.metadata import base_name, carried, network_fields
from lora_booth.adapter.weights import AdapterWeights, AnyWeights, Dense, LowRank, find_module, uses_dora, weight_change
from lora_booth.config import names
from lora_booth.config.toml import base_named
from lora_booth.errors import ModelError
from lora_booth.models import loading
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.families.components import load_component
from lora_booth.run.number_types import FLOATS, NAMES
from lora_booth.run.report import Report, Silent
from lora_booth.run.safetensors import read_layout

_DTYPES = {stored: NAMES.get(dtype, "fp32") for stored, dtype in FLOATS.items()}

Parts = dict[str, dict[str, Approximation]]
"""Component to module path to what its layer becomes."""


@torch.no_grad()
def resize(
    *,
    file: Path,
    out: Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    format: str | None = None,
    dtype: str | None = None,
    leave_out: Sequence[str] = (),
    report: Report | None = None,
) -> Path:
    """Write the adapter in `file` as a plain LoRA of `rank`, or of the smallest ranks that keep `energy` of each layer.

    Layers of plain LoRA whose rank is low enough keep their numbers; of all others the best approximation is written.
    `out`: default `<stem>_rank8.safetensors` or `<stem>_energy95.safetensors` beside the source. `base`: as
    `model.base`; needed for DoRA, whose change depends on the base's weights. `format` and `dtype`: default as in the
    source; a source in PEFT's naming becomes a diffusers file, one in ComfyUI's a kohya file. `leave_out`: as in
    storage.contents. Reports the relative error of each block, that of
    rounding to `dtype` apart. Returns the file written.
    Raises ConfigError for settings that contradict and an `out` that exists, ModelError for a source that is no sound
    adapter, for changes of vectors, and DoRA without a base or with another one.
    """
    report = report or Silent()
    require_choice(rank, energy)
    out = out or file.with_name(f"{file.stem}_{_size_name(rank, energy)}.safetensors")
    _check(out, format, dtype)
    weights, header = storage.read_all([file], leave_out, report)[0], storage.read_metadata(file)
    storage.require_matrices(file.name, weights)
    embedding.remind([file], report)
    naming = storage.detect(file)
    format = format or {"peft": "diffusers", "comfyui": "kohya"}.get(naming, naming)
    dtype = dtype or _stored_dtype(file)
    facts = _facts(file, weights, base, report)
    parts = _approximated(weights, facts, rank, energy, report)
    tell_errors(parts, report)
    result = {component: {path: part.low_rank for path, part in layers.items()} for component, layers in parts.items()}
    family = facts.family if facts else family_of(weights, header) or "sd1"  # else its names are those of either
    fields = (
        carried(header) | network_fields(result) | {"ss_network_module": "networks.lora", "ss_output_name": out.stem}
    )
    fields["lora_booth.resized"] = _note(file, parts, rank, energy, base)
    storage.FORMATS[format].write(out, result, family, storage.DTYPES[dtype], fields)
    if format == "kohya":
        for fault in kohya.faults(result, family, storage.DTYPES[dtype]):
            report.warn(fault)
    _tell_kept(weights, result, out, report)
    return out


def _check(out: Path, format: str | None, dtype: str | None) -> None:
    names.require_new(out, "--out")
    storage.require_choices(format and [format], dtype)


def _size_name(rank: int | None, energy: float | None) -> str:
    return f"rank{rank}" if energy is None else f"energy{100 * energy:g}"


def _stored_dtype(file: Path) -> str:
    """The key of `storage.DTYPES` for the source's factors; fp16 for 8-bit types."""
    found = [entry.dtype for entry in read_layout(file).entries.values() if len(entry.shape) > 1]
    return _DTYPES.get(max(found, key=found.count), "fp16") if found else "fp32"


def _facts(file: Path, weights: AnyWeights, base: str | None, report: Report) -> BaseFacts | None:
    """What the base is, where the adapter needs it."""
    if not uses_dora(weights):
        if base is not None:
            report.warn(f"{file.name} has no DoRA layer, so its changes are known without --base {base}.")
        return None
    if base is None:
        raise ModelError(
            f"{file.name} is DoRA, whose change depends on the base's weights; name the base that it was trained on "
            "with --base."
        )
    facts = loading.facts(base_named(base))
    strange = weights.keys() - set(facts.architecture.adaptable)
    if strange:
        raise ModelError(
            f"{file.name} changes {min(strange)}, which {base}, a {facts.family} model, lacks; name its own base."
        )
    return facts


def _approximated(
    weights: AnyWeights, facts: BaseFacts | None, rank: int | None, energy: float | None, report: Report
) -> Parts:
    parts: Parts = {}
    done, total = 0, sum(map(len, weights.values()))
    for component, layers in weights.items():
        needs_base = uses_dora({component: layers})
        module = load_component(facts, component) if facts and needs_base else None
        for path, update in layers.items():
            change = _change(f"{component}.{path}", path, update, module)
            part = approximate(change, rank=rank, energy=energy)
            parts.setdefault(component, {})[path] = _finished(update, part, rank)
            done += 1
            report.progress("layers", done, total)
    return parts


def _change(name: str, path: str, update: LowRank | Dense, module: nn.Module | None) -> LowRank | Dense | Tensor:
    """The update itself, or for DoRA the change it makes of the base's weight."""
    if update.magnitude is None:
        return update
    assert module is not None, "DoRA without a base was refused"
    try:
        return weight_change(find_module(module, path).get_parameter("weight"), update)
    except (AttributeError, ModelError) as error:
        raise ModelError(
            f"{name} does not fit the base: {error} Name the base that the adapter was made for."
        ) from error


def _finished(update: LowRank | Dense, part: Approximation, rank: int | None) -> Approximation:
    """The source's own numbers where their rank is low enough; else the approximation with the source's alpha.

    That alpha is kept since a portable file has one for all: layers that keep their numbers then keep their bits.
    """
    if not isinstance(update, LowRank):
        return part
    if update.magnitude is None and update.rank <= (part.low_rank.rank if rank is None else rank):
        return Approximation(update, 0.0, part.norm)
    alpha = update.scale * update.rank
    return replace(part, low_rank=_with_alpha(part.low_rank, alpha)) if alpha > 0 else part


def _with_alpha(low_rank: LowRank, alpha: float) -> LowRank:
    """The same update with scale = `alpha` / rank."""
    scale = alpha / low_rank.rank
    root = (low_rank.scale / scale) ** 0.5
    return LowRank(low_rank.down * root, low_rank.up * root, scale)


def _note(file: Path, parts: Parts, rank: int | None, energy: float | None, base: str | None) -> str:
    error = whole_error(part for layers in parts.values() for part in layers.values())
    choice = {"rank": rank} if energy is None else {"energy": energy}
    origin = {} if base is None else {"base": base_name(base)}
    return json.dumps({"file": file.name, **choice, **origin, "error": round(error, 6)})


def _tell_kept(weights: AnyWeights, result: AdapterWeights, out: Path, report: Report) -> None:
    total = sum(map(len, weights.values()))
    kept = sum(
        result[component][path] is update for component, layers in weights.items() for path, update in layers.items()
    )
    report.event("resized", f"{out}: {total - kept} of {total} layers have a new rank", path=str(out), kept=kept)
