"""What each program accepts: one row a program, with its source, and the few rules that are no plain data.

Every rule was measured on the program's own code, or read in it where "read" stands beside it; the versions stand in
the rows. How the rows are applied to a file is in `loaders.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_booth.export.family import FAMILY_NAMES
from lora_booth.export.layers import OUTSIDE, TEXT_PROJECTION, AdapterFile, Layer

CONVERT = "`lora-booth export` makes a file of it that every program reads"
"""What mends a file that is only spelled wrongly."""

Rule = Callable[[AdapterFile], str | None]
"""A sentence when the rule strikes, else None."""
Scale = Callable[[AdapterFile, Layer], float | None]
"""The scale a program gives to a layer, None where the value of an alpha is not known."""


def alpha_over_rank(file: AdapterFile, layer: Layer) -> float | None:
    """alpha / rank; 1 without alpha."""
    if "alpha" not in layer.leaves:
        return 1.0
    return layer.alpha / layer.rank if layer.alpha is not None and layer.rank else None


_BOTH_NAMINGS = {family: frozenset({"diffusers", "ldm"}) for family in FAMILY_NAMES}
_TEXT_PREFIXES = {
    "sd1": frozenset({"lora_te"}),
    "sd2": frozenset({"lora_te"}),
    "sdxl": frozenset({"lora_te1", "lora_te2"}),
}
_ALL_KINDS = frozenset({"LoRA", "LoCon with lora_mid", "LoHa", "LoKr", "full difference"})


@dataclass(frozen=True)
class Loader:
    """What one program accepts. The defaults are those of most."""

    name: str
    source: str
    """Files read, version or date."""
    folder: str
    """Where the adapter goes, relative to the program, or how it is given to it."""
    spellings: frozenset[str] = frozenset({"kohya"})
    """Of layers.SPELLINGS."""
    unet_namings: Mapping[str, frozenset[str]] = field(default_factory=lambda: _BOTH_NAMINGS)
    """Family to the block names it maps under kohya's prefix."""
    text_prefixes: Mapping[str, frozenset[str]] = field(default_factory=lambda: _TEXT_PREFIXES)
    needs_text_model: frozenset[str] = frozenset({"text_encoder", "text_encoder_2"})
    """Components whose names must keep the level `text_model`."""
    factors: frozenset[str] = frozenset({"down/up"})
    """Values of Layer.factors."""
    kinds: frozenset[str] = _ALL_KINDS
    """Values of Layer.kind."""
    nameless: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """(family, naming) to the module paths it has no name for."""
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
    return {(family, naming): paths for family in FAMILY_NAMES for naming in ("diffusers", "ldm")}


def _half_layers(file: AdapterFile) -> str | None:
    half = [layer.name for layer in file.layers if layer.kind == "half" and file.is_in_base(layer)]
    return (
        f"AUTOMATIC1111 stops with an error at {half[0]}, which lacks a factor; export the file again."
        if half
        else None
    )


def _invokeai_keys(file: AdapterFile) -> str | None:
    keys = [key for layer in file.layers for key in layer.keys]
    foreign = [key for key in file.foreign if not key.startswith("bundle_emb")]
    dotted = ("unet.", "text_encoder.", "text_encoder_2.")
    bad = [key for key in keys if "lora_A" in key or "lora_B" in key or key.startswith(dotted)]
    if file.family == "sdxl":
        known = ("lora_unet_", "lora_te1_", "lora_te2_")
        bad += [key for key in (*keys, *foreign) if not key.startswith(known)]
    if bad:
        return f"InvokeAI stops with an error at {bad[0]}; {CONVERT}."
    namings = {layer.naming for layer in file.layers if not layer.is_text}
    if file.family == "sdxl" and len(namings) > 1:
        return f"InvokeAI stops with an error, as two namings of the UNet are mixed; {CONVERT}."
    return None


