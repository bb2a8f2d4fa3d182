"""`evaluate` from end to end: on a run of a tiny base, on files of the miniature, on photographs, and on bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.config.config import Config
from lora_booth.config.settings import AdapterConfig, ModelConfig
from lora_booth.errors import ConfigError, DataError, DiskError, Interrupted, LoraBoothError, ModelError
from lora_booth.evaluation import scores
from lora_booth.models import loading
from lora_booth.models.bases.sources import EMBEDDED
from lora_booth.verbs import dreambench, train
from lora_booth.verbs.evaluate import Method, evaluate
from lora_booth.verbs.evaluated import Asked
from tests.cli.test_app import in_process
from tests.evaluation.towers import tiny_clip
from tests.support.adapted import adapter_file, randomise_
from tests.support.runs import Recorder
from tests.support.tiny import tiny_pictures

MASCOT = EMBEDDED.parent / "mascot"
FAST = {"sampler": "ddim", "sampler_steps": 2}
PROMPTS = "a {token} {class}\na {token} {class} on the beach\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], pictures: Path, shared_cache: Path) -> Path:
    """A finished run of four steps on a tiny base, with two kept checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "dog"
    values: dict[str, Any] = {
        "model": {"base": str(bases["ends"])},
        "subject": {"images": pictures, "class_noun": "dog"},
        "data": {"resolution": 32, "bucket_step": 16},
        "prior": {"mode": "images", "num_images": 3, "sampler_steps": 2, "sampler": "ddim"},
        "adapter": {"rank": 2},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 4, "save_every_steps": 2},
        "preview": {"images_per_prompt": 1, "sampler": "ddim", "sampler_steps": 2},
        "run": {"folder": folder, "cache": shared_cache},
    }
    train.train(Config.model_validate(values))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("towers") / "clip"))


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


def test_a_run_is_measured_at_every_kept_step_and_strength_from_the_command_line(
    run: Path, clip: str, prompt_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words = ["evaluate", str(run), "--encoder", clip, "--encoder", "miniature", "--prompts", str(prompt_file)]
    code, text, message = in_process([*words, "--strengths", "0.5,1,0", "--out", str(out)], capsys, monkeypatch)
    assert (code, message) == (0, ""), text
    found = scores.read(out / "scores.json")
    assert [(c.step, c.strength) for c in found.encoders[0].candidates] == [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0)]
    assert found.is_in_sample and "in-sample" in text and "best: step" in text
    wanted = {"subject_fidelity", "preservation", "leak", "diversity", "drift", "subject_change", "prediction_drift"}
    for each in found.encoders:
        for candidate in each.candidates:
            assert wanted | {"prompt_fidelity"} <= set(candidate.metrics)
            assert candidate.metrics["prediction_drift"].mean > 0
        by_strength = [c.metrics["prediction_drift"].mean for c in each.candidates]
        assert by_strength[0] < by_strength[1] and by_strength[2] < by_strength[3]
    with Image.open(out / "scores.png") as picture:
        assert picture.width > 4 * 192
    assert {path.name for path in out.iterdir()} == {"scores.json", "scores.png"}
    assert str(tmp_path) not in (out / "scores.json").read_text()
    first = (out / "scores.json").read_bytes()
    code, text, _ = in_process(
        [*words, "--strengths", "0.5,1", "--out", str(out), "--compare", str(out), "--json"], capsys, monkeypatch
    )
    assert code == 0 and (out / "scores.json").read_bytes() == first, "the same command gives the same bytes"
    kinds = [json.loads(line)["kind"] for line in text.splitlines()]
    assert {"pictures", "progress", "scores", "best", "files", "compared"} <= set(kinds)


def test_a_checkpoint_alone_and_held_out_pictures_are_taken(
    run: Path, clip: str, prompt_file: Path, tmp_path: Path
) -> None:
    tiny_pictures(tmp_path / "unseen", 3, sizes=[(50, 50)])
    trained = tiny_pictures(tmp_path / "trained", 1)[0]  # as the run's own, byte for byte
    shutil.copy(trained, tmp_path / "unseen" / "trained_on.png")
    found = evaluate(
        run / "checkpoints" / "step-000002",
        Asked(subject=tmp_path / "unseen", out=tmp_path / "out"),
        Method(encoder_names=[clip], prompt_file=prompt_file, strengths=[1.0], per_prompt=1),
    )
    assert [c.step for c in found.encoders[0].candidates] == [2] and not found.is_in_sample
    assert len(found.real) == 3 and "trained_on.png" not in found.real
    assert "diversity" not in found.encoders[0].candidates[0].metrics


