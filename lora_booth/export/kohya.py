"""The portable file: kohya's names and alphas, by the rules that give one effect in every Stable Diffusion program.

The rules, found by reading and running the loaders' own code (ComfyUI 0.3.64, A1111 1.10, Forge of 2025-06, InvokeAI of
2026-08, SD.Next of 2026-07, sd-scripts of 2026-02, stable-diffusion.cpp of 2026-08, diffusers 0.42.1):

R1  `lora_<component>_<module, dots as underscores>` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`.
R2  SD 1.x and 2.x: the module names of diffusers. SDXL: those of the original code ("LDM": input_blocks …), since
    sd-scripts knows no others.
R3  Text encoders: `lora_te_` for SD 1.x and 2.x; `lora_te1_` and `lora_te2_` for SDXL.
R4  Their modules begin with `text_model_`, whatever transformers calls them today.
R5  Every module has an alpha, a 0-dim float32 tensor, = scale * rank: where it is missing, loaders use scale 1.
R6  One alpha for all modules of a component, as diffusers misapplies others; what differs is multiplied into `lora_up`.
R7  Only layers inside attentions, resnets and samplers, and the text encoders' attention and mlp.
R8  Of a text encoder's attention q, k, v and out together: A1111 merges OpenCLIP's fused projection only so.
R9  No DoRA, no other keys.
R10 Rank 2 at least, by zero padding: stable-diffusion.cpp reads the rank of a rank-1 layer wrongly.
R11 Some cross-attention k or v, or a text encoder: InvokeAI recognises the base by their width.

`to_tensors` holds R1-R6, R9 and R10 by construction; `faults` tells where an adapter breaks R7, R8 or R11.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_booth.adapter.weights import (
    AdapterWeights,
    LowRank,
    cast,
    padded,
    require_finite,
    rounding_faults,
    trimmed,
    uses_dora,
)
from lora_booth.errors import ModelError

PREFIXES = {
    "sd1": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sd2": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
"""Family to component to key prefix (R2, R3)."""

_COMPONENTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
_LDM_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_LDM_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_WORDS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks
    attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out
    conv conv1 conv2 conv_shortcut time_emb_proj conv_in conv_out time_embedding add_embedding linear_1 linear_2
    encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
"""
"""Every part of a module path: what tells the underscores inside a part from those between parts."""
_WORD = "|".join([*sorted(_WORDS.split(), key=len, reverse=True), r"\d+"])
_PORTABLE = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\..+"
    r"|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)
_LEAVES = ("lora_down.weight", "lora_up.weight", "alpha")


def kohya_name(component: str, module: str, family: str) -> str:
    """The module part of a key: ("unet", "mid_block.attentions.0.proj_in", "sdxl") to lora_unet_middle_block_1_proj_in.

    `module` may begin with `text_model.` or not. SDXL's rule assumes its two resnets per level.
    Raises ModelError for a component that the family does not have.
    """
    prefixes = PREFIXES[family]
    if component not in prefixes:
        raise ModelError(f"The adapter has a part for {component}, which {family} lacks; it is of another family.")
    if component != "unet":
        module = "text_model." + module.removeprefix("text_model.")
    elif family == "sdxl":
        module = _ldm_name(module)
    return f"{prefixes[component]}_{module.replace('.', '_')}"


