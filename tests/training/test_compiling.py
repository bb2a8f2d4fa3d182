"""A trial before the first step finds whether compiling pays, and changes nothing but the time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.errors import ConfigError
from lora_booth.training import compiling, loop, session
from lora_booth.training.compiling import Trial
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import assert_near, session_of, trained

SLOWED_S = 0.3
"""By which a pass of the tiny denoiser is made slower, until it is "compiled"."""
COMPILING_S = 2.0


class Clock:
    """A clock that passes of the denoiser move, and nothing else: how busy the machine is changes no test."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Heard:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.events: dict[str, str] = {}
        self.warnings: list[str] = []

    def event(self, kind: str, text: str, **_: Any) -> None:
        self.events[kind] = text

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, *_: Any, **__: Any) -> None:
        """Nothing."""


Bench = tuple[session.Session, Heard, list[str]]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trials are kept: other than the cache, for each test its own."""
    monkeypatch.setattr(compiling, "folder_of", lambda _: tmp_path)
    return tmp_path / "compiling.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a trial reads the time from."""
    clock = Clock()
    monkeypatch.setattr(compiling, "time", clock)
    return clock


@pytest.fixture
def bench(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Bench:
    """A session of 40 steps on a denoiser whose passes take `SLOWED_S`, what it tells, and how often it was compiled,
    which takes `COMPILING_S`, and after which passes take no time."""
    config = make_config(train={"steps": 40, "compile": "trial"})
    heard = Heard()
    s = replace(session_of(config, monkeypatch), report=heard)
    compiled: list[str] = []

    def move(*_: object) -> None:
        clock.now_s += 0.0 if compiled else SLOWED_S

    s.family.denoiser.register_forward_pre_hook(move)

    def compile_() -> None:
        compiled.append("compiled")
        clock.now_s += COMPILING_S

    monkeypatch.setattr(s.family, "compile_denoiser_", compile_)
    monkeypatch.setattr(compiling, "ASSUMED_S", 0.1)
    return s, heard, compiled


def test_steps_to_pay_are_the_time_of_compiling_over_what_a_step_saves() -> None:
    assert Trial(eager_s=1.5, compiled_s=1.0, compiling_s=60.0).steps_to_pay == 120
    assert Trial(eager_s=1.0, compiled_s=1.0, compiling_s=60.0).steps_to_pay == float("inf")
    assert Trial(eager_s=1.0, compiled_s=1.2, compiling_s=0.0).steps_to_pay == float("inf")


def test_what_is_faster_is_taken_told_and_remembered(bench: Bench, memory: Path) -> None:
    s, heard, compiled = bench
    assert compiling.pays(s, 0)
    assert compiled == ["compiled"]
    (trial,) = json.loads(memory.read_text()).values()
    passes = s.config.train.images_per_step * 2 / s.config.train.batch_size
    assert trial == {"eager_s": pytest.approx(SLOWED_S * passes), "compiled_s": 0.0, "compiling_s": COMPILING_S}
    assert heard.events["compiled"].startswith("compiled in 2 s: a step takes 0 s instead of ")
    assert heard.events["compiled"].endswith(" of 40 steps")
    assert not heard.warnings
    assert all(p.grad is None for p in s.parameters), "nothing of the trial stays"


def test_a_run_that_is_too_short_tries_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    s, heard, compiled = bench
    monkeypatch.setattr(compiling, "ASSUMED_S", 60.0)
    assert not compiling.pays(s, 0)
    assert not compiled
    assert not heard.events


def test_what_a_trial_measured_counts_for_the_next_run(
    bench: Bench, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, _, compiled = bench
    assert compiling.pays(s, 0)
    (key,) = json.loads(memory.read_text())
    memory.write_text(json.dumps({key: vars(Trial(1.0, 0.5, 10.0))}))
    monkeypatch.setattr(compiling, "ASSUMED_S", 1e6)
    compiled.clear()
    assert compiling.pays(s, 19), "21 steps are left, and 20 pay"
    memory.write_text(json.dumps({key: vars(Trial(1.0, 0.5, 10.0))}))
    monkeypatch.setattr(compiling, "_round", None)
    assert not compiling.pays(s, 20)
    assert compiled == ["compiled"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_a_damaged_memory_is_an_empty_one(damage: str, memory: Path) -> None:
    memory.write_text(damage)
    assert compiling._known(memory) == {}


def test_a_compiler_that_fails_is_told_once_and_the_run_goes_on_without(
    bench: Bench, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, heard, _ = bench

    def fail() -> None:
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(s.family, "compile_denoiser_", fail)
    assert not compiling.pays(s, 0)
    told = f"compiling failed (no such kernel); the run goes on without. Delete {memory} to have it tried again."
    assert heard.warnings == [told]
    assert not compiling.pays(s, 0)
    assert len(heard.warnings) == 1
    memory.unlink()
    assert not compiling.pays(s, 0)
    assert len(heard.warnings) == 2
    assert all(p.grad is None for p in s.parameters)


def test_a_compiler_that_changes_the_gradient_is_not_believed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    s, heard, _ = bench

    def break_() -> None:
        s.family.denoiser.conv_out.register_forward_hook(lambda *found: found[-1] * 2)

    monkeypatch.setattr(s.family, "compile_denoiser_", break_)
    assert not compiling.pays(s, 0)
    assert "compiling failed (it changes the gradient by " in heard.warnings[0]


def test_what_is_slower_compiled_runs_as_it_is(bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    s, heard, _ = bench

    def slow() -> None:
        s.family.denoiser.register_forward_pre_hook(lambda *_: vars(clock).update(now_s=clock.now_s + SLOWED_S))

    monkeypatch.setattr(s.family, "compile_denoiser_", slow)
    assert not compiling.pays(s, 0)
    assert heard.events["compiled"].endswith("; the run goes on without")
    assert not heard.warnings


def test_fp16_gradients_are_compared_though_the_run_s_own_scale_may_overflow(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train={"steps": 40, "compile": "trial"}, model={"precision": "fp16"})
    s = replace(session_of(config, monkeypatch), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60))
    passes, _ = compiling._passes(s, 0)
    _, gradient = compiling._round(s, passes, compiling._run_of(s))
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_every_shape_that_comes_soon_is_tried(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(data={"resolution": 48}, train={"steps": 9, "images_per_step": 2, "batch_size": 3})
    s = session_of(config, monkeypatch)
    passes, scale = compiling._passes(s, 0)
    everything = [rows for step in range(9) for rows in loop.micro_rows(s, step)]
    shapes = {(len(rows), *rows[0].item.shape) for rows in everything}
    assert {tuple(micro.batch.latents.shape) for micro in passes} == shapes
    assert len(passes) == len(shapes) > 1
    assert scale * len(passes) == pytest.approx(len(everything) / 9)


def opened(monkeypatch: pytest.MonkeyPatch, pays: Callable[..., bool]) -> None:
    monkeypatch.setattr(compiling, "_is_open", lambda _: True)
    monkeypatch.setattr(compiling, "pays", pays)


def test_on_a_cpu_nothing_is_tried(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "pays", None)
    trained(make_config(train={"compile": "trial"}))


def test_a_trial_changes_nothing_of_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tried, pays = trained(make_config(name="plain")), [], compiling.pays

    def try_(s: session.Session, start: int, **_: Any) -> bool:
        monkeypatch.setattr(s.family, "compile_denoiser_", lambda: tried.append(start))
        return pays(s, start)

    monkeypatch.setattr(compiling, "ASSUMED_S", 0.0)
    opened(monkeypatch, try_)
    after = trained(make_config(name="tried"))
    assert tried == [0]
    assert all(torch.equal(plain[name], after[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("is_faster", [True, False])
def test_blocks_run_compiled_only_where_that_pays(
    is_faster: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pays, counters = trained(make_config(name="plain")), compiling.pays, torch._dynamo.utils.counters
    found: list[int] = []

    def judge(s: session.Session, start: int, **_: Any) -> bool:
        pays(s, start)
        found.append(counters["stats"]["unique_graphs"])
        torch._dynamo.reset()  # so that running compiled would compile again
        counters.clear()
        return is_faster

    monkeypatch.setattr(compiling, "ASSUMED_S", 0.0)
    opened(monkeypatch, judge)
    assert_near(plain, trained(make_config(name="tried")), 1e-2)
    assert found[0] > 0
    assert (counters["stats"]["unique_graphs"] > 0) is is_faster


def test_compiling_without_a_compiler_says_what_to_do(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"neither g\+\+ nor clang\+\+ is installed; .* train.compile = false"):
        train.train(make_config(train={"compile": True}))


class Process:
    """One of two processes that share a sum: `others` is what the other one adds."""

    num_processes, process_index, device = 2, 0, torch.device("cpu")

    def __init__(self, is_main: bool, others: list[float]) -> None:
        self.is_main_process, self.others = is_main, others

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor + self.others.pop(0)


def test_of_several_processes_the_main_one_decides_by_its_clock(bench: Bench) -> None:
    s, _, compiled = bench
    for main_says in (True, False):  # this one, which is slow, would compile
        shared = replace(s, accelerator=Process(False, [1.0, 1.0, float(main_says), 0.0]))  # type: ignore[arg-type]
        assert compiling.pays(shared, 0) == main_says
        assert compiled.pop() == "compiled"
    assert not compiling.pays(replace(s, accelerator=Process(False, [0.0])), 0)  # type: ignore[arg-type]
    assert not compiled


def test_where_the_compiler_fails_in_one_process_none_goes_on_compiled(bench: Bench) -> None:
    s, _, _ = bench
    shared = replace(s, accelerator=Process(True, [0.0, 0.0, 0.0, 1.0]))  # type: ignore[arg-type]
    assert not compiling.pays(shared, 0)
