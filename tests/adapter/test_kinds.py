"""Every kind of layer against its formula written out, and files of the field through `export`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_booth.adapter.files import storage
from lora_booth.adapter.files.keys import parse
from lora_booth.adapter.files.kinds import MAX_LAYER_NUMBERS, update_of
from lora_booth.adapter.weights import Dense, LowRank, delta, weight_shape
from lora_booth.errors import ModelError
from tests.support import adapted

GENERATOR = torch.Generator().manual_seed(0)
LAYER = "lora_unet_mid_block_attentions_0_proj_in"
PATH = "mid_block.attentions.0.proj_in"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def entry(tensor: Tensor, *at: int) -> float:
    return float(tensor[at])


def test_loha_is_the_entrywise_product_of_two_low_rank_matrices() -> None:
    leaves = {
        "hada_w1_a": numbers(5, 2),
        "hada_w1_b": numbers(2, 3),
        "hada_w2_a": numbers(5, 2),
        "hada_w2_b": numbers(2, 3),
    }
    change = delta(update_of("x", leaves | {"alpha": torch.tensor(1.0)}))
    for out in range(5):
        for column in range(3):
            first = sum(entry(leaves["hada_w1_a"], out, r) * entry(leaves["hada_w1_b"], r, column) for r in range(2))
            second = sum(entry(leaves["hada_w2_a"], out, r) * entry(leaves["hada_w2_b"], r, column) for r in range(2))
            assert entry(change, out, column) == pytest.approx(0.5 * first * second, abs=1e-5)


def test_loha_with_cores_multiplies_them_in() -> None:
    leaves = {f"hada_w{side}_a": numbers(2, 5) for side in "12"} | {f"hada_w{side}_b": numbers(2, 3) for side in "12"}
    leaves |= {f"hada_t{side}": numbers(2, 2, 3, 3) for side in "12"}
    change = delta(update_of("x", leaves))
    assert change.shape == (5, 3, 3, 3)

    def half(side: str) -> float:
        a, b, core = leaves[f"hada_w{side}_a"], leaves[f"hada_w{side}_b"], leaves[f"hada_t{side}"]
        return sum(entry(core, i, j, 1, 2) * entry(a, i, 4) * entry(b, j, 2) for i in range(2) for j in range(2))

    assert entry(change, 4, 2, 1, 2) == pytest.approx(half("1") * half("2"), abs=1e-5)


@pytest.mark.parametrize("is_factored", [False, True])
def test_lokr_is_the_kronecker_product(is_factored: bool) -> None:
    first, a, b = numbers(2, 3), numbers(4, 2), numbers(2, 5)
    leaves = {"lokr_w1": first, "alpha": torch.tensor(6.0)}
    leaves |= {"lokr_w2_a": a, "lokr_w2_b": b} if is_factored else {"lokr_w2": a @ b}
    change = delta(update_of("x", leaves))
    scale = 3.0 if is_factored else 1.0  # with both whole, LyCORIS ignores alpha
    assert change.shape == (8, 15)
    assert entry(change, 1 * 4 + 3, 2 * 5 + 1) == pytest.approx(
        scale * entry(first, 1, 2) * entry(a @ b, 3, 1), abs=1e-5
    )


def test_lokr_of_a_convolution_fits_its_weight_whole_or_flattened() -> None:
    first, second = numbers(2, 2), numbers(3, 4, 3, 3)
    whole = update_of("x", {"lokr_w1": first, "lokr_w2": second})
    flat = update_of("x", {"lokr_w1": first, "lokr_w2_a": torch.eye(3), "lokr_w2_b": second.flatten(1)})
    weight = numbers(6, 8, 3, 3)
    assert torch.allclose(adapted.merged_weight(weight, whole), adapted.merged_weight(weight, flat), atol=1e-6)
    assert delta(whole)[1 * 3 + 2, 1 * 4 + 3, 0, 1] == pytest.approx(entry(first, 1, 1) * entry(second, 2, 3, 0, 1))


def test_a_middle_factor_makes_a_convolution_of_two_linear_ones() -> None:
    up, mid, down = numbers(5, 2, 1, 1), numbers(2, 2, 3, 3), numbers(2, 4, 1, 1)
    change = delta(update_of("x", {"lora_up": up, "lora_mid": mid, "lora_down": down, "alpha": torch.tensor(4.0)}))
    picture = numbers(1, 4, 6, 6)
    conv = torch.nn.functional.conv2d
    steps = conv(conv(conv(picture, down), mid), up)
    assert torch.allclose(conv(picture, change), 2.0 * steps, atol=1e-4)


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 1), "hada_w2_b": (1, 3)},
        {"hada_w1_a": (2, 5), "hada_w1_b": (2, 4), "hada_w2_a": (2, 5), "hada_w2_b": (2, 4), "hada_t1": (2, 2, 3, 1),
         "hada_t2": (2, 2, 3, 1)},
        {"lokr_w1": (2, 3), "lokr_w2": (4, 5)},
        {"lokr_w1": (2, 3), "lokr_w2": (4, 5, 3, 3)},
        {"lora_up": (5, 2, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_down": (2, 4, 1, 1)},
        {"diff": (3, 4)},
    ],
)  # fmt: skip
def test_the_shape_is_known_before_the_change_is_computed(shapes: dict[str, tuple[int, ...]]) -> None:
    update = update_of("x", {leaf: numbers(*shape) for leaf, shape in shapes.items()})
    assert weight_shape(update) == tuple(delta(update).shape)
    assert update.shape is not None or "diff" in shapes  # type: ignore[union-attr]


def test_a_whole_difference_is_itself() -> None:
    change = numbers(3, 4)
    assert torch.equal(delta(update_of("x", {"diff": change})), change)


def test_dora_in_kohya_naming_is_read_with_its_magnitudes() -> None:
    leaves = {"lora_down": numbers(2, 4), "lora_up": numbers(3, 2), "dora_scale": torch.tensor([[1.0], [2.0], [3.0]])}
    update = update_of("x", leaves)
    assert isinstance(update, LowRank)
    rows = adapted.merged_weight(numbers(3, 4), update).norm(dim=1)
    assert rows.tolist() == pytest.approx([1.0, 2.0, 3.0], abs=1e-5)


def decomposed(weight: Tensor, change: Tensor, magnitude: list[float], *, over_inputs: bool) -> Tensor:
    """W' of DoRA written out entry by entry: LyCORIS' apply_weight_decompose, wd_on_out True and False."""
    whole = (weight + change).double()
    result = whole.clone()
    for i, size in enumerate(magnitude):
        part = whole[:, i] if over_inputs else whole[i]
        index = (slice(None), i) if over_inputs else (i,)
        result[index] = part * size / part.square().sum().sqrt()
    return result.float()


SHAPES = {"linear": (3, 4), "square": (4, 4), "convolution": (3, 4, 3, 3), "square convolution": (4, 4, 3, 3)}
FACTORS: dict[str, Callable[[tuple[int, ...]], tuple[dict[str, Tensor], Tensor]]] = {}
"""Kind to a function from a weight's shape to leaves and the change that they are, written out."""


