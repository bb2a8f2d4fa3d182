"""What the key of a tensor in an adapter file says: its spelling, layer and part.

What lives here: every spelling of a layer's name and every name of its parts. What does not: what the parts mean
(`kinds.py`) and what a program makes of a spelling (`adapter/programs/table.py`).

Words: *leaf* is the last part of a key, as "lora_down"; *spelling* is how the rest is written, which decides who finds
the layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from lora_booth.adapter.files import kohya
from lora_booth.adapter.weights import plain_path
from lora_booth.models.bases.architectures import ARCHITECTURES, is_text

SPELLINGS = {
    "kohya": "lora_unet_…, lora_te_…",
    "lycoris": "lycoris_…",
    "dotted": "unet.… of diffusers and PEFT",
    "dotted attention": "the same, in attn1 and attn2",
    "dotted text": "text_encoder.…, text_encoder_2.…",
    "processor": "unet.….attn1.processor.to_q_lora.…, which diffusers wrote until 2023",
    "bare": "dotted without unet.",
    "bare attention": "the same, in attn1 and attn2",
    "bare processor": "processor without unet.",
    "generic": "diffusion_model.… and text_encoders.clip_l.… of ComfyUI",
    "peft": "base_model.model.…, which PEFT itself writes",
    "unknown": "no layer of a Stable Diffusion base",
}
ALIASES = {
    "lora_down": "lora_down",
    "lora_up": "lora_up",
    "lora_mid": "lora_mid",
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora.down": "lora_down",
    "lora.up": "lora_up",
    "_lora.down": "lora_down",
    "_lora.up": "lora_up",
    "lora_linear_layer.down": "lora_down",
    "lora_linear_layer.up": "lora_up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "scale": "scale",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
} | {
    name: name
    for name in (
        *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    )
}
"""Every leaf that is read, without ".weight", to the one word for it here."""
BIASES = {"b_norm", "diff_b"}
"""Leaves that change a layer's bias; their update is kept apart, under the layer's path and ".bias"."""
WHOLE_KINDS = {
    **dict.fromkeys(("a1", "a2", "b1", "b2"), "GLoRA"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R", "rescale"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    "on_input": "IA3",
}
"""Leaves of kinds that are known by name and not computed; the whole layer is of that kind."""
EXTRAS = {
    **dict.fromkeys(("bias_indices", "bias_values", "bias_size"), "a sparse remainder"),
    "lora_A.bias": "a bias of a factor",
    "lora_B.bias": "a bias of a factor",
    "set_weight": "a weight to put in place",
    "reshape_weight": "a weight to be widened",
}
"""Leaves beside others that are known by name and not computed."""

_LEAVES = "|".join(sorted(map(re.escape, (*ALIASES, *WHOLE_KINDS, *EXTRAS)), key=len, reverse=True))
_KEY = re.compile(rf"(?P<name>.+?)(?:\.|(?=_lora\.))(?P<leaf>{_LEAVES})(?:\.default)?(?:\.weight)?")
_GENERIC = {
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_h.transformer.": "lora_te_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
_PEFT = "base_model.model."
_BARE = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)\b.*"
)
_NORM = re.compile(r"(?:.*[._])?(?:norm\d?|conv_norm_out|layer_norm\d|final_layer_norm|group_norm)(?:\.bias)?")


@dataclass(frozen=True)
class Key:
    """What a key says.

    `name`: the key without its leaf. `path`: as in AdapterWeights; the name itself where `spelling` is "unknown".
    `leaf`: a value of ALIASES, or a key of WHOLE_KINDS or EXTRAS.
    """

    name: str
    spelling: str
    component: str
    path: str
    leaf: str


@lru_cache(maxsize=1 << 13)
def parse(key: str) -> Key | None:
    """What `key` says; None when it is written like no part of a layer."""
    match = _KEY.fullmatch(key)
    layer = _layer(match["name"]) if match else None
    if match is None or layer is None:
        return None
    return Key(match["name"], *layer, ALIASES.get(match["leaf"], match["leaf"]))


def is_norm(path: str) -> bool:
    """Whether a layer is a normalisation, by the end of its path."""
    return _NORM.fullmatch(path) is not None


def naming_of(spelling: str) -> str:
    """ "kohya", "diffusers", "peft" or "comfyui": what a user calls a spelling."""
    named = {"kohya": "kohya", "lycoris": "kohya", "unknown": "kohya", "generic": "comfyui", "peft": "peft"}
    return named.get(spelling, "diffusers")


def _layer(name: str) -> tuple[str, str, str] | None:
    """Spelling, component and path of a layer's name."""
    if name.startswith(tuple(f"{prefix}_" for prefix in kohya.prefixes())):
        if "." in name:
            return None
        found = kohya.module_path(name)
        return ("lycoris" if name.startswith("lycoris_") else "kohya", *found) if found else ("unknown", "unet", name)
    for prefix, kohya_prefix in _GENERIC.items():
        if name.startswith(prefix):
            found = kohya.module_path(kohya_prefix + name.removeprefix(prefix).replace(".", "_"))
            return ("generic", *found) if found else None
    if name.startswith(_PEFT):  # its own file does not say whose layers these are
        path = _plain(name.removeprefix(_PEFT))
        return "peft", "text_encoder" if path.startswith("encoder.layers") else "unet", path
    first, _, rest = name.partition(".")
    if rest and first in {name for row in ARCHITECTURES.values() for name in row.adaptable}:
        path = _plain(rest)
        return _dotted(first, rest, path, "dotted"), first, path
    return (_dotted("unet", name, _plain(name), "bare"), "unet", _plain(name)) if _BARE.fullmatch(name) else None


def _plain(path: str) -> str:
    path = plain_path(path).replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def _dotted(component: str, name: str, path: str, start: str) -> str:
    if is_text(component):
        return "dotted text"
    if ".processor." in name:
        return "processor" if start == "dotted" else "bare processor"
    return start + (" attention" if re.search(r"\.attn[12]\.", path) else "")
