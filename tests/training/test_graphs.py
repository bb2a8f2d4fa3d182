"""Steps that are recorded once and started as one compute what steps do that are run operation by operation."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lora_booth.errors import ConfigError, Interrupted
from lora_booth.training import compiling, graphs, loop, session
from lora_booth.training.graphs import Graphs
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import tape
from tests.support.runs import At, Recorder, assert_equal, session_of, trained

CAPTIONS = ("a cat", "a house", "a tree")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {"prior": {"mode": "model", "captions": CAPTIONS}}),
    ("sd2", {"prior": {"mode": "images"}, "objective": {"noise_offset": 0.05, "min_snr_gamma": 5.0}}),
    ("sdxl", {"prior": {"mode": "model", "captions": CAPTIONS}, "objective": {"dco_beta": 10.0}}),
    ("sdxl", {"model": {"precision": "bf16"}, "prior": {"mode": "weights", "norm_weight": 1e-3}}),
]
STEPS = {"steps": 6, "save_every_steps": 4, "images_per_step": 2, "batch_size": 2, "gradient_checkpointing": 0}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """The graphs that runs are made with from now on, recorded on tapes."""
    made: list[Graphs] = []

    def make(s: session.Session, scale: Any = None) -> Graphs:
        made.append(Graphs(s, scale, tape.record))
        return made[-1]

    monkeypatch.setattr(compiling, "Graphs", make)
    monkeypatch.setattr(graphs, "why_not", lambda _: None)
    return made


def graphed(make_config: MakeConfig, family: str, name: str, **sections: Any) -> Any:
    """A run on a CPU, where `train.compile` = "graph" is refused, that asks for it all the same."""
    train_section = STEPS | sections.pop("train", {})
    return make_config(family, name=name, train=train_section, data={"resolution": 48}, **sections)


@pytest.mark.parametrize(("family", "sections"), CASES)
def test_a_recorded_run_computes_the_same_bits(
    family: str,
    sections: dict[str, Any],
    make_config: MakeConfig,
    recorded: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = trained(graphed(make_config, family, "plain", **sections))
    replays = counted(monkeypatch)
    monkeypatch.setattr(compiling, "_records", lambda *_: True)
    assert_equal(trained(graphed(make_config, family, "graphed", **sections)), plain)
    assert len(replays) > 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every replay of a tape."""
    replays: list[int] = []
    honest = tape.Tape.replay
    monkeypatch.setattr(tape.Tape, "replay", lambda self: (replays.append(1), honest(self))[1])
    return replays


