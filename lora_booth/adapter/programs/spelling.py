"""The layers of a file as it spells them, and the layers that each family has.

What lives here: keys, shapes and header sorted into layers, without a tensor of them. What does not: what a program
makes of them (`verdicts.py`) and what the tensors mean (`adapter/files/kinds.py`).

Words: *spelling* is how a key is written, see `adapter/files/keys.py`. *Outside* are the layers that lie in none of the
UNet's blocks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from lora_booth.adapter.files import diffusers
from lora_booth.adapter.files.family import context_widths, family_of_width, told_family
from lora_booth.adapter.files.keys import EXTRAS, WHOLE_KINDS, parse
from lora_booth.adapter.files.reading import require_no_stranger
from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES, is_text

Shape = tuple[int, ...]

OUTSIDE = frozenset({
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    "add_embedding.linear_1", "add_embedding.linear_2",
})  # fmt: skip
TEXT_PROJECTION = "text_projection"

_WIDENING_LEVELS = (1, 2)
"""Levels whose first resnet has more channels than the level above: 320, 640, 1280 (, 1280)."""
_IN_BLOCK = (
    *(f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_ORIGINAL_NAME = re.compile(
    r"(?:lora_unet_|lycoris_|diffusion_model\.)"
    r"(?:input_blocks|middle_block|output_blocks|out[_.]2|time_embed[_.]|label_emb)"
)


@dataclass
class Layer:
    """One adapted layer as the file spells it.

    `name`: the first key's part for the layer. `path`: as in AdapterWeights; the name itself where `spelling` is
    "unknown". `leaves`: words of `kinds.ALIASES` to shapes.
    """

    name: str
    spelling: str
    component: str
    path: str
    leaves: dict[str, Shape] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    alpha: float | None = None
    """None where there is none, or its value was not given or is not finite."""

    @cached_property
    def prefix(self) -> str:
        """ "lora_unet", "lora_te1" … of kohya's names, else empty."""
        match = re.match(r"lora_(?:unet|te[12]?)(?=_)", self.name)
        return match[0] if match else ""

    @property
    def is_text(self) -> bool:
        """Whether it lies in a text encoder."""
        return is_text(self.component)

    @cached_property
    def naming(self) -> str:
        """ "ldm" or "diffusers": whose names the UNet's layers have."""
        return "ldm" if _ORIGINAL_NAME.match(self.name) else "diffusers"

    @property
    def has_text_model(self) -> bool:
        """Whether the name keeps the level that transformers 5.6 dropped from CLIPTextModel."""
        return "text_model" in self.name

    @cached_property
    def factors(self) -> str:
        """How the two factors are called: "down/up", "A/B", "A/B.default" or "old" (`.lora.down`, `_lora.down`)."""
        text = " ".join(self.keys)
        if "lora_A" in text:
            return "A/B.default" if ".default" in text else "A/B"
        return "old" if re.search(r"[._]lora\.(?:down|up)|lora_linear_layer", text) else "down/up"

    @cached_property
    def kind(self) -> str:
        """ "LoRA", "LoHa", "full difference" …, as the rows of `table.py` have it; "half" where a part is missing."""
        leaves = self.leaves.keys()
        whole = next((WHOLE_KINDS[leaf] for leaf in self.leaves if leaf in WHOLE_KINDS), None)
        if whole is not None:
            return self._named(whole)
        if any(leaf.startswith(("hada_", "lokr_")) for leaf in leaves):
            return "LoHa" if "hada_w1_a" in leaves else "LoKr" + (" with Tucker core" if "lokr_t2" in leaves else "")
        if "w_norm" in leaves or "b_norm" in leaves:
            return "norm" if {"w_norm", "b_norm"} <= leaves else "norm without bias" if "w_norm" in leaves else "half"
        if "diff" in leaves:
            return "full difference"
        if leaves and leaves <= {"diff_b", "alpha"}:
            return "bias alone" if "diff_b" in leaves else "half"
        if not {"lora_down", "lora_up"} <= leaves:
            return "half"
        return "LoCon with lora_mid" if "lora_mid" in leaves else "LoRA"

    def _named(self, kind: str) -> str:
        """GLoRA by whose order of factors it has, OFT by whether its alpha limits it."""
        first, second = self.leaves.get("b1", ()), self.leaves.get("b2", ())
        if kind == "GLoRA" and len(first) > 1 and len(second) > 1 and first[0] == second[1] != second[0]:
            return "GLoRA of 2023"
        return "OFT with a limit" if kind == "OFT" and self.alpha else kind

    @cached_property
    def rank(self) -> int:
        """Rows of lora_down; 0 where there are none."""
        shape = self.leaves.get("lora_down", ())
        return shape[0] if shape else 0

    @cached_property
    def fan_in(self) -> int | None:
        """Channels that go into the layer, None where the shapes do not tell."""
        for leaf in ("lora_down", "hada_w1_b", "diff"):
            if len(self.leaves.get(leaf, ())) > 1:
                return self.leaves[leaf][1]
        sides = [self.leaves.get(leaf) or self.leaves.get(f"{leaf}_b", ()) for leaf in ("lokr_w1", "lokr_w2")]
        return math.prod(shape[1] for shape in sides) if all(len(shape) > 1 for shape in sides) else None

    @cached_property
    def dora_axis(self) -> str:
        """ "" without DoRA; the axis its scale runs along: "output", "input", or "flat" where it has one dimension."""
        if "magnitude" in self.leaves:
            return "output"  # PEFT knows no other
        shape = self.leaves.get("dora_scale")
        if shape is None:
            return ""
        return "flat" if len(shape) < 2 else "input" if shape[0] == 1 else "output"