def factors(kind: str) -> Any:
    def register(function: Any) -> Any:
        FACTORS[kind] = function
        return function

    return register


@factors("LoRA")
def lora(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    down, up = numbers(2, *shape[1:]), numbers(shape[0], 2, *(1 for _ in shape[2:]))
    change = torch.stack([sum(up[o, r].reshape(()) * down[r] for r in range(2)) for o in range(shape[0])])
    return {"lora_down": down, "lora_up": up}, change


@factors("LoHa")
def loha(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    flat = (shape[0], math.prod(shape[1:]))
    halves = {side: (numbers(flat[0], 2), numbers(2, flat[1])) for side in "12"}
    leaves = {f"hada_w{side}_{ab}": t for side, pair in halves.items() for ab, t in zip("ab", pair, strict=True)}
    first, second = (a @ b for a, b in halves.values())
    return leaves, (first * second).reshape(shape)


@factors("LoKr")
def lokr(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    first, a, b = numbers(1, 2), numbers(shape[0], 2), numbers(2, shape[1] // 2 * math.prod(shape[2:]))
    second = (a @ b).reshape(shape[0], shape[1] // 2, *shape[2:])
    change = torch.cat([first[0, 0] * second, first[0, 1] * second], dim=1)
    return {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}, change


@pytest.mark.parametrize("over_inputs", [False, True])
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("kind", FACTORS)
def test_dora_of_every_kind_runs_along_the_axis_that_its_shape_says(kind: str, layer: str, over_inputs: bool) -> None:
    shape = SHAPES[layer]
    leaves, change = FACTORS[kind](shape)
    magnitude = [0.5 + i for i in range(shape[1 if over_inputs else 0])]
    ones = [1] * (len(shape) - 2)
    stored = torch.tensor(magnitude).reshape(*((1, -1) if over_inputs else (-1, 1)), *ones)
    update = update_of("unet.x", leaves | {"dora_scale": stored, "alpha": torch.tensor(3.0)})  # scale 1.5
    weight = numbers(*shape)
    expected = decomposed(weight, 1.5 * change, magnitude, over_inputs=over_inputs)
    assert torch.allclose(adapted.merged_weight(weight, update), expected, atol=1e-5)
    assert update.over_inputs == over_inputs and torch.allclose(delta(update).reshape(shape), 1.5 * change, atol=1e-5)


def test_pefts_magnitudes_run_along_the_outputs_in_whatever_shape() -> None:
    leaves, change = lora((4, 4, 3, 3))
    magnitude, weight = [1.0, 2.0, 3.0, 4.0], numbers(4, 4, 3, 3)
    update = update_of("unet.x", leaves | {"magnitude": torch.tensor(magnitude).reshape(1, 4, 1, 1)})
    expected = decomposed(weight, change, magnitude, over_inputs=False)
    assert torch.allclose(adapted.merged_weight(weight, update), expected, atol=1e-5)


@pytest.mark.parametrize(("layer", "side"), [("conv1", 3), ("conv_shortcut", 1)])
@pytest.mark.parametrize("kind", FACTORS)
def test_a_convolution_that_is_stored_flat_is_one_again(kind: str, layer: str, side: int) -> None:
    leaves, change = FACTORS[kind]((6, 4, side, side))
    flat = {leaf: tensor.flatten(1) if leaf.startswith("lora") else tensor for leaf, tensor in leaves.items()}
    update = update_of(f"unet.mid_block.resnets.0.{layer}", flat)
    assert weight_shape(update) == (6, 4, side, side) and torch.allclose(delta(update), change, atol=1e-5)
    other = update_of("unet.mid_block.attentions.0.proj_in", flat)
    assert weight_shape(other) == (6, 4 * side * side), "which may be linear"


def test_a_row_that_the_update_makes_zero_stays_zero_in_dora() -> None:
    update = LowRank(torch.eye(2), -torch.eye(2), 1.0, torch.ones(2))
    assert torch.equal(adapted.merged_weight(torch.eye(2), update), torch.zeros(2, 2))


def test_a_flat_dora_scale_is_read_only_where_something_tells_its_axis() -> None:
    def file(*shapes: tuple[int, int], count: int) -> dict[str, Tensor]:
        tensors = {}
        for number, (out, inputs) in enumerate(shapes):
            name = f"lora_unet_down_blocks_{number}_attentions_0_proj_in"
            tensors |= {f"{name}.lora_down.weight": numbers(2, inputs), f"{name}.lora_up.weight": numbers(out, 2)}
            tensors[f"{name}.dora_scale"] = torch.ones(count)
        return tensors

    def axes(tensors: dict[str, Tensor]) -> list[bool]:
        return [update.over_inputs for update in adapted.from_tensors(tensors)["unet"].values()]

    assert axes(file((4, 6), count=4)) == [False] and axes(file((6, 4), count=4)) == [True]
    assert axes(file((4, 4), (4, 6), count=4)) == [False, False], "the second layer tells"
    assert axes(file((4, 4), (6, 4), count=4)) == [True, True]
    for shapes in (((4, 4),), ((4, 4), (4, 6), (6, 4))):
        with pytest.raises(ModelError, match=r"down_blocks\.0.+of one dimension and as many inputs as outputs"):
            axes(file(*shapes, count=4))


def test_lokr_with_a_tucker_core_is_the_kronecker_product_with_the_core_multiplied_in() -> None:
    first, core, a, b = numbers(2, 3), numbers(2, 2, 3, 3), numbers(2, 4), numbers(2, 5)
    leaves = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    update = update_of("unet.x", leaves)
    change = delta(update)
    assert change.shape == weight_shape(update) == (8, 15, 3, 3)
    inner = sum(entry(core, i, j, 1, 2) * entry(a, i, 3) * entry(b, j, 1) for i in range(2) for j in range(2))
    assert entry(change, 1 * 4 + 3, 2 * 5 + 1, 1, 2) == pytest.approx(0.5 * entry(first, 1, 2) * inner, abs=1e-5)


@pytest.mark.parametrize(("leaf", "layer", "kind", "path"), [
    ("w_norm", "resnets_0_norm1", "norm", "resnets.0.norm1"),
    ("b_norm", "resnets_0_norm1", "norm", "resnets.0.norm1.bias"),
    ("diff", "resnets_0_norm1", "norm", "resnets.0.norm1"),
    ("diff_b", "resnets_0_norm1", "norm", "resnets.0.norm1.bias"),
    ("diff_b", "resnets_0_conv1", "bias", "resnets.0.conv1.bias"),
])  # fmt: skip
def test_changes_of_norms_and_biases_are_themselves(leaf: str, layer: str, kind: str, path: str) -> None:
    change = numbers(8)
    weights = adapted.from_tensors({f"lora_unet_mid_block_{layer}.{leaf}": change})
    assert list(weights["unet"]) == [f"mid_block.{path}"]
    update = weights["unet"][f"mid_block.{path}"]
    assert update.kind == kind and torch.equal(adapted.merged_weight(torch.zeros(8), update, 0.5), 0.5 * change)  # type: ignore[union-attr]


def test_a_layer_has_a_low_rank_update_and_one_of_its_bias(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.lora_down.weight": numbers(2, 4), f"{LAYER}.lora_up.weight": numbers(5, 2)}
    found = adapted.from_tensors(tensors | {f"{LAYER}.diff_b": torch.ones(5)})["unet"]
    assert isinstance(found[PATH], LowRank) and torch.equal(delta(found[f"{PATH}.bias"]), torch.ones(5))


def test_strength_moves_a_dora_layer_in_a_straight_line() -> None:
    weight = numbers(3, 4)
    update = LowRank(numbers(2, 4), numbers(3, 2), 1.0, torch.tensor([1.0, 2.0, 3.0]))
    at = {strength: adapted.merged_weight(weight, update, strength) for strength in (0.0, 0.5, 1.0)}
    assert torch.equal(at[0.0], weight)
    assert torch.allclose(at[0.5], (at[0.0] + at[1.0]) / 2, atol=1e-6)


def test_alpha_is_over_rank_and_one_without_and_a_scale_wins() -> None:
    pair = {"lora_down": torch.ones(2, 4), "lora_up": torch.ones(3, 2)}
    scales = [
        update_of("x", pair | {name: torch.tensor(value) for name, value in extra.items()}).scale  # type: ignore[union-attr]
        for extra in ({}, {"alpha": 8.0}, {"alpha": 8.0, "scale": 0.25})
    ]
    assert scales == [1.0, 4.0, 0.25]


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"lora_down": (2, 4)}, "has only lora_down"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "hada_t1": (2, 2, 1, 1)}, "besides"),
        ({"lora_down": (2, 4), "lora_up": (3, 2, 1, 1)}, "do not multiply"),
        ({"lora_down": (2, 4, 3, 3), "lora_up": (3, 2, 3, 3)}, "up factor"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "alpha": (2,)}, "2 numbers, expected one"),
        ({"lora_down": (2, 4, 1, 1), "lora_up": (3, 2, 1, 1), "lora_mid": (2, 3, 3, 3)}, "lora_mid of shape"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 2)}, "has only"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}, "different shapes"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (3, 3), "hada_w2_a": (5, 2), "hada_w2_b": (2, 3)}, "do not multiply"),
        ({"lokr_w1": (2, 2)}, "do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2,)}, "do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (3, 3)}, "do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": ()}, "do not fit"),
        ({"diff": (2, 2), "lora_up": (2, 2)}, "besides"),
        ({"diff": (2, 2), "scale": ()}, "scale besides diff"),
        ({"diff": ()}, r"a diff of shape \[\]; expected \[out, in"),
        ({"diff": (4,)}, r"a diff of shape \[4\]; expected \[out, in"),
        ({"diff": (0, 4)}, "holds no numbers"),
        ({"diff_b": (2, 2)}, r"expected \[out\]"),
        ({"w_norm": (4,)}, "is no normalisation"),
        ({"lokr_w1": (2, 2), "lokr_w2": (0, 2)}, "holds no numbers"),
        ({"lora_down": (2, 4, 1, 1), "lora_up": (3, 2, 1, 1), "lora_mid": (2, 2, 0, 3)}, "holds no numbers"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "lokr_w2_a": (2, 1)}, "both lokr_w2 and lokr_w2_a"),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
         r"ranks \[1, 2\], so nothing tells"),
        ({"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (3, 5)}, "do not fit"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "dora_scale": (1, 5)}, "5 magnitudes over the inputs, expected 4"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "dora_scale": (5, 1)}, "5 magnitudes over the outputs, expected 3"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "dora_scale": (3, 4)}, "12 magnitudes"),
        ({"lora_down": (2, 4), "lora_up": (3, 2), "dora_scale": (3, 1), "magnitude": (3,)}, "and also PEFT's"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_with_the_layers_name(
    leaves: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        update_of("unet.conv_in", {leaf: torch.ones(shape) for leaf, shape in leaves.items()})
    assert "unet.conv_in" in str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_a": (9000, 1), "hada_w1_b": (1, 9000), "hada_w2_a": (9000, 1), "hada_w2_b": (1, 9000)},
        {"lokr_w1": (3000, 3), "lokr_w2": (100, 100)},
        {"lokr_w1": (1, 1), "lokr_w2_a": (9000, 1), "lokr_w2_b": (1, 9000)},
        {"lora_up": (900, 1, 1, 1), "lora_mid": (1, 1, 10, 10), "lora_down": (1, 900, 1, 1)},
    ],
)
def test_a_small_file_cannot_ask_for_a_giant_layer(shapes: dict[str, tuple[int, ...]]) -> None:
    assert MAX_LAYER_NUMBERS < 81_000_000
    with pytest.raises(ModelError, match="than any Stable Diffusion layer has"):
        update_of("x", {leaf: torch.ones(shape) for leaf, shape in shapes.items()})


def test_leaves_of_unknown_kinds_have_no_word() -> None:
    layer = "unet.mid_block.attentions.0.proj_in"
    found = [parse(f"{layer}.{leaf}") for leaf in ("lora_down.weight", "lora_A.weight", "lora_A")]
    assert [key and key.leaf for key in found] == ["lora_down"] * 3
    assert parse(f"{layer}.bundle_emb") is None


def test_files_of_the_field_are_read_whatever_their_naming(tmp_path: Path) -> None:
    down, up = numbers(2, 4), numbers(5, 2)
    spellings = {
        "kohya": {
            f"{LAYER}.lora_down.weight": down,
            f"{LAYER}.lora_up.weight": up,
            f"{LAYER}.alpha": torch.tensor(1.0),
        },
        "lycoris": {
            f"lycoris_{LAYER.removeprefix('lora_unet_')}.{leaf}": tensor
            for leaf, tensor in {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}.items()
        },
        "a1111": {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up, f"{LAYER}.alpha": torch.tensor(1.0)},
        "diffusers": {f"unet.{PATH}.lora_A.weight": down, f"unet.{PATH}.lora_B.weight": 0.5 * up},
        "diffusers of 2023": {f"unet.{PATH}.lora.down.weight": down, f"unet.{PATH}.lora.up.weight": 0.5 * up},
        "peft": {f"base_model.model.{PATH}.lora_A.weight": down, f"base_model.model.{PATH}.lora_B.weight": up},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    for name, tensors in spellings.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        weights = storage.read(tmp_path / f"{name}.safetensors")
        assert list(weights) == ["unet"] and list(weights["unet"]) == [PATH], name
        assert torch.allclose(delta(weights["unet"][PATH]), 0.5 * up @ down, atol=1e-6), name


def test_lycoris_has_one_prefix_for_the_unet_and_the_text_encoder(tmp_path: Path) -> None:
    name = "lycoris_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{name}.lora_down.weight": numbers(2, 4), f"{name}.lora_up.weight": numbers(5, 2)}, tmp_path / "a.safetensors"
    )
    assert {c: list(layers) for c, layers in storage.read(tmp_path / "a.safetensors").items()} == {
        "text_encoder": ["encoder.layers.0.mlp.fc1"]
    }


def test_the_attention_names_of_2023_are_read(tmp_path: Path) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_"
    tensors = {f"{stem}{part}_lora.{leaf}.weight": numbers(*shape) for part in ("q", "out") for leaf, shape in
               (("down", (2, 4)), ("up", (4, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    stem = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert set(storage.read(tmp_path / "a.safetensors")["unet"]) == {f"{stem}.to_q", f"{stem}.to_out.0"}


def test_pefts_text_encoder_file_is_known_by_its_layers(tmp_path: Path) -> None:
    stem = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {f"{stem}.lora_A.weight": numbers(2, 4), f"{stem}.lora_B.weight": numbers(4, 2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        storage.read(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        storage.read(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}')
    with pytest.raises(ModelError, match="init_lora_weights = pissa_niter_4, which changed its base too"):
        storage.read(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    assert list(storage.read(tmp_path / "a.safetensors")) == ["text_encoder"]


def test_what_cannot_be_trained_on_is_read_only_by_read_any(tmp_path: Path) -> None:
    save_file({f"{LAYER}.diff": numbers(3, 4)}, tmp_path / "a.safetensors")
    assert isinstance(storage.read_any(tmp_path / "a.safetensors")["unet"][PATH], Dense)
    with pytest.raises(ModelError, match="lora-booth resize"):
        storage.read(tmp_path / "a.safetensors")


def test_contents_tell_every_fault_and_keep_the_sound_layers(tmp_path: Path) -> None:
    sound = {f"{LAYER}.lora_down.weight": numbers(2, 4), f"{LAYER}.lora_up.weight": numbers(5, 2)}
    broken = {"bundle_emb.cat.string_to_param": numbers(2), "lora_unet_conv_in.lora_down.weight": numbers(2, 4)}
    save_file(sound | broken, tmp_path / "a.safetensors")
    found = storage.contents(tmp_path / "a.safetensors")
    assert list(found.weights["unet"]) == [PATH]
    assert len(found.faults) == 2
    assert found.dtypes == {"F32": 4}
    with pytest.raises(ModelError, match="1 more such fault"):
        storage.read_any(tmp_path / "a.safetensors")