def test_a_stopped_run_goes_on_by_graphs_to_the_same_bytes(
    make_config: MakeConfig, recorded: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trained(graphed(make_config, "sd1", "straight"))
    monkeypatch.setattr(compiling, "_records", lambda *_: True)
    config = graphed(make_config, "sd1", "stopped")
    with pytest.raises(Interrupted):
        train.train(config, report=At(3, partial(os.kill, os.getpid(), signal.SIGTERM)))
    assert_equal(trained(config), straight)


def test_the_first_of_a_shape_is_run_as_it_is_and_graphs_are_forgotten_before_a_save(
    make_config: MakeConfig, recorded: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(graphed(make_config, "sd1", "run"), monkeypatch)
    session.set_training_(s, True)
    run, replays = Graphs(s, None, tape.record), counted(monkeypatch)
    counts = []
    for step in range(3):
        for rows in loop.micro_rows(s, step):
            run(loop.micro_step(s, rows[:1], step))
        counts.append((run.count, len(replays)))
    assert counts[0][0] <= counts[1][0] and counts[-1][0] >= 1 and len(replays) >= 1
    run.forget()
    assert run.count == 0
    before = len(replays)
    run(loop.micro_step(s, s.prepared.order.at(0)[:1], 0))
    assert run.count == 1 and len(replays) == before + 1, "a known shape is recorded again at once"


def test_a_shape_too_many_and_another_one_are_run_as_they_are(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(graphed(make_config, "sd1", "run"), monkeypatch)
    session.set_training_(s, True)
    monkeypatch.setattr(graphs, "MAX_SHAPES", 1)
    run, rows = Graphs(s, None, tape.record), s.prepared.order.at(0)
    for step in range(3):
        for count in (1, 2):
            expected = loop.run_pass(s, loop.micro_step(s, rows[:count], step))
            plain = gradient(s)
            assert torch.equal(run(loop.micro_step(s, rows[:count], step)), expected)
            assert torch.equal(gradient(s), plain)
    assert run.count == 1


def gradient(s: session.Session) -> torch.Tensor:
    """The gradient that was gathered; it is gone afterwards."""
    found = torch.cat([g.reshape(-1) for flat in s.trained for _, g in flat.gradients()])
    s.optimizer.zero_grad(set_to_none=True)
    return found


def test_what_cannot_be_recorded_is_told_once_and_the_run_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(graphed(make_config, "sd1", "plain"))

    def refuse(run: Any) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(compiling, "Graphs", lambda s, scale=None: Graphs(s, scale, refuse))
    monkeypatch.setattr(compiling, "_records", lambda *_: True)
    heard = Recorder()
    assert_equal(trained(graphed(make_config, "sd1", "refused"), heard), plain)
    told = [warning for warning in heard.warnings if "recorded as a graph" in warning]
    assert told == [
        "a step could not be recorded as a graph (operation not permitted when stream is capturing); the run goes on "
        "without."
    ]


def test_a_step_that_asks_for_a_number_is_found_out(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    s = session_of(graphed(make_config, "sd1", "run"), monkeypatch)
    honest = loop.losses_of

    def asking(s: session.Session, micro: loop.MicroStep) -> torch.Tensor:
        losses = honest(s, micro)
        return losses * (1.0 if float(losses.detach().sum()) > 0 else 2.0)

    monkeypatch.setattr(loop, "losses_of", asking)
    run, micro = Graphs(s, None, tape.record), loop.micro_step(s, s.prepared.order.at(0)[:1], 0)
    run(micro)
    run(micro)
    assert run.count == 0


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({}, "the device has none"),
        ({"adapter": {"text_encoder": True}}, "text encoders are trained"),
        ({"adapter": {"dropout": 0.1}}, "dropout draws other numbers"),
        ({"train": {"gradient_checkpointing": 1}}, "asks for the random state"),
    ],
)
def test_why_steps_cannot_be_recorded_is_told(
    sections: dict[str, Any], reason: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(graphed(make_config, "sd1", "run", **sections), monkeypatch)
    if sections:
        monkeypatch.setattr(graphs.devices, "lacks", lambda _: {})
    found = graphs.why_not(s)
    assert found is not None and reason in found


class Trial:
    """A session whose recorded rounds take `recorded_s` and all others 1 s, by a clock that only they move."""

    def __init__(self, s: session.Session, recorded_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard, self.now_s = Recorder(), 0.0
        self.s = replace(s, report=self.heard, config=s.config.with_values({"train": {"compile": "trial"}}))
        monkeypatch.setattr(compiling, "time", self)
        honest_pass, honest_replay = loop.run_pass, tape.Tape.replay

        def run_pass(*words: Any, **named: Any) -> torch.Tensor:
            self.now_s += 1.0
            return honest_pass(*words, **named)

        def replay(recording: tape.Tape) -> None:
            self.now_s += recorded_s
            honest_replay(recording)

        monkeypatch.setattr(loop, "run_pass", run_pass)
        monkeypatch.setattr(tape.Tape, "replay", replay)

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("recorded_s", "steps", "expected"), [(0.5, 40, True), (1.5, 40, False), (0.5, 39, False)])
def test_steps_are_recorded_where_that_is_faster_and_the_run_long_enough(
    recorded_s: float, steps: int, expected: bool, make_config: MakeConfig, recorded: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = graphed(make_config, "sd1", "run", train={"steps": steps})
    trial = Trial(session_of(config, monkeypatch), recorded_s, monkeypatch)
    assert compiling._records(trial.s, 0) == expected
    told = dict(trial.heard.events).get("recorded", "")
    assert told.startswith(f"recorded as a graph a step takes {recorded_s:.0%}") == (steps >= 40)
    assert all(flat.vector.grad is None for flat in trial.s.trained), "nothing of the trial stays"


def test_graphs_that_change_the_gradient_are_not_believed(
    make_config: MakeConfig, recorded: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = graphed(make_config, "sd1", "run", train={"steps": 40})
    trial = Trial(session_of(config, monkeypatch), 0.1, monkeypatch)
    honest = Graphs._recorded

    def wrong(self: Graphs, micro: loop.MicroStep) -> Any:
        graph = honest(self, micro)
        for gradients in graph.gradients:
            for one in gradients:
                if one is not None:
                    one.requires_grad_(False)
        replay = graph.replay

        def spoilt() -> None:
            replay()
            for gradients in graph.gradients:
                for one in gradients:
                    if one is not None:
                        one.mul_(2)

        return graphs._Graph(graph.inputs, graph.losses, graph.gradients, spoilt)

    monkeypatch.setattr(Graphs, "_recorded", wrong)
    assert not compiling._records(trial.s, 0)


def test_a_wish_for_graphs_that_cannot_be_is_told(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    s, heard = session_of(make_config("sd1"), monkeypatch), Recorder()
    s = replace(s, report=heard, config=s.config.with_values({"train": {"compile": "graph"}}))
    assert not compiling._records(s, 0)
    assert heard.warnings == [
        'train.compile is "graph", but the device has none (it starts operations itself); the run goes on without.'
    ]


def test_a_device_without_graphs_refuses_them_before_a_run(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile is \"graph\", which the CPU cannot do"):
        train.train(make_config("sd1", train={"steps": 2, "compile": "graph"}))
