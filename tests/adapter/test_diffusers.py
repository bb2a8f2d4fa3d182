"""The file through the real pipelines, DoRA included, and files that diffusers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from lora_booth.adapter import inject
from lora_booth.adapter.files import diffusers, storage
from lora_booth.adapter.weights import AdapterWeights, LowRank, delta
from lora_booth.config.settings import AdapterConfig
from lora_booth.errors import ModelError
from tests.support import adapted

DORA = adapted.MIXED | {"targets": adapted.FEW, "dora": True}
PAIR = {"unet.mid_block.x.lora_A.weight": torch.ones(2, 4), "unet.mid_block.x.lora_B.weight": torch.ones(5, 2)}


def load(weights: AdapterWeights, family: str, dtype: str, bases: dict[str, Path], path: Path) -> Any:
    storage.FORMATS["diffusers"].write(path, weights, family, storage.DTYPES[dtype], {"note": "x"})
    pipe = adapted.pipeline(family, bases)
    pipe.load_lora_weights(path)
    return pipe


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_draws_the_same_picture_from_the_file(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    weights, expected = adapted.trained_mixed(family, bases)
    pipe = load(weights, family, "fp32", bases, tmp_path / "adapter.safetensors")
    # the scale is rounded into lora_B: 6e-8 per weight, through two steps
    assert adapted.relative_difference(adapted.draw(pipe), expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "settings", "dtype", "tolerance"),
    [
        ("sd2", adapted.RSLORA, "fp32", 1e-4),
        ("sdxl", DORA, "fp32", 1e-4),
        ("sd1", DORA, "fp16", 1e-2),  # 5e-4 per weight, two steps
    ],
)
def test_diffusers_draws_the_same_picture_from_other_kinds(
    family: str, settings: dict[str, Any], dtype: str, tolerance: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = adapted.adapted_pipeline(family, bases, **settings)
    weights = inject.collect(adapted.components(trained))
    pipe = load(weights, family, dtype, bases, tmp_path / "adapter.safetensors")
    assert adapted.relative_difference(adapted.draw(pipe), adapted.draw(trained)) < tolerance


def test_magnitudes_of_a_text_encoder_arrive(bases: dict[str, Path], tmp_path: Path) -> None:
    """peft's own key names do not: transformers keeps the initial magnitudes and only a log line tells."""
    trained = adapted.adapted_pipeline("sd1", bases, **DORA)
    weights = inject.collect(adapted.components(trained))
    pipe = load(weights, "sd1", "fp32", bases, tmp_path / "adapter.safetensors")
    loaded = {key: value for key, value in pipe.text_encoder.named_parameters() if "magnitude" in key}
    assert len(loaded) == len(weights["text_encoder"]) == 12
    for path, low_rank in weights["text_encoder"].items():
        key = next(key for key in loaded if path in key)
        assert torch.equal(loaded[key], low_rank.magnitude), key


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_continues_from_the_file_with_the_same_effect(dora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    settings = adapted.MIXED | {"targets": adapted.FEW, "dora": dora}
    trained = adapted.adapted_pipeline("sdxl", bases, **settings)
    path = tmp_path / "adapter.safetensors"
    weights = inject.collect(adapted.components(trained))
    storage.FORMATS["diffusers"].write(path, weights, "sdxl", torch.float32, {})
    fresh = adapted.pipeline("sdxl", bases)
    inject.inject_(adapted.components(fresh), AdapterConfig(**settings), seed=2)
    inject.load_into_(adapted.components(fresh), storage.read(path))
    assert adapted.relative_difference(adapted.draw(fresh), adapted.draw(trained)) < 1e-4
    # scale 1 in the file, the trained scale in the module: a second rounding of `up`, nothing else
    again = inject.collect(adapted.components(fresh))
    for component, layers in weights.items():
        for name, low_rank in layers.items():
            assert torch.equal(again[component][name].down, low_rank.down)
            assert torch.allclose(again[component][name].up, low_rank.up, rtol=1e-6)


def test_keys_say_unet_and_text_model_and_ranks_are_made_equal() -> None:
    layers = {
        "encoder.layers.0.self_attn.q_proj": LowRank(torch.ones(2, 4), torch.ones(4, 2), 0.5),
        "encoder.layers.0.self_attn.k_proj": LowRank(torch.ones(3, 4), torch.ones(4, 3), 2.0),
    }
    tensors = diffusers.to_tensors({"text_encoder": layers}, torch.float32)
    start = "text_encoder.text_model.encoder.layers.0.self_attn"
    assert set(tensors) == {f"{start}.{leaf}_proj.lora_{ab}.weight" for leaf in "qk" for ab in "AB"}
    assert {tensor.shape for key, tensor in tensors.items() if "lora_A" in key} == {(3, 4)}
    assert tensors[f"{start}.q_proj.lora_B.weight"].tolist() == [[0.5, 0.5, 0.0]] * 4
    back = adapted.from_tensors(tensors)["text_encoder"]
    assert {path: low_rank.rank for path, low_rank in back.items()} == {path: w.rank for path, w in layers.items()}
    assert all(torch.equal(delta(back[path]), delta(layers[path])) for path in layers)


def test_magnitudes_have_pefts_shapes_and_the_names_each_loader_takes() -> None:
    linear = LowRank(torch.ones(2, 4), torch.ones(5, 2), 1.0, torch.arange(5.0))
    convolution = LowRank(torch.ones(2, 4, 3, 3), torch.ones(5, 2, 1, 1), 1.0, torch.arange(5.0))
    weights = {"unet": {"a": linear, "b": convolution}, "text_encoder": {"c": linear}}
    tensors = diffusers.to_tensors(weights, torch.float32)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if "magnitude" in key}
    assert shapes == {
        "unet.a.lora_magnitude_vector": (5,),
        "unet.b.lora_magnitude_vector": (1, 5, 1, 1),
        "text_encoder.text_model.c.lora_magnitude_vector.weight": (5,),
    }
    back = adapted.from_tensors(tensors)
    assert all(back[c][p].magnitude.tolist() == [0, 1, 2, 3, 4] for c, p in (("unet", "a"), ("unet", "b"),
                                                                            ("text_encoder", "c")))  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_that_diffusers_wrote_is_read_with_its_scales(
    rslora: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    settings = adapted.MIXED | {"targets": adapted.FEW, "rslora": rslora}
    trained = adapted.adapted_pipeline("sd1", bases, **settings)
    modules = adapted.components(trained)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(module) for name, module in modules.items()}
    metadata = _collate_lora_metadata(modules)
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert "lora_adapter_metadata" in storage.read_metadata(path)
    read, truth = storage.read(path), inject.collect(modules)
    assert {name: list(read[name]) for name in truth} == {name: sorted(truth[name]) for name in truth}
    scales = set()
    for name, low_ranks in truth.items():
        for layer, low_rank in low_ranks.items():
            scales.add(low_rank.scale)
            assert read[name][layer].scale == pytest.approx(low_rank.scale, rel=1e-12), layer
    assert len(scales) > 3, "the adapter has mixed scales"