def _invokeai_base(file: AdapterFile) -> str | None:
    told = _invokeai_family(file)
    if told == file.family or not file.is_full_size:
        return None
    effect = f"takes the file for {FAMILY_NAMES[told]}" if told else "refuses to import the file"
    return (
        f"InvokeAI {effect}: it tells the base by the first layer in the file of attn2.to_k, attn2.to_v, time_emb_proj "
        "or, for SD 1 and 2, a text encoder; adapt attn2.to_k in every block."
    )


def _invokeai_family(file: AdapterFile) -> str | None:
    """`lora_token_vector_length`, which stops at the first key by name that has a width, and where it finds none the
    depth of the transformers. The text encoders of SDXL tell nothing: their width is forgotten at the next key."""
    for layer in sorted(file.layers, key=lambda layer: layer.name):
        is_text = layer.prefix == "lora_te" and ".self_attn." in layer.path
        is_telling = layer.path.endswith(("attn2.to_k", "attn2.to_v")) or layer.name.endswith("time_emb_proj")
        if layer.fan_in and (is_text or is_telling):
            return {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}.get(layer.fan_in)
    deep = tuple(f".transformer_blocks.{i}." for i in range(2, 10))
    return "sdxl" if any(part in layer.path for layer in file.layers for part in deep) else None


def _diffusers_keys(file: AdapterFile) -> str | None:
    """What `lora_state_dict` and the converter of kohya's names refuse; keys of dora_scale are stripped before."""
    keys = [key for layer in file.layers for key in layer.keys if not key.endswith("dora_scale")] + list(file.foreign)
    if not all(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in keys):
        bad = [key for key in keys if "lora" not in key]
        return f"diffusers refuses the whole file for the key {bad[0]}; take such keys out." if bad else None
    bad = [key for key in keys if key.partition(".")[2] not in ("lora_down.weight", "lora_up.weight", "alpha")]
    bad += [layer.name for layer in file.layers if layer.kind == "half"]
    if bad:
        return f"diffusers refuses the whole file for {bad[0]}; take it out, or convert the layer to plain LoRA."
    original = [layer.naming == "ldm" for layer in file.layers if not layer.is_text]
    if file.family != "sdxl" and original and all(original):
        return (
            f"diffusers refuses the whole file: it does not know the original block names for "
            f"{FAMILY_NAMES[file.family]}; {CONVERT}."
        )
    return None


def _diffusers_second_encoder(file: AdapterFile) -> str | None:
    """`_load_lora_into_text_encoder` finds no rank: CLIPTextModelWithProjection has the level that the file lacks."""
    second = [layer for layer in file.layers if layer.component == "text_encoder_2"]
    if not second or any(layer.has_text_model for layer in second):
        return None
    return f"diffusers stops with an error at {second[0].name}, which lacks the part text_model; {CONVERT}."


def _diffusers_header(file: AdapterFile) -> str | None:
    if "lora_adapter_metadata" not in file.header:
        return None
    if any(layer.spelling == "kohya" and "alpha" in layer.leaves for layer in file.layers):
        return (
            "diffusers refuses the whole file: it has alphas and also lora_adapter_metadata in its header; take that "
            "field out."
        )
    without = [
        layer for layer in file.layers if file.header_scale(layer.component, layer.path, layer.rank or 1) is None
    ]
    if without:
        return (
            f"diffusers refuses the whole file: lora_adapter_metadata in its header says nothing of "
            f"{without[0].component}; save the adapter again with the metadata of every part."
        )
    return None


def _diffusers_scale(file: AdapterFile, layer: Layer) -> float | None:
    """Own keys: the header's scale. kohya's: the component's commonest alpha wherever a layer has none, or its alpha is
    filed under a name that no layer has: in attention, and under text_model in the encoder that lost this level
    (`_get_alpha_name`, `get_peft_kwargs`; held against diffusers in tests/test_loaders.py)."""
    common = file.common_alphas.get(layer.component)
    if layer.spelling != "kohya" or common is None:
        return file.header_scale(layer.component, layer.path, layer.rank or 1) or 1.0
    has_lost_level = layer.component == "text_encoder" and layer.has_text_model
    is_misfiled = "attn" in layer.path or has_lost_level or "alpha" not in layer.leaves
    return common / layer.rank if is_misfiled and layer.rank else alpha_over_rank(file, layer)


