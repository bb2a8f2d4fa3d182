"""The rules of programs that need code: refusals, scales, what headers say.

Every rule was measured on the program's own code, or read in it where "read" stands beside it; the versions stand in
`table.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_booth.adapter.programs.spelling import AdapterFile, Layer
from lora_booth.models.bases.architectures import ARCHITECTURES

CONVERT = "`lora-booth export` makes a file of it that every program reads"
"""What mends a file that is only spelled wrongly."""
RESIZE = "`lora-booth resize` makes plain LoRA"
"""What mends a file of another kind; " of it" follows."""

Rule = Callable[[AdapterFile], str | None]
"""A sentence when the rule strikes, else None."""
Scale = Callable[[AdapterFile, Layer], float | None]
"""The scale a program gives to a layer, None where the value of an alpha is not known."""


def alpha_over_rank(file: AdapterFile, layer: Layer) -> float | None:
    """alpha / rank; 1 without alpha."""
    if "alpha" not in layer.leaves:
        return 1.0
    return layer.alpha / layer.rank if layer.alpha is not None and layer.rank else None


def a1111_leaves(file: AdapterFile) -> str | None:
    """No type of module accepts the tensors of such a layer."""
    bad = {"half", "norm without bias", "bias alone", "BOFT"}
    found = [layer for layer in file.layers if layer.kind in bad and file.is_in_base(layer)]
    if not found:
        return None
    what = "lacks a factor" if found[0].kind == "half" else f"is {found[0].kind}"
    return f"AUTOMATIC1111 stops with an error at {found[0].name}, which {what}; take it out, or export the file again."


def forge_lokr(file: AdapterFile) -> str | None:
    found = [layer.name for layer in file.layers if layer.kind == "LoKr with Tucker core" and file.is_in_base(layer)]
    if not found:
        return None
    return f"Forge stops with an error at {found[0]}, a LoKr with Tucker core; {RESIZE} of it."


def invokeai_keys(file: AdapterFile) -> str | None:
    keys = [key for layer in file.layers for key in layer.keys]
    foreign = [key for key in file.foreign if not key.startswith("bundle_emb")]
    dotted = ("unet.", "text_encoder.", "text_encoder_2.")
    bad = [key for key in keys if "lora_A" in key or "lora_B" in key or key.startswith(dotted)]
    strange = {"GLoRA", "GLoRA of 2023", "OFT", "OFT with a limit", "BOFT", "bias alone"}
    bad += [layer.name for layer in file.layers if layer.kind in strange or _is_decomposed_lycoris(layer)]
    if file.family == "sdxl":
        known = ("lora_unet_", "lora_te1_", "lora_te2_")
        bad += [key for key in (*keys, *foreign) if not key.startswith(known)]
    if bad:
        return f"InvokeAI stops with an error at {bad[0]}; {CONVERT}."
    namings = {layer.naming for layer in file.layers if not layer.is_text}
    if file.family == "sdxl" and len(namings) > 1:
        return f"InvokeAI stops with an error, as two namings of the UNet are mixed; {CONVERT}."
    return None


def _is_decomposed_lycoris(layer: Layer) -> bool:
    """It takes every layer with a dora_scale for a LoRA."""
    return bool(layer.dora_axis) and layer.kind not in ("LoRA", "LoCon with lora_mid")


def invokeai_base(file: AdapterFile) -> str | None:
    told = _invokeai_family(file)
    if told == file.family or not file.is_full_size:
        return None
    effect = f"takes the file for {ARCHITECTURES[told].label}" if told else "refuses to import the file"
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


def diffusers_keys(file: AdapterFile) -> str | None:
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
            f"{ARCHITECTURES[file.family].label}; {CONVERT}."
        )
    return None


def diffusers_second_encoder(file: AdapterFile) -> str | None:
    """`_load_lora_into_text_encoder` finds no rank: CLIPTextModelWithProjection has the level that the file lacks."""
    second = [layer for layer in file.layers if layer.component == "text_encoder_2"]
    if not second or any(layer.has_text_model for layer in second):
        return None
    return f"diffusers stops with an error at {second[0].name}, which lacks the part text_model; {CONVERT}."


def diffusers_mixed_dora(file: AdapterFile) -> str | None:
    """PEFT gives every layer of a component magnitudes, and those that the file lacks stay without numbers."""
    own = [layer for layer in file.layers if layer.spelling.startswith("dotted")]
    for component in {layer.component for layer in own if layer.dora_axis}:
        plain = [layer.name for layer in own if layer.component == component and not layer.dora_axis]
        if plain:
            return (
                f"diffusers stops with an error: {plain[0]} is plain LoRA beside layers of DoRA; `lora-booth generate` "
                "takes both, and `lora-booth export --base` makes plain LoRA of all."
            )
    return None


def diffusers_header(file: AdapterFile) -> str | None:
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


def diffusers_scale(file: AdapterFile, layer: Layer) -> float | None:
    """Own keys: the header's scale. kohya's: the component's commonest alpha wherever a layer has none, or its alpha is
    filed under a name that no layer has: in attention, and under text_model in the encoder that lost this level
    (`_get_alpha_name`, `get_peft_kwargs`; held against diffusers in tests/adapter/test_verdicts.py)."""
    common = file.common_alphas.get(layer.component)
    if layer.spelling != "kohya" or common is None:
        return file.header_scale(layer.component, layer.path, layer.rank or 1) or 1.0
    has_lost_level = layer.component == "text_encoder" and layer.has_text_model
    is_misfiled = "attn" in layer.path or has_lost_level or "alpha" not in layer.leaves
    return common / layer.rank if is_misfiled and layer.rank else alpha_over_rank(file, layer)


def diffusers_keeps_dora(layer: Layer) -> bool:
    """In own keys; of a text encoder only under the parameter's name, `….lora_magnitude_vector.weight`."""
    is_parameter = any(key.endswith("lora_magnitude_vector.weight") for key in layer.keys)
    return layer.spelling.startswith("dotted") and (is_parameter or not layer.is_text)


