"""Adapter files: writing them in the formats that programs load, and reading them without trusting them.

A format is one module with `to_tensors` and `split_key`, and a line in FORMATS and NAMINGS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_booth import files
from lora_booth.adapter.weights import AdapterWeights, AnyWeights, LowRank, nonfinite
from lora_booth.errors import ConfigError, ModelError
from lora_booth.export import diffusers, kohya
from lora_booth.export.kinds import gather, strictly
from lora_booth.export.metadata import MAX_HEADER_BYTES, Facts, metadata, trigger_words, with_hashes

__all__ = [
    "DTYPES",
    "FORMATS",
    "Contents",
    "Facts",
    "Format",
    "contents",
    "detect",
    "metadata",
    "read",
    "read_any",
    "read_metadata",
    "require_choices",
    "trigger_words",
]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of `export.dtype`."""


@dataclass(frozen=True)
class Format:
    """One way to name an adapter's tensors."""

    to_tensors: Callable[[AdapterWeights, str, torch.dtype], dict[str, Tensor]]
    """(weights, family, dtype) to the file's tensors."""

    def write(
        self, path: Path, weights: AdapterWeights, family: str, dtype: torch.dtype, metadata: Mapping[str, str]
    ) -> None:
        """Write `path`, whole or not at all, with `metadata` and the hashes of the data in the header.

        Raises ModelError when the format cannot hold the adapter, NumericError when the adapter is not finite,
        DiskError when the file cannot be written.
        """
        tensors = self.to_tensors(weights, family, dtype)
        if not tensors:
            raise ModelError(f"{path.name} would be empty: the adapter has no layers.")
        content = save(tensors, with_hashes(metadata, tensors))
        header = int.from_bytes(content[:8], "little")
        if header > MAX_HEADER_BYTES:
            raise ModelError(
                f"The header of {path.name} would take {header} bytes, and ComfyUI reads {MAX_HEADER_BYTES}; shorten "
                "the metadata."
            )
        files.write_bytes(path, content)


FORMATS = {
    "diffusers": Format(lambda weights, family, dtype: diffusers.to_tensors(weights, dtype)),
    "kohya": Format(kohya.to_tensors),
}
"""Values of `export.formats`: what can be written."""

NAMINGS = {
    "kohya": ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_"),
    "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
    "peft": ("base_model.model.",),
}
"""What can be read, and how its keys begin."""


def require_choices(formats: Sequence[str] | None, dtype: str | None) -> None:
    """Raises ConfigError when a format or the type that a verb's flags name is unknown, or no format is named.

    None, for either: as in the source.
    """
    for name in (formats or [""]) if formats is not None else []:
        if name not in FORMATS:
            raise ConfigError(f'--format "{name}" is unknown; use {" or ".join(FORMATS)}.')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'--dtype "{dtype}" is unknown; use one of {", ".join(DTYPES)}.')


@dataclass(frozen=True)
class Contents:
    """What a file holds: its naming (a key of NAMINGS), layers in float32 on the CPU, header, and what is wrong."""

    naming: str
    weights: AnyWeights
    header: dict[str, str]
    dtypes: dict[str, int]
    """Type, as "F16", to the count of tensors that have it."""
    faults: tuple[str, ...]
    """One sentence each; layers with a fault are not among `weights`, except those that are not finite."""


def contents(path: Path) -> Contents:
    """Everything in an adapter file of any naming and kind, sound or not; for telling about it, not for using it.

    Nothing in the file is executed. Raises ModelError when it is missing, a pickle, cut off, or of no known naming.
    """
    tensors, header = _load(path)
    naming = _naming_of(path, tensors)
    dtypes = dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))
    split_key, scale_of = kohya.split_key, None
    if naming != "kohya":
        fields = _beside(path) if naming == "peft" else header
        split_key, scale_of = diffusers.split_key, diffusers.scale_from(fields)
    weights, faults = gather(tensors, split_key, *([scale_of] if scale_of else []))
    broken = nonfinite(weights)
    if broken:
        faults.append(
            f"{path.name} holds NaN or infinity in {len(broken)} layers, first {broken[0]}; its training diverged. Use "
            "an earlier checkpoint."
        )
    return Contents(naming, weights, header, dtypes, tuple(faults))


def read_any(path: Path) -> AnyWeights:
    """The adapter in a sound file of any naming and kind, float32 on the CPU.

    Raises ModelError when it is missing, a pickle, damaged, of no known naming or kind, half an adapter, or not finite.
    """
    found = contents(path)
    try:
        return strictly(found.weights, found.faults)
    except ModelError as error:
        raise ModelError(str(error) if path.name in str(error) else f"{path.name}: {error}") from error


def read(path: Path) -> AdapterWeights:
    """The adapter in a sound file of plain LoRA or DoRA, float32 on the CPU: what can be trained on.

    Raises ModelError as `read_any` does, and for other kinds.
    """
    weights: AdapterWeights = {}
    for component, layers in read_any(path).items():
        for module, update in layers.items():
            if not isinstance(update, LowRank):
                raise ModelError(
                    f"{path.name} is {update.kind} at {component}.{module}, which cannot be used here; "
                    f"`lora-booth resize {path.name} --rank 16` makes a plain LoRA of it."
                )
            weights.setdefault(component, {})[module] = update
    return weights


def detect(path: Path) -> str:
    """The key in NAMINGS of a file. Raises ModelError as `contents` does."""
    with _opened(path) as file:
        return _naming_of(path, dict.fromkeys(file.keys()))


def read_metadata(path: Path) -> dict[str, str]:
    """The header's fields; empty when there are none. Raises ModelError as `contents` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _beside(path: Path) -> dict[str, str]:
    """What PEFT's adapter_config.json beside `path` says of scales. Raises ModelError when there is none."""
    config = path.with_name("adapter_config.json")
    try:
        with config.open(encoding="utf-8") as file:
            return diffusers.peft_metadata(file.read(MAX_HEADER_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path.name} is in PEFT's naming, whose strength stands in adapter_config.json beside it, and {config} "
            f"cannot be read ({error}); put it there."
        ) from error


def _naming_of(path: Path, keys: Mapping[str, object]) -> str:
    if not keys:
        raise ModelError(f"{path.name} holds no tensors, so it is no adapter.")
    for name, prefixes in NAMINGS.items():
        if any(key.startswith(prefixes) for key in keys):
            return name
    raise ModelError(
        f"{path.name} is no LoRA in kohya, diffusers or PEFT naming; its first key is {next(iter(keys))}. A full "
        "model, an embedding or a checkpoint of a run is something else."
    )


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _opened(path: Path) -> safe_open:
    """The file, open; tensors are read, not mapped, which would hold the file on Windows as long as one of them lives.

    Raises ModelError when it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ModelError(f"{path} could not be read: {error.strerror}; check the path.") from error
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        if start.startswith((b"PK\x03\x04", b"\x80")):  # asked last: a header's length may begin with 0x80 too
            raise ModelError(
                f"{path.name} is a pickle, which can run any program when it is opened, so it is not read; ask its "
                "author for a .safetensors file."
            ) from error
        raise ModelError(f"{path.name} is not a whole safetensors file ({error}); fetch or export it again.") from error
