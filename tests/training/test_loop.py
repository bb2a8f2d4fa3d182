"""What must hold whatever is changed: the invariants at the end of the design, each on a real run of a tiny base."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import delta, find_module
from lora_booth.config.config import Config
from lora_booth.data import images
from lora_booth.data.subject import crops_of, find_pictures
from lora_booth.errors import Interrupted
from lora_booth.models import loading
from lora_booth.run.number_types import DTYPES
from lora_booth.run.report import Silent
from lora_booth.training import loop
from lora_booth.training.objective import draw
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At, assert_equal, assert_near, distance, session_of, trained

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_adapter_changes_nothing(
    family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(family, adapter={"targets": "attention+ff+conv"}), monkeypatch)
    rows = s.prepared.order.at(0)
    with torch.no_grad():
        with_adapter = loop.losses_of(s, loop.micro_step(s, rows[:1], 0))
        with inject.disabled(s.adapted):
            without = loop.losses_of(s, loop.micro_step(s, rows[:1], 0))
    assert torch.equal(with_adapter, without)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_trainable_parameter_is_float32_and_nothing_else_has_gradients(
    precision: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(model={"precision": precision}), monkeypatch)
    loop.losses_of(s, loop.micro_step(s, s.prepared.order.at(0)[:1], 0)).sum().backward()
    trainable = {id(p) for p in s.parameters}
    everything = list(s.family.denoiser.named_parameters())
    assert {p.dtype for p in s.parameters} == {torch.float32}
    assert {id(p) for _, p in everything if p.grad is not None} <= trainable
    assert {id(p) for _, p in everything if p.requires_grad} == trainable
    gradients = [gradient for flat in s.trained for gradient in flat.take()]
    assert sum(gradient is not None for gradient in gradients) == len(s.parameters) > 0
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {DTYPES[precision]}


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_one_batch_of_four_equals_four_micro_steps_of_one(family: str, make_config: MakeConfig) -> None:
    step = {"images_per_step": 2, "steps": 2}
    together = trained(make_config(family, "together", train={**step, "batch_size": 4}))
    apart = trained(make_config(family, "apart", train={**step, "batch_size": 1}))
    other = trained(make_config(family, "other", train={**step, "batch_size": 4, "seed": 1}))
    assert_near(together, apart, 2e-4)  # two Adam steps of 1e-2; another seed differs by the steps themselves
    assert distance(together, other) > 1e-2


def test_a_run_killed_and_resumed_twice_equals_the_straight_run_bit_for_bit(make_config: MakeConfig) -> None:
    def config(name: str) -> Config:
        return make_config(name=name, train={"steps": 7, "save_every_steps": 2}, adapter={"dropout": 0.1})

    straight = trained(config("straight"))
    interrupted = config("interrupted")
    for step in (3, 5):
        with pytest.raises(Interrupted, match="continue with"):
            train.train(interrupted, report=At(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))
    assert interrupted.run.folder is not None
    lines = (interrupted.run.folder / "metrics.jsonl").read_text().splitlines()
    assert [int(line.split('"step": ')[1].split(",")[0]) for line in lines] == list(range(1, 8))


def test_a_run_killed_without_warning_resumes_to_the_same_bytes(make_config: MakeConfig) -> None:
    straight, killed = make_config(name="straight"), make_config(name="killed")
    expected = trained(straight)
    child = os.fork()
    if child == 0:
        train.train(killed, report=At(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert_equal(expected, trained(killed))
    assert straight.run.folder is not None and killed.run.folder is not None
    name = "yql_dog_diffusers.safetensors"
    assert_equal(load_file(straight.run.folder / name), load_file(killed.run.folder / name))


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree"])
def test_every_optimizer_resumes_bit_for_bit(optimizer: str, make_config: MakeConfig) -> None:
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(optimizer, "torch"))

    def config(name: str) -> Config:
        return make_config(name=name, train={"steps": 3}, optimizer={"name": optimizer}, adapter={"rank": 32})

    straight, interrupted = trained(config("straight")), config("interrupted")
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))


def test_b_learns_at_its_own_rate_and_resumes_bit_for_bit(make_config: MakeConfig) -> None:
    def config(name: str, ratio: float, steps: int) -> Config:
        optimizer = {"lora_plus_ratio": ratio, "warmup_steps": 0, "weight_decay": 0.0, "learning_rate": 1e-3}
        return make_config(name=name, train={"steps": steps, "save_every_steps": 1}, optimizer=optimizer)

    alike, faster = (trained(config(f"one{ratio}", ratio, 1)) for ratio in (1.0, 4.0))
    ups = [name for name in alike if "lora_B" in name]
    assert ups and all(torch.allclose(faster[name], 4 * alike[name], rtol=1e-3, atol=1e-7) for name in ups)
    assert all(torch.equal(faster[name], alike[name]) for name in alike if name not in ups)  # B was 0
    straight, interrupted = trained(config("straight", 4.0, 3)), config("interrupted", 4.0, 3)
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_equal(straight, trained(interrupted))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_from_cached_inputs_equals_the_loss_without_a_cache(
    family: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(family, run={"cache": tmp_path / "cache"}, prior={"loss_weight": 0.0})
    session_of(config, monkeypatch)
    s = session_of(config, monkeypatch)  # the second one reads what the first one stored
    row = s.prepared.order.at(0)[0]
    fresh = loading.load(config.model, device="cpu", dtype=torch.float32)
    picture = next(p for p in find_pictures(config, Silent()).instances.pictures if p.path.name == row.item.name)
    (crop,) = crops_of(s.config, [picture])
    pixels = torch.as_tensor(images.to_pixels(images.crop(images.read(picture.path), crop)))[None]
    with torch.no_grad():
        mean, std = fresh.encode_images(pixels)
        draws, latent_noise = draw(0, 0, [row.position], row.item.shape, fresh.schedule)
        conditioning = fresh.encode_prompts(["a photo of yql dog"])
        geometry = torch.tensor([crop.geometry], dtype=torch.float32)
        expected = s.objective.loss(
            lambda noisy, t: fresh.predict(noisy, t, conditioning, geometry), mean + std * latent_noise, draws
        )
        assert torch.equal(loop.losses_of(s, loop.micro_step(s, [row], 0)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_sample_does_not_depend_on_its_batch(
    family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(family, train={"images_per_step": 2}), monkeypatch)
    rows = s.prepared.order.at(0)
    with torch.no_grad():
        together = loop.losses_of(s, loop.micro_step(s, rows, 0))
        alone = torch.cat([loop.losses_of(s, loop.micro_step(s, [row], 0)) for row in rows])
    assert torch.allclose(together, alone, rtol=1e-5, atol=0)  # another summation order in convolutions


def test_prior_weight_zero_equals_no_prior(make_config: MakeConfig) -> None:
    weightless = trained(make_config(name="weightless", prior={"loss_weight": 1e-30}))
    without = trained(make_config(name="without", prior={"loss_weight": 0.0}))
    with_prior = trained(make_config(name="with"))
    assert_near(weightless, without, 1e-4)
    assert distance(with_prior, without) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_an_exported_file_draws_the_same_picture_as_the_run_and_as_the_merged_base(
    name: str, family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"targets": "all-linear+conv", "rank": 3, "alpha": 5.0}
    config = make_config(family, adapter=adapter, export={"dtype": "fp32"})
    s = session_of(config, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    for parameter in s.parameters:
        parameter.data.normal_(0, 0.05, generator=generator)
    assert config.run.folder is not None
    path = config.run.folder / "x.safetensors"
    storage.FORMATS[name].write(path, inject.collect(s.adapted), family, torch.float32, {})
    expected = picture(s.family)
    with inject.disabled(s.adapted):
        base = picture(s.family)

    loaded = loading.load(config.model, device="cpu", dtype=torch.float32)
    loaded.pipeline("ddim").load_lora_weights(str(path.parent), weight_name=path.name)
    merged = loading.load(config.model, device="cpu", dtype=torch.float32)
    for module_path, low_rank in storage.read(path)["unet"].items():
        weight = find_module(merged.denoiser, module_path).weight
        weight.data += delta(low_rank).view_as(weight)

    assert (expected - base).abs().max() > 1e-2
    assert (expected - picture(loaded)).abs().max() < 1e-4
    assert (expected - picture(merged)).abs().max() < 1e-4


def picture(family: Any) -> torch.Tensor:
    """Latents of one short sampling, which say more than 8-bit pixels."""
    with torch.no_grad():
        row = load_row(family)
        latents = family.pipeline("ddim")(
            **family.pipeline_inputs(row, row),
            width=32,
            height=32,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    return latents.float()


def load_row(family: Any) -> dict[str, torch.Tensor]:
    """A fixed conditioning of the right shape, since a session's text encoders are gone."""
    generator = torch.Generator().manual_seed(1)
    width = family.denoiser.config.cross_attention_dim
    row = {"embeddings": torch.randn(1, 24, width, generator=generator)}
    if family.name == "sdxl":
        pooled = family.denoiser.add_embedding.linear_1.in_features - 6 * family.denoiser.config.addition_time_embed_dim
        row |= {"pooled": torch.randn(1, pooled, generator=generator), "is_empty": torch.tensor([False])}
    return row