def sd_cpp_scale(file: AdapterFile, layer: Layer) -> float | None:
    """ggml drops trailing sides of 1, so the inputs of a rank-1 layer are taken for its rank; read for convolutions."""
    if layer.alpha is not None and layer.rank == 1 and layer.fan_in:
        return layer.alpha / layer.fan_in
    return alpha_over_rank(file, layer)


def sorted_by(version: Callable[[Mapping[str, str]], str | None], effect: str) -> Rule:
    """The rule for a program that sorts files by what their header says; `version`: header to family."""

    def rule(file: AdapterFile) -> str | None:
        told = version(file.header)
        if told is None or told == file.family:
            return None
        return (
            f"By its header the file is one for {ARCHITECTURES[told].label}: "
            f"{effect.format(base=ARCHITECTURES[file.family].label)}; write ss_base_model_version and ss_v2 into the "
            "header."
        )

    return rule


def a1111_version(header: Mapping[str, str]) -> str | None:
    """Any header without the other marks is SD 1."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if header.get("ss_v2") == "True" else "sd1" if header else None


def forge_version(header: Mapping[str, str]) -> str | None:
    exact = {"stable-diffusion-v1/lora": "sd1", "stable-diffusion-xl-v1-base/lora": "sdxl"}
    found = exact.get(header.get("modelspec.architecture", ""), a1111_version(header))
    return found if found != "sd1" or header.get("modelspec.architecture") in exact else None


def sdnext_version(header: Mapping[str, str]) -> str | None:
    marks = (
        ("ss_base_model_version", "sd_v1", "sd1"),
        ("ss_base_model_version", "sdxl", "sdxl"),
        ("modelspec.architecture", "stable-diffusion-v1", "sd1"),
        ("modelspec.architecture", "stable-diffusion-v2", "sd2"),
        ("modelspec.architecture", "stable-diffusion-xl", "sdxl"),
        ("ss_v2", "True", "sd2"),
    )
    return next((family for key, mark, family in marks if header.get(key, "").startswith(mark)), None)


def bundle_is_left(file: AdapterFile) -> str | None:
    if not any(key.startswith("bundle_emb") for key in file.foreign):
        return None
    return "The embedding in the file is not read; put it into the embeddings folder as a file of its own."
