"""What each program accepts: one row for each, with its source.

Every rule was measured on the program's own code, or read in it where "read" stands beside it; the versions stand in
the rows. How the rows are applied to a file is in `verdicts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_booth.adapter.programs.rules import (
    Rule,
    Scale,
    a1111_leaves,
    a1111_version,
    alpha_over_rank,
    bundle_is_left,
    diffusers_header,
    diffusers_keeps_dora,
    diffusers_keys,
    diffusers_mixed_dora,
    diffusers_scale,
    diffusers_second_encoder,
    forge_lokr,
    forge_version,
    invokeai_base,
    invokeai_keys,
    sd_cpp_scale,
    sdnext_version,
    sorted_by,
)
from lora_booth.adapter.programs.spelling import OUTSIDE, TEXT_PROJECTION, Layer
from lora_booth.models.bases.architectures import ARCHITECTURES

_MEASURED = {family: row for family, row in ARCHITECTURES.items() if row.depths}
"""The families whose layout is known here, on which the programs were measured."""
_BOTH_NAMINGS = {family: frozenset({"diffusers", "ldm"}) for family in _MEASURED}
_TEXT_PREFIXES = {
    family: frozenset(row.kohya_prefixes[name] for name in row.text_encoders) for family, row in _MEASURED.items()
}
_ALL_KINDS = frozenset({"LoRA", "LoCon with lora_mid", "LoHa", "LoKr", "LoKr with Tucker core", "full difference"})
_NORMS = frozenset({"norm", "norm without bias"})
_COMFY_KINDS = _ALL_KINDS | _NORMS | {"GLoRA", "GLoRA of 2023", "bias alone"}


@dataclass(frozen=True)
class Loader:
    """What one program accepts. The defaults are those of most."""

    name: str
    source: str
    """Files read, version or date."""
    folder: str
    """Where the adapter goes, relative to the program, or how it is given to it."""
    spellings: frozenset[str] = frozenset({"kohya"})
    """Of keys.SPELLINGS."""
    unet_namings: Mapping[str, frozenset[str]] = field(default_factory=lambda: _BOTH_NAMINGS)
    """Family to the block names it maps under kohya's prefix."""
    text_prefixes: Mapping[str, frozenset[str]] = field(default_factory=lambda: _TEXT_PREFIXES)
    needs_text_model: frozenset[str] = frozenset({"text_encoder", "text_encoder_2"})
    """Components whose names must keep the level `text_model`."""
    factors: frozenset[str] = frozenset({"down/up"})
    """Values of Layer.factors."""
    kinds: frozenset[str] = _ALL_KINDS
    """Values of Layer.kind."""
    biases: frozenset[str] = frozenset()
    """Values of Layer.kind beside which it takes a diff_b."""
    changed_kinds: frozenset[str] = frozenset()
    """Values of Layer.kind that it computes otherwise than they were trained."""
    nameless: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """(family, naming) to the module paths it has no name for."""
    lacks_norms: frozenset[tuple[str, str]] = frozenset()
    """(family, component) whose normalisations it has no names for."""
    fused_attention: frozenset[tuple[str, str]] = frozenset()
    """(family, component) whose attention moves only with q, k, v and out together."""
    keeps_dora: Callable[[Layer], bool] = lambda layer: False
    """Whether a DoRA layer keeps its form."""
    scale: Scale = alpha_over_rank
    strength: str = ""
    """What to say where `scale` differs from alpha / rank."""
    reads_scale_tensor: bool = False
    """Whether a tensor `scale` goes before alpha."""
    max_unmatched: int | None = None
    """Keys without a place that it bears; with more it loads nothing. None is any number."""
    refusals: tuple[Rule, ...] = ()
    """The first that strikes is why nothing loads."""
    remarks: tuple[Rule, ...] = ()


def _nameless(paths: frozenset[str]) -> dict[tuple[str, str], frozenset[str]]:
    """In every family and naming."""
    return {(family, naming): paths for family in _MEASURED for naming in ("diffusers", "ldm")}


_ANY_TEXT_PREFIX = {
    "sd1": frozenset({"lora_te", "lora_te1"}),
    "sd2": frozenset({"lora_te", "lora_te1"}),
    "sdxl": frozenset({"lora_te", "lora_te1", "lora_te2"}),
}
_COMFY_SPELLINGS = frozenset({
    "kohya", "lycoris", "dotted", "dotted text", "processor", "bare", "bare processor", "generic",
})  # fmt: skip
_DIFFUSERS_NAMINGS = {"sd1": frozenset({"diffusers"}), "sd2": frozenset({"diffusers"})}
_EITHER = frozenset({"diffusers", "ldm"})
_TEXT_COMPONENTS = frozenset({
    ("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2"),
})  # fmt: skip
_ALL_FACTORS = frozenset({"down/up", "A/B", "A/B.default", "old"})
_OUTSIDE_BLOCKS = _nameless(OUTSIDE | {TEXT_PROJECTION})

