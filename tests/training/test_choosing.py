"""Which checkpoint at which strength a run exports, and that a run never loses anything over the choice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import delta
from lora_booth.errors import ConfigError, Interrupted, LoraBoothError
from lora_booth.evaluation import encoders, scores
from lora_booth.training import candidates, choosing, watching
from lora_booth.verbs import export, train
from tests.conftest import MakeConfig
from tests.support.runs import At, Recorder, assert_equal, session_of

BEST = {"choose": "best", "encoder": "miniature", "max_share": 100.0}
DRAWN = {"images_per_prompt": 0, "sampler": "ddim", "sampler_steps": 2, "guidance_scale": 1.0}


def best(make_config: MakeConfig, name: str = "run", **sections: Any) -> Any:
    sections = {"evaluate": BEST, "preview": DRAWN, **sections}
    return make_config(name=name, **sections)


def wanted(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], **sections: Any) -> Any:
    s = session_of(best(make_config, **sections), monkeypatch)
    return candidates.candidates(s.config, sorted(steps, reverse=True))


class TestCandidates:
    def test_the_last_at_full_strength_comes_first_and_farther_ones_later(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = wanted(make_config, monkeypatch, (1, 2, 4))
        assert found[:3] == [(4, 1.0), (2, 1.0), (4, 0.8)]
        assert sorted(found) == [(step, x) for step in (1, 2, 4) for x in (0.6, 0.8, 1.0)]

    @pytest.mark.parametrize(
        ("share", "steps", "guidance", "expected"),
        # Pictures of one candidate: 4 × 2 of the subject, 4 of its class, 4 unrelated: 16 times 2 steps of the solver.
        # 50 steps of 2 rows with gradients are 300 passes.
        [(0.5, 50, 1.0, 150 // 32 - 1), (0.5, 50, 7.0, 150 // 64 - 1), (0.2, 50, 1.0, 0), (0.1, 50, 1.0, 0)],
    )
    def test_as_many_as_the_share_allows_beside_the_base(
        self,
        share: float,
        steps: int,
        guidance: float,
        expected: int,
        make_config: MakeConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sections = {
            "evaluate": {**BEST, "max_share": share},
            "train": {"steps": steps},
            "preview": {**DRAWN, "guidance_scale": guidance},
        }
        assert len(wanted(make_config, monkeypatch, (25, 50), **sections)) == expected

    def test_dora_has_one_strength_and_averaging_optimizers_one_checkpoint(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert wanted(make_config, monkeypatch, (2, 4), adapter={"dora": True}) == [(4, 1.0), (2, 1.0)]
        pytest.importorskip("schedulefree")
        found = wanted(make_config, monkeypatch, (2, 4), name="averaged", optimizer={"name": "schedulefree"})
        assert {step for step, _ in found} == {4} and len(found) == 3


def test_the_chosen_one_is_exported_with_its_strength_in_the_tensors(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preview = {**DRAWN, "images_per_prompt": 1, "prompts": ["a {token} {class}"]}
    config, report = best(make_config, preview=preview), Recorder()
    monkeypatch.setattr(choosing, "candidates", lambda *_: [(4, 1.0), (2, 0.6)])
    honest = choosing.Bench.results
    second = lambda self, **words: tuple(  # noqa: E731
        type(found)(**{**vars(found), "best": 1, "reason": "because"}) for found in honest(self, **words)
    )
    monkeypatch.setattr(choosing.Bench, "results", second)
    summary = train.train(config, report=report)
    assert (summary.exported_step, summary.exported_strength, summary.reason) == (2, 0.6, "because")
    assert summary.scores.startswith("likeness ") and summary.scores.endswith("; by miniature")

    run = tmp_path / "run"
    exported, header = storage.read(run / "yql_dog.safetensors"), storage.read_metadata(run / "yql_dog.safetensors")
    assert (header["lora_booth.strength"], header["ss_steps"]) == ("0.6", "2")
    kept = export.export(file=run / "checkpoints" / "step-000002", out=tmp_path / "two", dtype="fp32")
    plain = storage.read(kept["kohya"])["unet"]
    assert len(plain) > 5
    for path, layer in exported["unet"].items():
        expected = 0.6 * delta(plain[path])
        assert torch.allclose(delta(layer), expected, atol=2e-3 * float(expected.abs().max()))
    again = export.export(file=run, out=tmp_path / "best", step="best")
    one, other = load_file(run / "yql_dog.safetensors"), load_file(again["kohya"])
    assert_equal(one, other)
    assert len(scores.read(run / "scores.json").encoders[0].candidates) == 2
    with Image.open(run / "scores.png") as picture:
        assert picture.width > 200


def test_what_is_chosen_is_what_the_rule_chooses_of_what_was_measured(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watching, "MAX_SHARE", 100.0)  # else four steps are too few for the drift at saves
    summary = train.train(best(make_config))
    (found,) = scores.read(tmp_path / "run" / "scores.json").encoders
    chosen = found.candidates[found.best]
    assert (chosen.step, chosen.strength) == (summary.exported_step, summary.exported_strength)
    assert {(c.step, c.strength) for c in found.candidates} == {(step, x) for step in (2, 4) for x in (0.6, 0.8, 1.0)}
    assert scores.read(tmp_path / "run" / "scores.json").is_in_sample
    drifts = {c.strength: c.metrics["prediction_drift"].mean for c in found.candidates if c.step == 4}
    assert 0 < drifts[0.6] < drifts[0.8] < drifts[1.0]
    full = [c for c in found.candidates if c.step == 4 and c.strength == 1]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert 0 < state["prediction_drift"] < 10 and len(full) == 1


def test_a_run_killed_while_it_chooses_ends_as_one_that_was_not(make_config: MakeConfig, tmp_path: Path) -> None:
    class AtPictures(Recorder):
        def progress(self, task: str, done: int, total: int, **values: Any) -> None:
            if task == "pictures":
                os.kill(os.getpid(), signal.SIGTERM)

    straight = train.train(best(make_config, "straight"))
    with pytest.raises(Interrupted, match="everything is saved"):
        train.train(best(make_config, "stopped"), report=AtPictures())
    assert not (tmp_path / "stopped" / "summary.json").exists()
    again = train.train(best(make_config, "stopped"))
    assert (again.exported_step, again.exported_strength) == (straight.exported_step, straight.exported_strength)
    name = "yql_dog.safetensors"
    assert_equal(load_file(tmp_path / "straight" / name), load_file(tmp_path / "stopped" / name))
    one, other = (scores.read(tmp_path / run / "scores.json") for run in ("straight", "stopped"))
    assert one.encoders[0].candidates == other.encoders[0].candidates


def test_the_choice_changes_nothing_of_what_was_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    train.train(best(make_config, "chosen"))
    train.train(make_config(name="last"))
    place = Path("checkpoints/step-000004/adapter.safetensors")
    assert_equal(load_file(tmp_path / "chosen" / place), load_file(tmp_path / "last" / place))
    assert not (tmp_path / "last" / "scores.json").exists()
    summary = json.loads((tmp_path / "last" / "summary.json").read_text())
    assert summary["exported_step"] is None and summary["scores"] == ""


def test_pictures_that_go_while_it_trains_are_no_reason_to_fail(
    make_config: MakeConfig, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "held"
    shutil.copytree(pictures, folder)
    config = best(make_config, subject={"held_out": folder})
    summary = train.train(config, report=At(2, lambda: shutil.rmtree(folder)))
    assert summary.exported_step is not None
    assert not scores.read(tmp_path / "run" / "scores.json").is_in_sample


def test_a_damaged_checkpoint_is_told_and_not_compared(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "step-000002" / "adapter.safetensors"
    report = Recorder()

    class Damaging(At):
        def warn(self, text: str) -> None:
            report.warn(text)

    train.train(best(make_config), report=Damaging(3, lambda: path.write_bytes(b"nothing")))
    (found,) = scores.read(tmp_path / "run" / "scores.json").encoders
    assert {candidate.step for candidate in found.candidates} == {4}
    assert any("step-000002 is damaged" in text and "not compared" in text for text in report.warnings)


@pytest.mark.parametrize("name", ["nowhere/at-all", "no_such_folder"])
def test_an_encoder_that_cannot_be_used_is_told_before_anything_is_trained(
    name: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(LoraBoothError, match=f"^evaluate.encoder .*{name.split('/')[-1]}"):
        train.train(best(make_config, evaluate={**BEST, "encoder": name}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_an_encoder_of_photographs_the_last_is_exported_and_that_is_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(base: str | None) -> Any:
        raise ConfigError("no encoder of photographs is here")

    monkeypatch.setattr(encoders, "default_names", none)
    report = Recorder()
    summary = train.train(best(make_config, evaluate={**BEST, "encoder": None}), report=report)
    assert summary.exported_step is None
    assert any("pip install lora-booth[likeness]" in text for kind, text in report.events if kind == "encoder")


def test_too_small_a_share_exports_the_last_and_says_so(make_config: MakeConfig) -> None:
    report = Recorder()
    summary = train.train(best(make_config, evaluate={**BEST, "max_share": 0.01}), report=report)
    assert summary.exported_step is None
    assert any("evaluate.max_share" in text for _, text in report.events)


def test_trained_text_encoders_read_the_prompts_of_each_candidate(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = best(make_config, adapter={"text_encoder": True}, evaluate={**BEST, "strengths": [1.0]})
    summary = train.train(config)
    assert summary.exported_step in (2, 4)
    (found,) = scores.read(tmp_path / "run" / "scores.json").encoders
    assert all(c.metrics["prediction_drift"].mean > 0 for c in found.candidates)


def test_a_strength_is_put_into_the_adapter_of_the_denoiser(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(best(make_config), monkeypatch)
    for parameter in s.parameters:
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    full, state = inject.collect(s.adapted)["unet"], inject.state(s.adapted)
    choosing._put_(s, state, 0.5)
    half = inject.collect(s.adapted)["unet"]
    assert all(torch.allclose(delta(half[path]), 0.5 * delta(layer), atol=1e-6) for path, layer in full.items())
