"""The portable file: kohya's names and alphas, which every program reads.

Its rules give the same effect in every Stable Diffusion program.

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
R11 Some cross-attention k or v, in SD 1.x and 2.x or a text encoder: InvokeAI recognises the base by the first such
    layer in the file, and takes a time_emb_proj before it for SDXL.

`to_tensors` holds R1-R6, R9 and R10 by construction; `faults` tells where an adapter breaks R7, R8 or R11.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from lora_booth.adapter.weights import AdapterWeights, LowRank, cast, padded, require_finite, rounding_faults, uses_dora
from lora_booth.errors import ModelError
from lora_booth.models.bases import ldm
from lora_booth.models.bases.architectures import ARCHITECTURES, is_text

_WORDS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks
    attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out
    conv conv1 conv2 conv_shortcut time_emb_proj conv_in conv_out time_embedding add_embedding linear_1 linear_2
    encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
    norm norm1 norm2 norm3 conv_norm_out layer_norm1 layer_norm2 final_layer_norm
"""
"""Every part of a module path: what tells the underscores inside a part from those between parts."""
_PORTABLE = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers)\..+"
    r"|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
)


def kohya_name(component: str, module: str, family: str) -> str:
    """The module part of a key: ("unet", "mid_block.attentions.0.proj_in", "sdxl") to lora_unet_middle_block_1_proj_in.

    `module` may begin with `text_model.` or not. SDXL's rule assumes its two resnets per level.
    Raises ModelError for a component that the family does not have.
    """
    row = ARCHITECTURES[family]
    if component not in row.kohya_prefixes:
        raise ModelError(f"The adapter has a part for {component}, which {family} lacks; it is of another family.")
    if is_text(component) and module != "text_projection":  # which lies beside text_model
        module = "text_model." + module.removeprefix("text_model.")
    elif row.has_original_names:
        module = ldm.original_name(module)
    return f"{row.kohya_prefixes[component]}_{module.replace('.', '_')}"


def to_tensors(weights: AdapterWeights, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the portable file; factors in `dtype`, alphas in float32.

    Raises ModelError when the adapter is DoRA or a value is too large for `dtype`, NumericError when one is not finite.
    """
    _refuse(weights)
    factors, alphas = _keyed_factors(weights, family)
    return cast(factors, dtype) | alphas


def module_path(name: str) -> tuple[str, str] | None:
    """Component and module path behind a kohya name, whichever family and naming of the UNet; None for the name of no
    layer of a Stable Diffusion model. The inverse of `kohya_name`."""
    components = prefixes()
    match = re.fullmatch(rf"({'|'.join(sorted(components, key=len, reverse=True))})_(?:text_model_)?(.+)", name)
    path = ldm.diffusers_name(match[2]) if match else ""
    if match is None or not is_layer(path):
        return None
    # LyCORIS has one prefix for everything.
    is_of_text = match[1] == "lycoris" and path.startswith(("encoder_layers", "final_layer_norm"))
    return "text_encoder" if is_of_text else components[match[1]], ".".join(re.findall(_word(), path))


def is_layer(path: str) -> bool:
    """Whether a module path, with dots or underscores, has no other parts than those of the families here."""
    return re.fullmatch(f"(?:{_word()})(?:[._](?:{_word()}))*", path) is not None


def prefixes() -> dict[str, str]:
    """Prefix of a kohya name to the component it stands for, of all families."""
    return _prefixes_of(tuple(ARCHITECTURES))


@lru_cache(maxsize=4)
def _prefixes_of(families: tuple[str, ...]) -> dict[str, str]:
    rows = [ARCHITECTURES[family] for family in families]
    return {"lycoris": "unet"} | {prefix: name for row in rows for name, prefix in row.kohya_prefixes.items()}


def _word() -> str:
    """What matches one part of a module path, of all families."""
    return _word_of(tuple(ARCHITECTURES))


@lru_cache(maxsize=4)
def _word_of(families: tuple[str, ...]) -> str:
    words = {word for family in families for word in ARCHITECTURES[family].path_words.split()} | set(_WORDS.split())
    return "|".join([*sorted(words, key=lambda word: (-len(word), word)), r"\d+"])


def faults(weights: AdapterWeights, family: str, dtype: torch.dtype = torch.float16) -> list[str]:
    """What in this adapter would be lost or differ in some program, one sentence each; empty when it is portable."""
    if uses_dora(weights):
        return [_DORA]
    found = [*_outside(weights), *_split_attention(weights), *_unrecognisable(weights, family)]
    return found + rounding_faults(_keyed_factors(weights, family)[0], dtype)


_DORA = (
    "The adapter is DoRA, for which no kohya-named file has one effect: ComfyUI and Forge normalise otherwise, A1111 "
    "and InvokeAI take its scale for another axis, kohya's tools ignore it. Export the diffusers file "
    '(export.formats = ["diffusers"]), or train with adapter.dora = false.'
)


def _refuse(weights: AdapterWeights) -> None:
    if uses_dora(weights):
        raise ModelError(_DORA)
    require_finite(weights)


def _keyed_factors(weights: AdapterWeights, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
    return next((alpha for alpha, _ in alphas.most_common() if alpha), 1.0)  # an alpha of 0 would lose the others


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
    for component in filter(is_text, weights):
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


def _unrecognisable(weights: AdapterWeights, family: str) -> list[str]:
    """R11."""
    names = sorted(kohya_name(component, path, family) for component, layers in weights.items() for path in layers)
    telling = r".+_(attn2_to_[kv]|time_emb_proj|emb_layers_1)|lora_te_.+_self_attn_.+"
    first = next((name for name in names if re.fullmatch(telling, name)), "")
    if family == "sdxl":
        is_known = bool(first) or any(re.search(r"_transformer_blocks_[2-9]_", name) for name in names)
    else:
        is_known = bool(first) and not first.endswith("_time_emb_proj")
    if is_known:
        return []
    return [
        "InvokeAI will refuse the file or take it for another family: it tells the base by the width of the first "
        "cross-attention k or v (attn2.to_k, attn2.to_v) in the file, which must come before any time_emb_proj; adapt "
        "attn2.to_k in every block."
    ]
