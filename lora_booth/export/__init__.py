"""Adapter files: writing them in the formats that programs load, and reading them without trusting them.

A format is one module with `to_tensors` and `from_tensors`, and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_booth import files
from lora_booth.adapter.weights import AdapterWeights, nonfinite
from lora_booth.errors import ModelError
from lora_booth.export import diffusers, kohya
from lora_booth.export.metadata import MAX_HEADER_BYTES, Facts, metadata, with_hashes

__all__ = ["DTYPES", "FORMATS", "Facts", "Format", "detect", "metadata", "read", "read_metadata"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of `export.dtype`."""


@dataclass(frozen=True)
class Format:
    """One way to name an adapter's tensors."""

    to_tensors: Callable[[AdapterWeights, str, torch.dtype], dict[str, Tensor]]
    """(weights, family, dtype) to the file's tensors."""
    from_tensors: Callable[[Mapping[str, Tensor], Mapping[str, str]], AdapterWeights]
    """(tensors, header) to weights, float32."""
    prefixes: tuple[str, ...]
    """How a key of this format begins."""

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
    "diffusers": Format(
        to_tensors=lambda weights, family, dtype: diffusers.to_tensors(weights, dtype),
        from_tensors=diffusers.from_tensors,
        prefixes=("unet.", "text_encoder.", "text_encoder_2."),
    ),
    "kohya": Format(
        to_tensors=kohya.to_tensors,
        from_tensors=lambda tensors, header: kohya.from_tensors(tensors),
        prefixes=("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"),
    ),
}
"""Values of `export.formats`."""


def read(path: Path) -> AdapterWeights:
    """The adapter in a file of any of FORMATS, float32 on the CPU.

    Nothing in the file is executed. Raises ModelError when it is missing, a pickle, damaged, of no known format, half
    an adapter, or holds a NaN or an infinity.
    """
    tensors, header = _load(path)
    format_name = _format_of(path, tensors)
    try:
        weights = FORMATS[format_name].from_tensors(tensors, header)
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error
    broken = nonfinite(weights)
    if broken:
        raise ModelError(
            f"{path.name} holds NaN or infinity in {len(broken)} layers, first {broken[0]}; its training diverged. Use "
            "an earlier checkpoint."
        )
    return weights


def detect(path: Path) -> str:
    """The key in FORMATS of a file. Raises ModelError as `read` does."""
    with _opened(path) as file:
        return _format_of(path, dict.fromkeys(file.keys()))


def read_metadata(path: Path) -> dict[str, str]:
    """The header's fields; empty when there are none. Raises ModelError as `read` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _format_of(path: Path, keys: Mapping[str, object]) -> str:
    if not keys:
        raise ModelError(f"{path.name} holds no tensors, so it is no adapter.")
    for name, row in FORMATS.items():
        if any(key.startswith(row.prefixes) for key in keys):
            return name
    raise ModelError(
        f"{path.name} is no LoRA in kohya or diffusers naming; its first key is {next(iter(keys))}. A full model, an "
        "embedding or a checkpoint of a run is something else."
    )


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _opened(path: Path) -> safe_open:
    """The file, open; its tensors are mapped, not read. Raises ModelError when it is no safetensors file."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ModelError(f"{path} could not be read: {error.strerror}; check the path.") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        if start.startswith((b"PK\x03\x04", b"\x80")):  # asked last: a header's length may begin with 0x80 too
            raise ModelError(
                f"{path.name} is a pickle, which can run any program when it is opened, so it is not read; ask its "
                "author for a .safetensors file."
            ) from error
        raise ModelError(f"{path.name} is not a whole safetensors file ({error}); fetch or export it again.") from error