def miniature_adapter(path: Path, std: float) -> Path:
    """An adapter of random numbers on the miniature, with the header of none of our runs."""
    family = loading.load(ModelConfig(base="booth-mini"), device="cpu", dtype=torch.float32)
    modules = {"unet": family.denoiser}
    inject.inject_(modules, AdapterConfig(rank=4), seed=0)
    randomise_(modules, std=std)
    storage.FORMATS["kohya"].write(path, inject.collect(modules), "sd1", torch.float32, {})
    return path


def test_a_broken_adapter_of_the_miniature_loses_likeness_and_prompts_and_drifts(tmp_path: Path) -> None:
    files = {std: miniature_adapter(tmp_path / f"{std}.safetensors", std) for std in (0.001, 0.25)}
    report = Recorder()
    found = {}
    for std, file in files.items():
        asked = Asked(base="booth-mini", token="emo", class_noun="dog", subject=MASCOT / "held_out")
        method = Method(
            strengths=[1.0], per_prompt=1, wishes={"sampler": "dpm++", "sampler_steps": 6, "guidance_scale": 3.0}
        )
        result = evaluate(file, asked, method, report)
        found[std] = {name: value.mean for name, value in result.encoders[0].candidates[0].metrics.items()}
    whole, broken = found[0.001], found[0.25]
    assert broken["prompt_fidelity"] < whole["prompt_fidelity"] - 0.05
    assert broken["drift"] > whole["drift"] + 0.3 and broken["prediction_drift"] > 10 * whole["prediction_drift"]
    assert any("forgot too much" in warning for warning in report.warnings)
    assert (tmp_path / "0.001_scores" / "scores.json").is_file()


def test_photographs_are_judged_among_themselves(tmp_path: Path, clip: str) -> None:
    bench = made_bench(tmp_path / "bench")
    report = Recorder()
    dreambench.walk(bench, None, Asked(), Method(encoder_names=[clip]), report)
    told = " ".join(text for _, text in report.events)
    assert "2 subjects, 6 pictures" in told and "nearest neighbour" in told and "AUC" in told


def made_bench(folder: Path) -> Path:
    """The layout of google/dreambooth, with pictures of ours."""
    for number, subject in enumerate(("dog6", "can")):
        tiny_pictures(folder / "dataset" / subject, 3, sizes=[(40 + 8 * number, 40)])
    line = "'a {{0}} {{1}} {}'.format(unique_token, class_token),\n"
    lists = [("Object", "on the beach"), ("Live Subject", "in a hat")]
    text = "Classes\n\nsubject_name,class\ndog6,dog\ncan,can\nvase,vase\n\nPrompts\n\n"
    for kind, words in lists:
        text += f"{kind} Prompts\n\nprompt_list = [\n{line.format(words)}]\n\n"
    (folder / "dataset" / "prompts_and_classes.txt").write_text(text)
    return folder


def test_runs_named_like_subjects_are_judged_on_their_prompts(run: Path, tmp_path: Path, clip: str) -> None:
    bench, runs, report = made_bench(tmp_path / "bench"), tmp_path / "runs", Recorder()
    shutil.copytree(run, runs / "dog6")
    method = Method(encoder_names=[clip], strengths=[1.0], per_prompt=1)
    dreambench.walk(bench, runs, Asked(step="last"), method, report)
    found = scores.read(runs / "dog6" / "scores.json")
    assert found.class_noun == "dog" and found.drawing["templates"] == ["a {token} dog in a hat"]
    assert any(kind == "summary" and "1 subjects" in text for kind, text in report.events)
    assert dreambench.read(bench).templates("can") == ("a {token} {class} on the beach",)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("", "lists no classes"), ("Classes\n\ndog6,dog\n", "no prompts of both kinds")],
)
def test_a_folder_that_is_no_data_set_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "prompts_and_classes.txt").write_text(content)
    with pytest.raises(DataError, match=said):
        dreambench.walk(tmp_path, None, Asked(), Method(), Recorder())


