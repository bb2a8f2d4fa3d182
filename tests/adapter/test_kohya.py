"""Names against the real UNets, the rules R1-R11, and the same pictures through diffusers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.adapter.files import kohya, storage
from lora_booth.adapter.weights import AdapterWeights, LowRank, delta
from lora_booth.errors import ModelError, NumericError
from tests.support import adapted

LDM = re.compile(
    r"lora_unet_((input_blocks_[1-8]|output_blocks_[0-8])_[01]|middle_block_[012])"
    r"_(in_layers_2|emb_layers_1|out_layers_3|skip_connection|proj_in|proj_out"
    r"|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
    r"|lora_unet_(input_blocks_[36]_0_op|output_blocks_[25]_2_conv)"
)


def layer(rank: int = 2, scale: float = 1.0, inputs: int = 4, outputs: int = 5, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return LowRank(down, torch.randn(outputs, rank, generator=generator), scale)


def unet_layers(*names: str, **values: Any) -> AdapterWeights:
    return {"unet": {f"mid_block.attentions.0.transformer_blocks.0.{n}": layer(**values) for n in names}}


@pytest.mark.parametrize(
    ("component", "module", "family", "expected"),
    [
        ("unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "sd1",
         "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"),
        ("unet", "up_blocks.3.resnets.2.conv_shortcut", "sd2", "lora_unet_up_blocks_3_resnets_2_conv_shortcut"),
        ("text_encoder", "encoder.layers.11.self_attn.q_proj", "sd1",
         "lora_te_text_model_encoder_layers_11_self_attn_q_proj"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "sd2", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj", "sdxl",
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder_2", "encoder.layers.31.self_attn.out_proj", "sdxl",
         "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"),
        ("unet", "down_blocks.1.attentions.0.proj_in", "sdxl", "lora_unet_input_blocks_4_1_proj_in"),
        ("unet", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k", "sdxl",
         "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k"),
        ("unet", "mid_block.attentions.0.proj_out", "sdxl", "lora_unet_middle_block_1_proj_out"),
        ("unet", "up_blocks.0.attentions.2.proj_out", "sdxl", "lora_unet_output_blocks_2_1_proj_out"),
        ("unet", "down_blocks.0.resnets.0.conv1", "sdxl", "lora_unet_input_blocks_1_0_in_layers_2"),
        ("unet", "mid_block.resnets.1.time_emb_proj", "sdxl", "lora_unet_middle_block_2_emb_layers_1"),
        ("unet", "up_blocks.2.resnets.1.conv_shortcut", "sdxl", "lora_unet_output_blocks_7_0_skip_connection"),
        ("unet", "down_blocks.0.downsamplers.0.conv", "sdxl", "lora_unet_input_blocks_3_0_op"),
        ("unet", "up_blocks.1.upsamplers.0.conv", "sdxl", "lora_unet_output_blocks_5_2_conv"),
        ("unet", "conv_in", "sdxl", "lora_unet_input_blocks_0_0"),
        ("unet", "add_embedding.linear_2", "sdxl", "lora_unet_label_emb_0_2"),
    ],
)  # fmt: skip
def test_names_known_from_published_adapters(component: str, module: str, family: str, expected: str) -> None:
    assert kohya.kohya_name(component, module, family) == expected


@pytest.mark.parametrize(("family", "targets", "count"), [
    ("sd1", "attention", 128), ("sd1", "all-linear+conv", 278),
    ("sdxl", "attention", 560), ("sdxl", "all-linear+conv", 788),
])  # fmt: skip
def test_every_layer_of_the_real_unets_has_its_own_name_and_comes_back(family: str, targets: str, count: int) -> None:
    modules = inject.target_modules(adapted.full_size_unet(family), targets)
    names = [kohya.kohya_name("unet", module, family) for module in modules]
    assert len(names) == len(set(names)) == count
    if family == "sdxl":
        assert [name for name in names if not LDM.fullmatch(name)] == []
    else:
        assert names == ["lora_unet_" + module.replace(".", "_") for module in modules]
    tiny = {f"{name}.lora_{leaf}.weight": torch.ones(1, 1) for name in names for leaf in ("down", "up")}
    assert list(adapted.from_tensors(tiny)["unet"]) == modules


def test_sdxl_attention_modules_sit_where_the_original_code_has_them() -> None:
    modules = inject.target_modules(adapted.full_size_unet("sdxl"), "attention")
    blocks: dict[str, int] = {}
    for module in modules:
        name = kohya.kohya_name("unet", module, "sdxl").removeprefix("lora_unet_").partition("_transformer")[0]
        blocks[name] = blocks.get(name, 0) + 1
    # sd_xl_base.yaml: transformer_depth [1, 2, 10], none at the first level; 8 projections in each transformer block
    expected = dict.fromkeys(("input_blocks_4_1", "input_blocks_5_1"), 16)
    expected |= dict.fromkeys(("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"), 80)
    expected |= dict.fromkeys((f"output_blocks_{i}_1" for i in (0, 1, 2)), 80)
    expected |= dict.fromkeys((f"output_blocks_{i}_1" for i in (3, 4, 5)), 16)
    assert blocks == expected


def ldm_names_by_enumeration() -> dict[str, str]:
    """Kohya name to diffusers module prefix of SDXL's blocks, counted out as the original lists are built."""
    table = {}
    place = 1
    for level in range(3):
        for i in range(2):
            table[f"input_blocks_{place}_0"] = f"down_blocks.{level}.resnets.{i}"
            table[f"input_blocks_{place}_1"] = f"down_blocks.{level}.attentions.{i}"
            place += 1
        table[f"input_blocks_{place}_0_op"] = f"down_blocks.{level}.downsamplers.0.conv"
        place += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        table[f"middle_block_{i}"] = f"mid_block.{name}"
    place = 0
    for level in range(3):
        for i in range(3):
            table[f"output_blocks_{place}_0"] = f"up_blocks.{level}.resnets.{i}"
            table[f"output_blocks_{place}_1"] = f"up_blocks.{level}.attentions.{i}"
            place += 1
        table[f"output_blocks_{place - 1}_2_conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def layers_by_kohya_name(pipe: Any, family: str) -> dict[str, tuple[nn.Module, str]]:
    """What a loader has to build: every key a file may use, to the module. Independent of adapter/files/kohya.py."""
    resnet = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    table = {}
    for component, module in adapted.components(pipe).items():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_" if family != "sdxl" else "lora_te1_"}.get(
            component, "lora_te2_"
        )
        for name, child in module.named_modules():
            key = name.removeprefix("text_model.") if component != "unet" else name
            if component != "unet":
                key = "text_model." + key
            elif family == "sdxl":
                for ldm, start in ldm_names_by_enumeration().items():
                    if key == start or key.startswith(start + "."):
                        rest = key[len(start) + 1 :]
                        key = f"{ldm}.{resnet.get(rest, rest)}".rstrip(".")
                        break
            table[prefix + key.replace(".", "_")] = (child, name)
    return table


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_base_plus_scale_times_up_down_from_the_file_alone_is_the_adapted_model(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    weights, expected = adapted.trained_mixed(family, bases)
    storage.FORMATS["kohya"].write(tmp_path / "a.safetensors", weights, family, torch.float32, {})
    tensors = load_file(tmp_path / "a.safetensors")
    merged = adapted.pipeline(family, bases)
    assert adapted.relative_difference(adapted.draw(merged), expected) > 0.01, "the adapter is worth testing"
    table = layers_by_kohya_name(merged, family)
    names = {key.partition(".")[0] for key in tensors}
    assert len(names) == len(tensors) / 3
    assert len(names) == {"sd1": 277 + 12, "sdxl": 257 + 24}[family]  # 3 text layers x 4 projections per encoder
    with torch.no_grad():
        for name in names:
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            scale = tensors[f"{name}.alpha"].item() / down.shape[0]
            weight = table[name][0].weight
            weight += (scale * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    # two orders of float32 summation through two steps of a network of random weights
    assert adapted.relative_difference(adapted.draw(merged), expected) < 1e-4


def load_and_draw(weights: AdapterWeights, family: str, dtype: str, bases: dict[str, Path], path: Path) -> Tensor:
    storage.FORMATS["kohya"].write(path, weights, family, storage.DTYPES[dtype], {"ss_network_dim": "4"})
    pipe = adapted.pipeline(family, bases)
    pipe.load_lora_weights(path)
    return adapted.draw(pipe)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_draws_the_same_picture_from_the_file(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    weights, expected = adapted.trained_mixed(family, bases)
    drawn = load_and_draw(weights, family, "fp32", bases, tmp_path / "adapter.safetensors")
    assert adapted.relative_difference(drawn, expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "tolerance"),
    [
        ("sd2", adapted.RSLORA, "fp32", 1e-5),
        ("sdxl", adapted.RSLORA, "fp16", 1e-2),  # 5e-4 per weight through two steps
    ],
)
def test_diffusers_draws_the_same_picture_from_other_kinds(
    family: str, settings: dict[str, Any], dtype: str, tolerance: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = adapted.adapted_pipeline(family, bases, **settings)
    weights = inject.collect(adapted.components(trained))
    drawn = load_and_draw(weights, family, dtype, bases, tmp_path / "adapter.safetensors")
    assert adapted.relative_difference(drawn, adapted.draw(trained)) < tolerance


def test_one_alpha_per_component_and_the_rest_in_up() -> None:
    weights = unet_layers("attn1.to_q", "attn1.to_k", rank=4, scale=0.5) | {
        "text_encoder": {"encoder.layers.0.self_attn.q_proj": layer(rank=3, scale=2.0)}
    }
    weights["unet"]["mid_block.attentions.0.transformer_blocks.0.ff.net.2"] = layer(rank=8, scale=3.0)
    tensors = kohya.to_tensors(weights, "sd1", torch.float32)
    alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    assert {value.item() for key, value in alphas.items() if "unet" in key} == {2.0}  # 0.5 x 4, the commonest
    assert {value.item() for key, value in alphas.items() if "te_" in key} == {6.0}
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in alphas.values())
    start = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    assert torch.equal(tensors[f"{start}attn1_to_q.lora_up.weight"], layer(rank=4).up)
    # file scale 2 / 8 = 0.25 where 3 is wanted: up is 12 times larger
    assert torch.allclose(tensors[f"{start}ff_net_2.lora_up.weight"], 12 * layer(rank=8).up)


def test_rank_1_is_written_as_rank_2_with_double_alpha_and_read_as_rank_1() -> None:
    weights = unet_layers("attn2.to_k", rank=1, scale=0.5)
    tensors = kohya.to_tensors(weights, "sd1", torch.float32)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert tensors[f"{name}.lora_down.weight"].shape == (2, 4)
    assert tensors[f"{name}.alpha"] == 1.0
    back = adapted.from_tensors(tensors)["unet"].popitem()[1]
    assert (back.rank, back.scale) == (1, 0.5)


def test_a_file_holds_nothing_but_loader_keys() -> None:
    tensors = kohya.to_tensors(unet_layers("attn1.to_q", "attn2.to_v"), "sdxl", torch.float16)
    pattern = re.compile(r"lora_(unet|te|te1|te2)_[a-z0-9_]+\.(lora_down\.weight|lora_up\.weight|alpha)")
    assert len(tensors) == 6
    assert all(pattern.fullmatch(key) for key in tensors)
    assert {t.dtype for key, t in tensors.items() if "weight" in key} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back(dtype: torch.dtype) -> None:
    weights = unet_layers("attn1.to_q", rank=3, scale=0.7) | {
        "text_encoder": {"encoder.layers.0.self_attn.q_proj": layer(rank=4, scale=math.sqrt(2))},
        "text_encoder_2": {"encoder.layers.0.self_attn.q_proj": layer(rank=4, scale=1.0)},
    }
    back = adapted.from_tensors(kohya.to_tensors(weights, "sdxl", dtype))
    for component, layers in weights.items():
        assert back[component].keys() == layers.keys()
        for path, low_rank in layers.items():
            # down and up are each rounded once: 2 x 2**-(bits + 1) of the largest sum
            tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            assert adapted.relative_difference(delta(back[component][path]), delta(low_rank)) < tolerance


def test_diffusers_own_converter_differs_where_it_is_wrong(bases: dict[str, Path]) -> None:
    """diffusers 0.42 `convert_state_dict_to_kohya` against ours: the scale, the text encoder's names, SDXL's names."""
    trained = adapted.adapted_pipeline("sd1", bases, targets=r"regex:.+\.attn1\.to_q", rank=4, alpha=2.0)
    modules = adapted.components(trained)
    theirs: dict[str, Tensor] = {}
    for component, module in modules.items():
        theirs |= {f"{component}.{key}": value for key, value in get_peft_model_state_dict(module).items()}
    theirs = convert_state_dict_to_kohya(theirs)
    ours = kohya.to_tensors(inject.collect(modules), "sd1", torch.float32)
    unet = [key for key in ours if key.startswith("lora_unet") and key.endswith(".alpha")]
    assert len(unet) == 16
    assert {theirs[key].item() for key in unet} == {4}, "alpha = rank: twice the trained strength"
    assert {ours[key].item() for key in unet} == {2.0}
    text = {key.partition("_encoder")[0] for key in theirs if "layers" in key}
    assert text == {"lora_te1"}, "neither SD 1's prefix nor text_model_"
    assert {k.partition("_encoder")[0] for k in ours if "layers" in k} == {"lora_te_text_model"}
    same = [key for key in ours if "lora_unet" in key and "weight" in key]
    assert all(torch.equal(theirs[key], ours[key]) for key in same), "the factors agree"
    sdxl = kohya.to_tensors(unet_layers("attn1.to_q"), "sdxl", torch.float32)
    assert next(iter(sdxl)).startswith("lora_unet_middle_block_1_"), "theirs keeps mid_block, which sd-scripts drops"


def test_what_the_file_cannot_hold_is_refused_with_the_way_out() -> None:
    dora = LowRank(torch.ones(2, 4), torch.ones(5, 2), 1.0, magnitude=torch.ones(5))
    with pytest.raises(ModelError, match=r"DoRA.*export\.formats = \[\"diffusers\"\]"):
        kohya.to_tensors({"unet": {"mid_block.attentions.0.proj_in": dora}}, "sd1", torch.float16)
    large = LowRank(torch.ones(2, 4), torch.full((5, 2), 7e4), 1.0)
    with pytest.raises(ModelError, match=r"lora_up\.weight reaches 7e\+04.*export\.dtype"):
        kohya.to_tensors({"unet": {"mid_block.attentions.0.proj_in": large}}, "sd1", torch.float16)
    nan = LowRank(torch.ones(2, 4), torch.full((5, 2), math.nan), 1.0)
    with pytest.raises(NumericError, match="NaN or infinity"):
        kohya.to_tensors({"unet": {"mid_block.attentions.0.proj_in": nan}}, "sd1", torch.float16)
    with pytest.raises(ModelError, match="text_encoder_2, which sd1 lacks"):
        kohya.to_tensors({"text_encoder_2": {"encoder.layers.0.self_attn.q_proj": layer()}}, "sd1", torch.float16)


def test_baking_that_overflows_fp16_is_refused_though_the_factors_fit() -> None:
    weights = unet_layers("attn1.to_q", "attn1.to_k", rank=4, scale=1.0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    weights["unet"][path] = LowRank(torch.ones(4, 4), torch.full((5, 4), 1e3), scale=100.0)
    with pytest.raises(ModelError, match=r"attn1_to_v\.lora_up\.weight reaches 1e\+05"):
        kohya.to_tensors(weights, "sd1", torch.float16)


def faults(weights: AdapterWeights, family: str = "sd1") -> str:
    return " ".join(kohya.faults(weights, family))


def test_what_leaves_the_portable_set_is_told() -> None:
    text = {f"encoder.layers.0.self_attn.{leaf}_proj": layer() for leaf in ("q", "k", "v", "out")}
    good = unet_layers("attn2.to_k", "ff.net.2")
    assert kohya.faults(good | {"text_encoder": text}, "sd1") == []
    assert "InvokeAI will refuse" in faults(unet_layers("attn1.to_q"))
    assert "InvokeAI will refuse" in faults({"text_encoder": text}, "sdxl") and faults({"text_encoder": text}) == ""
    late = {
        "down_blocks.3.resnets.0.time_emb_proj": layer(),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": layer(),
    }
    assert "before any time_emb_proj" in faults({"unet": late}) and faults({"unet": late}, "sdxl") == ""
    outside = {"unet": good["unet"] | {"conv_in": layer(), "time_embedding.linear_1": layer()}}
    assert "2 of 4 adapted layers, first unet.conv_in" in faults(outside)
    assert "2 of 4" in faults(outside, "sdxl")
    partial = {path: low_rank for path, low_rank in text.items() if "out" not in path}
    assert "text_encoder.encoder.layers.0.self_attn adapts only k_proj, q_proj, v_proj" in faults(
        {"text_encoder": partial}
    )
    assert "text_projection" in faults({"text_encoder_2": {"text_projection": layer()}}, "sdxl")
    assert "lose more than 1 %" in faults(
        {"unet": {p: LowRank(w.down, w.up * 1e-6, 1.0) for p, w in good["unet"].items()}}
    )
    assert "DoRA" in faults({"unet": {"x": LowRank(torch.ones(2, 4), torch.ones(5, 2), 1.0, torch.ones(5))}})


def test_every_preset_stays_in_the_portable_set() -> None:
    low_rank = layer()
    for family in ("sd1", "sdxl"):
        for preset in ("attention", "all-linear+conv"):
            names = inject.target_modules(adapted.full_size_unet(family), preset)
            assert kohya.faults({"unet": dict.fromkeys(names, low_rank)}, family) == []


def test_foreign_kohya_files_are_read_whichever_naming_and_without_alpha() -> None:
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(5, 2)}

    def read(name: str, **extra: Tensor) -> AdapterWeights:
        leaves = pair | extra
        return adapted.from_tensors({f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})

    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (path.replace(".", "_"), "input_blocks_4_1_transformer_blocks_0_attn1_to_q"):
        assert read(f"lora_unet_{name}")["unet"][path].scale == 1.0
    text = "encoder_layers_0_self_attn_out_proj"
    for prefix, component in (
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
    ):
        weights = read(f"{prefix}text_model_{text}", alpha=torch.tensor(1))
        assert weights[component]["encoder.layers.0.self_attn.out_proj"].scale == 0.5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_up.weight": (5, 2)}, "is no layer"),
        ({"lora_unet_conv_in.x": (2, 4)}, "no part of a LoRA, DoRA"),
        ({"lora_unet_conv_in.hada_w1_a": (2, 4)}, "has only hada_w1_a of unet.conv_in"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 4)}, "has only lora_down of unet.conv_in"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 4), "lora_unet_conv_in.lora_up.weight": (5, 3)}, "do not multiply"),
        ({"lora_unet_conv_in.lora_down.weight": (0, 4), "lora_unet_conv_in.lora_up.weight": (5, 0)}, "no numbers"),
        ({"lora_unet_input_blocks_0_0.lora_down.weight": (2, 4), "lora_unet_input_blocks_0_0.lora_up.weight": (5, 2),
          "lora_unet_conv_in.lora_down.weight": (2, 4), "lora_unet_conv_in.lora_up.weight": (5, 2)}, "twice"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 4), "lora_unet_conv_in.lora_up.weight": (5, 2),
          "lora_unet_conv_in.alpha": (2,)}, "has 2 numbers, expected one"),
        ({"lora_unet_input_blocks_1_0_proj_in.lora_down.weight": (2, 4),
          "lora_unet_input_blocks_1_0_proj_in.lora_up.weight": (5, 2)}, "is no layer"),
    ],
)  # fmt: skip
def test_files_that_are_no_plain_lora_are_refused(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapted.from_tensors({key: torch.ones(shape) for key, shape in tensors.items()})