def header(**fields: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}


def test_alpha_patterns_are_whole_names_or_ends_of_names_and_never_run_as_regex() -> None:
    def scale(**fields: Any) -> float:
        return adapted.from_tensors(PAIR, header(**fields))["unet"]["mid_block.x"].scale

    assert scale(r=2, lora_alpha=8) == 4.0
    assert scale(r=2, lora_alpha=8, alpha_pattern={"mid_block.x": 3}) == 1.5
    assert scale(r=2, lora_alpha=8, alpha_pattern={r"^mid_block\.x": 3}) == 1.5
    assert scale(r=2, lora_alpha=8, alpha_pattern={"x": 3}) == 1.5
    assert scale(r=2, lora_alpha=8, alpha_pattern={"k.x": 3}) == 4.0
    assert scale(r=2, lora_alpha=8, use_rslora=True) == pytest.approx(8 / 2**0.5)
    with pytest.raises(ModelError, match=r"alpha_pattern .*is no plain name"):
        scale(r=2, lora_alpha=8, alpha_pattern={"(a+)+$": 3})
    with pytest.raises(ModelError, match="gives no alpha"):
        scale(r=2)
    with pytest.raises(ModelError, match="cannot be read"):
        adapted.from_tensors(PAIR, {"lora_adapter_metadata": "["})
    assert adapted.from_tensors(PAIR, header())["unet"]["mid_block.x"].scale == 1.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"unet.mid_block.x.lora.mid.weight": (5, 2)}, "is no part of a LoRA"),
        ({"transformer.x.lora_A.weight": (5, 2)}, "is no part of a LoRA"),
        ({"unet.y.lora_A.weight": (2, 4)}, "has only lora_down of unet.y"),
        ({"unet.y.lora_A.weight": (2, 4), "unet.y.lora_B.weight": (5, 3)}, "do not multiply"),
        ({"unet.y.lora_A.weight": (2, 4, 1), "unet.y.lora_B.weight": (5, 2, 1)}, "do not multiply"),
        ({"unet.mid_block.x.lora_magnitude_vector": (4,)}, "has 4 magnitudes over the outputs, expected 5"),
        ({"unet.text_model.mid_block.x.lora_A.weight": (2, 4)}, "twice"),
    ],
)
def test_files_of_another_kind_are_refused(extra: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapted.from_tensors(PAIR | {key: torch.ones(shape) for key, shape in extra.items()})


def test_the_file_needs_no_metadata_for_its_strength(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = adapted.adapted_pipeline("sd1", bases, targets=adapted.FEW, rank=4, alpha=2.0)
    weights = inject.collect(adapted.components(trained))
    storage.FORMATS["diffusers"].write(tmp_path / "a.safetensors", weights, "sd1", torch.float32, {})
    assert "lora_adapter_metadata" not in storage.read_metadata(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for path, low_rank in weights["unet"].items():
        product = tensors[f"unet.{path}.lora_B.weight"].flatten(1) @ tensors[f"unet.{path}.lora_A.weight"].flatten(1)
        assert torch.equal(product.reshape(delta(low_rank).shape), delta(low_rank))  # scale 0.5 rounds nothing
