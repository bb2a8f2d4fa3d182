"""What only a CUDA card can show: `make test-gpu`."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.bases import random_base
from lora_booth.config.config import Config
from lora_booth.errors import Interrupted
from lora_booth.models import devices, loading
from lora_booth.planning import decide, memory
from lora_booth.run.report import Silent
from lora_booth.training import compiling, loop, session
from lora_booth.training.batch import Batch, sample_losses
from lora_booth.training.objective import Draws
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import tiny
from tests.support.runs import At, Recorder, assert_near, session_of, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
FAMILIES = ("sd1", "sd2", "sdxl")


def on_cpu(batch: Batch) -> Batch:
    conditioning = None if batch.conditioning is None else {k: t.cpu() for k, t in batch.conditioning.items()}
    draws = Draws(*(tensor.cpu() for tensor in vars(batch.draws).values()))
    return replace(
        batch, latents=batch.latents.cpu(), draws=draws, geometry=batch.geometry.cpu(), conditioning=conditioning
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_computes_the_losses_that_the_processor_computes(
    family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(family, model={"precision": "fp32"})
    s = session_of(config, monkeypatch)
    micro = loop.micro_step(s, s.prepared.order.at(0)[:1], 0)
    base = loading.load(config.model, device="cpu", dtype=torch.float32)
    objective = replace(s.objective)
    with torch.no_grad():
        found, expected = loop.losses_of(s, micro), sample_losses(base, objective, on_cpu(micro.batch))
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), expected, rtol=1e-2), "an untrained adapter changes nothing"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_a_micro_step_waits_for_the_card(
    family: str, precision: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(family, model={"precision": precision}), monkeypatch)

    def run(step: int) -> None:
        micro = loop.micro_step(s, s.prepared.order.at(step)[:1], step)
        (loop.losses_of(s, micro) * micro.weights).sum().backward()
        for flat in s.trained:
            flat.add_(flat.take())

    session.set_training_(s, True)
    run(0)  # kernels are loaded and tables moved the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stopped_run_goes_on_where_it_was(make_config: MakeConfig) -> None:
    straight, interrupted = trained(make_config(name="straight")), make_config(name="interrupted")
    with pytest.raises(Interrupted):
        train.train(interrupted, report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert_near(straight, trained(interrupted), 1e-3)  # a card sums in another order each time


@pytest.mark.parametrize("settings", [{"quantize": "nf4"}, {"quantize": "int8"}, {"precision": "fp16"}])
def test_every_way_to_hold_the_base_trains(settings: dict[str, str], make_config: MakeConfig) -> None:
    adapter = trained(make_config("sdxl", model={"precision": "bf16"} | settings))
    ups = [tensor for name, tensor in adapter.items() if "lora_B" in name]
    assert ups and all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in ups)


def test_compiled_blocks_compute_nearly_the_same(make_config: MakeConfig) -> None:
    plain, compiled = (trained(make_config(name=str(c), train={"steps": 2, "compile": c})) for c in (False, True))
    assert_near(plain, compiled, 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["images", "model"])
def test_recorded_steps_compute_nearly_the_same(family: str, mode: str, make_config: MakeConfig) -> None:
    settings = {"steps": 6, "save_every_steps": 3, "gradient_checkpointing": 0}
    found, heard = [], Recorder()
    for compile in (False, "graph"):
        config = make_config(family, name=str(compile), train=settings | {"compile": compile}, prior={"mode": mode})
        found.append(trained(config, heard))
    assert not heard.warnings
    assert_near(*found, 1e-2)


def test_a_trial_of_the_compiler_is_kept_and_changes_nearly_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiling, "ASSUMED_S", 0.0)
    monkeypatch.setattr(compiling, "folder_of", lambda _: tmp_path)
    plain = trained(make_config(name="plain", train={"compile": False}))
    assert_near(plain, trained(make_config(name="tried", train={"compile": "trial"})), 1e-2)
    (trial,) = json.loads((tmp_path / "compiling.json").read_text()).values()
    assert trial["compiled_s"] != trial["eager_s"], "equal where compiling failed"


@pytest.mark.parametrize("saving", [(0.0, False), (1.0, False), (1.0, True)])
def test_a_full_size_run_takes_the_memory_that_was_predicted(saving: tuple[float, bool], tmp_path: Path) -> None:
    base = random_base(tmp_path / "sd1", "sd1")
    tiny.tiny_pictures(tmp_path / "pictures", 3)
    values = {
        "model": {"base": str(base), "precision": "bf16"},
        "subject": {"images": tmp_path / "pictures", "class_noun": "dog"},
        "prior": {"num_images": 2, "sampler_steps": 2},
        "train": {"steps": 3, "gradient_checkpointing": saving[0], "compile": False},
        "memory": {"offload_activations": saving[1]},
        "preview": {"images_per_prompt": 1, "sampler_steps": 2},
        "run": {"folder": tmp_path / "run", "cache": tmp_path / "cache"},
    }
    config = Config.model_validate(values)
    inputs = decide.look(config, Silent())
    resolved = decide.filled(config, inputs)
    predicted = max(phase.gib for phase in memory.Modules.of(resolved, inputs.facts).phases(resolved, None))
    torch.cuda.reset_peak_memory_stats()
    assert train.train(config).peak_gib == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_denoiser_comes_back_to_the_card_as_it_was(quantize: str, make_config: MakeConfig) -> None:
    adapters, model = [], {"quantize": quantize, "precision": "bf16"}
    for is_alone in (False, True):
        memory_of_run = {"offload_denoiser": is_alone, "pictures_at_once": 2}
        preview = {"images_per_prompt": 1, "every_steps": 1}
        adapters.append(trained(make_config(name=str(is_alone), model=model, memory=memory_of_run, preview=preview)))
    assert_near(*adapters, 1e-2)


def test_the_card_says_what_it_is() -> None:
    device = devices.here()
    assert device.type == "cuda"
    free, used = devices.free_gib(device), devices.used_share(device)
    assert free is not None and used is not None
    assert free > 0 and 0 < used < 1
    moved = devices.put(torch.arange(5), device)
    assert moved.device.type == "cuda" and moved.tolist() == [0, 1, 2, 3, 4]