def _diffusers_keeps_dora(layer: Layer) -> bool:
    """In own keys; of a text encoder only under the parameter's name, `….lora_magnitude_vector.weight`."""
    is_parameter = any(key.endswith("lora_magnitude_vector.weight") for key in layer.keys)
    return layer.spelling.startswith("dotted") and (is_parameter or not layer.is_text)


def _sd_cpp_scale(file: AdapterFile, layer: Layer) -> float | None:
    """ggml drops trailing sides of 1, so the inputs of a rank-1 layer are taken for its rank; read for convolutions."""
    if layer.alpha is not None and layer.rank == 1 and layer.fan_in:
        return layer.alpha / layer.fan_in
    return alpha_over_rank(file, layer)


def _sorted_by(version: Callable[[Mapping[str, str]], str | None], effect: str) -> Rule:
    """The rule for a program that sorts files by what their header says; `version`: header to family."""

    def rule(file: AdapterFile) -> str | None:
        told = version(file.header)
        if told is None or told == file.family:
            return None
        return (
            f"By its header the file is one for {FAMILY_NAMES[told]}: "
            f"{effect.format(base=FAMILY_NAMES[file.family])}; write ss_base_model_version and ss_v2 into the header."
        )

    return rule


def _a1111_version(header: Mapping[str, str]) -> str | None:
    """Any header without the other marks is SD 1."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if header.get("ss_v2") == "True" else "sd1" if header else None


def _forge_version(header: Mapping[str, str]) -> str | None:
    exact = {"stable-diffusion-v1/lora": "sd1", "stable-diffusion-xl-v1-base/lora": "sdxl"}
    found = exact.get(header.get("modelspec.architecture", ""), _a1111_version(header))
    return found if found != "sd1" or header.get("modelspec.architecture") in exact else None


def _sdnext_version(header: Mapping[str, str]) -> str | None:
    marks = (
        ("ss_base_model_version", "sd_v1", "sd1"),
        ("ss_base_model_version", "sdxl", "sdxl"),
        ("modelspec.architecture", "stable-diffusion-v1", "sd1"),
        ("modelspec.architecture", "stable-diffusion-v2", "sd2"),
        ("modelspec.architecture", "stable-diffusion-xl", "sdxl"),
        ("ss_v2", "True", "sd2"),
    )
    return next((family for key, mark, family in marks if header.get(key, "").startswith(mark)), None)


def _bundle_is_left(file: AdapterFile) -> str | None:
    if not any(key.startswith("bundle_emb") for key in file.foreign):
        return None
    return "The embedding in the file is not read; put it into the embeddings folder as a file of its own."


_ANY_TEXT_PREFIX = {
    "sd1": frozenset({"lora_te", "lora_te1"}),
    "sd2": frozenset({"lora_te", "lora_te1"}),
    "sdxl": frozenset({"lora_te", "lora_te1", "lora_te2"}),
}
_COMFY_SPELLINGS = frozenset({"kohya", "lycoris", "dotted", "dotted text", "processor", "bare", "generic"})
_DIFFUSERS_NAMINGS = {"sd1": frozenset({"diffusers"}), "sd2": frozenset({"diffusers"})}
_EITHER = frozenset({"diffusers", "ldm"})
_ALL_FACTORS = frozenset({"down/up", "A/B", "A/B.default", "old"})
_OUTSIDE_BLOCKS = _nameless(OUTSIDE | {TEXT_PROJECTION})

LOADERS = (
    Loader(
        name="AUTOMATIC1111",
        source="AUTOMATIC1111/stable-diffusion-webui 1.10, extensions-builtin/Lora as of 2024-07-16; lycoris_ read",
        folder="models/Lora",
        text_prefixes=_TEXT_PREFIXES | {"sd1": frozenset({"lora_te", "lora_te1"})},
        factors=frozenset({"down/up", "A/B"}),
        nameless=_nameless(frozenset({TEXT_PROJECTION}))
        | {("sdxl", "diffusers"): frozenset({TEXT_PROJECTION, "add_embedding.linear_1", "add_embedding.linear_2",
                                             "up_blocks.0.upsamplers.0.conv"})},
        fused_attention=frozenset({("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}),
        keeps_dora=lambda layer: layer.dora_axis == "input",
        reads_scale_tensor=True,
        refusals=(_half_layers,),
        remarks=(_sorted_by(_a1111_version, "AUTOMATIC1111 hides it while {base} is loaded"),),
    ),
    Loader(
        name="Forge",
        source="lllyasviel/stable-diffusion-webui-forge of 2025-06-26, backend/patcher/lora.py",
        folder="models/Lora",
        spellings=_COMFY_SPELLINGS,
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        keeps_dora=lambda layer: layer.dora_axis == "input",
        max_unmatched=12,
        remarks=(_sorted_by(_forge_version, "Forge does not list it for {base}"), _bundle_is_left),
    ),
    Loader(
        name="ComfyUI",
        source="Comfy-Org/ComfyUI 0.3.64 and 0.28.0 of 2026-07, comfy/lora.py, comfy/weight_adapter",
        folder="models/loras",
        spellings=_COMFY_SPELLINGS,
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        keeps_dora=lambda layer: layer.dora_axis == "input",
        remarks=(_bundle_is_left,),
    ),
    Loader(
        name="InvokeAI",
        source="invoke-ai/InvokeAI of 2026-08-19, backend/patches, model_manager/configs/lora.py",
        folder="import it in the model manager",
        unet_namings=_DIFFUSERS_NAMINGS | {"sdxl": _EITHER},
        keeps_dora=lambda layer: layer.dora_axis == "input",
        refusals=(_invokeai_keys, _invokeai_base),
        remarks=(_bundle_is_left,),
    ),
    Loader(
        name="SD.Next",
        source="vladmandic/sdnext of 2026-07-23, modules/lora",
        folder="models/Lora",
        nameless={(family, "ldm"): frozenset({"up_blocks.0.upsamplers.0.conv"}) for family in ("sd1", "sd2")},
        needs_text_model=frozenset({"text_encoder_2"}),
        keeps_dora=lambda layer: layer.dora_axis in ("input", "output"),
        reads_scale_tensor=True,
        remarks=(_sorted_by(_sdnext_version, "SD.Next does not list it for {base}"),),
    ),
    Loader(
        name="kohya sd-scripts",
        source="kohya-ss/sd-scripts of 2026-02-16, networks/lora.py, merge_lora.py, sdxl_merge_lora.py",
        folder="any; give it as --models to networks/merge_lora.py or sdxl_merge_lora.py",
        unet_namings=_DIFFUSERS_NAMINGS | {"sdxl": frozenset({"ldm"})},
        kinds=frozenset({"LoRA"}),
        nameless=_OUTSIDE_BLOCKS,
        remarks=(_bundle_is_left,),
    ),
    Loader(
        name="stable-diffusion.cpp",
        source="leejet/stable-diffusion.cpp, stable-diffusion-cpp-python 0.4.7 run, 2026-08-19 read; SDXL only read",
        folder="the folder given as --lora-model-dir",
        spellings=_COMFY_SPELLINGS - {"dotted text", "generic"} | {"dotted attention", "bare attention"},
        text_prefixes=_ANY_TEXT_PREFIX,
        factors=_ALL_FACTORS,
        nameless=_OUTSIDE_BLOCKS,
        scale=_sd_cpp_scale,
        strength="have rank 1 and load at alpha / inputs instead of alpha / rank, next to nothing: pad them to rank 2 "
        "with zeros and double their alpha, as lora_booth's kohya format does",
        reads_scale_tensor=True,
        remarks=(_bundle_is_left,),
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
        keeps_dora=_diffusers_keeps_dora,
        scale=_diffusers_scale,
        strength="get the commonest alpha of their part of the model instead of their own: give all its layers one "
        "alpha and multiply the rest into lora_up, as lora_booth's kohya format does",
        refusals=(_diffusers_keys, _diffusers_header, _diffusers_second_encoder),
    ),
)  # fmt: skip
