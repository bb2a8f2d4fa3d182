"""The table of devices: what each lacks is chosen around, or told before the run.

No such device is needed: what a driver would answer is put in by hand here. `test_pretend.py` runs whole runs on
devices that are pretended.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, ModelError, lacks_memory
from lora_booth.models import abilities, devices
from lora_booth.models.abilities import LACKS, NAMES
from lora_booth.run import systems
from lora_booth.verbs import plan, train
from tests.conftest import MakeConfig

CPU, CUDA, XPU, MPS = (torch.device(name) for name in ("cpu", "cuda", "xpu", "mps"))


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets drivers answer: `answer(capability=(7, 5))` and so on."""

    def put(
        *,
        capability: tuple[int, int] = (8, 9),
        architecture: str | None = None,
        xpu: Mapping[str, bool] | None = None,
        macos: int = 15,
        triton: bool = True,
    ) -> None:
        monkeypatch.setattr(devices, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.version, "hip", None if architecture is None else "7.2")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=f"{architecture}:sramecc+")
        )
        can = {"has_fp64": True, "has_bfloat16_conversions": True, **(xpu or {})}
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(**can))
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)

    put()
    return put


def config(**sections: Mapping[str, Any]) -> Config:
    base: dict[str, Any] = {"model": {"base": "sd15"}, "subject": {"images": Path("dog"), "class_noun": "dog"}}
    return Config.model_validate({**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}})


def test_every_kind_has_a_row_a_name_and_a_question() -> None:
    assert LACKS.keys() == NAMES.keys() == devices._BY_MODEL.keys()
    needed = set(abilities.NEEDS.values()) | {"fast bf16", "compiling", "pinned memory", "memory of its own"}
    assert {ability for row in LACKS.values() for ability in row} <= needed | {"dropout in recomputed blocks"}


@pytest.mark.parametrize(
    ("device", "driver", "precision", "optimizer"),
    [
        (CPU, {}, "fp32", "adamw"),
        (CUDA, {"capability": (8, 6)}, "bf16", "adamw8bit"),
        (CUDA, {"capability": (7, 5)}, "fp16", "adamw8bit"),
        (CUDA, {"capability": (5, 2)}, "fp16", "adamw"),
        (CUDA, {"architecture": "gfx942"}, "bf16", "adamw8bit"),
        (CUDA, {"architecture": "gfx1100"}, "bf16", "adamw8bit"),
        (CUDA, {"architecture": "gfx1030"}, "fp16", "adamw8bit"),
        (XPU, {}, "bf16", "adamw8bit"),
        (XPU, {"triton": False}, "bf16", "adamw"),
        (XPU, {"xpu": {"has_fp64": False}}, "bf16", "adamw8bit"),
        (XPU, {"xpu": {"has_bfloat16_conversions": False}}, "fp16", "adamw8bit"),
        (XPU, {"xpu": {"has_fp64": False, "has_bfloat16_conversions": False}}, "bf16", "adamw8bit"),
        (MPS, {"macos": 14}, "bf16", "adamw"),
        (MPS, {"macos": 13}, "fp16", "adamw"),
    ],
)
def test_what_is_chosen_is_what_the_device_can(
    answer: Any, device: torch.device, driver: dict[str, Any], precision: str, optimizer: str
) -> None:
    answer(**driver)
    assert abilities.best_precision(devices.abilities(device)) == precision
    assert abilities.best_optimizer(devices.abilities(device)) == optimizer
    chosen = config(model={"precision": precision}, optimizer={"name": optimizer})
    assert abilities.faults_of(chosen, devices.abilities(device)) == []


@pytest.mark.parametrize(
    ("device", "driver", "settings", "told", "remedy"),
    [
        (MPS, {}, {"optimizer": {"name": "adamw8bit"}}, "Metal", 'set optimizer.name = "adamw".'),
        (MPS, {}, {"optimizer": {"name": "paged_adamw8bit"}}, "Metal", 'set optimizer.name = "adamw".'),
        (MPS, {}, {"model": {"attention": "xformers"}}, "Metal", 'set model.attention = "sdpa".'),
        (MPS, {"macos": 13}, {"model": {"precision": "bf16"}}, "macOS 14", 'set model.precision = "fp16".'),
        (MPS, {}, {"adapter": {"dropout": 0.1}}, "drop other inputs", "set train.gradient_checkpointing = 0"),
        (XPU, {"triton": False}, {"optimizer": {"name": "lion8bit"}}, "triton", 'set optimizer.name = "adamw".'),
        (XPU, {"xpu": {"has_fp64": False}}, {"model": {"precision": "fp16"}}, "float64", '= "bf16".'),
        (CUDA, {"capability": (5, 2)}, {"model": {"quantize": "nf4"}}, "5.2 is below 6.0", 'model.quantize = "none".'),
        (CPU, {}, {"model": {"attention": "xformers"}}, "training", 'set model.attention = "sdpa".'),
        (CPU, {}, {"memory": {"device": "cuda"}}, "no other device than the CPU", '"auto" or "cpu"'),
        (MPS, {}, {"memory": {"offload_denoiser": True}}, "main memory", "set memory.offload_denoiser = false."),
        (MPS, {}, {"memory": {"device": "cuda"}}, "MPS", '"auto" or "mps"'),
    ],
)
def test_what_a_device_lacks_is_told_with_what_to_set_instead(
    answer: Any, device: torch.device, driver: dict[str, Any], settings: Any, told: str, remedy: str
) -> None:
    answer(**driver)
    with pytest.raises(ConfigError) as caught:
        abilities.require(config(**settings), devices.abilities(device))
    message = str(caught.value)
    key = next(f"{section}.{name}" for section, values in settings.items() for name in values)
    assert message.startswith(f"{key} is ") and told in message and remedy in message and "\n" not in message


