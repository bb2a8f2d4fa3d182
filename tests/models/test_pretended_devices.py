"""Whole runs on devices that are pretended: nothing mixes devices, and the numbers are those of the CPU."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from lora_booth.errors import Interrupted
from lora_booth.models import devices
from lora_booth.run.report import Silent
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import pretend
from tests.support.runs import At, assert_near, trained

ONE_PICTURE = {"images_per_prompt": 1, "prompts": ["a {token} {class}"], "sampler_steps": 1}
FEW = {"steps": 2, "save_every_steps": 1}


class Each(Silent):
    """Calls `look` after every step that is told."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        if task == "train":
            self.look()


OPENED: list[list[str]] = []


@contextmanager
def opening() -> Iterator[list[str]]:
    """The files that are opened inside; Python never forgets who listens, so one listener serves for all."""
    if not OPENED:
        sys.addaudithook(lambda name, words: OPENED[-1].append(str(words[0])) if name == "open" else None)
    OPENED.append([])
    try:
        yield OPENED[-1]
    finally:
        OPENED.append([])


def forget_device() -> None:
    """accelerate keeps its device for the whole process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _own_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_device()
    monkeypatch.setattr(devices, "free_gib", lambda _: None)  # else memory is predicted, which other tests do
    monkeypatch.setattr(devices, "OFFLOADED_BYTES", 1)  # all tensors are small here
    yield
    forget_device()


@pytest.mark.parametrize(
    ("name", "family", "sections"),
    [
        ("mps", "sdxl", {"adapter": {"rank": 2, "text_encoder": True}, "train": FEW}),
        ("xpu", "sd2", {"adapter": {"rank": 2, "dora": True}, "train": FEW | {"gradient_checkpointing": True}}),
        (
            "cuda",
            "ends",
            {
                "memory": {"offload_denoiser": True, "offload_activations": True},
                "train": FEW | {"gradient_checkpointing": 0.5},
            },
        ),
    ],
)
def test_a_run_that_is_stopped_and_continued_mixes_no_devices_and_makes_the_numbers_of_the_cpu(
    name: str, family: str, sections: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(key: str, device: str) -> Any:
        own = {"run": {"folder": tmp_path / key, "cache": tmp_path / f"{key} cache"}, "preview": ONE_PICTURE}
        alike = {"model": {"precision": "fp32"}, "optimizer": {"name": "adamw"}, "memory": {"device": device}}
        return make_config(family, **sections, **own).with_values(alike)

    with pretend.device(name) as operations:
        with pytest.raises(Interrupted):
            train.train(config(name, name), report=At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        on_device = trained(config(name, name))
    assert operations.count > 1000, "nothing was computed on the device"
    forget_device()
    # Not equal bit for bit: copies lie elsewhere in memory, and diffusers makes some numbers float32 for MPS.
    assert_near(on_device, trained(config("cpu", "cpu")), 1e-3)


@pytest.mark.parametrize(("name", "quantize"), [("cuda", "nf4"), ("mps", "nf4"), ("xpu", "none")])
def test_what_is_chosen_for_a_device_runs_on_it(
    name: str, quantize: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "xpu":  # without it no 8-bit Adam runs there, which builds of torch for other devices bring along
        monkeypatch.setattr(devices, "find_spec", lambda _: None)
    own = {"folder": tmp_path / "run", "cache": tmp_path / "cache"}
    config = make_config(train={"steps": 1}, run=own, prior={"loss_weight": 0}, preview={"images_per_prompt": 0})
    with pretend.device(name):
        adapter = trained(config.with_values({"model": {"quantize": quantize}}))
    chosen = (tmp_path / "run" / "config.toml").read_text()
    assert 'precision = "bf16"' in chosen and f'name = "{"adamw8bit" if name == "cuda" else "adamw"}"' in chosen
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any(tensor.abs().max() > 0 for key, tensor in adapter.items() if "lora_B" in key)


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_a_pretended_device_refuses_what_a_real_one_would(name: str) -> None:
    with pretend.device(name):
        here = torch.ones(2, device=name)
        assert here.device == torch.device(name, 0) == (here * torch.tensor(2.0)).device
        assert here.cpu().device == torch.device("cpu") and here.cpu().tolist() == [1, 1]
        wrongs: list[Callable[[], Any]] = [
            lambda: here + torch.ones(2),
            lambda: here[torch.zeros(1, dtype=torch.long)],
            here.numpy,
            lambda: torch.ones(2).to(name, non_blocking=True),
            lambda: torch.randn(2, device=name, generator=torch.Generator()),
        ]
        if name == "mps":
            wrongs += [lambda: torch.ones(2, dtype=torch.float64).to(name), lambda: torch.ones(2).pin_memory()]
        for wrong in wrongs:
            with pytest.raises(pretend.Mixed):
                wrong()


def test_the_host_never_makes_the_device_wait_between_steps(make_config: MakeConfig, tmp_path: Path) -> None:
    steps = 8
    config = make_config(
        "sdxl",
        train={"steps": steps, "save_every_steps": steps},
        prior={"mode": "model"},
        run={"folder": tmp_path / "run", "cache": tmp_path / "cache"},
        preview={"images_per_prompt": 0},
    ).with_values({"model": {"precision": "fp32"}, "optimizer": {"name": "adamw"}, "memory": {"device": "cuda"}})
    marks: list[tuple[int, int]] = []
    with pretend.device("cuda") as operations:
        look = Each(lambda: marks.append((len(operations.waits), len(opened))))
        with opening() as opened:
            train.train(config, report=look)
    events = operations.events.seen
    assert events[:4] == [("recorded", 1), ("waited for", 1), ("recorded", 2), ("recorded", 3)]
    late = [("waited for", number) for number in range(2, steps + 1)]
    assert [event for event in events if event[0] == "waited for"][1:] == late
    for number in range(2, steps):
        assert events.index(("recorded", number + 1)) < events.index(("waited for", number))
    waits, files = zip(*marks[1 : steps - 1], strict=True)
    # One is pretending's own: clipping asks, in C++, where gradients really lie, and moves its factor there.
    assert operations.waits[waits[0] : waits[-1]] == ["a copy to main memory"] * (waits[-1] - waits[0])
    assert {later - sooner for sooner, later in pairwise(waits)} == {1}
    assert set(opened[files[0] : files[-1]]) <= {str(tmp_path / "run" / "metrics.jsonl")}
