"""The command line as a user meets it: real processes, messages and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_booth.cli import app
from lora_booth.config import names
from lora_booth.errors import LoraBoothError
from lora_booth.run.interrupts import SIGNALS
from tests.support import tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def lora_booth(*words: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_booth", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=300, check=False
    )


def in_process(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that needs no process of its own."""
    monkeypatch.setattr(sys, "argv", ["lora-booth", *words])
    code = 0
    try:
        app.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def processor_seconds_of_children() -> float:
    """Of all processes that this one has waited for; a busy machine does not change it."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_lack_of_memory_anywhere_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**_: object) -> None:
        try:
            torch.empty(1 << 60, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError("Unable to load weights") from error  # as diffusers does

    monkeypatch.setattr(app, "app", load)
    code, _, told = in_process([], capsys, monkeypatch)
    assert code == 5
    assert told.startswith("lora-booth: there is not enough memory (Unable to load weights); close other programs")


@pytest.fixture
def short(bases: dict[str, Path], pictures: Path, shared_cache: Path) -> list[str]:
    """A run of a second or two."""
    settings = {
        "data.resolution": 32,
        "data.bucket_step": 16,
        "prior.mode": "images",
        "prior.num_images": 2,
        "prior.sampler_steps": 2,
        "train.steps": 3,
        "train.save_every_steps": 1,
        "preview.images_per_prompt": 1,
        "preview.sampler_steps": 2,
        "evaluate.choose": "last",
        "run.cache": shared_cache,
    }
    words = ["--subject", pictures, "--class-noun", "dog", "--base", bases["sd1"]]
    return [*map(str, words), *(f"{key}={value}" for key, value in settings.items())]


def test_help_answers_without_torch_and_in_well_under_a_second() -> None:
    began = processor_seconds_of_children()
    done = lora_booth("--help")
    assert done.returncode == 0
    assert processor_seconds_of_children() - began < 1.5  # 0.3 measured
    assert all(verb in done.stdout for verb in ("demo", "train", "plan", "generate", "config"))
    check = (
        "import sys, lora_booth.cli.app\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'rich.progress')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["train"], 2, "model.base is missing"),
        (["train", "--base", "sd15", "--subject", "."], 2, "subject.class_noun is missing"),
        (["train", "no.toml"], 2, "no.toml cannot be read: it is missing"),
        (["train", "a.toml", "b.toml"], 2, "only one config file"),
        (["train", "--bse", "sd15"], 2, "--bse"),
        (["trian"], 2, "trian"),
        (["train", "--subject", "nowhere", "--class-noun", "dog", "--base", "sd15"], 3, "nowhere"),
        (["generate", "--base", "no/such/folder", "--prompt", "x"], 4, "no/such/folder"),
        (["generate", "--base", "sd15", "--prompt", "x", "--strengths", "a,b"], 2, "is not a list of numbers"),
        (["generate", "--base", "sd15", "--prompt", "x", "--size", "big"], 2, "is not a size"),
        (["generate", "--base", "", "--prompt", "x"], 2, "--base is empty; name a base: booth-mini"),
        (
            ["generate", "--base", "sd15", "--prompt", "x", "--strengths", "1,nan"],
            2,
            "a strength is nan; give a number",
        ),
        (["generate", "--base", "sd15", "--prompt", "x", "--adapter", "a:inf"], 2, "a strength is inf"),
        (["generate", "--base", "sd15", "--prompt", "x", "--steps", "0"], 2, "--steps is 0; give a number from 1"),
        (["generate", "--base", "sd15", "--prompt", "x", "--guidance", "nan"], 2, "--guidance is nan"),
        (["generate", "--base", "sd15", "--prompt", "x", "--seed", "-1"], 2, "--seed is -1"),
        (["generate", "--base", "sd15", "--prompt", "x", "--device", "tpu"], 2, '--device is "tpu", but torch finds'),
        (["generate", "--base", "sd15", "--prompt", "x", "--vram", "0"], 2, "--vram is 0"),
        (["generate", "--base", "sd15", "--prompt", "x", "--at-once", "0"], 2, "--at-once is 0"),
        (["generate", "--base", "sd15", "--prompt", "x", "--sampler", "k"], 2, '--sampler "k" is unknown; use dpm++'),
        (["config", "model.base=x", "preview.prompts=[]"], 2, "preview.prompts is empty"),
        (["config", "model.base=x", "train.steps=" + "9" * 5000], 2, "train.steps is"),
        (
            ["config", "model.base=x", "train.steps=0x" + "f" * 5000],
            2,
            "train.steps is a number of thousands of digits",
        ),
        (["config", "model.base=x", f"preview.prompts=['{'x' * 5000}'", "a" * 5000], 2, "File name too long"),
        (["config", 'subject.token="\\u0000"'], 2, 'subject.token "\\x00" holds a NUL character'),
        (["generate", "--base", "sd15", "--prompt", "\udcff"], 2, '--prompt "\\udcff" is not UTF-8'),
        (["generate", "--base=\udcff", "--prompt", "x"], 2, '--base "\\udcff" is not UTF-8'),
        (["train", "export.author=\udcff"], 2, "is not UTF-8"),
        (["generate", "--base", "é" * 300, "--prompt", "x"], 4, "model.base"),
        (["generate", "--base", "~no-such-user/x", "--prompt", "x"], 4, "~no-such-user/x"),
        (["merge", "a", "--base", "x/" * 3000, "--out", "y"], 4, "model.base"),
        (["train", "--out", "a\0b"], 2, '--out "a\\x00b" holds a NUL'),
    ],
)
def test_bad_input_gets_one_message_and_its_exit_code(
    words: list[str],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, message = in_process(words, capsys, monkeypatch)
    assert (found, "Traceback" in message) == (code, False)
    assert message.startswith("lora-booth: ")
    assert expected in message
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_says_which_formats_are_taken(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    words = ["train", "--subject", str(tmp_path / "empty"), "--class-noun", "dog", "--base", str(bases["sd1"])]
    code, _, message = in_process(words, capsys, monkeypatch)
    assert code == 3
    assert "JPEG, PNG, WebP and AVIF are taken" in message


def test_a_pickle_base_is_refused_with_the_reason(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    words = ["train", "--subject", str(pictures), "--class-noun", "dog", "--base", str(tmp_path / "model.ckpt")]
    code, _, message = in_process(words, capsys, monkeypatch)
    assert code == 4
    assert "can run any program when it is opened" in message


def test_targets_that_match_nothing_stop_the_run(
    short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *short, "--out", str(tmp_path / "run"), "adapter.targets=regex:transfomer.*"]
    code, _, message = in_process(words, capsys, monkeypatch)
    assert code == 4
    assert "transfomer" in message


def test_a_prompt_may_be_longer_than_a_file_name(
    short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a photo of {token} {class} " + "in a garden " * 50
    code, text, told = in_process(
        ["config", *short_settings(short), f'preview.prompts=["{prompt}"]'], capsys, monkeypatch
    )
    assert code == 0, told
    assert prompt in text


def short_settings(short: list[str]) -> list[str]:
    """The settings of `short` without its options, which `config` lacks, and what they say."""
    return [*short[6:], "subject.images=x", "subject.class_noun=dog", "model.base=sd15"]


def test_a_plan_whose_memory_cannot_be_traced_is_shown_all_the_same(
    short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("no such operator")

    monkeypatch.setattr("lora_booth.planning.memory.Modules.of", fail)
    code, text, told = in_process(["plan", *short, "--out", str(tmp_path / "run")], capsys, monkeypatch)
    assert (code, told) == (0, "")
    assert "a new run:" in text and "warning: memory and time cannot be predicted ('no such operator')" in text


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, _ = in_process(["--help"], capsys, monkeypatch)
    named = {int(number) for number in re.findall(r"\d+", text[text.index("Exit codes") :])}
    codes = {kind.exit_code for kind in LoraBoothError.__subclasses__() if hasattr(kind, "exit_code")}
    assert named >= codes | {0, 1} | {128 + number for number in SIGNALS}


def test_plan_shows_what_would_happen_and_writes_nothing(
    short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, _ = in_process(["plan", *short, "--out", str(tmp_path / "run")], capsys, monkeypatch)
    assert code == 0
    assert all(part in text for part in ('"yql dog"', "5 pictures", "picture_00.png: 48×48 to 32×32", "a new run:"))
    assert list(tmp_path.iterdir()) == []


def test_plan_of_an_alias_downloads_nothing(pictures: Path, tmp_path: Path) -> None:
    settings = ["train.batch_size=1", "prior.loss_weight=0", "preview.images_per_prompt=0"]
    words = ["--subject", pictures, "--class-noun", "dog", "--base", "sd15", *settings]
    ended = lora_booth("plan", *words, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "base     sd15: sd1, epsilon, 512 px" in ended.stdout
    assert "predicted for a CUDA card, not measured" in ended.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "true", '"q"', " a ", "a=b", "-rf", "a\nb", "é"])
def test_a_folder_given_as_an_option_may_have_any_name(name: str) -> None:
    out = name if names.fault(name) is None else "run"  # what is written has a name that every system takes
    config = app._config(None, subject=Path(name), class_noun="1e5", base="sd15", vram=12, out=Path(out))
    assert (str(config.subject.images), str(config.run.folder)) == (name, out)
    assert (config.subject.class_noun, config.memory.budget_gib) == ("1e5", 12)


def test_a_config_file_may_have_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    path = tmp_path / "run=3.toml"
    path.write_text('model.base = "sd15"\nsubject = { images = "x", class_noun = "dog" }\n')
    assert app._config([str(path), "train.steps=7"]).train.steps == 7


def test_config_prints_a_file_that_train_takes(
    short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ["model.base=sd15", "subject.images=x", "subject.class_noun=cat", "train.steps=7"]
    code, text, _ = in_process(["config", *settings], capsys, monkeypatch)
    assert code == 0
    (tmp_path / "full.toml").write_text(text)
    _, again, _ = in_process(["config", str(tmp_path / "full.toml")], capsys, monkeypatch)
    assert again == text
    code, schema, _ = in_process(["config", "--schema"], capsys, monkeypatch)
    assert json.loads(schema)["properties"]["train"]


def test_train_runs_from_a_process_of_its_own_and_is_finished_the_second_time(short: list[str], tmp_path: Path) -> None:
    first = lora_booth("train", *short, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "yql_dog"
    for name in ("yql_dog.safetensors", "yql_dog_diffusers.safetensors", "before_after.png", "contact_sheet.png"):
        assert (folder / name).stat().st_size > 0
        assert name in first.stdout or name == "contact_sheet.png"
    assert "\x1b" not in first.stdout
    assert first.stderr == ""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    second = lora_booth("train", *short, "--json", folder=tmp_path)
    lines = [json.loads(line) for line in second.stdout.splitlines()]
    assert any(line["kind"] == "finished" for line in lines)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert not any(str(tmp_path) in p.read_bytes().decode("latin1") for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_prints_the_command_that_continues_and_exits_by_its_number(
    number: signal.Signals, short: list[str], tmp_path: Path
) -> None:
    words = ["train", *short, "train.steps=500", "train.save_every_steps=400", "--json"]
    command = [sys.executable, "-m", "lora_booth", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if json.loads(line).get("task") == "train":
            process.send_signal(number)
            break
    process.stdout.read()
    message = process.stderr.read()
    assert process.wait(timeout=120) == 128 + number
    assert "everything is saved; continue with: lora-booth train" in message
    assert len(list((tmp_path / "runs" / "yql_dog" / "checkpoints").glob("step-*"))) == 1


def test_of_many_subjects_the_first_failure_gives_the_exit_code(tmp_path: Path, bases: dict[str, Path]) -> None:
    for name in ("one", "two"):
        tiny.tiny_pictures(tmp_path / "photos" / name, 3)
    (tmp_path / "photos" / "none").mkdir()
    words = ["data.resolution=32", "data.bucket_step=16", "prior.mode=none", "train.steps=1"]
    words += ["preview.images_per_prompt=0", "evaluate.choose=last", "train.seed=[1,2]"]
    command = ["train-many", "photos", *words, "--class-noun", "dog", "--base", bases["ends"], "--out", "out"]
    done = lora_booth(*command, folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("lora-booth: 2 of 6 subjects failed, none-seed_1 first: no usable picture in")
    assert "The same command tries them again" in done.stderr
    assert "4 of 6 subjects are trained; 2 failed, which the same command tries again" in done.stdout
    assert "[1/6 none-seed_1] no usable picture in" in done.stdout
    assert (tmp_path / "out" / "two-seed_2" / "summary.json").is_file()
    assert (tmp_path / "out" / "overview.html").is_file()