def test_dropout_is_fine_where_nothing_is_computed_again(answer: Any) -> None:
    settings = config(adapter={"dropout": 0.1}, train={"gradient_checkpointing": 0})
    assert abilities.faults_of(settings, devices.abilities(MPS)) == []
    assert abilities.faults_of(config(adapter={"dropout": 0.1}), devices.abilities(CUDA)) == []


def test_nothing_is_moved_to_main_memory_where_that_is_all_there_is(answer: Any) -> None:
    memory = abilities.without_moving(config(), devices.abilities(MPS)).memory
    assert memory.offload_denoiser is False and memory.offload_activations is False
    assert all(abilities.without_moving(config(), devices.abilities(device)) == config() for device in (CUDA, XPU, CPU))


def test_all_that_a_device_lacks_is_told_at_once(answer: Any) -> None:
    settings = config(optimizer={"name": "lion8bit"}, model={"attention": "xformers"})
    assert len(abilities.faults_of(settings, devices.abilities(MPS))) == 2


def test_a_device_without_a_row_is_told(answer: Any) -> None:
    with pytest.raises(ConfigError, match=r'"hpu".*memory.device = "cpu"'):
        devices.dtype_for("auto", torch.device("hpu"))


def test_accelerate_and_the_plan_mean_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert devices.here() == CUDA and devices.here("cpu") == CPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.here() == CPU


def test_memory_figures_of_a_device_that_shares_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * gib)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * gib)
    monkeypatch.setattr(systems, "available_memory_bytes", lambda: 64 * gib)
    assert (devices.free_gib(MPS), devices.peak_gib(MPS)) == (10.0, 2.0)
    monkeypatch.setattr(systems, "available_memory_bytes", lambda: 3 * gib)
    assert devices.free_gib(MPS) == 3.0 and devices.used_share(MPS) == 0.75


def test_a_driver_that_does_not_tell_what_is_free_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> None:
        raise RuntimeError("The device doesn't support querying free memory")

    gib = 2**30
    monkeypatch.setattr(torch.xpu, "mem_get_info", unknown)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * gib))
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda _: 4 * gib)
    assert devices.free_gib(XPU) == 12.0 and devices.used_share(XPU) == 0.25


def test_the_cpu_says_nothing_of_memory_and_takes_tensors_as_they_are() -> None:
    assert (devices.free_gib(CPU), devices.used_share(CPU), devices.peak_gib(CPU)) == (None, None, None)
    tensor = torch.arange(3)
    assert devices.put(tensor, CPU) is tensor
    devices.empty_cache(CPU)


def test_a_run_that_the_device_cannot_do_is_refused_before_anything(make_config: MakeConfig) -> None:
    refused = make_config(memory={"device": "cuda" if devices.here().type == "mps" else "mps"})
    with pytest.raises(ConfigError, match=r"memory\.device"):
        train.train(refused)
    assert refused.run.folder is not None and not refused.run.folder.exists()


def test_a_plan_warns_of_what_would_be_refused_here(make_config: MakeConfig) -> None:
    told: list[str] = []
    report = SimpleNamespace(event=lambda *_, **__: None, warn=told.append, progress=lambda *_, **__: None)
    plan.show(make_config(memory={"device": "mps"}), report)
    assert [line for line in told if 'memory.device is "mps"' in line]


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
        "MPS backend out of memory (MPS allocated: 8.89 GB, other allocations: 172.98 MB, max allowed: 9.07 GB).",
        "Invalid buffer size: 12.50 GiB",
        "CUDA error: out of memory",
        "HIP error: out of memory",
        "XPU out of memory. Tried to allocate 2.00 GiB.",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_device_s_way_to_say_that_memory_is_gone_is_understood(text: str) -> None:
    assert lacks_memory(RuntimeError(text))
    error = ModelError("wrapped")
    error.__cause__ = RuntimeError(text)
    assert lacks_memory(error)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lacks_memory(OSError(2, "No such file or directory"))
    too_small = OSError(22, "The paging file is too small for this operation to complete")
    too_small.winerror = 1455  # type: ignore[attr-defined]
    assert lacks_memory(too_small)
