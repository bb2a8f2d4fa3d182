"""Which family an adapter was made for, by its layers' widths and names.

What its header says comes last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_booth.adapter.weights import AdapterWeights, AnyWeights, weight_shape
from lora_booth.models.bases.architectures import ARCHITECTURES, is_text

MINIATURE_WIDTH = 192
"""booth-mini's; it is shaped like "sd1", and tests make other small bases of this width."""

Inputs = Mapping[tuple[str, str], int | None]
"""(component, module path) to the width of the layer's input, None where it is not known."""


def family_of(weights: AdapterWeights | AnyWeights, header: Mapping[str, str]) -> str | None:
    """The family of an adapter that was read: "sd1", "sd2", "sdxl", or None where nothing tells."""
    inputs = {
        (component, path): (*weight_shape(update)[1:2], None)[0]
        for component, layers in weights.items()
        for path, update in layers.items()
    }
    return told_family(inputs, header)


def told_family(inputs: Inputs, header: Mapping[str, str]) -> str | None:
    """From the components, the widths, the depth of a transformer, and last the header.

    A UNet's layers without cross-attention look alike in SD 1 and 2, and load alike: "sd1".
    """
    if any(component == "text_encoder_2" for component, _ in inputs):
        return "sdxl"
    widths = context_widths(inputs)
    wide = next(filter(None, map(family_of_width, widths[:1])), None)
    if wide is not None:
        return wide
    if any(re.search(r"transformer_blocks\.[1-9]|^add_embedding", path) for _, path in inputs):
        return "sdxl"
    texts = {width for (_, path), width in inputs.items() if ".self_attn." in path}
    four_levels = re.compile(r"(?:down_blocks\.0|up_blocks\.3)\.attentions\.|(?:down|up)_blocks\.3\.")
    is_small = 768 in texts or MINIATURE_WIDTH in widths or any(four_levels.match(path) for _, path in inputs)
    return said_family(header) or ("sd2" if 1024 in texts else "sd1" if is_small else None)


def family_of_width(width: int) -> str | None:
    """The family whose cross-attention reads text embeddings of this width; None where none of full size does."""
    return next((row.name for row in ARCHITECTURES.values() if row.context_width == width), None)


def context_widths(inputs: Inputs) -> list[int]:
    """Input widths of the adapted cross-attention keys and values, one for each."""
    ends = ("attn2.to_k", "attn2.to_v")
    return [
        width for (component, path), width in inputs.items() if width and not is_text(component) and path.endswith(ends)
    ]


def said_family(header: Mapping[str, str]) -> str | None:
    """What the header says; None where it says nothing known."""
    said = header.get("ss_base_model_version", "") + header.get("modelspec.architecture", "")
    rows = reversed(ARCHITECTURES.values())  # SDXL's own versions end as those of Stable Diffusion 1 do
    return next((row.name for row in rows if any(mark in said for mark in row.marks)), None)
