"""The commands on adapter files as a user types them: what they print, write and refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_booth.adapter.files import storage
from tests.cli.test_app import in_process
from tests.support import adapted

HEADER = {"modelspec.trigger_phrase": "yql dog", "ss_base_model_version": "sd_v1"}


@pytest.fixture
def dog(tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """A portable file in the folder where the commands run."""
    monkeypatch.chdir(tmp_path)
    weights, _ = adapted.trained_mixed("sd1", bases)
    storage.FORMATS["kohya"].write(tmp_path / "dog.safetensors", weights, "sd1", torch.float16, HEADER)
    return "dog.safetensors"


Run = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return capsys, monkeypatch


def test_inspect_tells_and_draws(dog: str, run: Run, tmp_path: Path) -> None:
    code, text, _ = in_process(["inspect", dog, "--picture", "norms.png"], *run)
    assert code == 0
    for part in ("kohya naming, LoRA", "yql dog", "mid_block", "ComfyUI", "norms.png"):
        assert part in text
    assert (tmp_path / "norms.png").stat().st_size > 5000
    code, text, _ = in_process(["inspect", dog, "--json"], *run)
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["loader"] for line in lines if line["kind"] == "program"} >= {"diffusers", "ComfyUI", "InvokeAI"}


def test_export_merge_and_resize_write_files_that_inspect_reads(
    dog: str, run: Run, tmp_path: Path, bases: dict[str, Path]
) -> None:
    commands = {
        "export dog.safetensors --out out --format diffusers --dtype fp32": "out/dog_diffusers.safetensors",
        "merge dog.safetensors:0.5 dog.safetensors --out both.safetensors --format diffusers": "both.safetensors",
        "merge dog.safetensors dog.safetensors --out r4.safetensors --method svd --rank 4": "r4.safetensors",
        "resize dog.safetensors --rank 2": "dog_rank2.safetensors",
        "resize dog.safetensors --energy 0.9 --out small.safetensors": "small.safetensors",
    }
    for command, made in commands.items():
        code, _, message = in_process(command.split(), *run)
        assert (code, message) == (0, ""), command
        assert in_process(["inspect", made], *run)[0] == 0
    code, text, _ = in_process(["merge", dog, "--base", str(bases["sd1"]), "--out", "merged"], *run)
    assert code == 0 and (tmp_path / "merged" / "model_index.json").exists()
    code, text, _ = in_process(
        ["extract", "--base", str(bases["sd1"]), "--tuned", "merged", "--rank", "4", "--out", "again.safetensors"], *run
    )
    assert code == 0 and "error" in text
    assert in_process(["inspect", "again.safetensors"], *run)[0] == 0


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        ("inspect none.safetensors", 4, "none.safetensors"),
        ("inspect .", 4, "cannot be read"),
        ("export dog.safetensors", 2, "is not replaced"),
        ("export dog.safetensors --format onnx --out x", 2, "onnx"),
        ("export dog.safetensors --dtype int8 --out x", 2, "int8"),
        ("export dog.safetensors --out x --base nowhere/at/all", 4, "nowhere/at/all"),
        ("merge dog.safetensors", 2, "--out"),
        ("merge dog.safetensors --out dog.safetensors", 2, "dog.safetensors"),
        ("merge dog.safetensors:nan --out x.safetensors", 2, "nan"),
        ("merge dog.safetensors --out x.safetensors --method average", 2, "average"),
        ("merge dog.safetensors --out x --base sd15 --rank 4", 2, "--rank: with --base this means nothing"),
        ("merge dog.safetensors --out x --base sd15 --dtype fp32 --seed 0", 2, "--seed, --dtype: with --base"),
        ("merge dog.safetensors --out x --base sd15 --format kohya", 2, "--format: with --base"),
        ("merge dog.safetensors --out x --base sd15 --family sd1 --density 0.5", 2, "--density, --family: with --base"),
        ("merge dog.safetensors --out x.safetensors --density 0.5", 2, "--density means nothing with --method concat"),
        ("merge dog.safetensors --out x.safetensors --method ties --seed 1", 2, "--seed means nothing with"),
        ("merge dog.safetensors --out x --base=", 2, "--base is empty"),
        ("export dog.safetensors --out x --base=", 2, "--base is empty"),
        ("export dog.safetensors --out x --name ../y", 2, '--name "../y" holds'),
        ("export dog.safetensors --out x --name ..", 2, '--name ".." has no letter'),
        ("export dog.safetensors --out x --name=", 2, '--name "" has no letter'),
        ("inspect dog.safetensors --picture dog.safetensors", 2, "dog.safetensors exists and is not replaced"),
        ("extract --base= --tuned nowhere --rank 2 --out x.safetensors", 2, "--base is empty"),
        ("extract --base sd15 --tuned= --rank 2 --out x.safetensors", 2, "--tuned is empty"),
        ("inspect dog.safetensors --picture con.png", 2, '--picture "con.png" is the device CON'),
        ("merge dog.safetensors --out nul.safetensors", 2, '--out "nul.safetensors" is the device NUL'),
        ("merge dog.safetensors --base sd15 --out a:b", 2, "--out \"a:b\" holds ':'"),
        ("resize dog.safetensors --rank 2 --out x/aux.safetensors", 2, '--out "aux.safetensors" is the device AUX'),
        ("extract --base a --tuned b --rank 2 --out what?.safetensors", 2, "--out \"what?.safetensors\" holds '?'"),
        ("resize dog.safetensors", 2, "--rank"),
        ("resize dog.safetensors --rank 0", 2, "--rank"),
        ("resize dog.safetensors --energy 1.5", 2, "--energy"),
        ("resize dog.safetensors --rank 2 --energy 0.5", 2, "either"),
        ("resize dog.safetensors --rank 2 --dtype int4", 2, "int4"),
        ("resize dog.safetensors --rank 2 --format onnx", 2, "onnx"),
        ("extract --base nowhere --tuned nowhere --rank 2 --out x.safetensors", 4, "nowhere"),
        ("extract --base nowhere --tuned nowhere --rank 2 --out x.safetensors --dtype int4", 2, "int4"),
        ("extract --base nowhere --tuned nowhere --out x.safetensors", 2, "--rank"),
    ],
)
def test_bad_input_gets_one_message_and_its_exit_code_and_writes_nothing(
    command: str, code: int, expected: str, dog: str, run: Run, tmp_path: Path
) -> None:
    found, _, message = in_process(command.split(), *run)
    assert (found, "Traceback" in message) == (code, False), message
    assert message.startswith("lora-booth: ") and expected in message
    assert [path.name for path in tmp_path.iterdir()] == ["dog.safetensors"]


def test_what_cannot_be_held_is_left_out_by_name(dog: str, run: Run, tmp_path: Path, bases: dict[str, Path]) -> None:
    more = {"bundle_emb.x.string_to_param": torch.ones(2, 32), "lora_unet_conv_norm_out.w_norm": torch.ones(16)}
    save_file(load_file(dog) | more, tmp_path / "more.safetensors", HEADER)
    rank = ["resize", "more.safetensors", "--rank", "2", "--out", "r.safetensors"]
    merge = ["merge", "more.safetensors", "--base", str(bases["sd1"]), "--out", "merged"]
    for words, needed in ((rank, "embedding"), ([*rank, "--leave-out", "embedding"], "norm"), (merge, "embedding")):
        code, _, message = in_process(words, *run)
        assert code == 4 and f"--leave-out {needed}" in message
    code, text, _ = in_process([*rank, "--leave-out", "embedding, norm"], *run)
    assert code == 0 and text.count("is used without 1 keys") == 2
    assert in_process([*merge, "--leave-out", "embedding"], *run)[0] == 0
    export_words = ["export", "more.safetensors", "--out", "out", "--leave-out", "embedding,norm"]
    assert in_process(export_words, *run)[0] == 0
    code, _, message = in_process([*rank[:-1], "x.safetensors", "--leave-out", "nrom,embedding,norm"], *run)
    assert code == 2 and '"nrom" names nothing' in message


def test_a_cover_that_is_a_pipe_is_not_waited_for(dog: str, run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cover.png")
    code, _, message = in_process(["export", dog, "--out", "x", "--cover", "cover.png"], *run)
    assert code == 3 and "cover.png cannot be read: it is a named pipe; give --cover a PNG" in message
    assert not (tmp_path / "x").exists()


def test_a_name_that_is_too_long_for_any_disk_is_told(dog: str, run: Run, tmp_path: Path) -> None:
    out = "x" * 300 + ".safetensors"
    for words in (["merge", dog, "--out", out], ["resize", dog, "--rank", "1", "--out", out]):
        code, _, message = in_process(words, *run)
        assert code == 2 and "is 312 long, and 255 is the most a name takes" in message, message
    code, _, message = in_process(["export", "x" * 300, "--out", "x"], *run)
    assert code == 4 and "x cannot be read: File name too long" in message, message


def test_a_file_that_is_no_adapter_is_told_apart(dog: str, run: Run, tmp_path: Path) -> None:
    save_file({"model.diffusion_model.x": torch.ones(2)}, tmp_path / "full.safetensors")
    for verb in (["inspect"], ["export", "--out", "x"], ["resize", "--rank", "2"], ["merge", "--out", "x.safetensors"]):
        code, _, message = in_process([verb[0], "full.safetensors", *verb[1:]], *run)
        assert code == 4 and "is no LoRA" in message, verb
