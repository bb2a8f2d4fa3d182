"""The contract that every family keeps, on tiny bases of real classes, without a network."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import socket
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_booth.config.settings import ModelConfig
from lora_booth.errors import ConfigError, LoraBoothError, ModelError, lacks_memory
from lora_booth.models import at_once, devices, loading
from lora_booth.models.families import components, vae
from lora_booth.models.families import family as families
from lora_booth.models.families import quantize as quantized
from lora_booth.models.families.family import Conditioning, Family
from tests.soak.sabotage import OutOfMemory
from tests.support.tiny import PROMPT_TOKENS, tiny_sd, tiny_sd2, tiny_sdxl

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 kernels sum in another order for another batch size; values are of order 1."""
PROMPT = "a photo of yql dog"
SAMPLERS = ("dpm++", "ddim", "euler", "base")


@dataclass(frozen=True)
class Base:
    """A tiny base on disk and what it should be found to be."""

    name: str
    prediction_type: str
    folder: Path


BASES: dict[str, tuple[Callable[..., Path], str, str]] = {
    "sd1": (tiny_sd, "sd1", "epsilon"),
    "sd2": (tiny_sd2, "sd2", "v_prediction"),
    "sdxl": (tiny_sdxl, "sdxl", "epsilon"),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any try to reach another machine fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local base must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    write, name, prediction_type = BASES[request.param]
    folder = write(tmp_path_factory.mktemp(request.param), prediction_type=prediction_type)
    return Base(name, prediction_type, folder)


@pytest.fixture(scope="module")
def family(base: Base) -> Family:
    return load(base.folder)


@pytest.fixture(scope="module")
def half(base: Base) -> Family:
    """The same base in bfloat16."""
    return load(base.folder, torch.bfloat16)


def load(folder: Path, dtype: torch.dtype = torch.float32, **needs: bool) -> Family:
    return loading.load(ModelConfig(base=str(folder)), device="cpu", dtype=dtype, **needs)


def pixels(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def latents(count: int, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(4))


def geometry(count: int) -> torch.Tensor:
    """Sizes that differ from sample to sample."""
    return torch.tensor([[500.0 + i, 400, 10, 20 + i, 32, 32] for i in range(count)])


def rows(conditioning: Conditioning, start: int, stop: int) -> Conditioning:
    return {name: value[start:stop] for name, value in conditioning.items()}


def draw(family: Family, sampler: str, **inputs: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {"width": 32, "height": 32, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    return family.pipeline(sampler)(**settings, **inputs, generator=generator).images[0]


def test_family_is_what_its_files_say(base: Base, family: Family) -> None:
    assert (family.name, family.native_resolution) == (base.name, 32)
    assert family.bucket_step == {"sd1": 16, "sd2": 16, "sdxl": 8}[base.name]
    assert family.schedule.prediction_type == base.prediction_type
    assert len(family.fingerprint) == 64
    assert list(family.text_encoders()) == ["text_encoder", "text_encoder_2"][: 1 + (base.name == "sdxl")]
    assert list(family.tokenizers()) == list(family.text_encoders()) == list(family.num_used_text_layers)


def test_text_layers_said_to_be_used_are_those_that_get_gradients(base: Base) -> None:
    family = load(base.folder)
    for name, module in family.text_encoders().items():
        layers = module.text_model.encoder.layers if name == "text_encoder_2" else module.encoder.layers
        for layer in layers:
            layer.requires_grad_(True)
        conditioning = family.encode_prompts([PROMPT])
        sum(value.square().sum() for value in conditioning.values() if value.is_floating_point()).backward()
        reached = [layer.self_attn.q_proj.weight.grad is not None for layer in layers]
        assert reached == [i < family.num_used_text_layers[name] for i in range(len(layers))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_frozen_in_eval_mode_and_in_its_type(family: Family, half: Family, dtype: torch.dtype) -> None:
    family = half if dtype == torch.bfloat16 else family
    modules = [family.denoiser, *family.text_encoders().values()]
    for module in [*modules, family.pipeline("ddim").vae]:
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())
    assert {p.dtype for module in modules for p in module.parameters()} == {dtype}
    assert {p.dtype for p in family.pipeline("ddim").vae.parameters()} == {torch.float32}


def test_latent_moments_are_the_posterior_scaled(family: Family) -> None:
    x, module = pixels(2, 32, 48), family.pipeline("ddim").vae
    mean, std = family.encode_images(x)
    posterior = module.encode(x).latent_dist
    scale = module.config.scaling_factor
    assert mean.shape == std.shape == (2, 4, 16, 24)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, posterior.mean * scale, **CLOSE)
    torch.testing.assert_close(std, posterior.std * scale, **CLOSE)
    assert (std > 0).all()


def test_decoding_undoes_the_scale_and_gives_pixels_on_the_cpu(family: Family) -> None:
    x, module = pixels(2, 32, 48), family.pipeline("ddim").vae
    mean, _ = family.encode_images(x)
    decoded = family.decode_latents(mean.to(torch.bfloat16).float())
    expected = module.decode(mean.to(torch.bfloat16).float() / module.config.scaling_factor).sample.clamp(-1, 1)
    assert decoded.shape == x.shape
    torch.testing.assert_close(decoded, expected, **CLOSE)
    assert family.decode_latents(1e6 * mean).abs().max() <= 1
    assert family.decode_latents(mean.bfloat16()).dtype == torch.float32


def test_vae_works_in_chunks_with_the_same_result(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = family.encode_images(pixels(3))
    seen: list[int] = []
    module = family.pipeline("ddim").vae
    hooks = [
        part.register_forward_pre_hook(lambda _, x: seen.append(len(x[0]))) for part in (module.encoder, module.decoder)
    ]
    monkeypatch.setattr(at_once, "PIXELS_AT_ONCE", 2 * 32 * 32)
    torch.testing.assert_close(family.encode_images(pixels(3)), whole, **CLOSE)
    family.decode_latents(whole[0])
    for hook in hooks:
        hook.remove()
    assert seen == [2, 1, 2, 1]


def test_tiles_change_a_decoded_picture_little_and_encoding_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = loading.load(ModelConfig(base="booth-mini"), device="cpu", dtype=torch.float32)
    side, seen = torch.linspace(-1, 1, 128), []
    smooth = torch.stack([side.expand(128, 128), side.view(-1, 1).expand(128, 128), side.abs().expand(128, 128)])
    monkeypatch.setattr(vae, "TILE_PX", 96)
    encoded, _ = family.encode_images(smooth[None])
    whole = family.decode_latents(encoded)
    decoder = family.pipeline("ddim").vae.decoder
    hook = decoder.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[-2:])))
    tiled = family.decode_latents(encoded, is_tiled=True)
    hook.remove()
    factor = 128 // encoded.shape[-1]
    assert seen[0] == (96 // factor, 96 // factor)
    assert len(seen) == 4, "two tiles along a side"
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.1
    torch.testing.assert_close(family.encode_images(smooth[None])[0], encoded)


def test_latents_mean_std_and_shift_are_honoured(tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "base")
    plain, module = load(folder).encode_images(pixels(1)), load(folder).pipeline("ddim").vae
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    for changes, shift, spread in (
        ({"latents_mean": [1.0, 2, 3, 4], "latents_std": [1.0, 2, 4, 8]}, (1.0, 2, 3, 4), (1.0, 2, 4, 8)),
        ({"shift_factor": 0.5}, (0.5,) * 4, (1.0,) * 4),
    ):
        path.write_text(json.dumps(config | changes))
        family = load(folder)
        mean, std = family.encode_images(pixels(1))
        by = torch.tensor(spread).view(1, 4, 1, 1)
        scale = config["scaling_factor"]
        torch.testing.assert_close(mean, (plain[0] - scale * torch.tensor(shift).view(1, 4, 1, 1)) / by, **CLOSE)
        torch.testing.assert_close(std, plain[1] / by, **CLOSE)
        expected = module.decode(module.encode(pixels(1)).latent_dist.mean).sample.clamp(-1, 1)
        torch.testing.assert_close(family.decode_latents(mean), expected, **CLOSE)


def test_prompts_are_encoded_one_by_one(family: Family) -> None:
    prompts = [PROMPT, "", "a cat on the beach in red and blue"]
    together = family.encode_prompts(prompts)
    for value in together.values():
        assert len(value) == 3
        assert not value.requires_grad
    assert together["embeddings"].shape[1] == PROMPT_TOKENS
    for i, prompt in enumerate(prompts):
        for name, value in family.encode_prompts([prompt]).items():
            torch.testing.assert_close(value[0], together[name][i], **CLOSE)


def test_prompts_are_encoded_as_the_stock_pipeline_does(base: Base, family: Family) -> None:
    stock = diffusers.DiffusionPipeline.from_pretrained(base.folder)
    found = family.encode_prompts([PROMPT])
    if base.name == "sdxl":
        embeddings, _, pooled, _ = stock.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=0)
    else:
        embeddings, _ = stock.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(found["embeddings"], embeddings, rtol=0, atol=0)


def test_a_prompt_longer_than_the_window_is_cut_and_told_once(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    family = load(base.folder)
    kept = " ".join(["dog"] * (PROMPT_TOKENS - 2))
    long = f"{kept} hat toy"
    assert family.words_cut([kept, long]) == {long: "hat toy"}
    with caplog.at_level(logging.WARNING):
        cut, whole = family.encode_prompts([long]), family.encode_prompts([kept])
        family.encode_prompts([long])
    torch.testing.assert_close(cut["embeddings"], whole["embeddings"], **CLOSE)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(family.text_encoders())
    assert all("hat toy" in message for message in told)


@torch.no_grad()
def test_prediction_of_a_sample_does_not_depend_on_its_companions(family: Family) -> None:
    conditioning = family.encode_prompts([PROMPT, "a cat", ""])
    timesteps, sizes = torch.tensor([0, 500, 999]), geometry(3)
    together = family.predict(latents(3), timesteps, conditioning, sizes)
    assert together.shape == latents(3).shape
    assert together.isfinite().all()
    for i in range(3):
        one = slice(i, i + 1)
        alone = family.predict(latents(3)[one], timesteps[one], rows(conditioning, i, i + 1), sizes[one])
        torch.testing.assert_close(alone[0], together[i], **CLOSE)


@torch.no_grad()
def test_prediction_is_that_of_the_stock_pipeline(base: Base, family: Family) -> None:
    stock = diffusers.DiffusionPipeline.from_pretrained(base.folder)
    stock.set_progress_bar_config(disable=True)
    calls: list[tuple[Any, ...]] = []
    stock.unet.register_forward_hook(lambda _, inputs, output: calls.append((*inputs, output[0])))
    generator = torch.Generator().manual_seed(1)
    stock(
        PROMPT,
        width=32,
        height=48,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=generator,
        output_type="latent",
    )
    assert len(calls) >= 2
    sizes = torch.tensor([[48.0, 32, 0, 0, 48, 32]])
    for noisy, timestep, expected in calls:
        found = family.predict(noisy, timestep.reshape(1).long(), family.encode_prompts([PROMPT]), sizes)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_noise_schedule_is_that_of_the_stock_scheduler(base: Base, family: Family) -> None:
    stock = diffusers.DiffusionPipeline.from_pretrained(base.folder).scheduler
    assert family.schedule.alphas_cumprod.dtype == torch.float64
    # diffusers multiplies 1000 float32 factors
    torch.testing.assert_close(family.schedule.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-4, atol=0)


def test_picture_from_encoded_prompts_is_the_picture_from_prompts(base: Base) -> None:
    family = load(base.folder)
    from_prompts = [draw(family, sampler, prompt=PROMPT) for sampler in SAMPLERS]
    prompt, negative = (family.encode_prompts([text]) for text in (PROMPT, ""))
    family.release_text_encoders()
    for sampler, expected in zip(SAMPLERS, from_prompts, strict=True):
        found = draw(family, sampler, **family.pipeline_inputs(prompt, negative))
        assert found.shape == (32, 32, 3)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=sampler)


def test_pipeline_shares_the_modules_and_is_silent(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = family.pipeline("dpm++")
    assert pipeline.unet is family.denoiser
    assert pipeline.text_encoder is family.text_encoders()["text_encoder"]
    assert pipeline.scheduler.config.algorithm_type == "dpmsolver++"
    assert family.pipeline("ddim").scheduler.config.clip_sample is False, "latents are not bounded"
    draw(family, "dpm++", prompt=PROMPT)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_half_precision_base_draws_finite_pictures_with_its_float32_vae(half: Family) -> None:
    for sampler in SAMPLERS:
        picture = draw(half, sampler, prompt=PROMPT)
        assert np.isfinite(picture).all(), sampler
        assert picture.std() > 0.01, sampler


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_zero_terminal_snr_draws_finite_pictures(tmp_path: Path, spacing: str) -> None:
    folder = tiny_sd2(tmp_path / "base")
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    path.write_text(json.dumps(settings))
    family = load(folder)
    assert family.schedule.has_zero_terminal_snr
    for sampler in SAMPLERS:
        pipeline = family.pipeline(sampler)
        pipeline.scheduler.set_timesteps(4)
        assert (pipeline.scheduler.timesteps[0] == 999) == (spacing == "trailing"), sampler
        picture = draw(family, sampler, prompt=PROMPT)
        assert np.isfinite(picture).all(), sampler
        assert 0.01 < picture.std() < 0.5, sampler


def test_solver_follows_a_schedule_that_was_rescaled_after_loading(tmp_path: Path) -> None:
    family = load(tiny_sd2(tmp_path / "sd2"))
    family.schedule = family.schedule.rescaled_to_zero_terminal_snr()
    scheduler = family.pipeline("ddim").scheduler
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), family.schedule.alphas_cumprod, rtol=1e-3, atol=1e-7)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    plms = load(tiny_sd(tmp_path / "sd1", prediction_type="v_prediction"))
    plms.schedule = plms.schedule.rescaled_to_zero_terminal_snr()
    with pytest.raises(ConfigError, match="PNDMScheduler"):
        plms.pipeline("base")


