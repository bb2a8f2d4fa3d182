"""Bases whose configs, links or headers are hostile: each is told from its files, before anything is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.config.inputs import MAX_BYTES
from lora_booth.config.settings import ModelConfig
from lora_booth.errors import ModelError
from lora_booth.models.bases import identify, limits, sources
from lora_booth.models.families import components
from tests.models.test_identify import UNET, VAE, change, header_file

HUGE = (
    ("unet", "reverse_transformer_layers_per_block", [[100] * 100] * 4, "asks for .* transformer blocks"),
    ("unet", "transformer_layers_per_block", [[100] * 100] * 4, "asks for .* transformer blocks"),
    ("unet", "transformer_layers_per_block", [[[1]]], "no number of layers"),
    ("unet", "layers_per_block", 100, "asks for .* transformer blocks"),
    ("unet", "downsample_padding", 16384, "no size up to 9"),
    ("unet", "block_out_channels", [1 << 20] * 4, "no size up to 8192"),
    ("unet", "block_out_channels", [8192] * 4, "billion weights"),
    ("unet", "block_out_channels", [[16]] * 4, "no size"),
    ("unet", "cross_attention_dim", [1 << 31, 1, 1], "no size up to 16384"),
    ("unet", "sample_size", 1_000_000, "no size up to 4096"),
    ("unet", "sample_size", 4096, "asks for pictures of 8192 px"),
    ("unet", "sample_size", 1, "asks for pictures of 2 px"),
    ("unet", "norm_num_groups", 1 << 40, "no size"),
    ("unet", "conv_in_kernel", 99, "no size up to 9"),
    ("unet", "encoder_hid_dim", 1 << 30, "no base that is known has other"),
    ("unet", "attention_type", "gated", "has other than default"),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4, "has other than DownBlock2D"),
    ("unet", "freq_shift", 1e300, "in freq_shift, which no base has"),
    ("unet", "dropout", float("nan"), "nan in dropout"),
    ("vae", "block_out_channels", [8] * 9, "lacks block_out_channels"),
    ("vae", "block_out_channels", [8] * 8, "asks for steps of 1024 px"),
    ("vae", "layers_per_block", 1 << 40, "no number of layers"),
    ("vae", "scaling_factor", "a lot", "no factor"),
    ("vae", "scaling_factor", 0, "no factor"),
    ("vae", "scaling_factor", 10**400, "no factor"),
    ("vae", "latents_mean", [float("inf")] * 4, "inf in latents_mean"),
    ("text_encoder", "vocab_size", 1 << 40, "no size"),
    ("text_encoder", "num_labels", 1 << 40, "no size up to 1000"),
    ("text_encoder", "hidden_size", True, "no size"),
    ("text_encoder", "vocab_size", [1000, 1000], "no size"),
    ("unet", "time_embedding_dim", [64], "no size"),
    ("vae", "layers_per_block", [1, 1], "no number of layers"),
    ("unet", "_diffusers_version", 64, "no version"),
    ("text_encoder", "eos_token_id", 10**400, "in eos_token_id, which no base has"),
    ("scheduler", "num_train_timesteps", 1 << 70, "no size up to 100000"),
    ("scheduler", "solver_order", 1 << 70, "in solver_order, which no base has"),
)  # fmt: skip


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny base that a test may break."""
    return Path(shutil.copytree(bases["sd1"], tmp_path / "base"))


@pytest.mark.parametrize(("component", "key", "value", "message"), HUGE)
def test_a_number_that_asks_for_too_much_is_refused_before_anything_is_built(
    base: Path, component: str, key: str, value: Any, message: str
) -> None:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    change(base / component / name, **{key: value})
    for has_weights in (True, False):  # as `plan` looks at a base that is not downloaded
        with pytest.raises(ModelError, match=message) as told:
            identify.identify(base, has_weights=has_weights)
        assert str(base) in str(told.value) and len(str(told.value)) < 500


def test_what_published_bases_and_their_pruned_descendants_ask_for_is_within_the_bounds(base: Path) -> None:
    for name in ("sd1", "sd2_base", "sd2_v", "sdxl"):
        identify.identify(sources.SHIPPED_CONFIGS / name, has_weights=False)
    change(
        base / "unet" / "config.json",
        transformer_layers_per_block=[1, [2, 2], [4, 4], 1],  # as SSD-1B writes it
        reverse_transformer_layers_per_block=[1, [4, 4, 10], [2, 1, 1], 1],
        mid_block_type=None,
    )
    change(base / "text_encoder" / "config.json", bad_words_ids=None, id2label={"0": "LABEL_0"}, num_labels=2)
    identify.identify(base, has_weights=False)


def test_weights_are_counted_to_a_hundredth_from_configs_alone() -> None:
    real = {"sd1": 859.5 + 123.1 + 83.7, "sd2_v": 865.9 + 340.4 + 83.7, "sdxl": 2567.5 + 123.1 + 694.7 + 83.7}
    for name, millions in real.items():
        folder = sources.SHIPPED_CONFIGS / name
        configs = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/config.json")}
        assert sum(limits.num_parameters(configs).values()) / 1e6 == pytest.approx(millions, rel=0.01), name


@pytest.mark.parametrize(
    ("component", "values"),
    [
        ("text_encoder", {"hidden_size": 4096, "intermediate_size": 8192}),
        ("text_encoder", {"vocab_size": 1_000_000}),
        ("unet", {"transformer_layers_per_block": 12, "block_out_channels": [640] * 4}),
        ("vae", {"block_out_channels": [1024, 1024]}),
    ],
)
def test_a_config_that_asks_for_more_than_the_weight_files_hold_is_refused_before_it_fills_the_memory(
    base: Path, component: str, values: dict[str, Any]
) -> None:
    change(base / component / "config.json", **values)
    identify.identify(base, has_weights=False)
    with pytest.raises(
        ModelError, match=rf"{component} has a config of [\d,]+ million weights and files of \d million"
    ):
        identify.identify(base)


