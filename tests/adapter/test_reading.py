"""What a file of others holds, what is left out by name, and what is told once for each cause."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter.files import other_models, storage
from lora_booth.adapter.weights import delta
from lora_booth.errors import ConfigError, LoraBoothError, ModelError
from lora_booth.verbs import export as verb_export
from lora_booth.verbs import merge, resize
from lora_booth.verbs.inspect import inspect
from tests.support import adapted, tiny
from tests.support.runs import Recorder

GENERATOR = torch.Generator().manual_seed(3)
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
V = {"modelspec.prediction_type": "v"}
"""Without it no one knows what a single file of SD 2 predicts."""
LDM = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
NAME = f"lora_unet_{TO_K.replace('.', '_')}"
TEXT = "encoder.layers.0.self_attn.q_proj"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def pair(name: str, *, inputs: int = 32, out: int = 16) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": numbers(2, inputs), f"{name}.lora_up.weight": numbers(out, 2)}


def saved(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()}, path, header or {"ss_base_model_version": "sd_v1"}
    )
    return path


@pytest.mark.parametrize("spelling", ["generic", "generic with alpha", "bare", "bare processor", "processor"])
def test_comfyuis_and_bare_names_are_read_as_the_layers_they_are(spelling: str, tmp_path: Path) -> None:
    down, up = numbers(2, 32), numbers(16, 2)
    ab = {"lora_A.weight": down, "lora_B.weight": up}
    old = {"to_k_lora.down.weight": down, "to_k_lora.up.weight": up}
    names = {
        "generic": {f"diffusion_model.{LDM}.{leaf}": tensor for leaf, tensor in ab.items()},
        "generic with alpha": {
            f"diffusion_model.{LDM}.{leaf}": tensor
            for leaf, tensor in {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0)}.items()
        },
        "bare": {f"{TO_K}.{leaf}": tensor for leaf, tensor in ab.items()},
        "bare processor": {f"{TO_K.removesuffix('to_k')}processor.{leaf}": tensor for leaf, tensor in old.items()},
        "processor": {f"unet.{TO_K.removesuffix('to_k')}processor.{leaf}": tensor for leaf, tensor in old.items()},
    }
    weights = storage.read(saved(tmp_path / "a.safetensors", names[spelling]))
    assert list(weights) == ["unet"] and list(weights["unet"]) == [TO_K]
    scale = 2.0 if spelling == "generic with alpha" else 1.0
    weight = numbers(16, 32)
    assert torch.allclose(adapted.merged_weight(weight, weights["unet"][TO_K]), weight + scale * up @ down, atol=1e-5)


@pytest.mark.parametrize(("start", "component"), [
    ("text_encoders.clip_l.transformer.text_model", "text_encoder"),
    ("text_encoders.clip_h.transformer.text_model", "text_encoder"),
    ("text_encoders.clip_g.transformer.text_model", "text_encoder_2"),
])  # fmt: skip
def test_comfyuis_names_of_text_encoders_are_read(start: str, component: str) -> None:
    weights = adapted.from_tensors(pair(f"{start}.{TEXT}"))
    assert {name: list(layers) for name, layers in weights.items()} == {component: [TEXT]}


def test_the_projection_of_the_second_encoder_is_a_layer_and_written_where_programs_look(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", pair("lora_te2_text_projection"))
    weights = storage.read(file)
    assert {name: list(layers) for name, layers in weights.items()} == {"text_encoder_2": ["text_projection"]}
    keys = {name: list(storage.FORMATS[name].to_tensors(weights, "sdxl", torch.float32)) for name in storage.FORMATS}
    assert keys["kohya"][0] == "lora_te2_text_projection.lora_down.weight"
    assert keys["diffusers"][0] == "text_encoder_2.text_projection.lora_A.weight"


def test_a_layer_in_two_spellings_is_refused() -> None:
    halves = {f"{NAME}.lora_down.weight": numbers(2, 32), f"unet.{TO_K}.lora_B.weight": numbers(16, 2)}
    with pytest.raises(ModelError, match="twice, under two names"):
        adapted.from_tensors(halves)


def glora(count: int) -> dict[str, Tensor]:
    names = [f"{NAME.replace('_0_trans', f'_{i}_trans')}" for i in range(count)]
    leaves = {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (16, 2), "b2.weight": (2, 32), "alpha": ()}
    return {f"{name}.{leaf}": numbers(*shape) for name in names for leaf, shape in leaves.items()}


def test_what_cannot_be_read_is_one_sentence_with_counts_first_names_and_what_to_do(tmp_path: Path) -> None:
    tensors = pair(NAME.replace("down_blocks_0", "down_blocks_1")) | glora(2)
    tensors |= {"bundle_emb.yql.string_to_param.*": numbers(2, 32), "lora_unet_conv_in.x": numbers(2)}
    file, recorder = saved(tmp_path / "a.safetensors", tensors), Recorder()
    inspect(file, recorder)
    (warning,) = recorder.warnings
    assert f"10 keys of GLoRA, which is not computed here, first {NAME}.a1.weight" in warning
    assert "1 key of a bundled embedding, first bundle_emb.yql" in warning and "first lora_unet_conv_in.x" in warning
    assert "--leave-out unknown,embedding" in warning
    with pytest.raises(ModelError, match=r"10 keys of GLoRA.+--leave-out unknown,embedding"):
        storage.read_any(file)
    assert len(storage.read_all([file], ("unknown", "embedding"), Recorder())[0]["unet"]) == 1


def test_faults_of_one_cause_are_told_once(tmp_path: Path) -> None:
    tensors = {f"lora_unet_down_blocks_0_attentions_{i}_proj_in.lora_down.weight": numbers(2 + i, 4) for i in range(9)}
    found = storage.contents(saved(tmp_path / "a.safetensors", tensors))
    (fault,) = found.faults
    assert "has only lora_down of unet.down_blocks.0.attentions.0.proj_in" in fault
    assert fault.endswith("The same holds for 8 more layers.")


def everything(tmp_path: Path) -> Path:
    """A LoRA, changes of a normalisation and of a bias, and an embedding."""
    norm = "lora_unet_mid_block_resnets_0_norm1"
    tensors = pair(NAME) | {f"{norm}.w_norm": numbers(32), f"{norm}.b_norm": numbers(32)}
    tensors |= {f"{NAME.replace('attn2_to_k', 'ff_net_2')}.diff_b": numbers(16)}
    return saved(tmp_path / "all.safetensors", tensors | {"bundle_emb.x.string_to_param": numbers(2, 32)})


@pytest.mark.parametrize("verb", ["export", "resize", "merge"])
def test_a_lora_cannot_hold_vectors_and_what_is_left_out_by_name_is_told(verb: str, tmp_path: Path) -> None:
    file = everything(tmp_path)

    def run(leave_out: tuple[str, ...]) -> list[str]:
        recorder = Recorder()
        out = {"leave_out": leave_out, "report": recorder}
        if verb == "export":
            verb_export.export(file=file, out=tmp_path / "out", formats=["kohya"], **out)
        elif verb == "resize":
            resize.resize(file=file, out=tmp_path / "out.safetensors", rank=1, **out)
        else:
            merge.merge_adapters(adapters=[(file, 1.0)], out=tmp_path / "out.safetensors", **out)
        return [text for text in recorder.warnings if "is used without" in text]

    with pytest.raises(ModelError, match=r"bundled embedding.+--leave-out embedding"):
        run(())
    vectors = (
        r"2 weights and biases of normalisations, first unet\.mid_block.+and 1 biases, first unet.+ff\.net\.2\.bias"
    )
    with pytest.raises(ModelError, match=vectors + r".+no LoRA can hold.+--leave-out norm,bias"):
        run(("embedding",))
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"]
    told = run(("embedding", "norm", "bias"))
    assert told == [
        "all.safetensors is used without 1 keys (embedding), first bundle_emb.x.string_to_param.",
        "all.safetensors is used without 2 keys (norm), first lora_unet_mid_block_resnets_0_norm1.b_norm.",
        f"all.safetensors is used without 1 keys (bias), first {NAME.replace('attn2_to_k', 'ff_net_2')}.diff_b.",
    ]


def test_keys_and_layers_are_left_out_by_how_they_begin_and_a_word_for_nothing_is_refused(tmp_path: Path) -> None:
    tensors = pair(NAME) | pair("lora_te_text_model_encoder_layers_0_mlp_fc1") | {f"{NAME}.x": numbers(2)}
    file = saved(tmp_path / "a.safetensors", tensors)
    for word in ("lora_te_", "text_encoder"):
        assert list(storage.read_all([file], (word, f"{NAME}.x"), Recorder())[0]) == ["unet"]
    with pytest.raises(ConfigError, match=r'--leave-out "nrom" names nothing in the files; use norm, bias'):
        storage.read_all([file], ("nrom", "unknown"), Recorder())
    with pytest.raises(ConfigError, match="has an empty word"):
        storage.read_all([file], ("", "unknown"), Recorder())
    with pytest.raises(ModelError, match=r"Nothing is left of a\.safetensors without lora_"):
        storage.read_all([file], ("lora_",), Recorder())
    with pytest.raises(ModelError, match="has only lora_down"):
        storage.read_all([file], (f"{NAME}.lora_up", "unknown"), Recorder())


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_norms_and_biases_are_merged_into_the_bases_own(
    family: str, is_file: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    text, layer = "lora_te_text_model_", "encoder.layers.0"
    changes = {
        "lora_unet_mid_block_resnets_0_norm1.w_norm": ("unet", "mid_block.resnets.0.norm1.weight", 32),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": ("unet", "mid_block.resnets.0.norm1.bias", 32),
        "lora_unet_mid_block_attentions_0_norm.diff": ("unet", "mid_block.attentions.0.norm.weight", 32),
        "lora_unet_input_blocks_1_0_out_layers_0.diff_b": ("unet", "down_blocks.0.resnets.0.norm2.bias", 16),
        "lora_unet_conv_norm_out.w_norm": ("unet", "conv_norm_out.weight", 16),
        "lora_unet_conv_in.diff_b": ("unet", "conv_in.bias", 16),
        f"{text}encoder_layers_0_self_attn_k_proj.diff_b": (
            "text_encoder",
            "encoder.layers.0.self_attn.k_proj.bias",
            32,
        ),
        f"{text}encoder_layers_0_layer_norm2.w_norm": ("text_encoder", f"{layer}.layer_norm2.weight", 32),
        f"{text}final_layer_norm.b_norm": ("text_encoder", "final_layer_norm.bias", 32),
    }
    tensors = {key: numbers(count) for key, (_, _, count) in changes.items()}
    file = saved(tmp_path / "a.safetensors", tensors)
    base = tiny.tiny_single_file(bases[family], tmp_path / "base.safetensors", metadata=V) if is_file else bases[family]
    out = merge.merge_into_base(
        base=str(base), adapters=[(file, 0.5)], out=tmp_path / ("o.safetensors" if is_file else "o")
    )
    expected = tmp_path / "expected"
    for component in ("unet", "text_encoder"):
        path = next((bases[family] / component).glob("*.safetensors"))
        state = load_file(path)
        names = {key.removeprefix("text_model."): key for key in state}
        for key, (of, name, _) in changes.items():
            if of == component:
                state[names[name]] += 0.5 * tensors[key]
        if not is_file:
            found = load_file(out / component / path.name)
            assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
        (expected / component).mkdir(parents=True)
        save_file(state, expected / component / path.name, {"format": "pt"})
    if is_file:
        for path in bases[family].rglob("*"):
            target = expected / path.relative_to(bases[family])
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        wanted = load_file(tiny.tiny_single_file(expected, tmp_path / "wanted.safetensors"))
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_file(out).items())


def test_a_bias_that_the_base_lacks_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", {f"{NAME}.diff_b": numbers(16)})
    with pytest.raises(ModelError, match=r"unet lacks layer .+attn2\.to_k\.bias"):
        merge.merge_into_base(base=str(bases["sd1"]), adapters=[(file, 1.0)], out=tmp_path / "out")


@pytest.mark.parametrize(
    "layer", ["attentions.0.proj_in", "resnets.0.conv1", "attentions.0.transformer_blocks.0.attn1.to_q"]
)
def test_dora_over_the_inputs_is_merged_and_resized_by_its_formula(
    layer: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    path = next((bases["sd1"] / "unet").glob("*.safetensors"))
    key = f"mid_block.{layer}.weight"
    weight = load_file(path)[key]  # square, so that nothing but the scale's shape tells the axis
    assert weight.shape[:2] == (32, 32)
    down, up = numbers(2, *weight.shape[1:]), numbers(32, 2, *(1 for _ in weight.shape[2:]))
    scale = (1 + torch.rand(32, generator=GENERATOR)).reshape(1, 32, *(1 for _ in weight.shape[2:]))
    name = f"lora_unet_mid_block_{layer.replace('.', '_')}"
    leaves = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
    file = saved(tmp_path / "a.safetensors", {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})
    whole = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    expected = torch.stack(
        [whole[:, i] * scale.flatten()[i] / whole[:, i].square().sum().sqrt() for i in range(32)], dim=1
    )
    out = merge.merge_into_base(base=str(bases["sd1"]), adapters=[(file, 1.0)], out=tmp_path / "out")
    assert torch.allclose(load_file(out / "unet" / path.name)[key], expected, atol=1e-5)
    resize.resize(file=file, out=tmp_path / "r.safetensors", rank=32, base=str(bases["sd1"]), dtype="fp32")
    resized = storage.read(tmp_path / "r.safetensors")["unet"][f"mid_block.{layer}"]
    if weight.ndim == 2 or weight.shape[2] == 1:
        assert torch.allclose(weight + delta(resized), expected, atol=1e-4)
    with pytest.raises(ModelError, match=rf"unet\.mid_block\.{layer} is DoRA over the inputs.+merge --base"):
        storage.FORMATS["diffusers"].to_tensors(storage.low_rank("a", storage.read_any(file)), "sd1", torch.float32)


STRANGERS = {
    "Flux": [
        "lora_unet_single_blocks_0_linear1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    ],
    "Flux ": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "Flux, or": ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"],
    "HunyuanVideo": ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"],
    "Stable Diffusion 3": ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"],
    "Stable Diffusion 3 ": ["transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"],
    "Wan": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],
    "Wan ": ["lora_unet_blocks_0_cross_attn_k.lora_down.weight"],
    "Wan  ": ["transformer.blocks.0.attn1.to_q.lora_A.weight"],
    "Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"],
    "Z-Image": ["diffusion_model.context_refiner.0.attention.to_q.lora_A.weight"],
    "a diffusion transformer": ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "a language model": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    "AnimateDiff": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight"],
}


@pytest.mark.parametrize("model", STRANGERS)
def test_an_adapter_for_another_model_is_called_by_its_name(model: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", {key: numbers(2, 768) for key in STRANGERS[model]})
    for function in (storage.read_any, storage.contents, storage.detect):
        with pytest.raises(ModelError, match=rf"a\.safetensors: It is an adapter for {model.strip()}.+1, 2 and XL"):
            function(file)
    with pytest.raises(ModelError, match=f"an adapter for {model.strip()}"):
        inspect(file, Recorder())


def test_one_strange_key_makes_no_stranger_of_a_stable_diffusion_adapter() -> None:
    assert other_models.model_of([f"{NAME}.alpha", "lora_unet_double_blocks_0_x.alpha"]) is None
    assert other_models.model_of(["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"]) is None


def typed(path: Path, dtype: str, bits: int) -> Path:
    """A LoRA whose factors are stored as `dtype`."""
    header, end = {}, 0
    for leaf, shape in (("lora_down", [2, 32]), ("lora_up", [16, 2])):
        count = shape[0] * shape[1] * bits // 8
        header[f"{NAME}.{leaf}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


@pytest.mark.parametrize(("dtype", "bits"), [
    ("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E8M0", 8), ("C64", 64), ("BOOL", 8), ("I8", 8), ("U16", 16),
])  # fmt: skip
def test_types_that_hold_no_numbers_of_an_adapter_are_refused_by_name(dtype: str, bits: int, tmp_path: Path) -> None:
    file, recorder = typed(tmp_path / "a.safetensors", dtype, bits), Recorder()
    with pytest.raises(
        ModelError, match=rf"a\.safetensors: {NAME}\.lora_down\.weight is stored as {dtype}, and so are 1 others"
    ):
        storage.read_any(file)
    inspect(file, recorder)
    assert len(recorder.warnings) == 1


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    assert list(storage.read(typed(tmp_path / "a.safetensors", "F8_E4M3", 8))["unet"]) == [TO_K]


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e400", "1" + "0" * 400, '"x"', "null", "[]"])
def test_an_alpha_in_the_header_that_is_no_number_is_refused(alpha: str, tmp_path: Path) -> None:
    tensors = {f"unet.{TO_K}.lora_A.weight": numbers(2, 32), f"unet.{TO_K}.lora_B.weight": numbers(16, 2)}
    header = '{"unet.r": 2, "unet.lora_alpha": ' + alpha + "}"
    file = saved(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=header)
    with pytest.raises(ModelError, match=r"lora_adapter_metadata (gives no alpha|cannot be read)"):
        storage.read_any(file)


@pytest.mark.parametrize("change", ["factors", "alphas", "both"])
def test_an_adapter_that_changes_nothing_goes_through_every_verb(
    change: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tensors = pair(NAME) | {f"{NAME}.alpha": torch.tensor(2.0)}
    zero = {
        key: 0 * value for key, value in tensors.items() if change == "both" or ("alpha" in key) == (change == "alphas")
    }
    file = saved(tmp_path / "a.safetensors", tensors | zero)
    verb_export.export(file=file, out=tmp_path / "out", base=str(bases["sd1"]))
    resize.resize(file=file, out=tmp_path / "r.safetensors", rank=1)
    resize.resize(file=file, out=tmp_path / "e.safetensors", energy=0.9)
    merge.merge_adapters(adapters=[(file, 1.0), (file, 2.0)], out=tmp_path / "m.safetensors", family="sd1")
    files = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / f"{name}.safetensors" for name in "rem")]
    assert len(files) == 5
    for written in files:
        assert all(not delta(update).any() for update in storage.read(written)["unet"].values()), written


@pytest.mark.parametrize("strength", [1e308, -2e6, float("nan"), float("inf")])
def test_a_strength_that_no_weight_can_be_multiplied_by_is_refused(strength: float, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", pair(NAME))
    with pytest.raises(ConfigError, match=r"The strength of a\.safetensors is .+use a number such as 0\.8"):
        merge.merge_into_base(base="none", adapters=[(file, strength)], out=tmp_path / "out")


@pytest.mark.parametrize("shape", [(16, 32, 1), (32, 16), (16, 4, 8), (2, 16, 16)])
def test_a_change_of_another_shape_is_never_bent_into_the_weight(
    shape: tuple[int, ...], bases: dict[str, Path], tmp_path: Path
) -> None:
    file = saved(tmp_path / "a.safetensors", {f"{NAME}.diff": numbers(*shape)})
    with pytest.raises(LoraBoothError, match=r"changes shape|has a diff of shape"):
        merge.merge_into_base(base=str(bases["sd1"]), adapters=[(file, 1.0)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_#_1_proj_in",
        "lora_unet_output_blocks_#_1_proj_in",
        "lora_unet_middle_block_#_proj_in",
        "lora_unet_down_blocks_#_attentions_0_proj_in",
        "lora_te_text_model_encoder_layers_#_mlp_fc1",
        "diffusion_model.input_blocks.#.1.proj_in",
        "unet.down_blocks.#.attentions.0.proj_in",
    ],
)
def test_a_block_of_thousands_of_digits_ends_in_a_message_or_in_facts(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", pair(name.replace("#", "1" * 5000), inputs=16))
    told = []
    for verb in (partial(inspect, file), partial(merge.merge_adapters, adapters=[(file, 1.0)], out=tmp_path / "b")):
        try:
            verb(report=Recorder())
        except LoraBoothError as error:
            told.append(str(error))
    assert max(map(len, told), default=0) < 2000