def test_released_text_encoders_are_gone(base: Base) -> None:
    family = load(base.folder)
    family.encode_prompts([PROMPT])
    alive = [weakref.ref(module) for module in family.text_encoders().values()]
    family.release_text_encoders()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    with pytest.raises(AssertionError, match="released"):
        family.text_encoders()


def test_parts_that_are_not_needed_are_not_loaded(base: Base) -> None:
    family = load(base.folder, needs_vae=False)
    with pytest.raises(AssertionError, match="VAE was not loaded"):
        family.encode_images(pixels(1))


def test_parts_that_wait_are_read_when_they_are_needed_and_give_the_same(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, honest, names = load(base.folder), components._from_folder, []

    def noted(facts: Any, wanted: Sequence[str], dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        names.append(list(wanted))
        return honest(facts, wanted, dtype)

    monkeypatch.setattr(components, "_from_folder", noted)
    family = load(base.folder, does_vae_wait=True, do_text_encoders_wait=True)
    assert family.latent_shape(64, 32) == at_once.latent_shape(64, 32)
    family.move_vae("cpu")
    assert names == [["unet"]]
    for a, b in zip(family.encode_images(pixels(1)), at_once.encode_images(pixels(1)), strict=True):
        assert torch.equal(a, b)
    assert names == [["unet"], ["vae"]]
    prompts, same = family.encode_prompts([PROMPT]), at_once.encode_prompts([PROMPT])
    assert all(torch.equal(prompts[name], same[name]) for name in same)
    family.decode_latents(latents(1))
    assert names == [["unet"], ["vae"], list(at_once.text_encoders())]
    family.release_text_encoders()
    late = load(base.folder, do_text_encoders_wait=True)
    late.release_text_encoders()
    for released in (family, late):
        with pytest.raises(AssertionError, match="released"):
            released.text_encoders()


@pytest.mark.parametrize(
    ("part", "use"),
    [
        ("vae", lambda family: family.decode_latents(latents(1))),
        ("text_encoder", lambda family: family.encode_prompts([PROMPT])),
        ("unet", lambda family: family.encode_prompts([PROMPT])),
    ],
)
def test_a_damaged_part_that_waits_is_told_when_it_is_read(
    part: str, use: Callable[[Family], Any], tmp_path: Path
) -> None:
    folder = tiny_sd(tmp_path / "base")
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    save_file({key: t * float("nan") if key == name else t for key, t in tensors.items()}, path)
    family = load(folder, does_vae_wait=True, do_text_encoders_wait=True)
    with pytest.raises(ModelError, match=f"the {part.replace('_', ' ')} of .* computes NaN"):
        use(family)


def test_gradients_reach_an_adapted_text_encoder_and_only_it(base: Base) -> None:
    family = load(base.folder)
    weight = family.text_encoders()["text_encoder"].encoder.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    conditioning = family.encode_prompts([PROMPT])
    family.predict(latents(1), torch.tensor([10]), conditioning, geometry(1)).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert all(p.grad is None for p in family.denoiser.parameters())


def test_gradient_checkpointing_computes_the_first_share_of_blocks_twice_and_the_same_gradients(base: Base) -> None:
    family = load(base.folder)
    family.denoiser.conv_in.weight.requires_grad_(True)
    conditioning, gradients, runs = family.encode_prompts([PROMPT]), [], []
    for name in ("down_blocks", "up_blocks"):
        block = getattr(family.denoiser, name)[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    counts = {}
    for share in (0.0, 0.5, 1.0):
        runs.clear()
        family.prepare_denoiser_(gradient_checkpointing=share, attention="sdpa")
        family.denoiser.zero_grad()
        family.predict(latents(1), torch.tensor([10]), conditioning, geometry(1)).square().sum().backward()
        gradients.append(family.denoiser.conv_in.weight.grad.clone())
        counts[share] = (runs.count("down_blocks"), runs.count("up_blocks"))
    torch.testing.assert_close(gradients[0], gradients[1], **CLOSE)
    torch.testing.assert_close(gradients[0], gradients[2], **CLOSE)
    assert counts == {0.0: (1, 1), 0.5: (2, 1), 1.0: (2, 2)}


def test_offloading_keeps_the_inputs_of_checkpointed_blocks_elsewhere_and_no_weight(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, kept, inputs, send = load(base.folder), {}, [], devices._away

    def away(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        sent = send(tensor)
        kept[tensor.data_ptr()] = sent[1]
        return sent

    monkeypatch.setattr(devices, "OFFLOADED_BYTES", 1)
    monkeypatch.setattr(devices, "_away", away)
    family.denoiser.conv_in.weight.requires_grad_(True)
    conditioning, gradients = family.encode_prompts([PROMPT]), []
    for is_offloading in (False, True):
        family.prepare_denoiser_(gradient_checkpointing=1.0, attention="sdpa", is_offloading=is_offloading)
        if is_offloading:
            resnet = family.denoiser.mid_block.resnets[1]
            resnet.register_forward_pre_hook(lambda _, given: inputs.extend(given))
        assert not kept
        family.denoiser.zero_grad()
        family.predict(latents(1), torch.tensor([10]), conditioning, geometry(1)).square().sum().backward()
        gradients.append(family.denoiser.conv_in.weight.grad.clone())
    assert torch.equal(*gradients), "a copy there and back changes nothing"
    weights = {weight.data_ptr() for weight in family.denoiser.parameters()}
    assert not weights & kept.keys()
    assert {tensor.data_ptr() for tensor in inputs[:2]} <= kept.keys(), "hidden states and time embedding"
    assert all(copy.data_ptr() != address for address, copy in kept.items())


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_base_is_loaded_with_the_denoiser_offloaded_and_never_beside_the_text_encoders(
    quantize: str, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, move = [], quantized.move_frozen_

    def moved(module: torch.nn.Module, device: torch.device | str) -> None:
        kind = type(module).__name__
        moves.append((kind.replace("WithProjection", ""), "device" if isinstance(device, torch.device) else device))
        move(module, device)

    for module in (components, families, quantized):
        monkeypatch.setattr(module, "move_frozen_", moved)
    config = ModelConfig(base=str(base.folder), quantize=quantize)
    family = loading.load(config, device="cpu", dtype=torch.bfloat16, is_denoiser_offloaded=True)
    encoders = len(family.text_encoders())
    assert moves == [
        ("UNet2DConditionModel", "cpu"),
        *[("CLIPTextModel", "cpu")] * encoders,
        ("UNet2DConditionModel", "device"),
        ("UNet2DConditionModel", "cpu"),
        *[("CLIPTextModel", "device")] * encoders,
    ]
    beside = loading.load(config, device="cpu", dtype=torch.bfloat16)
    row = family.encode_prompts([PROMPT])
    with torch.no_grad():
        found = [f.predict(latents(1), torch.tensor([10]), row, geometry(1)) for f in (family, beside)]
    assert torch.equal(*found)


def test_missing_xformers_says_what_to_do(family: Family) -> None:
    with pytest.raises(ConfigError, match=r'lora-booth\[xformers\]|set model.attention = "sdpa"'):
        family.prepare_denoiser_(gradient_checkpointing=False, attention="xformers")


@torch.no_grad()
def test_sdxl_sees_each_images_own_sizes_in_its_order(tmp_path: Path) -> None:
    family = load(tiny_sdxl(tmp_path / "base"), torch.bfloat16)
    seen: list[torch.Tensor] = []
    family.denoiser.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sizes = torch.tensor([[1367.0, 2049, 16, 8, 832, 1216], [512, 512, 0, 0, 1024, 1024]])
    family.predict(latents(2), torch.tensor([1, 2]), family.encode_prompts([PROMPT, ""]), sizes)
    assert seen[0].tolist() == [1367, 2049, 16, 8, 832, 1216, 512, 512, 0, 0, 1024, 1024]
    # the same order as the stock pipeline: original size, crop's top left, target size
    width = family.denoiser.config.projection_class_embeddings_input_dim - 6 * 8
    ids = family.pipeline("ddim")._get_add_time_ids((1367, 2049), (16, 8), (832, 1216), torch.float32, width)
    assert ids[0].tolist() == sizes[0].tolist()


def test_sdxl_zeroes_only_an_empty_negative_and_only_if_the_base_asks(tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path / "base")
    family = load(folder)
    empty, full = family.encode_prompts([""]), family.encode_prompts(["a cat"])
    assert empty["embeddings"].abs().max() > 0, "training sees the encoded empty prompt"
    inputs = family.pipeline_inputs(empty, empty)
    assert inputs["prompt_embeds"].abs().max() > 0
    for key in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert inputs[key].abs().max() == 0
        assert family.pipeline_inputs(full, full)[key].abs().max() > 0
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder).pipeline_inputs(empty, empty)["negative_prompt_embeds"].abs().max() > 0


def test_fp16_variant_files_are_read(tmp_path: Path, base: Base) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base.folder, folder)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    found, expected = load(folder).denoiser.state_dict(), load(base.folder).denoiser.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_libraries_keep_their_logging_settings(base: Base) -> None:
    before = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    load(base.folder)
    assert (transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("number", [1, 3000, 8000])
def test_a_lack_of_memory_while_loading_is_not_taken_for_a_damaged_file(number: int, bases: dict[str, Path]) -> None:
    with pytest.raises(Exception) as caught, OutOfMemory(number):  # noqa: PT011 - whatever the libraries make of it
        loading.load(ModelConfig(base=str(bases["sd1"])), device="cpu", dtype=torch.float16)
    assert lacks_memory(caught.value)
    assert torch.get_default_dtype() is torch.float32
    assert not isinstance(caught.value, LoraBoothError)


def test_a_tokenizer_is_parsed_once_until_its_files_change(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases["sd1"] / "tokenizer", tmp_path / "tokenizer")
    first = components._tokenizer(folder)
    assert components._tokenizer(folder) is first
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    assert components._tokenizer(folder) is not first
