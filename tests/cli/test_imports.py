"""Each command imports the large libraries that it uses and no others, so that none creeps back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_booth.config import toml
from tests.conftest import MakeConfig
from tests.support.adapted import adapter_file

HEAVY = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "scipy",
    "tensorboard",
    "torch",
    "torch._inductor.compile_fx",
    "transformers",
)
MODELS = {"accelerate", "diffusers", "huggingface_hub", "peft", "torch", "transformers"}
"""What building a base takes: each of these imports others of them, and transformers torch's tracer besides."""
PROGRAM = f"""
import sys
from lora_booth.cli import app
try:
    app.main()
except SystemExit as stop:
    print("ended with", stop.code)
print("imported:", *(name for name in {HEAVY} if sys.modules.get(name)))
"""


def imported(*words: str | Path) -> tuple[str, set[str]]:
    """What a command says, and which of HEAVY it has imported when it ends."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said, found, names = done.stdout.rpartition("imported:")
    assert found, done.stderr
    return said + done.stderr, set(names.split())


@pytest.mark.parametrize(
    "command",
    [
        "-",
        "train",
        "train-many",
        "plan",
        "generate",
        "doctor",
        "config",
        "cache",
        "inspect",
        "export",
        "merge",
        "resize",
        "extract",
        "evaluate",
        "tokens",
        "demo",
    ],
)
def test_help_needs_none(command: str) -> None:
    said, found = imported(*([] if command == "-" else [command]), "--help")
    assert "Usage" in said and found == set()


def test_errors_and_facts_that_need_none(pictures: Path, tmp_path: Path) -> None:
    words = ["--class-noun", "dog", "--base", "booth-mini"]
    cases = {
        "there is no folder": ["train", "--subject", "nowhere", *words],
        "model.base": ["plan", "--subject", pictures, "--class-noun", "dog", "--base", "./nowhere"],
        "name a file of subjects": ["train-many", "nowhere"],
        "train.steps": ["train", "--subject", pictures, *words, "train.steps=-1"],
        "resolution": ["config", "--schema"],
        "MiB": ["cache", "--folder", tmp_path],
    }
    for told, command in cases.items():
        said, found = imported(*command)
        assert told in said and found == set(), (said, found)


def test_doctor_imports_in_another_process() -> None:
    said, found = imported("doctor")
    assert "can be imported" in said and found == set()


def test_files_of_adapters_need_torch_alone(tmp_path: Path) -> None:
    one, other = (adapter_file(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab"))
    commands = [
        ["inspect", one],
        ["export", one, "--out", tmp_path / "exported"],
        ["resize", one, "--rank", "1", "--out", tmp_path / "resized.safetensors"],
        ["merge", one, other, "--out", tmp_path / "merged.safetensors"],
    ]
    for command in commands:
        said, found = imported(*command)
        assert "ended with" not in said and found == {"torch"}, (command, said, found)


def test_a_base_is_planned_trained_and_drawn_without_torchs_compiler(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train={"steps": 1}, optimizer={"name": "adamw"}, run={"cache": tmp_path / "cache"})
    (tmp_path / "config.toml").write_text(toml.to_toml(config))
    base, file = str(config.model.base), tmp_path / "run" / "yql_dog.safetensors"
    drawing = ["generate", "--base", base, "--adapter", file, "--prompt", "a dog", "--size", "32x32", "--steps", "1"]
    commands = [
        ("memory", ["plan", tmp_path / "config.toml", "train.steps=99"], MODELS),
        ("memory", ["plan", tmp_path / "config.toml", "train.steps=99"], set()),  # what it counts is known by now
        ("1 steps in", ["train", tmp_path / "config.toml"], MODELS),
        ("grid.png", [*drawing, "--out", tmp_path / "drawn"], MODELS),
    ]
    for told, command, expected in commands:
        said, found = imported(*command)
        assert told in said and "ended with" not in said and found == expected, (said, found)


def test_a_quantised_base_brings_bitsandbytes_and_a_plain_one_does_not() -> None:
    program = """
import sys
from lora_booth.run import imports
imports.leave_out_("bitsandbytes", "scipy")
import torch
from lora_booth.adapter import inject
from lora_booth.config.settings import AdapterConfig, ModelConfig
from lora_booth.models import loading

def adapted(kind):
    config = ModelConfig.model_validate({"base": "booth-mini", "quantize": kind})
    denoiser = loading.load(config, device="cpu", dtype=torch.float32).denoiser
    inject.inject_({"unet": denoiser}, AdapterConfig(rank=2))
    layer = denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    return type(layer).__name__, type(layer.get_base_layer()).__name__, "bitsandbytes" in sys.modules

for kind in ("none", "nf4", "none", "int8"):
    print(*adapted(kind))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "BaseTypeLinear Linear False",
        "BaseTypeLinear Linear4bit True",
        "BaseTypeLinear Linear True",
        "BaseTypeLinear Linear8bitLt True",
    ], done.stderr


def test_code_of_others_that_imports_lora_booth_finds_all_packages() -> None:
    program = """
import lora_booth
lora_booth.train
from diffusers.utils import is_bitsandbytes_available, is_scipy_available
from peft.import_utils import is_bnb_4bit_available
print(is_bitsandbytes_available(), is_scipy_available(), is_bnb_4bit_available())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * 3, done.stderr
