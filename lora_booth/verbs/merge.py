"""Adapters made part of a base, or several of them made one.

Into a base: every change is computed in float32 against the original weight, the changes of several adapters are added
up, and the sum is rounded once to the type of the tensor. So the order of the adapters does not matter. The result has
the layout of the base, and is written in pieces: a checkpoint of 7 GB needs the memory of one layer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_booth.adapter.combine import Adapter, Recipe, combine
from lora_booth.adapter.decompose import tell_errors
from lora_booth.adapter.files import combined, embedding, kohya, storage
from lora_booth.adapter.weights import AnyWeights, Dense, LowRank, misfit, weight_change
from lora_booth.config import names
from lora_booth.config.inputs import is_plain_file, require_plain_file
from lora_booth.config.toml import base_named
from lora_booth.errors import ConfigError, ModelError, NumericError
from lora_booth.models.bases.identify import BaseFacts, identify
from lora_booth.models.bases.sources import PICKLES, read_json, resolve, weighted
from lora_booth.models.bases.weight_names import Place, find, weight_sets
from lora_booth.run import disk
from lora_booth.run.number_types import FLOATS
from lora_booth.run.report import Report, Silent
from lora_booth.run.safetensors import Layout, read_layout, rewrite

QUANTISED_MARKS = (
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_scale",
    ".scale_weight",
    "scaled_fp8",
    ".scales",
    ".qweight",
)
"""Ends of keys that only quantised weights bring (bitsandbytes, ComfyUI's scaled fp8, GPTQ)."""
MAX_STRENGTH = 1e6
"""A larger number is a slip, and float32 need not hold what it multiplies."""
NOT_COPIED = (*PICKLES, ".msgpack", ".onnx", ".h5")
"""Files of a base folder that are left out: pickles, and weights that the adapters were not merged into."""


@dataclass(frozen=True)
class Change:
    """What one adapter does to one layer, and where the layer's weight lies in its tensor."""

    layer: str
    place: Place
    update: LowRank | Dense
    strength: float


Changes = dict[Path, dict[str, list[Change]]]
"""File to tensor key to what is done to it."""


def merge_into_base(
    *,
    base: str,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    leave_out: Sequence[str] = (),
    report: Report | None = None,
) -> Path:
    """Write `out`, a new folder or `.safetensors` file in the layout of `base`, with the adapters in its weights.

    `base`: as `model.base`; of a hub id the full-precision weights are fetched. `adapters`: files of any kind with a
    strength each. `leave_out`: as in storage.contents. In a folder every variant of the weights is merged; configs and
    tokenizers are copied as they are; pickles, hidden files and loose checkpoints are left out, which is told. The
    base itself is only read.
    Raises ConfigError when `out` exists or a strength is no number, ModelError when a layer does not fit, a weight is
    quantised or the result exceeds its type, NumericError when it is not finite, DiskError when it cannot be written;
    after any of them nothing is left behind.
    """
    report = report or Silent()
    _check_strengths(adapters)
    names.require_new(out, "--out")  # before gigabytes are downloaded
    path = resolve(base_named(base, precision="fp32")).path
    _require_suffix(out, ".safetensors" if path.is_file() else "")
    _refuse_quantised_config(path)
    facts = identify(path)
    changes: Changes = {}
    read = storage.read_all([file for file, _ in adapters], leave_out, report)
    embedding.remind([file for file, _ in adapters], report)
    for (file, strength), weights in zip(adapters, read, strict=True):
        _add_changes_(changes, facts, file.name, weights, strength)
    layouts = {weight_file: read_layout(weight_file) for weight_file in changes}
    _require_fit(layouts, changes)
    fields = partial(combined.with_merged, base=path.name, adapters=combined.described(adapters))
    if path.is_file():
        _write_file(layouts[path], changes[path], out, fields, report)
    else:
        _write_folder(path, layouts, changes, out, fields, report)
    report.event("merged", f"{len(adapters)} adapters merged into {out}", path=str(out))
    return out


def merge_adapters(
    *,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    method: str = "concat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    formats: Sequence[str] = ("kohya",),
    dtype: str = "fp16",
    family: str | None = None,
    leave_out: Sequence[str] = (),
    report: Report | None = None,
) -> Path:
    """Write one LoRA that does what `adapters`, files of any kind with a strength each, do together; returns `out`.

    `method`, `rank`, `density`, `seed`: as in `combine.Recipe`. `formats`: keys of storage.FORMATS; the first is
    written to `out`, a second one beside it with its name behind the stem. `dtype`: a key of storage.DTYPES. `family`:
    "sd1", "sd2" or "sdxl", needed where no file tells. `leave_out`: as in storage.contents.
    Raises ConfigError for an impossible recipe or an existing `out`, ModelError for adapters of different families,
    DoRA, changes of vectors, and values that `dtype` does not hold, DiskError when a file cannot be written.
    """
    report = report or Silent()
    recipe = Recipe(method, rank, density, seed)
    _check_strengths(adapters)
    storage.require_choices(formats, dtype)
    paths = _outputs(out, formats)
    all_weights = storage.read_all([path for path, _ in adapters], leave_out, report)
    read = [
        (path, weights, storage.read_metadata(path)) for (path, _), weights in zip(adapters, all_weights, strict=True)
    ]
    embedding.remind([path for path, _ in adapters], report)
    for path, weights, _ in read:
        storage.require_matrices(path.name, weights)
    family = combined.common_family([(path.name, weights, header) for path, weights, header in read], stated=family)
    ingredients = [
        Adapter(path.name, weights, strength) for (path, weights, _), (_, strength) in zip(read, adapters, strict=True)
    ]
    result = combine(ingredients, recipe, lambda done, total: report.progress("layers", done, total))
    if result.steps:
        tell_errors(result.steps, report)
    header = combined.adapter_fields(
        title=out.stem,
        family=family,
        weights=result.weights,
        headers=[header for _, _, header in read],
        adapters=combined.described(adapters),
        recipe=asdict(recipe),
    )
    for name, path in paths.items():
        storage.FORMATS[name].write(path, result.weights, family, storage.DTYPES[dtype], header)
    if "kohya" in formats:
        for fault in kohya.faults(result.weights, family, storage.DTYPES[dtype]):
            report.warn(fault)
    report.event("merged", f"{len(adapters)} adapters merged into {out}", path=str(out))
    return out


def _outputs(out: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Format to the file that gets it. Raises ConfigError for files that exist."""
    paths = {name: out if name == formats[0] else out.with_stem(f"{out.stem}_{name}") for name in formats}
    for path in paths.values():
        names.require_new(path, "--out")
        _require_suffix(path, ".safetensors")
    return paths


def _check_strengths(adapters: Sequence[tuple[Path, float]]) -> None:
    if not adapters:
        raise ConfigError("There is nothing to merge; name one adapter file or more.")
    for path, strength in adapters:
        if not abs(strength) <= MAX_STRENGTH:
            raise ConfigError(f"The strength of {path.name} is {strength:g}; use a number such as 0.8.")


def _require_suffix(out: Path, suffix: str) -> None:
    """Raises ConfigError when `out` lacks the `suffix` of its kind."""
    if suffix and out.suffix != suffix:
        raise ConfigError(f"{out} must end in {suffix}; choose such a name for the result.")
    if not suffix and out.suffix == ".safetensors":
        raise ConfigError(f"{out} is the name of a file, but the base is a folder and so is the result; name a folder.")


def _refuse_quantised_config(base: Path) -> None:
    for component in weighted():
        config = base / component / "config.json"
        if base.is_dir() and is_plain_file(config) and "quantization_config" in read_json(config):
            raise ModelError(_quantised(config, "has a quantization_config"))


def _quantised(where: Path, why: str) -> str:
    return (
        f"{where} {why}: its weights are quantised, and a merged change would be lost in their rounding; merge into "
        "the original weights, then quantise the result."
    )


def _add_changes_(changes: Changes, base: BaseFacts, name: str, weights: AnyWeights, strength: float) -> None:
    """Find every layer of adapter `name` in every set of weights of the base."""
    for component, layers in weights.items():
        for keys in weight_sets(base, component):
            marks = [key for key in keys if key.endswith(QUANTISED_MARKS) or ".quant_state." in key]
            if marks:
                raise ModelError(_quantised(keys[marks[0]], f"has {marks[0]}"))
            for path, update in layers.items():
                place = find(base, component, path, keys)
                if place is None:
                    raise ModelError(
                        f"adapter {name} does not fit {base.path}, a {base.family} model: {component} lacks layer "
                        f"{path}. `lora-booth inspect {name}` tells its family; name such a base."
                    )
                change = Change(f"{component}.{path}", place, update, strength)
                changes.setdefault(keys[place.key], {}).setdefault(place.key, []).append(change)


def _require_fit(layouts: Mapping[Path, Layout], changes: Changes) -> None:
    """Raises ModelError, naming the layer, when a weight has another shape than its change or cannot be changed."""
    for file, tensors in changes.items():
        for key, parts in tensors.items():
            entry = layouts[file].entries[key]
            if entry.dtype not in FLOATS:
                raise ModelError(_quantised(file, f"stores {parts[0].layer} as {entry.dtype}"))
            for part in parts:
                weight = part.place.shape(entry.shape)
                if wrong := misfit(part.update, weight):
                    raise ModelError(
                        f"{part.layer} is {list(weight)} in {file}, but the adapter changes {wrong}; it was made for "
                        "another base."
                    )


@torch.no_grad()
def _merged(changes: Sequence[Change], tensor: Tensor) -> Tensor:
    """The stored `tensor` with its changes, each computed in float32, their sum rounded once to the tensor's type.

    Where several adapters change one layer their sum is taken in float64, so that their order does not matter.
    Raises ModelError when a value exceeds the type, NumericError when one is not finite.
    """
    active = [change for change in changes if change.strength != 0]
    is_shared = len({change.place for change in active}) < len(active)
    total = torch.zeros(tensor.shape, dtype=torch.float64 if is_shared else torch.float32)
    for change in active:
        change.place.part(total).add_(weight_change(change.place.part(tensor), change.update), alpha=change.strength)
    merged = tensor.to(total.dtype, copy=True).add_(total)
    result = torch.where(total == 0, tensor, merged.to(tensor.dtype))  # where nothing is added, -0.0 stays what it is
    if not torch.isfinite(result).all():
        _refuse_result(active or changes, tensor, merged)
    return result


def _refuse_result(changes: Sequence[Change], tensor: Tensor, merged: Tensor) -> None:
    largest = torch.finfo(tensor.dtype).max
    for change in changes:
        before, after = change.place.part(tensor), change.place.part(merged)
        if not torch.isfinite(before).all():
            raise NumericError(f"{change.layer} of the base holds NaN or infinity; copy or download the base again.")
        if not torch.isfinite(after).all():
            raise NumericError(
                f"{change.layer} becomes NaN or infinite; lower the strength, or check the adapter with `lora-booth "
                "inspect`."
            )
        if after.abs().max() > largest:
            raise ModelError(
                f"{change.layer} reaches {after.abs().max().item():.3g}, more than its type "
                f"{str(tensor.dtype).removeprefix('torch.')} holds ({largest:.5g}); lower the strength, or merge into "
                "a base in fp32 or bf16."
            )
    raise NumericError(f"The base holds NaN or infinity beside {changes[0].layer}; copy or download it again.")


Fields = Callable[[Mapping[str, str]], dict[str, str]]
"""A file's metadata to that of the merged file."""


class _Meter:
    """Progress in MiB over all files."""

    def __init__(self, total_bytes: int, report: Report) -> None:
        self.done, self.total, self.report = 0, total_bytes, report

    def __call__(self, count: int) -> None:
        self.done += count
        self.report.progress("merge MiB", min(self.done, self.total) >> 20, self.total >> 20)


def _write_file(source: Layout, changes: Mapping[str, list[Change]], out: Path, fields: Fields, report: Report) -> None:
    """The merged checkpoint, and the .yaml beside the base, which says what some bases predict."""
    size = source.path.stat().st_size
    disk.require_space(out, size)
    sidecar = source.path.with_suffix(".yaml")
    if sidecar.is_file():
        names.require_new(out.with_suffix(".yaml"), "--out")
    if any(key.startswith("model_ema.") for key in source.entries):
        report.warn(
            f"{source.path.name} also has averaged weights (model_ema.*), which are copied without the adapters."
        )
    with disk.replacing(out, needed_bytes=size) as temporary:
        _rewrite(source, temporary, changes, fields, _Meter(size, report))
        if sidecar.is_file():
            disk.write_bytes(out.with_suffix(".yaml"), sidecar.read_bytes())


def _rewrite(
    source: Layout, target: Path, changes: Mapping[str, list[Change]], fields: Fields, copied: Callable[[int], None]
) -> None:
    functions = {key: partial(_merged, parts) for key, parts in changes.items()}
    rewrite(source, target, functions, metadata=fields(source.metadata), copied=copied)


def _write_folder(
    base: Path, layouts: Mapping[Path, Layout], changes: Changes, out: Path, fields: Fields, report: Report
) -> None:
    merged_components = {path.parent.name for path in changes}
    kept: list[Path] = []
    left_out: list[Path] = []
    for path in _files(base):
        (kept if path in changes or _is_copied(path.relative_to(base), merged_components) else left_out).append(path)
    if left_out:
        first = ", ".join(str(path.relative_to(base)) for path in left_out[:3])
        report.warn(
            f"{len(left_out)} files of {base} are left out ({first}{' …' if len(left_out) > 3 else ''}): pickles, and "
            "weights that the adapters were not merged into."
        )
    for path in kept:
        require_plain_file(path, "remove it from the base", ModelError)
    size = sum(path.stat().st_size for path in kept)
    disk.require_space(out, size)
    meter = _Meter(size, report)
    with _new_folder(out, needed_bytes=size) as temporary:
        for path in kept:
            target = temporary / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in changes:
                _rewrite(layouts[path], target, changes[path], fields, meter)
            else:
                shutil.copyfile(path, target)
                meter(path.stat().st_size)
            disk.sync(target)


def _files(base: Path) -> Iterator[Path]:
    """Every file of the base but hidden ones; links, as in the hub's cache, are followed."""
    seen = set()
    for folder, folders, plain in os.walk(base, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        yield from (Path(folder, name) for name in sorted(plain) if not name.startswith("."))


def _is_copied(path: Path, merged_components: set[str]) -> bool:
    """False for a file, relative to the base, that is a pickle or weights without the adapters."""
    is_loose = path.suffix == ".safetensors" and (len(path.parts) == 1 or path.parts[0] in merged_components)
    return path.suffix not in NOT_COPIED and not is_loose


@contextmanager
def _new_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes its name on success and is removed on failure."""
    with disk.writing(out, needed_bytes=needed_bytes):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = disk.temporary_beside(out)
        temporary.mkdir()
        try:
            yield temporary
            disk.move(temporary, out)
            disk.sync_folder(out.parent)
        finally:
            disk.remove_folder(temporary)