def to_tensors(weights: AdapterWeights, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the portable file; factors in `dtype`, alphas in float32.

    Raises ModelError when the adapter is DoRA or a value is too large for `dtype`, NumericError when one is not finite.
    """
    _refuse(weights)
    factors, alphas = _unrounded(weights, family)
    return cast(factors, dtype) | alphas


def from_tensors(tensors: Mapping[str, Tensor]) -> AdapterWeights:
    """The adapter in a kohya-named file, float32, whichever family and either naming of the UNet.

    Raises ModelError for names that are no layer of a Stable Diffusion model and for kinds other than plain LoRA.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        if leaf not in _LEAVES:
            raise ModelError(
                f"The adapter file holds {key}, which is not part of a plain LoRA ({', '.join(_LEAVES)}); other kinds "
                "(DoRA, LoHa, LoKr …) in kohya naming cannot be read yet."
            )
        parts.setdefault(name, {})[leaf] = tensor
    weights: AdapterWeights = {}
    for name, leaves in parts.items():
        component, path = _module_path(name)
        if path in weights.get(component, {}):
            raise ModelError(f"The adapter file holds {component}.{path} twice, under two names; the second is {name}.")
        weights.setdefault(component, {})[path] = _low_rank(name, leaves)
    return weights


def faults(weights: AdapterWeights, family: str, dtype: torch.dtype = torch.float16) -> list[str]:
    """What in this adapter would be lost or differ in some program, one sentence each; empty when it is portable."""
    if uses_dora(weights):
        return [_DORA]
    found = [*_outside(weights), *_split_attention(weights), *_unrecognisable(weights)]
    return found + rounding_faults(_unrounded(weights, family)[0], dtype)


_DORA = (
    "The adapter is DoRA, for which no kohya-named file has one effect: ComfyUI and Forge normalise otherwise, A1111 "
    "and InvokeAI take its scale for another axis, kohya's tools ignore it. Export the diffusers file "
    '(export.formats = ["diffusers"]), or train with adapter.dora = false.'
)


def _refuse(weights: AdapterWeights) -> None:
    if uses_dora(weights):
        raise ModelError(_DORA)
    require_finite(weights)


def _unrounded(weights: AdapterWeights, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Factors in float32 and alphas, by key (R1-R6, R10)."""
    factors, alphas = {}, {}
    for component, layers in weights.items():
        named = {kohya_name(component, path, family): padded(low, max(2, low.rank)) for path, low in layers.items()}
        assert len(named) == len(layers), f"two layers of {component} have one kohya name"
        alpha = _common_alpha(named.values())
        for name, low in named.items():
            ratio = low.scale * low.rank / alpha
            up = low.up.float() if math.isclose(ratio, 1.0, rel_tol=1e-6) else (low.up.double() * ratio).float()
            factors[f"{name}.lora_down.weight"] = low.down.float()
            factors[f"{name}.lora_up.weight"] = up
            alphas[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return factors, alphas


def _common_alpha(layers: Iterable[LowRank]) -> float:
    """The commonest scale * rank, as float32 has it: the layers that have it keep `up` as it is."""
    alphas = Counter(torch.tensor(low.scale * low.rank, dtype=torch.float32).item() for low in layers)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _low_rank(name: str, leaves: Mapping[str, Tensor]) -> LowRank:
    if "lora_down.weight" not in leaves or "lora_up.weight" not in leaves:
        raise ModelError(f"The adapter file has only {', '.join(sorted(leaves))} of {name}; it is damaged or cut off.")
    down, up = leaves["lora_down.weight"].float(), leaves["lora_up.weight"].float()
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        raise ModelError(f"The shapes {list(down.shape)} and {list(up.shape)} of {name} do not multiply.")
    alpha = leaves.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ModelError(f"{name}.alpha has {alpha.numel()} numbers, expected one.")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return trimmed(LowRank(down, up, scale))


def _module_path(name: str) -> tuple[str, str]:
    """Component and module path behind a kohya name; the inverse of `kohya_name`."""
    match = re.fullmatch(r"(lora_unet|lora_te[12]?)_(?:text_model_)?(.+)", name)
    path = _from_ldm_name(match[2]) if match else ""
    if match is None or not re.fullmatch(f"(?:{_WORD})(?:_(?:{_WORD}))*", path):
        raise ModelError(f"The adapter file holds {name}, which is no layer of a Stable Diffusion 1, 2 or XL model.")
    return _COMPONENTS[match[1]], ".".join(re.findall(_WORD, path))


_BLOCK = re.compile(r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")


def _ldm_name(module: str) -> str:
    """SDXL's original name of a diffusers UNet module: each level is 3 places of a list, resnet in column 0, attention
    in column 1; after the second comes the sampler (Stability-AI/generative-models, openaimodel.py, UNetModel)."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return _LDM_OUTSIDE.get(module, module)
    level, place = int(match[2] or 0), int(match[4])
    rest = _LDM_RESNET.get(match[5], match[5]) if match[3] == "resnets" else match[5]
    column = 0 if match[3] == "resnets" else 1
    if match[1] == "mid":
        return f"middle_block_{1 if column else 2 * place}_{rest}"
    if match[3] == "downsamplers":
        return f"input_blocks_{3 * level + 3}_0_op"
    if match[3] == "upsamplers":
        return f"output_blocks_{3 * level + 2}_2_conv"
    if match[1] == "down":
        return f"input_blocks_{3 * level + place + 1}_{column}_{rest}"
    return f"output_blocks_{3 * level + place}_{column}_{rest}"


def _from_ldm_name(name: str) -> str:
    """The diffusers name, in underscores, of an original one; any other name as it is."""
    outside = {ldm: module.replace(".", "_") for module, ldm in _LDM_OUTSIDE.items()}
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:([0-2])_)?(.+)", name)
    if match is None or name in outside:
        return outside.get(name, name)
    side, place, column, rest = match[1], int(match[2]), match[3], match[4]
    resnet = {ldm: part for part, ldm in _LDM_RESNET.items()}.get(rest)
    if side == "middle_block":
        return f"mid_block_attentions_0_{rest}" if place == 1 else f"mid_block_resnets_{place // 2}_{resnet}"
    level, place = divmod(place - 1 if side == "input_blocks" else place, 3)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{level}"
    if rest in ("op", "conv"):
        return f"{block}_{'downsamplers' if rest == 'op' else 'upsamplers'}_0_conv"
    return f"{block}_resnets_{place}_{resnet}" if column == "0" else f"{block}_attentions_{place}_{rest}"


def _outside(weights: AdapterWeights) -> list[str]:
    """R7."""
    paths = [f"{component}.{path}" for component, layers in weights.items() for path in layers]
    lost = [path for path in paths if not _PORTABLE.fullmatch(path.partition(".")[2])]
    if not lost:
        return []
    return [
        f"{len(lost)} of {len(paths)} adapted layers, first {lost[0]}, lie outside the blocks: kohya's tools and "
        "stable-diffusion.cpp drop them; choose adapter.targets within attentions and resnets."
    ]


def _split_attention(weights: AdapterWeights) -> list[str]:
    """R8."""
    for component in weights.keys() - {"unet"}:
        layers: dict[str, set[str]] = {}
        for path in weights[component]:
            parent, _, leaf = path.rpartition(".")
            if parent.endswith("self_attn"):
                layers.setdefault(parent, set()).add(leaf)
        partial = [parent for parent, leaves in layers.items() if len(leaves) < 4]
        if partial:
            return [
                f"{component}.{partial[0]} adapts only {', '.join(sorted(layers[partial[0]]))}: A1111 ignores it "
                "unless q, k, v and out are adapted together."
            ]
    return []


def _unrecognisable(weights: AdapterWeights) -> list[str]:
    """R11."""
    has_text = any(layers for component, layers in weights.items() if component != "unet")
    if has_text or any(re.search(r"\.attn2\.to_[kv]$", path) for path in weights.get("unet", {})):
        return []
    return [
        "No cross-attention k or v (attn2.to_k, attn2.to_v) is adapted: InvokeAI tells the base by their width and "
        "will refuse the file or take it for another family."
    ]