@dataclass(frozen=True)
class AdapterFile:
    """What keys, shapes, alphas and header of an adapter file say, sorted. `foreign`: keys that belong to no layer."""

    family: str
    layers: tuple[Layer, ...]
    foreign: tuple[str, ...]
    header: Mapping[str, str]
    is_full_size: bool
    """False where cross-attention has a width of no released base, as the miniature's."""

    def is_in_base(self, layer: Layer) -> bool:
        """Whether the base has the layer. Of a base whose layout is unknown every name that parses counts as present,
        as long as the family has the component."""
        if layer.spelling == "unknown" or layer.component not in ARCHITECTURES[self.family].adaptable:
            return False
        place = (layer.component, layer.path)
        return not self.is_full_size or place in module_paths(self.family) or place in norm_paths(self.family)

    @cached_property
    def text_attention(self) -> dict[tuple[str, str], set[str]]:
        """(component, attention's path) to the projections of it that the file adapts."""
        found: dict[tuple[str, str], set[str]] = {}
        for layer in self.layers:
            parent, _, leaf = layer.path.rpartition(".")
            if layer.is_text and parent.endswith("self_attn"):
                found.setdefault((layer.component, parent), set()).add(leaf)
        return found

    @cached_property
    def common_alphas(self) -> dict[str, float]:
        """Component to the commonest alpha of its layers, the earlier of equally common ones."""
        alphas: dict[str, Counter[float]] = {}
        for layer in self.layers:
            if layer.alpha is not None:
                alphas.setdefault(layer.component, Counter())[layer.alpha] += 1
        return {component: counts.most_common(1)[0][0] for component, counts in alphas.items()}

    @cached_property
    def header_scale(self) -> Callable[[str, str, int | None], float | None]:
        """(component, path, rank) to the scale in diffusers' `lora_adapter_metadata`; raises ModelError where it is
        broken."""
        return diffusers.scale_from(self.header)


def adapter_file(
    shapes: Mapping[str, Shape], family: str | None, header: Mapping[str, str], alphas: Mapping[str, float]
) -> AdapterFile:
    """The file with these keys, sorted. `alphas`: full key (`….alpha`) to value.

    Raises ModelError when no key is a layer's, and when `family` is None and cannot be told or contradicts the shapes.
    """
    require_no_stranger(shapes)
    found: dict[tuple[str, str, str, str], Layer] = {}
    foreign = []
    for key, shape in shapes.items():
        said = parse(key)
        if said is None or said.leaf in EXTRAS:
            foreign.append(key)
            continue
        layer = Layer(said.name, said.spelling, said.component, said.path)
        layer = found.setdefault((layer.spelling, layer.naming, layer.component, layer.path), layer)
        layer.leaves[said.leaf] = tuple(shape)
        layer.keys.append(key)
        if said.leaf == "alpha" and math.isfinite(alphas.get(key, math.nan)):
            layer.alpha = alphas[key]
    if not found:
        raise ModelError(
            "The file holds no layer of a LoRA, LoCon, DoRA, LoHa or LoKr; its first key is "
            f"{next(iter(shapes), None)}. Only adapters of Stable Diffusion 1, 2 and XL can be checked."
        )
    layers = tuple(found.values())
    inputs = {(layer.component, layer.path): layer.fan_in for layer in layers}
    widths, told = context_widths(inputs), told_family(inputs, header)
    wide = next(filter(None, map(family_of_width, widths)), None)
    if family is not None and wide is not None and wide != family:
        raise ModelError(
            f"The adapter is for {ARCHITECTURES[wide].label} by the width of its cross-attention, not for "
            f"{ARCHITECTURES[family].label}; check it against its own family."
        )
    family = family or told
    if family is None:
        raise ModelError(
            "The family of the base cannot be told: no cross-attention keys or values are adapted and the header names "
            f"none. Say which of {', '.join(ARCHITECTURES)} it is."
        )
    return AdapterFile(family, layers, tuple(foreign), header, not widths or wide == family)


