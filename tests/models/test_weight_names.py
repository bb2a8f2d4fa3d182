"""Every layer of the real models has its tensor, in its shape, in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lora_booth.adapter import inject
from lora_booth.adapter.weights import plain_path
from lora_booth.errors import ModelError
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.bases.weight_names import Place, find, weight_sets
from tests.support import tiny

TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def facts(path: Path, family: Any) -> BaseFacts:
    return BaseFacts(path, path, family, "epsilon", 512, 64, {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Stands for a single file; its keys come from the test."""
    path = tmp_path / "base.safetensors"
    path.touch()
    return path


def real_modules(architecture: str) -> dict[str, nn.Module]:
    """The components of a published model, full size, without weights."""
    folder, modules = SHIPPED_CONFIGS / architecture, {}
    with torch.device("meta"):
        modules["unet"] = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))
        for name, class_name in TEXT_CLASSES.items():
            if (folder / name).is_dir():
                config = transformers.CLIPTextConfig(**json.loads((folder / name / "config.json").read_text()))
                modules[name] = getattr(transformers, class_name)(config)
    return modules


def published_tensors(family: str, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What the published single file holds, under CompVis' and OpenCLIP's names (the rules of
    tests/support/tiny.py, which diffusers' own converter reads back: test_identify.py)."""
    states = {name: module.state_dict() for name, module in modules.items()}
    unet = {f"model.diffusion_model.{tiny._ldm_unet_name(k, states['unet'])}": v for k, v in states["unet"].items()}
    if family == "sd2":
        return unet | tiny._open_clip(states["text_encoder"], "cond_stage_model.model.")
    prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
    tensors = unet | {f"{prefix}text_model.{plain_path(k)}": v for k, v in states["text_encoder"].items()}
    if family == "sdxl":
        tensors |= tiny._open_clip(states["text_encoder_2"], "conditioner.embedders.1.model.")
    return tensors


@pytest.mark.parametrize(
    ("architecture", "family", "unet_tensors", "layers"),
    [
        ("sd1", "sd1", 686, {"unet": 278, "text_encoder": 72}),
        ("sd2_v", "sd2", 686, {"unet": 278, "text_encoder": 138}),
        ("sdxl", "sdxl", 1680, {"unet": 788, "text_encoder": 72, "text_encoder_2": 193}),
    ],
)
def test_every_layer_of_a_real_model_has_a_place_of_its_own_and_shape_in_the_published_file(
    architecture: str, family: str, unet_tensors: int, layers: dict[str, int], file: Path
) -> None:
    modules = real_modules(architecture)
    tensors = published_tensors(family, modules)
    assert sum(key.startswith("model.diffusion_model.") for key in tensors) == unet_tensors  # as published
    base, counts = facts(file, family), {}
    for component, module in modules.items():
        names = [n for n, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
        if component == "unet":
            names = inject.target_modules(module, "all-linear+conv")
        places = {}
        for name in names:
            place = find(base, component, plain_path(name), tensors)
            assert place is not None, name
            stored, weight = tensors[place.key], module.get_submodule(name).weight
            assert place.shape(tuple(stored.shape)) == tuple(place.part(stored).shape) == tuple(weight.shape), name
            places[place.key, place.third] = name
        assert len(places) == len(names)
        counts[component] = len(names)
    assert counts == layers


def test_layers_outside_the_blocks_have_a_place_too(file: Path) -> None:
    modules = real_modules("sdxl")
    tensors = published_tensors("sdxl", modules)
    for path in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"):
        place = find(facts(file, "sdxl"), "unet", path, tensors)
        assert place is not None and tensors[place.key].shape == modules["unet"].get_submodule(path).weight.shape


@pytest.mark.parametrize(
    ("family", "component", "path", "expected"),
    [
        ("sd1", "unet", "up_blocks.0.upsamplers.0.conv", Place("model.diffusion_model.output_blocks.2.1.conv.weight")),
        ("sd1", "unet", "up_blocks.1.upsamplers.0.conv", Place("model.diffusion_model.output_blocks.5.2.conv.weight")),
        ("sdxl", "unet", "up_blocks.0.upsamplers.0.conv", Place("model.diffusion_model.output_blocks.2.2.conv.weight")),
        ("sd1", "unet", "down_blocks.2.downsamplers.0.conv",
         Place("model.diffusion_model.input_blocks.9.0.op.weight")),
        ("sdxl", "unet", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         Place("model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.weight")),
        ("sd2", "text_encoder", "encoder.layers.22.self_attn.v_proj",
         Place("cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", 2)),
        ("sdxl", "text_encoder_2", "encoder.layers.31.mlp.fc2",
         Place("conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight")),
        ("sdxl", "text_encoder", "encoder.layers.11.self_attn.out_proj",
         Place("conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.out_proj.weight")),
        ("sdxl", "text_encoder_2", "text_projection",
         Place("conditioner.embedders.1.model.text_projection", is_transposed=True)),
    ],
)  # fmt: skip
def test_names_known_from_published_checkpoints(
    family: str, component: str, path: str, expected: Place, file: Path
) -> None:
    assert find(facts(file, family), component, path, {expected.key}) == expected


def test_a_text_encoder_is_found_with_and_without_text_model(file: Path, tmp_path: Path) -> None:
    path = "encoder.layers.0.mlp.fc1"
    for level in ("", "text_model."):
        for base, prefix in ((tmp_path, ""), (file, "cond_stage_model.transformer.")):
            place = find(facts(base, "sd1"), "text_encoder", path, {f"{prefix}{level}{path}.weight"})
            assert place == Place(f"{prefix}{level}{path}.weight")


def test_what_a_base_lacks_has_no_place(file: Path, bases: dict[str, Path]) -> None:
    assert find(facts(file, "sd2"), "text_encoder", "embeddings.token_embedding", {"x"}) is None
    assert find(facts(file, "sd1"), "unet", "down_blocks.3.attentions.0.proj_in", {"x"}) is None
    with pytest.raises(ModelError, match="sd1 model, which has no text_encoder_2"):
        weight_sets(facts(bases["sd1"], "sd1"), "text_encoder_2")


def test_the_parts_of_a_fused_tensor_are_views_of_it() -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    assert Place("x", 1).part(fused).tolist() == [[4, 5], [6, 7]]
    Place("x", 2).part(fused).zero_()
    assert fused[4:].eq(0).all() and fused[3, 1] == 7
    assert Place("x", is_transposed=True).part(fused).shape == (2, 6) == Place("x", is_transposed=True).shape((6, 2))
