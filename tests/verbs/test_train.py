"""Whole runs: what is refused, what stops them, what they leave behind, with one process and with two."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora_booth.adapter.files import storage
from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DataError, DiskError, Interrupted, ModelError, NumericError
from lora_booth.models import devices, loading
from lora_booth.models.families import components
from lora_booth.training import loop, session, trackers
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import tiny
from tests.support.runs import At, Recorder, assert_equal, assert_near, session_of, trained


def test_a_run_leaves_adapter_files_pictures_metrics_and_a_summary(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        "sd1", preview={"images_per_prompt": 1, "sampler_steps": 2, "every_steps": 2, "prompts": ["a {class}"]}
    )
    recorder = Recorder()
    summary = train.train(config, report=recorder)
    folder = tmp_path / "run"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names >= {
        "config.toml",
        "contact_sheet.png",
        "metrics.jsonl",
        "summary.json",
        "yql_dog.safetensors",
        "yql_dog_diffusers.safetensors",
        "yql_dog.json",
        "yql_dog.png",
        "before_after.png",
        "previews/step-000000.png",
        "previews/step-000002.png",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["instance_loss"] < 10 and 0 < line["class_loss"] < 10 for line in lines)
    assert toml.load(folder / "config.toml").train.steps == 4
    assert json.loads((folder / "summary.json").read_text())["steps"] == summary.steps == 4
    rows = [text for kind, text in recorder.events if kind == "program"]
    assert len(rows) == 8 and all("  128 of 128  " in row for row in rows)
    assert train.train(config) == summary


def test_the_cover_is_the_first_picture_made_with_the_adapter_or_none(make_config: MakeConfig, tmp_path: Path) -> None:
    pictures = {"images_per_prompt": 1, "sampler_steps": 2, "prompts": ["a {class}"]}
    train.train(make_config(preview=pictures))
    folder = tmp_path / "run"
    for name in ("yql_dog", "yql_dog_diffusers"):
        assert "modelspec.thumbnail" in storage.read_metadata(folder / f"{name}.safetensors")
    assert json.loads((folder / "yql_dog.json").read_text())["activation text"] == "yql dog"
    with Image.open(folder / "yql_dog.png") as cover:
        assert cover.size == (512, 512)
    train.train(make_config(name="bare", preview=pictures, export={"cover": False}))
    assert "modelspec.thumbnail" not in storage.read_metadata(tmp_path / "bare" / "yql_dog.safetensors")
    assert not (tmp_path / "bare" / "yql_dog.png").exists()


def test_the_files_say_what_they_are_and_hold_no_path(make_config: MakeConfig, tmp_path: Path) -> None:
    train.train(make_config())
    with safe_open(tmp_path / "run" / "yql_dog.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.trigger_phrase"] == "yql dog"
    assert header["ss_base_model_version"] == "sd_v1"
    assert json.loads(header["lora_booth.config"])["subject"]["class_noun"] == "dog"
    assert str(tmp_path) not in str(header)


def test_a_finished_run_is_shown_and_left_as_it_is(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train={"steps": 2}, memory={"budget_gib": 2.0})
    summary, folder = train.train(config), tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".owner.json"}
    recorder = Recorder()
    other = config.with_values({"memory": {"budget_gib": 0.1}, "train": {"save_every_steps": 1}})
    assert train.train(other, report=recorder) == summary
    assert not any(kind == "memory" for kind, _ in recorder.events), "nothing was predicted"
    assert before == {path: path.read_bytes() for path in before}


def test_what_a_run_lost_of_its_pictures_and_metrics_is_made_again_or_told(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = make_config(train={"steps": 2}), tmp_path / "run"
    summary = train.train(config)
    (folder / "summary.json").unlink()
    sheet = folder / "contact_sheet.png"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    before = sheet.read_bytes()
    sheet.write_bytes(before[:100])
    (folder / "metrics.jsonl").write_text(f"{lines[0][:9]}\n{lines[1]}\n")
    recorder = Recorder()
    again = train.train(config, report=recorder)
    assert sheet.read_bytes() == before
    assert any("metrics.jsonl lacks 1 of the 2 lines so far" in warning for warning in recorder.warnings)
    assert again.validation_loss == summary.validation_loss


def test_both_files_hold_the_same_update(make_config: MakeConfig, tmp_path: Path) -> None:
    train.train(make_config("sd1", export={"dtype": "fp32"}))
    kohya = storage.read(tmp_path / "run" / "yql_dog.safetensors")["unet"]
    diffusers = storage.read(tmp_path / "run" / "yql_dog_diffusers.safetensors")["unet"]
    assert kohya.keys() == diffusers.keys()
    assert len(kohya) == 128  # the attention layers of every SD 1 UNet
    for name, low in kohya.items():
        one, other = low.scale * low.up @ low.down, diffusers[name].scale * diffusers[name].up @ diffusers[name].down
        assert torch.allclose(one, other, atol=1e-7), name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_train_with_their_own_learning_rate(family: str, make_config: MakeConfig) -> None:
    config = make_config(
        family,
        adapter={"text_encoder": True},
        optimizer={"text_encoder_learning_rate": 1e-3},
        train={"steps": 1, "save_every_steps": 1},
    )
    recorder = Recorder()
    after = trained(config, recorder)
    text = [name for name in after if name.startswith("text_encoder")]
    assert len(text) > 0
    moved = [name for name in text if name.endswith("lora_B.default.weight")]
    assert all(after[name].abs().max() > 0 for name in moved), "a text-encoder layer got no gradient"
    assert all(after[name].abs().max() < 2e-3 for name in moved)
    assert any("text_encoder" in text and "0.001" in text for kind, text in recorder.events if kind == "adapter")


def test_a_run_continues_from_an_adapter_file(make_config: MakeConfig, tmp_path: Path) -> None:
    first = trained(make_config(name="first", export={"dtype": "fp32"}))
    path = tmp_path / "first" / "yql_dog_diffusers.safetensors"
    second = make_config(name="second", adapter={"continue_from": path}, optimizer={"learning_rate": 1e-12})
    assert_near(first, trained(second), 1e-6)


def test_gradient_checkpointing_changes_memory_only(make_config: MakeConfig) -> None:
    plain = trained(make_config(name="plain", train={"steps": 2}))
    saving = trained(make_config(name="saving", train={"steps": 2, "gradient_checkpointing": True}))
    assert_near(plain, saving, 1e-4)


def test_what_waits_in_main_memory_comes_back_as_it_was(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "OFFLOADED_BYTES", 1)
    runs, pictures = [], []
    for waits in (False, True):
        config = make_config(
            "sdxl",
            name=str(waits),
            train={"gradient_checkpointing": 1.0},
            memory={"offload_activations": waits, "offload_denoiser": waits},
            preview={"images_per_prompt": 1, "every_steps": 2},
            run={"cache": tmp_path / str(waits)},
        )
        runs.append(trained(config))
        assert config.run.folder is not None
        pictures.append([path.read_bytes() for path in sorted(config.run.folder.rglob("*.png"))])
    assert_equal(*runs)
    assert len(pictures[0]) > 2
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_blocks_change_time_only(make_config: MakeConfig) -> None:
    plain = trained(make_config(name="plain", preview={"images_per_prompt": 1, "every_steps": 2}))
    compiled = trained(
        make_config(name="compiled", preview={"images_per_prompt": 1, "every_steps": 2}, train={"compile": True})
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_near(plain, compiled, 1e-2)


def test_a_file_that_whoever_took_the_folder_removed_is_told_as_a_taken_folder(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    assert config.run.folder is not None
    owner = config.run.folder / ".owner.json"

    def taken(*_: object, **__: object) -> None:
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"id": "another", "host": "elsewhere"}))
        raise DiskError("contact_sheet.png cannot be written (No such file or directory)")

    monkeypatch.setattr(train.prepare, "prepare", taken)
    with pytest.raises(DiskError, match=r"was taken by process .* on elsewhere"):
        train.train(config)


def test_a_stop_while_pictures_are_drawn_ends_between_two_steps_of_the_solver(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(preview={"images_per_prompt": 1}), monkeypatch)
    passes: list[int] = []
    s.family.denoiser.register_forward_pre_hook(lambda *_: passes.append(1))
    s.stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped while drawing, everything is saved; continue with: "):
        session.draw_rows(s)
    assert len(passes) == 1


def test_a_bf16_base_moves_the_adapter_as_a_float32_base_does(make_config: MakeConfig) -> None:
    start = trained(make_config(name="start", optimizer={"learning_rate": 1e-12}))
    single = trained(make_config(name="single"))
    half = trained(make_config(name="half", model={"precision": "bf16"}))
    moved = [sum(float((run[n] - start[n]).norm()) for n in start) for run in (single, half)]
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
    apart = sum(float((single[n] - half[n]).norm()) for n in start)
    assert apart < 0.3 * moved[0]  # Adam's sign flips where a gradient is near zero


def test_fp16_trains_with_a_loss_scale(make_config: MakeConfig) -> None:
    after = trained(make_config(model={"precision": "fp16"}))
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in after.values())
    assert max(float(tensor.abs().max()) for name, tensor in after.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_mixed_aspects_train_in_buckets_and_no_picture_is_dropped(family: str, make_config: MakeConfig) -> None:
    config = make_config(family, data={"resolution": 48}, train={"steps": 1, "images_per_step": 5, "batch_size": 4})
    recorder = Recorder()
    train.train(config, report=recorder)
    assert recorder.tasks["encode images"] == 5
    assert config.run.cache is not None
    sizes = {Image.open(p).size for p in (config.run.cache / "class_images").rglob("*.png")}
    assert len(sizes) > 1


def test_own_class_images_are_used_and_none_are_drawn(make_config: MakeConfig, tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path / "dogs", 4)
    config = make_config(prior={"folder": tmp_path / "dogs"}, run={"cache": tmp_path / "cache"})
    recorder = Recorder()
    train.train(config, report=recorder)
    assert "draw class images" not in recorder.tasks
    assert not (tmp_path / "cache" / "class_images").exists()


def test_class_images_are_shared_between_runs_and_only_missing_ones_are_drawn(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(name: str, count: int) -> Config:
        return make_config(name=name, prior={"num_images": count}, run={"cache": tmp_path / "cache"})

    train.train(config("a", 2))
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.png")}
    recorder = Recorder()
    train.train(config("b", 5), report=recorder)
    after = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.png")}
    assert (len(before), len(after), recorder.tasks["draw class images"]) == (2, 5, 3)
    assert all(after[path] == data for path, data in before.items())
    assert len(set(after.values())) == 5


def test_the_users_folder_is_not_touched(make_config: MakeConfig, pictures: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in pictures.iterdir()}
    train.train(make_config())
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in pictures.iterdir()}


def test_captions_and_held_out_pictures_are_used(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = tiny.tiny_pictures(tmp_path / "captioned", 3)
    first.with_suffix(".txt").write_text("a picture of {token} {class} on the beach")
    tiny.tiny_pictures(tmp_path / "held_out", 2, sizes=[(40, 40)])
    config = make_config(subject={"images": tmp_path / "captioned", "held_out": tmp_path / "held_out"})
    s = session_of(config, monkeypatch)
    prompts = [item.prompt for item in s.prepared.order.instances]
    assert prompts == ["a picture of yql dog on the beach", "a photo of yql dog", "a photo of yql dog"]
    assert len(s.prepared.validation) == 2


def test_flipping_trains_on_mirrored_pictures_too(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    s = session_of(make_config(data={"flip": True}, train={"steps": 10}), monkeypatch)
    assert len(s.prepared.order.instances) == 10
    moments = [s.prepared.latents[item.latent_key].mean for item in s.prepared.order.instances]
    assert not torch.equal(moments[0], moments[5])


def test_fewer_than_three_pictures_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path / "two", 2)
    with pytest.raises(DataError, match="has 2 usable pictures, at least 3 are needed"):
        train.train(make_config(subject={"images": tmp_path / "two"}))


@pytest.mark.parametrize("section", ["subject", "prior"])
def test_another_folder_without_pictures_is_not_asked_for_three(
    section: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    name = {"subject": "held_out", "prior": "folder"}[section]
    with pytest.raises(
        DataError, match=rf"no usable picture in .*none; it is empty\nLeave {section}\.{name} out, or put"
    ):
        train.train(make_config(**{section: {name: tmp_path / "none"}}))


def test_unreadable_pictures_are_named_and_left_out(make_config: MakeConfig, tmp_path: Path) -> None:
    tiny.tiny_pictures(tmp_path / "some", 4)
    (tmp_path / "some" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    recorder = Recorder()
    train.train(make_config(subject={"images": tmp_path / "some"}), report=recorder)
    assert any("broken.jpg" in text for text in recorder.warnings)


def test_another_config_in_the_same_folder_is_refused(make_config: MakeConfig) -> None:
    train.train(make_config(train={"steps": 1}))
    with pytest.raises(ConfigError, match=r"train\.steps: 1 -> 2"):
        train.train(make_config(train={"steps": 2}))


def test_a_base_with_a_damaged_file_is_refused(make_config: MakeConfig, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sd1"], tmp_path / "base")
    weights = next((tmp_path / "base" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="unet"):
        train.train(make_config(model={"base": str(tmp_path / "base")}))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = loop.losses_of

    def poisoned(s: session.Session, micro: loop.MicroStep) -> torch.Tensor:
        return honest(s, micro) * (float("nan") if micro.step == 3 else 1.0)

    monkeypatch.setattr(loop, "losses_of", poisoned)
    with pytest.raises(NumericError, match=r"picture_0.* is not finite at step 4"):
        train.train(make_config())
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints[-1].name == "step-000002"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoints[-1] / "adapter.safetensors").values())
    assert not (tmp_path / "run" / "yql_dog.safetensors").exists()


def test_the_next_step_s_inputs_are_made_before_the_device_is_waited_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def tell(name: str, word: Callable[..., str]) -> None:
        honest = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *given: (told.append(word(*given)), honest(*given))[1])

    tell("micro_step", lambda s, rows, step: f"inputs {step}")
    tell("losses_of", lambda s, micro: f"pass {micro.step}")
    tell("_reduce_and_clip_", lambda s: "wait")
    train.train(make_config(train={"steps": 2, "batch_size": 1, "images_per_step": 1}))
    assert " ".join(told) == "inputs 0 pass 0 inputs 0 pass 0 inputs 1 wait pass 1 inputs 1 pass 1 wait"


def test_modules_are_gone_through_only_when_their_mode_changes(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    honest, optimize = UNet2DConditionModel.train, loop.optimize

    def count(module: UNet2DConditionModel, mode: bool = True) -> UNet2DConditionModel:
        modes.append(mode)
        return honest(module, mode)

    def counted(s: session.Session, start: int, *_: Any) -> None:
        monkeypatch.setattr(UNet2DConditionModel, "train", count)
        optimize(s, start)

    monkeypatch.setattr(loop, "optimize", counted)
    train.train(make_config(train={"steps": 4, "save_every_steps": 2}))
    # training, looking and saving at step 2, training, the same at step 4, looking at the end
    assert modes == [True, False, True, False, True, False]


def test_weights_that_are_not_finite_are_not_saved(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = session.validation_loss

    def poisoned(s: session.Session) -> float:
        loss = honest(s)
        s.parameters[3].data[0] = float("inf")
        return loss

    monkeypatch.setattr(session, "validation_loss", poisoned)
    config = make_config(train={"steps": 2})
    with pytest.raises(NumericError, match=r"lora_.* of the adapter is not finite after step 2; .*learning_rate"):
        train.train(config)
    assert config.run.folder is not None
    assert not list((config.run.folder / "checkpoints").glob("step-*"))


def test_an_optimizer_that_is_not_finite_is_not_saved(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = session.validation_loss

    def poisoned(s: session.Session) -> float:
        next(iter(s.optimizer.state.values()))["exp_avg_sq"][0] = float("inf")  # the weight never moves again
        return honest(s)

    monkeypatch.setattr(session, "validation_loss", poisoned)
    config = make_config(train={"steps": 2})
    with pytest.raises(NumericError, match=r"exp_avg_sq of the optimizer is not finite after step 2; .*learning_rate"):
        train.train(config)
    assert config.run.folder is not None
    assert not list((config.run.folder / "checkpoints").glob("step-*"))


def test_layers_without_a_gradient_are_named_at_the_first_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, is_dead = loop.losses_of, re.compile(r"mid_block.*attn1\.to_q")

    def cut(s: session.Session, micro: loop.MicroStep) -> torch.Tensor:
        for name, parameter in s.family.denoiser.named_parameters():
            if is_dead.search(name) and parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)
        return honest(s, micro)

    monkeypatch.setattr(loop, "losses_of", cut)
    recorder = Recorder()
    train.train(make_config("sd1", "one", train={"steps": 2}), report=recorder)
    (told,) = [text for text in recorder.warnings if "gradient" in text]
    assert "1 of 128 adapted layers get no gradient and will not learn, first unet.mid_block" in told
    is_dead = re.compile("")
    with pytest.raises(NumericError, match="no adapted layer gets a gradient"):
        train.train(make_config(name="all"))


def test_latents_that_are_not_finite_name_the_picture(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cls = type(loading.load(make_config().model, device="cpu", dtype=torch.float32))
    honest = cls.encode_images

    def poisoned(self: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = honest(self, pixels)
        return (mean / 0 if pixels.any() else mean), std  # a grey picture is what every base is tried with

    monkeypatch.setattr(cls, "encode_images", poisoned)
    with pytest.raises(NumericError, match=r"latents of picture_00\.png"):
        train.train(make_config(run={"cache": tmp_path / "cache"}))


def test_the_text_encoders_are_gone_once_their_work_is_cached(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config("sdxl"), monkeypatch)
    with pytest.raises(AssertionError, match="released"):
        s.family.text_encoders()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_step_needs_neither_vae_nor_text_encoders(
    family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, encoders, vae_calls, seen = loading.load, [], [], []

    def load(*words: Any, **settings: Any) -> Any:
        loaded = honest(*words, **settings)
        encoders.extend(weakref.ref(module) for module in loaded.text_encoders().values())
        vae = loaded.pipeline("ddim").vae
        for part in (vae.encoder, vae.decoder):
            part.register_forward_pre_hook(lambda *_: vae_calls.append(1))
        return loaded

    def look() -> None:
        gc.collect()
        seen.append(([ref() for ref in encoders], len(vae_calls)))

    monkeypatch.setattr(loading, "load", load)
    train.train(make_config(family, train={"steps": 3}), report=At(1, look))
    train.train(make_config(family, "other", train={"steps": 3}), report=At(3, look))
    (after_first, calls_first), (after_third, calls_third) = seen
    assert len(after_first) == (2 if family == "sdxl" else 1)
    assert all(module is None for module in after_first + after_third)
    assert calls_third == calls_first  # the second run found its latents in the cache


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_run_whose_work_is_cached_reads_the_denoiser_alone_and_ends_the_same(
    family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, names = components._from_folder, list[str]()

    def noted(facts: Any, wanted: Sequence[str], dtype: torch.dtype) -> Any:
        names.extend(wanted)
        return honest(facts, wanted, dtype)

    monkeypatch.setattr(components, "_from_folder", noted)
    run = {"cache": tmp_path / "cache"}
    settings: dict[str, Any] = {"train": {"steps": 3}, "preview": {"images_per_prompt": 0}, "run": run}
    first = train.train(make_config(family, **settings))
    assert {"vae", "text_encoder"} < set(names)
    names.clear()
    second = train.train(make_config(family, "other", **settings))
    assert names == ["unet"]
    assert second.validation_loss == first.validation_loss
    train.train(make_config(family, "drawn", **settings | {"preview": {"images_per_prompt": 1}}))
    assert names == ["unet", "unet", "vae"]


@pytest.mark.parametrize("prior", [{"num_images": 13}, {"mode": "model", "captions": ("a cat",), "norm_weight": 1.0}])
def test_two_processes_give_the_result_of_one(prior: dict[str, Any], make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"steps": 2, "images_per_step": 2, "batch_size": 4, "save_every_steps": 2}
    alone = trained(make_config(name="alone", train=settings, prior=prior))
    together = make_config(name="together", train=settings, prior=prior, run={"cache": tmp_path / "cache"})
    (tmp_path / "config.toml").write_text(toml.to_toml(together))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "lora_booth", "train", str(tmp_path / "config.toml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2 saved") == 1, "only the main process speaks"
    newest = max((tmp_path / "together" / "checkpoints").iterdir())
    assert_near(alone, load_file(newest / "adapter.safetensors"), 2e-4)  # another order of summation, two steps of 1e-2
    assert len((tmp_path / "together" / "metrics.jsonl").read_text().splitlines()) == 2


def test_zero_terminal_snr_needs_v_prediction_and_reaches_the_loss(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="predicts epsilon"):
        train.train(make_config("sd1", objective={"zero_terminal_snr": True}))
    s = session_of(make_config("sd2", objective={"zero_terminal_snr": True}), monkeypatch)
    assert s.objective.schedule.has_zero_terminal_snr
    assert s.family.schedule.has_zero_terminal_snr


def test_tensorboard_gets_the_metrics_when_asked(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train.train(make_config(run={"trackers": ["tensorboard"]}, train={"steps": 1}))
    logs = b"".join(log.read_bytes() for log in (tmp_path / "run").rglob("events.out.tfevents*"))
    assert b"instance_loss" in logs and b"adapter.rank" in logs


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(run={"trackers": ["wandb"]}, subject={"images": tmp_path / "none"})
    with pytest.raises(ConfigError, match=r'run.trackers names "wandb", which is not installed; `pip install wandb`'):
        train.train(config)


def test_trackers_are_told_how_is_trained_and_no_word_or_path_of_the_users(make_config: MakeConfig) -> None:
    config = make_config(subject={"class_noun": "secretdog", "token": "zyxw"})
    told = trackers.settings(config)
    assert told["adapter.rank"] == 2 and told["train.steps"] == 4
    assert all(isinstance(value, (bool, int, float, str)) for value in told.values())
    words = ("secretdog", "zyxw", str(config.subject.images), str(config.folder), config.model.base)
    assert not [value for value in map(str, told.values()) if any(word in value for word in words)]


def test_the_learning_rate_follows_its_schedule_over_a_resumed_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimizer={"warmup_steps": 1, "schedule": "linear", "learning_rate": 1e-2})
    with pytest.raises(Interrupted):
        train.train(config, report=At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # One warm-up step at a half, then linearly towards 0 over the three that are left.
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-3, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_a_run_that_another_process_finishes_meanwhile_is_returned_as_it_is(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = train.train(make_config())
    file = tmp_path / "run" / "yql_dog.safetensors"
    before = file.stat()
    answers = iter([False])  # as this process looks; when it has the folder, the run is finished
    monkeypatch.setattr(train, "is_finished", lambda folder: next(answers, True))
    recorder = Recorder()
    assert train.train(make_config(), report=recorder) == first
    assert any("is finished already" in text for _, text in recorder.events)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