LOADERS = (
    Loader(
        name="AUTOMATIC1111",
        source="AUTOMATIC1111/stable-diffusion-webui 1.10, extensions-builtin/Lora as of 2024-07-16; lycoris_ read",
        folder="models/Lora",
        text_prefixes=_TEXT_PREFIXES | {"sd1": frozenset({"lora_te", "lora_te1"})},
        factors=frozenset({"down/up", "A/B"}),
        kinds=_ALL_KINDS | {"norm", "GLoRA of 2023", "OFT with a limit", "IA3"},
        biases=frozenset({"full difference"}),
        nameless=_nameless(frozenset({TEXT_PROJECTION}))
        | {
            ("sd1", "diffusers"): frozenset({TEXT_PROJECTION, "conv_norm_out", "final_layer_norm"}),
            ("sd2", "diffusers"): frozenset({TEXT_PROJECTION, "conv_norm_out"}),
            ("sdxl", "diffusers"): frozenset({TEXT_PROJECTION, "conv_norm_out", "add_embedding.linear_1",
                                              "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv"}),
        },
        lacks_norms=frozenset({("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}),
        fused_attention=frozenset({("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}),
        keeps_dora=lambda layer: layer.dora_axis == "input",
        reads_scale_tensor=True,
        refusals=(a1111_leaves,),
        remarks=(sorted_by(a1111_version, "AUTOMATIC1111 hides it while {base} is loaded"),),
    ),
    Loader(
        name="Forge",
        source="lllyasviel/stable-diffusion-webui-forge of 2025-06-26, backend/patcher/lora.py",
        folder="models/Lora",
        spellings=_COMFY_SPELLINGS,
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        kinds=_COMFY_KINDS,
        biases=_COMFY_KINDS,
        lacks_norms=_TEXT_COMPONENTS,
        keeps_dora=lambda layer: layer.dora_axis == "input",
        max_unmatched=12,
        refusals=(forge_lokr,),
        remarks=(sorted_by(forge_version, "Forge does not list it for {base}"), bundle_is_left),
    ),
    Loader(
        name="ComfyUI",
        source="Comfy-Org/ComfyUI 0.3.64 and 0.28.0 of 2026-07, comfy/lora.py, comfy/weight_adapter",
        folder="models/loras",
        spellings=_COMFY_SPELLINGS,
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        kinds=_COMFY_KINDS - {"LoKr with Tucker core"} | {"OFT", "OFT with a limit", "BOFT"},
        biases=_COMFY_KINDS,
        changed_kinds=frozenset({"OFT with a limit"}),
        lacks_norms=_TEXT_COMPONENTS,
        keeps_dora=lambda layer: layer.dora_axis == "input",
        remarks=(bundle_is_left,),
    ),
    Loader(
        name="InvokeAI",
        source="invoke-ai/InvokeAI of 2026-08-19, backend/patches, model_manager/configs/lora.py",
        folder="import it in the model manager",
        unet_namings=_DIFFUSERS_NAMINGS | {"sdxl": _EITHER},
        kinds=_ALL_KINDS | _NORMS | {"IA3"},
        biases=frozenset({"full difference"}),
        keeps_dora=lambda layer: layer.dora_axis == "input",
        refusals=(invokeai_keys, invokeai_base),
        remarks=(bundle_is_left,),
    ),
    Loader(
        name="SD.Next",
        source="vladmandic/sdnext of 2026-07-23, modules/lora",
        folder="models/Lora",
        nameless={(family, "ldm"): frozenset({"up_blocks.0.upsamplers.0.conv"}) for family in ("sd1", "sd2")},
        needs_text_model=frozenset({"text_encoder_2"}),
        kinds=_ALL_KINDS | {"norm", "GLoRA of 2023", "OFT with a limit", "IA3"},
        biases=frozenset({"full difference", "LoRA", "LoCon with lora_mid"}),
        keeps_dora=lambda layer: layer.dora_axis in ("input", "output"),
        reads_scale_tensor=True,
        remarks=(sorted_by(sdnext_version, "SD.Next does not list it for {base}"),),
    ),
    Loader(
        name="kohya sd-scripts",
        source="kohya-ss/sd-scripts of 2026-02-16, networks/lora.py, merge_lora.py, sdxl_merge_lora.py",
        folder="any; give it as --models to networks/merge_lora.py or sdxl_merge_lora.py",
        unet_namings=_DIFFUSERS_NAMINGS | {"sdxl": frozenset({"ldm"})},
        kinds=frozenset({"LoRA"}),
        nameless=_OUTSIDE_BLOCKS,
        remarks=(bundle_is_left,),
    ),
    Loader(
        name="stable-diffusion.cpp",
        source="leejet/stable-diffusion.cpp, stable-diffusion-cpp-python 0.4.7 run, 2026-08-19 read; SDXL only read",
        folder="the folder given as --lora-model-dir",
        spellings=_COMFY_SPELLINGS - {"dotted text", "generic"} | {"dotted attention", "bare attention"},
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        kinds=_ALL_KINDS - {"LoKr with Tucker core"} | {"bias alone"},
        biases=_ALL_KINDS,
        nameless=_OUTSIDE_BLOCKS,
        scale=sd_cpp_scale,
        strength="have rank 1 and load at alpha / inputs instead of alpha / rank, next to nothing: pad them to rank 2 "
        "with zeros and double their alpha, as lora_booth's kohya format does",
        reads_scale_tensor=True,
        remarks=(bundle_is_left,),
    ),
    Loader(
        name="diffusers",
        source="huggingface/diffusers 0.42.1 with peft 0.21.2, transformers 5.23, src/diffusers/loaders",
        folder="any; give it to pipe.load_lora_weights",
        spellings=frozenset({"kohya", "dotted", "dotted attention", "dotted text", "processor"}),
        unet_namings=_DIFFUSERS_NAMINGS | {"sdxl": _EITHER},
        text_prefixes=_ANY_TEXT_PREFIX,
        needs_text_model=frozenset({"text_encoder_2"}),
        factors=_ALL_FACTORS - {"A/B.default"},
        kinds=frozenset({"LoRA"}),
        keeps_dora=diffusers_keeps_dora,
        scale=diffusers_scale,
        strength="get the commonest alpha of their part of the model instead of their own: give all its layers one "
        "alpha and multiply the rest into lora_up, as lora_booth's kohya format does",
        refusals=(diffusers_keys, diffusers_header, diffusers_second_encoder, diffusers_mixed_dora),
    ),
)  # fmt: skip