@lru_cache
def module_paths(family: str) -> frozenset[tuple[str, str]]:
    """(component, module path) of every linear and convolutional layer of a full-size base's UNet and text encoders."""
    row = ARCHITECTURES[family]
    outside = {path for path in OUTSIDE if "text_encoder_2" in row.parts or not path.startswith("add_embedding")}
    paths = {(row.denoiser, path) for path in [*_unet_paths(row.depths), *outside]}
    for component, count in row.text_layers.items():
        layers = [f"encoder.layers.{i}" for i in range(count)]
        paths |= {(component, f"{layer}.self_attn.{leaf}_proj") for layer in layers for leaf in ("q", "k", "v", "out")}
        paths |= {(component, f"{layer}.mlp.{leaf}") for layer in layers for leaf in ("fc1", "fc2")}
    if "text_encoder_2" in row.parts:
        paths.add(("text_encoder_2", TEXT_PROJECTION))
    return frozenset(paths)


@lru_cache
def norm_paths(family: str) -> frozenset[tuple[str, str]]:
    """(component, module path) of every normalisation of a full-size base's UNet and text encoders."""
    row = ARCHITECTURES[family]
    unet = row.denoiser
    parents = {(component, path.rpartition(".")) for component, path in module_paths(family)}
    paths = {(unet, "conv_norm_out")}
    for parent in {parent for component, (parent, _, _) in parents if component == unet}:
        if re.search(r"resnets\.\d+$", parent):
            paths |= {(unet, f"{parent}.norm1"), (unet, f"{parent}.norm2")}
        elif re.search(r"attentions\.\d+$", parent):
            paths.add((unet, f"{parent}.norm"))
        elif match := re.fullmatch(r"(.+\.transformer_blocks\.\d+)\.attn1", parent):
            paths |= {(unet, f"{match[1]}.norm{i}") for i in (1, 2, 3)}
    for component, count in row.text_layers.items():
        paths |= {(component, f"encoder.layers.{i}.layer_norm{j}") for i in range(count) for j in (1, 2)}
        paths.add((component, "final_layer_norm"))
    return frozenset(paths)


def _unet_paths(depths: tuple[int, ...]) -> Iterator[str]:
    """Down: two resnets a level, each with an attention behind it; up: three, from the smallest picture back."""
    last = len(depths) - 1
    for level, depth in enumerate(depths):
        for i in range(2):
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", has_shortcut=i == 0 and level in _WIDENING_LEVELS)
            yield from _attention(f"down_blocks.{level}.attentions.{i}", depth)
        for i in range(3):
            yield from _resnet(f"up_blocks.{last - level}.resnets.{i}", has_shortcut=True)
            yield from _attention(f"up_blocks.{last - level}.attentions.{i}", depth)
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv"
            yield f"up_blocks.{level}.upsamplers.0.conv"
    yield from _attention("mid_block.attentions.0", max(depths))
    for i in range(2):
        yield from _resnet(f"mid_block.resnets.{i}", has_shortcut=False)


def _resnet(path: str, *, has_shortcut: bool) -> Iterator[str]:
    for leaf in ("conv1", "time_emb_proj", "conv2", *(["conv_shortcut"] if has_shortcut else [])):
        yield f"{path}.{leaf}"


def _attention(path: str, depth: int) -> Iterator[str]:
    if depth:
        yield from (f"{path}.proj_in", f"{path}.proj_out")
    for block in range(depth):
        yield from (f"{path}.transformer_blocks.{block}.{leaf}" for leaf in _IN_BLOCK)