Case = Callable[[Path, Path], tuple[Path, Asked, Method]]
BAD: dict[str, tuple[Case, type[LoraBoothError]]] = {
    "cannot be read: it is missing": (lambda run, tmp: (tmp / "nowhere", Asked(), Method()), ModelError),
    "is no run folder": (lambda run, tmp: (tmp, Asked(), Method()), ConfigError),
    "keeps the steps 2, 4": (lambda run, tmp: (run, Asked(step="7"), Method()), ConfigError),
    "no folder": (lambda run, tmp: (run, Asked(subject=tmp / "none"), Method()), DataError),
    "no usable picture": (lambda run, tmp: (run, Asked(subject=_words(tmp)), Method()), DataError),
    "names none but 0": (lambda run, tmp: (run, Asked(), Method(strengths=[0.0])), ConfigError),
    "a strength is nan": (lambda run, tmp: (run, Asked(), Method(strengths=[float("nan")])), ConfigError),
    "--pictures is 0": (lambda run, tmp: (run, Asked(), Method(per_prompt=0)), ConfigError),
    "--sampler": (lambda run, tmp: (run, Asked(), Method(wishes={"sampler": "magic"})), ConfigError),
    "--steps is 0": (lambda run, tmp: (run, Asked(), Method(wishes={"sampler_steps": 0})), ConfigError),
    "is no folder here and no hub id": (lambda run, tmp: (run, Asked(), Method(encoder_names=["x"])), ModelError),
    "no config.json": (lambda run, tmp: (run, Asked(), Method(encoder_names=[str(tmp)])), ModelError),
    "not a multiple": (lambda run, tmp: (run, Asked(), Method(wishes={"size_px": (33, 32)})), ConfigError),
    "scores.json cannot be read": (lambda run, tmp: (run, Asked(), Method(compare=tmp)), DataError),
    "--device": (lambda run, tmp: (run, Asked(), Method(device="quantum")), ConfigError),
    "prompts.txt": (lambda run, tmp: (run, Asked(), Method(prompt_file=tmp / "prompts.txt")), ConfigError),
    "does not tell --base and --token": (lambda run, tmp: (_file(tmp), Asked(class_noun="dog"), Method()), ConfigError),
    "is a file; choose another --out": (lambda run, tmp: (run, Asked(out=_file(tmp)), Method()), DiskError),
    "chooses a checkpoint": (lambda run, tmp: (_file(tmp), Asked(step="2"), Method()), ConfigError),
}  # fmt: skip


def _words(tmp: Path) -> Path:
    (tmp / "words").mkdir()
    (tmp / "words" / "cat.png").write_text("no picture")
    return tmp / "words"


def _file(tmp: Path) -> Path:
    return adapter_file(tmp / "a.safetensors", 0)


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_told_before_a_picture_is_drawn(
    said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(loading, "load", refuse)
    case, error = BAD[said]
    path, asked, method = case(run, tmp_path)
    with pytest.raises(error, match=said):
        evaluate(path, asked, method)


def test_an_adapter_of_another_base_is_refused_before_a_picture_is_drawn(
    tmp_path: Path, bases: dict[str, Path], clip: str
) -> None:
    report = Recorder()
    asked = Asked(base=str(bases["sdxl"]), token="yql", class_noun="dog")
    with pytest.raises(ModelError, match="does not fit the base"):
        evaluate(_file(tmp_path), asked, Method(encoder_names=[clip], wishes=FAST), report)
    assert "pictures" not in report.tasks and not (tmp_path / "a_scores").exists()


def test_without_pictures_of_the_subject_drift_is_measured_alone(
    tmp_path: Path, bases: dict[str, Path], clip: str, prompt_file: Path
) -> None:
    report = Recorder()
    asked = Asked(base=str(bases["sd1"]), token="yql", class_noun="dog")
    method = Method(encoder_names=[clip], prompt_file=prompt_file, strengths=[1.0], wishes=FAST)
    found = evaluate(_file(tmp_path), asked, method, report)
    metrics = found.encoders[0].candidates[0].metrics
    assert "subject_fidelity" not in metrics and metrics["drift"].mean >= 0 and found.real == {}
    assert any("without --subject" in warning for warning in report.warnings)
    assert "step" not in found.encoders[0].reason


class Signals(Recorder):
    """Asks this process to stop when the base's pictures are drawn."""

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_middle_stops_and_leaves_nothing_and_the_same_again_finishes(
    run: Path, clip: str, prompt_file: Path, tmp_path: Path
) -> None:
    asked, method = Asked(out=tmp_path / "out"), Method(encoder_names=[clip], prompt_file=prompt_file, strengths=[1.0])
    with pytest.raises(Interrupted, match="nothing was written"):
        evaluate(run, asked, method, Signals())
    assert not (tmp_path / "out").exists()
    evaluate(run, asked, method)
    assert scores.read(tmp_path / "out" / "scores.json").name == "yql_dog"


def test_scores_of_another_encoder_are_not_compared(run: Path, clip: str, prompt_file: Path, tmp_path: Path) -> None:
    method = {"prompt_file": prompt_file, "strengths": [1.0], "per_prompt": 1}
    evaluate(run, Asked(out=tmp_path / "a", step="last"), Method(encoder_names=[clip], **method))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="different encoders"):
        evaluate(
            run,
            Asked(out=tmp_path / "b", step="last"),
            Method(encoder_names=["miniature"], compare=tmp_path / "a", **method),  # type: ignore[arg-type]
        )
