"""What is recognised, what is refused, and single-file checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.config.settings import ModelConfig
from lora_booth.config.toml import base_named
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models import loading
from lora_booth.models.bases import identify, sources
from lora_booth.models.bases.architectures import ARCHITECTURES, PredictionType
from lora_booth.models.families.components import CLIP_MERGES, shipped_tokenizer
from tests.models.test_sources import header_bytes
from tests.support.tiny import tiny_sd, tiny_sd2, tiny_sdxl, tiny_single_file


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any try to reach another machine fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local base must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def drop_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path, metadata={"format": "pt"})


def spoil_a_weight(path: Path, value: float, end: str = "") -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    ends = (end,) if end else ("conv_in.weight", "layer_norm1.weight")
    name = next(name for name in sorted(weights) if name.endswith(ends))
    weights[name].view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flux": ("sd1", lambda b: change(b / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "custom pipeline": ("sd1", lambda b: change(b / "model_index.json", _class_name=["mine", "P"]), "mine"),
    "custom unet": ("sd1", lambda b: change(b / "model_index.json", unet=["mine", "Net"]), "mine"),
    "other unet": ("sd1", lambda b: change(b / "model_index.json", unet=["diffusers", "UNet3D"]), "UNet3D"),
    "surplus part": ("sd1", lambda b: change(b / "model_index.json", prior=["mine", "X"]), "unknown component prior"),
    "no vae named": ("sd1", lambda b: change(b / "model_index.json", vae=[None, None]), "vae"),
    "unet class": ("sd1", lambda b: change(b / "unet/config.json", _class_name="Evil"), "Evil"),
    "scheduler class": (
        "sd1",
        lambda b: change(b / "scheduler/scheduler_config.json", _class_name="LCMScheduler"),
        "LCM",
    ),
    "text class": ("sd1", lambda b: change(b / "text_encoder/config.json", architectures=["T5"]), "T5"),
    "tokenizer class": ("sd1", lambda b: change(b / "tokenizer/tokenizer_config.json", tokenizer_class="T5T"), "T5T"),
    "code": ("sd1", lambda b: change(b / "text_encoder/config.json", auto_map={"AutoModel": "x.py"}), "auto_map"),
    "inpainting": ("sd1", lambda b: change(b / "unet/config.json", in_channels=9), "inpainting"),
    "distilled": ("sd1", lambda b: change(b / "unet/config.json", time_cond_proj_dim=256), "distilled"),
    "sample": ("sd1", lambda b: change(b / SCHEDULER_FILE, prediction_type="sample"), "sample"),
    "not sdxl": ("sd1", lambda b: change(b / "unet/config.json", addition_embed_type="text"), "addition_embed_type"),
    "refiner": ("sdxl", lambda b: change(b / "unet/config.json", projection_class_embeddings_input_dim=88), "refiner"),
    "no levels": ("sd1", lambda b: change(b / "vae/config.json", block_out_channels=None), "block_out_channels"),
    "surplus tokens": ("sd1", lambda b: change(b / "text_encoder/config.json", vocab_size=99), "text_encoder"),
    "no weights": ("sd1", lambda b: (b / UNET_FILE).unlink(), "no diffusion_pytorch_model.safetensors"),
    "cut off": ("sd1", lambda b: cut_off(b / UNET_FILE), "download it again"),
    "missing weight": ("sd1", lambda b: drop_a_weight(b / UNET_FILE), "lacks 1 weights"),
    "missing text weight": ("sd1", lambda b: drop_a_weight(b / "text_encoder/model.safetensors"), "lacks 1 weights"),
    "other widths": ("sd1", lambda b: change(b / "unet/config.json", cross_attention_dim=40), "unet"),
    "no vocabulary": ("sd1", lambda b: (b / "tokenizer/vocab.json").unlink(), r"vocab\.json"),
    "nan in the unet": ("sd1", lambda b: spoil_a_weight(b / UNET_FILE, float("nan")), "the unet of .* computes NaN"),
    "inf in the text": (
        "sd1",
        lambda b: spoil_a_weight(b / "text_encoder/model.safetensors", float("inf")),
        "the text encoder of .* computes NaN or infinity; its weights are damaged",
    ),
    "deep json": ("sd1", lambda b: (b / "vae/config.json").write_text("[" * 100_000), "is not valid JSON"),
    "no solver": ("sd1", lambda b: change(b / SCHEDULER_FILE, _class_name=None), "scheduler is a None"),
    "odd scale": ("sd1", lambda b: change(b / "vae/config.json", scaling_factor="x"), "which is no factor"),
    "odd decoder": (
        "sd1",
        lambda b: change(b / "vae/config.json", up_block_types=["UpDecoderBlock2D"]),
        "number of channels",
    ),
    "nan in the decoder": (
        "sd1",
        lambda b: spoil_a_weight(
            b / "vae/diffusion_pytorch_model.safetensors", float("nan"), "decoder.conv_out.weight"
        ),
        "the vae of .* computes NaN",
    ),
    "no count": ("sd1", lambda b: change(b / "text_encoder/config.json", num_hidden_layers="3"), "no number of layers"),
    "endless layers": (
        "sd1",
        lambda b: change(b / "unet/config.json", layers_per_block=1 << 70),
        "no number of layers",
    ),
    "endless blocks": (
        "sdxl",
        lambda b: change(b / "unet/config.json", transformer_layers_per_block=[1, 1 << 40]),
        "no number of layers up to 100",
    ),
    "endless schedule": (
        "sd1",
        lambda b: change(b / SCHEDULER_FILE, num_train_timesteps=1 << 40),
        "no size up to 100000",
    ),
    "odd spacing": ("sd1", lambda b: change(b / SCHEDULER_FILE, timestep_spacing=[[]]), "timestep_spacing .*known are"),
    "no room for words": (
        "sd1",
        lambda b: change(b / "tokenizer/tokenizer_config.json", model_max_length=0),
        "allows prompts of 0 tokens only",
    ),
    "odd schedule": ("sd1", lambda b: change(b / SCHEDULER_FILE, trained_betas=[0.1, 2.0]), "leaves its range"),
    "broken json": ("sd1", lambda b: (b / "vae/config.json").write_text("{"), r"vae.config\.json is not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_incomplete_and_unsafe_folders_are_refused(tmp_path: Path, bases: dict[str, Path], fault: str) -> None:
    which, break_, message = FAULTS[fault]
    folder = tmp_path / "base"
    shutil.copytree(bases[which], folder)
    break_(folder)
    with pytest.raises(ModelError, match=message) as told:
        loading.load(ModelConfig(base=str(folder)), device="cpu", dtype=torch.float32)
    assert str(folder) in str(told.value)


@pytest.mark.parametrize(
    ("name", "family", "prediction_type", "side", "step"),
    [
        ("sd1", "sd1", "epsilon", 512, 64),
        ("sd2_base", "sd2", "epsilon", 512, 64),
        ("sd2_v", "sd2", "v_prediction", 768, 64),
        ("sdxl", "sdxl", "epsilon", 1024, 64),
    ],
)
def test_real_architectures_have_their_published_sides_and_steps(
    name: str, family: str, prediction_type: PredictionType, side: int, step: int
) -> None:
    configs = sources.SHIPPED_CONFIGS / name
    unet, vae = (json.loads((configs / part / "config.json").read_text()) for part in ("unet", "vae"))
    row = ARCHITECTURES[family]
    assert row.recognises(unet) and row.predictions[prediction_type] == side
    assert identify._native_resolution(unet, 8, side) == side
    assert identify._native_resolution(unet | {"sample_size": None}, 8, side) == side
    assert identify._bucket_step(8 * row.latent_multiple(unet), side) == step
    assert len(vae["block_out_channels"]) == 4


def test_the_miniature_is_found_to_be_shaped_like_sd1(tmp_path: Path, bases: dict[str, Path]) -> None:
    """booth-mini: VAE factor 4, three levels, 16 latents a side, text width 192; here the weights do not matter."""
    folder = tmp_path / "mini"
    shutil.copytree(bases["sd1"], folder)
    change(folder / "vae/config.json", block_out_channels=[32, 64, 128])
    change(folder / "unet/config.json", block_out_channels=[64, 128, 192], sample_size=16, cross_attention_dim=192)
    facts = identify.identify(folder, has_weights=False)
    assert (facts.family, facts.native_resolution, facts.bucket_step) == ("sd1", 64, 16)


def test_shipped_architectures_have_the_published_number_of_weights() -> None:
    import diffusers
    import transformers

    millions = {}
    for name in ("sd1", "sd2_v", "sdxl"):
        folder = sources.SHIPPED_CONFIGS / name
        with torch.device("meta"):
            models = [diffusers.UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text()))]
            for part in sorted(folder.glob("text_encoder*/config.json")):
                config = json.loads(part.read_text())
                model = getattr(transformers, config["architectures"][0])
                models.append(model(transformers.CLIPTextConfig(**config)))
        millions[name] = [round(sum(p.numel() for p in model.parameters()) / 1e6, 1) for model in models]
    assert millions == {"sd1": [859.5, 123.1], "sd2_v": [865.9, 340.4], "sdxl": [2567.5, 123.1, 694.7]}


def test_shipped_tokenizer_is_clips() -> None:
    tokenizer = shipped_tokenizer(sources.SHIPPED_CONFIGS / "sdxl" / "tokenizer_2")
    ids = tokenizer("a photo of an astronaut riding a horse", padding="max_length").input_ids
    # the ids of CLIP's published vocabulary; SDXL's second tokenizer pads with "!", which is 0
    assert ids[:11] == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407, 0]
    assert (len(ids), len(tokenizer)) == (77, 49408)
    assert (CLIP_MERGES.parent / "LICENSES.md").is_file()


SINGLE = {
    "sd1": (tiny_sd, "sd1", {}, "sd1", "epsilon"),
    "sd2": (tiny_sd2, "sd2_v", {"modelspec.prediction_type": "v"}, "sd2", "v_prediction"),
    "sdxl": (tiny_sdxl, "sdxl", {"modelspec.prediction_type": "epsilon"}, "sdxl", "epsilon"),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_file_gives_the_very_weights_of_its_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, architecture, metadata, name, prediction_type = SINGLE[kind]
    folder = write(tmp_path / "architectures" / architecture)
    file = tiny_single_file(folder, tmp_path / "one.safetensors", metadata=metadata)
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    one, many = (loading.load(ModelConfig(base=str(b)), device="cpu", dtype=torch.float32) for b in (file, folder))
    assert (one.name, one.schedule.prediction_type) == (name, prediction_type)
    parts = [[f.denoiser, f.pipeline("ddim").vae, *f.text_encoders().values()] for f in (one, many)]
    for found, expected in zip(*parts, strict=True):
        weights = expected.state_dict()
        assert found.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in found.state_dict().items())
        assert not any(p.requires_grad for p in found.parameters())
    prompts = ["a photo of yql dog", ""]
    for key, value in one.encode_prompts(prompts).items():
        assert torch.equal(value, many.encode_prompts(prompts)[key])


def test_a_single_file_in_half_precision_keeps_its_vae_in_float32(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_sd(tmp_path / "architectures" / "sd1")
    file = tiny_single_file(folder, tmp_path / "one.safetensors")
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    family = loading.load(ModelConfig(base=str(file)), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in family.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in family.pipeline("ddim").vae.parameters()} == {torch.float32}


def test_a_single_file_that_lacks_a_weight_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny_sd(tmp_path / "architectures" / "sd1")
    file = tiny_single_file(folder, tmp_path / "one.safetensors")
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for name in (
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
    ):
        save_file({key: value for key, value in weights.items() if key != name}, file)
        with pytest.raises(ModelError, match=r"one\.safetensors (lacks|cannot be loaded)"):
            loading.load(ModelConfig(base=str(file)), device="cpu", dtype=torch.float32)


UNET = {"model.diffusion_model.input_blocks.0.0.weight": (2, 4, 3, 3)}
VAE = {"first_stage_model.decoder.conv_in.weight": (1,)}
CLIP_L = {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (1,)}
OPEN_CLIP = {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1,)}
SDXL = {"conditioner.embedders.1.model.transformer.resblocks.0.ln_1.weight": (1,)}


def header_file(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(header_bytes(shapes, metadata))
    return path


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_down.lora_down.weight": (1,)}, "an adapter"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (1,)}, "Flux"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "one component in diffusers naming"),
        ({"w": (1,)}, "no Stable Diffusion checkpoint"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (2, 9, 3, 3)} | VAE | CLIP_L, "inpainting"),
        (UNET | CLIP_L, "has no VAE"),
        (UNET | VAE, "has no text encoder"),
        (UNET | VAE | {"conditioner.embedders.0.model.transformer.x": (1,)}, "refiner"),
    ],
)
def test_other_single_files_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        identify.identify(header_file(tmp_path / "x.safetensors", shapes))


@pytest.mark.parametrize(
    ("shapes", "metadata", "yaml", "expected"),
    [
        (CLIP_L, {}, None, ("sd1", "epsilon", 512)),
        (SDXL, {}, None, ("sdxl", "epsilon", 1024)),
        (SDXL | {"v_pred": (0,)}, {}, None, ("sdxl", "v_prediction", 1024)),
        (CLIP_L, {"modelspec.prediction_type": "v"}, None, ("sd1", "v_prediction", 512)),
        (OPEN_CLIP, {"modelspec.prediction_type": "epsilon"}, None, ("sd2", "epsilon", 512)),
        (OPEN_CLIP, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, ("sd2", "v_prediction", 768)),
        (OPEN_CLIP, {"modelspec.architecture": "stable-diffusion-v2-512"}, None, ("sd2", "epsilon", 512)),
        (OPEN_CLIP, {}, 'model:\n  params:\n    parameterization: "v"\n', ("sd2", "v_prediction", 768)),
        (OPEN_CLIP, {}, "model:\n  params: {}\n", ("sd2", "epsilon", 512)),
    ],
)
def test_a_single_file_says_what_it_predicts(
    tmp_path: Path, shapes: dict[str, Any], metadata: dict[str, str], yaml: str | None, expected: tuple[str, str, int]
) -> None:
    file = header_file(tmp_path / "x.safetensors", UNET | VAE | shapes, metadata)
    if yaml is not None:
        (tmp_path / "x.yaml").write_text(yaml)
    facts = identify.identify(file)
    assert (facts.family, facts.prediction_type, facts.native_resolution) == expected
    assert facts.config("scheduler")["prediction_type"] == expected[1]


def test_what_the_user_says_goes_before_what_a_file_says(tmp_path: Path, bases: dict[str, Path]) -> None:
    file = header_file(tmp_path / "x.safetensors", UNET | VAE | SDXL, {"modelspec.prediction_type": "epsilon"})
    facts = identify.identify(file, said_prediction="v_prediction")
    assert (facts.prediction_type, facts.config("scheduler")["prediction_type"]) == ("v_prediction", "v_prediction")
    silent = header_file(tmp_path / "y.safetensors", UNET | VAE | OPEN_CLIP)
    assert identify.identify(silent, said_prediction="v_prediction").native_resolution == 768
    folder = loading.facts(ModelConfig(base=str(bases["sdxl"]), prediction_type="v_prediction"))
    assert folder.prediction_type == folder.config("scheduler")["prediction_type"] == "v_prediction"
    plain, said = (
        loading.load(ModelConfig(base=str(bases["sdxl"]), prediction_type=kind), device="cpu", dtype=torch.float32)
        for kind in ("auto", "v_prediction")
    )
    assert (plain.schedule.prediction_type, said.schedule.prediction_type) == ("epsilon", "v_prediction")
    assert plain.fingerprint != said.fingerprint, "it draws other class images"
    flow = shutil.copytree(bases["sd1"], tmp_path / "flow")
    (flow / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ModelError):
        identify.identify(flow, said_prediction="v_prediction")
    with pytest.raises(ConfigError, match='--prediction "x" is unknown; use auto or epsilon or v_prediction'):
        base_named("sd15", prediction_type="x")


def test_an_sd2_file_that_says_nothing_is_not_guessed(tmp_path: Path) -> None:
    file = header_file(tmp_path / "x.safetensors", UNET | VAE | OPEN_CLIP)
    with pytest.raises(ModelError, match=r"parameterization: v.*x\.yaml"):
        identify.identify(file)
    with pytest.raises(ModelError, match="flow"):
        identify.identify(header_file(file, UNET | VAE | CLIP_L, {"modelspec.prediction_type": "flow"}))


def test_a_file_marked_ztsnr_gets_a_zero_terminal_schedule(tmp_path: Path) -> None:
    from lora_booth.models.families.schedules import noise_schedule

    file = header_file(tmp_path / "x.safetensors", UNET | VAE | SDXL | {"v_pred": (0,), "ztsnr": (0,)})
    scheduler = identify.identify(file).config("scheduler")
    assert noise_schedule(scheduler).has_zero_terminal_snr
    assert scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("is_zero", [False, True])
def test_schedules_are_those_of_diffusers(kind: str, is_zero: bool) -> None:
    from diffusers import DDIMScheduler

    from lora_booth.models.families.schedules import noise_schedule

    config = {"beta_schedule": kind, "beta_start": 0.001, "beta_end": 0.01, "rescale_betas_zero_snr": is_zero}
    stock = DDIMScheduler(**config, clip_sample=False, steps_offset=1).alphas_cumprod.double()
    found = noise_schedule(config)
    assert found.has_zero_terminal_snr == is_zero
    torch.testing.assert_close(found.alphas_cumprod, stock, rtol=1e-3, atol=1e-6)


def test_unknown_schedules_are_refused() -> None:
    from lora_booth.models.families.schedules import noise_schedule

    for config in ({"beta_schedule": "sigmoid"}, {"prediction_type": "sample"}):
        with pytest.raises(ModelError):
            noise_schedule(config)


def test_loading_is_silent(tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_sdxl(tmp_path / "architectures" / "sdxl")
    file = tiny_single_file(folder, tmp_path / "one.safetensors")
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    capfd.readouterr()
    for base in (folder, file):
        with caplog.at_level(logging.WARNING):
            loading.load(ModelConfig(base=str(base)), device="cpu", dtype=torch.float32)
    captured = capfd.readouterr()
    assert captured.out + captured.err + caplog.text == ""


def test_a_denoiser_that_no_family_with_its_pipeline_knows_is_refused(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sd1", "sd2"):
        monkeypatch.setitem(ARCHITECTURES, name, replace(ARCHITECTURES[name], recognises=lambda config: False))
    with pytest.raises(ModelError, match="another denoiser; lora_booth trains"):
        identify.identify(bases["sd1"])