def test_a_base_may_leave_all_numbers_to_the_library(base: Path) -> None:
    """Or say null: what is counted then are the library's own defaults, and nothing is refused for it."""
    for null in (False, True):
        for name in ("unet", "vae", "text_encoder"):
            config = json.loads((base / name / "config.json").read_text())
            for key in limits.MOST[name].keys() - {
                "block_out_channels",
                "in_channels",
                "latent_channels",
                "num_labels",
            }:
                config.pop(key, None)
                config |= {key: None} if null else {}
            (base / name / "config.json").write_text(json.dumps(config))
        identify.identify(base, has_weights=False)


LINKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe in the vocabulary": (lambda b: os.mkfifo(b / "tokenizer" / "x.txt"), "it is a named pipe"),
    "pipe as config": (lambda b: replace(b / "vae" / "config.json", os.mkfifo), "it is a named pipe"),
    "pipe as weights": (lambda b: replace(b / UNET_FILE, os.mkfifo), "it is a named pipe"),
    "endless config": (lambda b: link(b / "unet" / "config.json", "/dev/zero"), "it is a device"),
    "endless vocabulary": (lambda b: link(b / "tokenizer" / "vocab.json", "/dev/zero"), "it is a device"),
    "endless weights": (lambda b: link(b / UNET_FILE, "/dev/zero"), "it is a device"),
    "dangling config": (lambda b: link(b / "unet" / "config.json", "../b/1"), "link to ../b/1, which is missing"),
    "dangling words": (lambda b: link(b / "tokenizer" / "added.txt", "blob"), "link to blob, which is missing"),
    "circle": (lambda b: link(b / "scheduler" / "scheduler_config.json", "scheduler_config.json"), "symbolic links"),
    "circle of folders": (lambda b: (shutil.rmtree(b / "vae"), link(b / "vae", "vae")), "symbolic links"),
    "folder as config": (lambda b: replace(b / "vae" / "config.json", os.mkdir), "it is a folder"),
    "dangling weights": (lambda b: link(b / UNET_FILE, "blob"), "link to blob, which is missing"),
    "huge config": (lambda b: (b / "vae" / "x.json").write_bytes(b" " * (MAX_BYTES + 1)), "no real one more than"),
    "long shard": (lambda b: shards(b, "x" * 300 + ".safetensors"), "File name too long"),
    "shard with a nul": (lambda b: shards(b, "x\0.safetensors"), "null"),
    "pipe as shard": (lambda b: (os.mkfifo(b / "unet" / "a.safetensors"), shards(b, "a.safetensors")), "a named pipe"),
    "odd shape": (lambda b: header_file(b / UNET_FILE, {"w": (True,)}), "broken safetensors header"),
}  # fmt: skip
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def shards(base: Path, name: str) -> None:
    (base / UNET_FILE).unlink()
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))


@pytest.mark.parametrize("fault", LINKS)
def test_a_file_of_a_base_that_is_no_plain_file_is_told_before_it_is_opened(base: Path, fault: str) -> None:
    break_, message = LINKS[fault]
    break_(base)
    with pytest.raises(ModelError, match=message) as told:
        identify.identify(base)
    assert str(base) in str(told.value) and len(str(told.value)) < 600


def test_half_precision_weights_serve_where_the_full_ones_are_a_link_into_a_cleaned_cache(base: Path) -> None:
    (base / UNET_FILE).rename(base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    link(base / UNET_FILE, "blob")
    assert sources.component_weights(base / "unet").variant == "fp16"


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (2, 4, 3, 3, 3)])
def test_a_single_file_whose_first_tensor_has_other_dimensions_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    first = next(iter(UNET))
    file = header_file(tmp_path / "x.safetensors", UNET | VAE | {first: shape})
    with pytest.raises(ModelError, match="no Stable Diffusion checkpoint"):
        identify.identify(file)


def test_a_yaml_beside_a_single_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    clip = {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1,)}
    file = header_file(tmp_path / "x.safetensors", UNET | VAE | clip)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe parameterization: v")
    with pytest.raises(ModelError, match=r"x\.yaml cannot be read"):
        identify.identify(file)
    replace(tmp_path / "x.yaml", os.mkfifo)
    with pytest.raises(ModelError, match=r"x\.yaml cannot be read: it is a named pipe"):
        identify.identify(file)


def test_a_vae_that_cannot_be_built_is_told_where_no_weights_are_needed_either(base: Path) -> None:
    change(base / "vae" / "config.json", latents_mean="x")
    with pytest.raises(ModelError, match="vae cannot be loaded"):
        components.without_weights(identify.identify(base), torch.float32)


@pytest.mark.parametrize(
    "word",
    ["x" * 300, "~nobody-of-that-name/x", f"a/{'b' * 300}", "x" * 5000, "./" + "é" * 200, "a--b/c", "a/b.git", " "],
)
def test_a_word_that_is_no_base_is_told_whatever_it_is(word: str) -> None:
    with pytest.raises(ModelError, match="is no file or folder here") as told:
        sources.resolve(ModelConfig(base=word))
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".ckpt"])
def test_a_pipe_or_a_device_as_a_base_is_never_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device")):
        with pytest.raises(ModelError, match=f"it is {kind}; name a .safetensors file"):
            sources.resolve(ModelConfig(base=str(tmp_path / f"{name}{suffix}")))
