"""What a merged file says of itself: what went into it, and what it keeps of their headers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_booth.adapter.files.family import family_of
from lora_booth.adapter.files.metadata import base_fields, carried, network_fields, prediction_of
from lora_booth.adapter.weights import AdapterWeights, AnyWeights, context_width
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.run import disk

_MERGED = "lora_booth.merged"

Ingredient = dict[str, Any]
"""`file`: name without folders, `sha256` and `strength` of an adapter."""


def described(adapters: Sequence[tuple[Path, float]]) -> list[Ingredient]:
    """What a header tells of the adapters that were merged."""
    return [{"file": path.name, "sha256": disk.sha256(path), "strength": strength} for path, strength in adapters]


def with_merged(fields: Mapping[str, str], *, base: str, adapters: Sequence[Ingredient]) -> dict[str, str]:
    """The header of a base with the adapters in it: `fields` of the base, its own earlier merges first in the list."""
    earlier = fields.get("modelspec.merged_from")
    names = ([earlier] if earlier else []) + [base, *(str(adapter["file"]) for adapter in adapters)]
    merged = {"modelspec.merged_from": ", ".join(names), _MERGED: json.dumps([*_earlier(fields), *adapters])}
    return carried(fields) | merged


def common_family(adapters: Sequence[tuple[str, AnyWeights, Mapping[str, str]]], *, stated: str | None = None) -> str:
    """The family of (name, weights, header) of several adapters; `stated` decides where none of them tells.

    Raises ModelError when they differ from each other or from `stated`, or nothing tells; ConfigError when `stated` is
    no family.
    """
    if stated is not None and stated not in ARCHITECTURES:
        raise ConfigError(f'family "{stated}" is unknown; use one of {", ".join(ARCHITECTURES)}.')
    families = {family_of(weights, header): name for name, weights, header in adapters}
    families.pop(None, None)
    widths = {context_width(weights): f"{name}, text width" for name, weights, _ in adapters}
    widths.pop(None, None)
    for kinds in (families, widths):
        if len(kinds) > 1:
            told = " and ".join(f"{name} ({kind})" for kind, name in kinds.items())
            raise ModelError(f"{told} were made for different bases, so they cannot be one; merge those of one family.")
    if stated and families and stated not in families:
        raise ModelError(f"{' and '.join(families.values())} was made for {next(iter(families))}, not {stated}.")
    if not stated and not families:
        names = " and ".join(name for name, _, _ in adapters)
        raise ModelError(f"{names} do not tell which family they are of; name it: {', '.join(ARCHITECTURES)}.")
    return stated or str(next(iter(families)))


def adapter_fields(
    *,
    title: str,
    family: str,
    weights: AdapterWeights,
    headers: Sequence[Mapping[str, str]],
    adapters: Sequence[Ingredient],
    recipe: Mapping[str, Any],
) -> dict[str, str]:
    """The header of an adapter combined from others, whose `headers` give what they agree on; without hashes."""
    agreed = {key: _agreed(headers, key) for key in ("ss_base_model_version", "modelspec.prediction_type")}
    fields = base_fields(family, prediction_of(agreed), title) | network_fields(weights)
    fields |= {
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.merged_from": ", ".join(str(adapter["file"]) for adapter in adapters),
        _MERGED: json.dumps({"adapters": list(adapters), **recipe}),
    }
    if resolution := _agreed(headers, "modelspec.resolution"):
        fields["modelspec.resolution"] = resolution
    words = ", ".join(
        dict.fromkeys(h["modelspec.trigger_phrase"] for h in headers if h.get("modelspec.trigger_phrase"))
    )
    if words:
        fields |= {"modelspec.trigger_phrase": words, "modelspec.usage_hint": f"Trigger words: {words}"}
    return fields


def _agreed(headers: Sequence[Mapping[str, str]], field: str) -> str:
    """The value of `field` that all headers which have it agree on, else ''."""
    values = {header[field] for header in headers if field in header}
    return values.pop() if len(values) == 1 else ""


def _earlier(fields: Mapping[str, str]) -> list[Any]:
    """The adapters of earlier merges that the base's header lists."""
    try:
        earlier = json.loads(fields.get(_MERGED, "[]"))
    except (ValueError, RecursionError):
        return []
    return earlier if isinstance(earlier, list) else []
