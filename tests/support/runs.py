"""Whole runs in tests: what one gives, what it tells, where it is stopped, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_booth.config.config import Config
from lora_booth.run.report import Silent
from lora_booth.training import loop, session
from lora_booth.verbs import train


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.tasks: dict[str, int] = {}

    def event(self, kind: str, text: str, **values: Any) -> None:
        self.events.append((kind, text))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        self.tasks[task] = done


def trained(config: Config, report: Any = None) -> dict[str, torch.Tensor]:
    """The adapter, exactly, after a whole run of `config`."""
    train.train(config, report=report)
    return adapter_of(config)


def adapter_of(config: Config) -> dict[str, torch.Tensor]:
    """The adapter of the newest checkpoint of the run of `config`, exactly."""
    newest = max((config.folder / "checkpoints").iterdir())
    return load_file(newest / "adapter.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 0
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal up to rounding: differences are small against how far training moved the adapter."""
    assert one.keys() == other.keys() and len(one) > 0
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert worst < tolerance, worst


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class At(Silent):
    """Calls `action` when training has come to `step`."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        if task == "train" and done == self.step:
            self.action()


def session_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> session.Session:
    """The session that `train` makes of `config`, before its first step."""
    caught = []

    def catch(session: session.Session, start: int, *_: Any) -> None:
        caught.append(session)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimize", catch)
        with suppress(KeyboardInterrupt):
            train.train(config)
    return caught[0]
