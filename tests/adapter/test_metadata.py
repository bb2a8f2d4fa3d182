"""The types programs expect, and nothing of the user's machine."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.adapter.files.metadata import Facts, base_name, carried, metadata, network_fields, resolved_config
from lora_booth.adapter.weights import LowRank
from lora_booth.config.config import Config


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"base": "/home/alice/models/my_base.safetensors"},
        "subject": {"images": Path("/home/alice/photos/rex"), "class_noun": "dog", "token": "yql"},
        "run": {"folder": Path("/home/alice/runs/rex"), "cache": Path("C:\\Users\\alice\\cache")},
        "adapter": {"rank": 16, "alpha": 8.0, "continue_from": Path("old/alice.safetensors")},
    }
    for name, pairs in sections.items():
        values.setdefault(name, {}).update(pairs)
    return Config.model_validate(values)


def facts(**values: Any) -> Facts:
    settings: dict[str, Any] = {
        "family": "sd1",
        "prediction_type": "epsilon",
        "config": config(),
        "steps": 400,
        "num_instance_images": 12,
        "num_class_images": 200,
        "resolution_px": 512,
        "started_at": 1763750000.0,
        "identity": "1234",
        "buckets": {(512, 768): 10, (512, 512): 2},
        "versions": {"lora_booth": "0.1.0"},
    }
    return Facts(**(settings | values))


def test_every_key_and_value_is_text() -> None:
    fields = metadata(facts())
    assert len(fields) > 35
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in fields.items())
    assert {key.partition("_")[0].partition(".")[0] for key in fields} == {"modelspec", "ss", "lora"}


def test_fields_that_programs_parse_have_the_types_they_parse() -> None:
    fields = metadata(facts())
    key = "1_yql dog"  # SD.Next splits repeats and tag at the first underscore
    assert json.loads(fields["ss_dataset_dirs"]) == {key: {"n_repeats": 1, "img_count": 12}}
    assert json.loads(fields["ss_tag_frequency"]) == {key: {"yql dog": 12}}
    assert json.loads(fields["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [512, 768], "count": 10}, "1": {"resolution": [512, 512], "count": 2}},
        "mean_img_ar_error": 0.0,
    }
    assert float(fields["ss_training_started_at"]) == 1763750000.0
    assert fields["ss_resolution"] == "(512, 512)"
    assert fields["ss_clip_skip"] == "None"
    assert fields["ss_output_name"] == "yql_dog"
    assert fields["ss_text_encoder_lr"] == "None"
    assert fields["modelspec.sai_model_spec"] == "1.0.1"
    assert fields["modelspec.date"] == datetime.fromtimestamp(int(facts().started_at), UTC).strftime(
        "%Y-%m-%dT%H:%M:%S"
    )
    assert fields["modelspec.trigger_phrase"] == "yql dog"
    assert fields["modelspec.resolution"] == "512x512"
    names = ("ss_output_name", "ss_sd_model_name", "modelspec.title", "modelspec.trigger_phrase")
    assert not [name for name in names if fields[name].startswith("{")], "A1111 would take it for JSON"


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "version", "is_v2", "spec_prediction"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1/lora", "sd_v1", "False", "epsilon"),
        ("sd1", "v_prediction", "stable-diffusion-v1/lora", "sd_v1_v", "False", "v"),
        ("sd2", "epsilon", "stable-diffusion-v2-512/lora", "sd_v2", "True", "epsilon"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True", "v"),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False", "epsilon"),
    ],
)
def test_the_base_is_named_so_that_programs_recognise_it(
    family: str, prediction: str, architecture: str, version: str, is_v2: str, spec_prediction: str
) -> None:
    fields = metadata(facts(family=family, prediction_type=prediction))
    assert fields["modelspec.architecture"] == architecture
    assert fields["ss_base_model_version"] == version
    assert fields["ss_v2"] == is_v2
    assert fields["modelspec.prediction_type"] == spec_prediction
    is_sdxl = family == "sdxl"
    assert fields["modelspec.implementation"].startswith("https://github.com/Stability-AI") == is_sdxl


def test_no_path_of_the_machine_is_written() -> None:
    fields = metadata(facts())
    text = json.dumps(fields)
    for private in ("alice/", "alice\\", "/home", "C:", "Users", "photos"):
        assert private not in text, private
    assert fields["ss_sd_model_name"] == "my_base.safetensors"
    written = json.loads(fields["lora_booth.config"])
    assert written["run"] == {} and "images" not in written["subject"], "what the result does not depend on"
    assert written["model"]["base"] == "my_base.safetensors"
    assert written["train"]["seed"] == 0


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("sdxl", "sdxl"),
        ("/home/alice/base", "base"),
        ("/home/alice/base/", "base"),
        ("~/base", "base"),
        ("./alice/base", "base"),
        ("alice/base.safetensors", "base.safetensors"),
        ("C:\\Users\\alice\\base.safetensors", "base.safetensors"),
    ],
)
def test_a_base_is_named_by_hub_id_or_last_part(base: str, name: str) -> None:
    assert base_name(base) == name


@pytest.mark.parametrize(
    ("layers", "rank", "alpha"),
    [
        ([(16, 0.5), (16, 0.5)], "16", "8.0"),
        ([(16, 2.0)], "16", "32.0"),  # rsLoRA's scale of alpha 8 is 8 / sqrt(16)
        ([(16, 0.5), (4, 0.5)], "Dynamic", "Dynamic"),
        ([(16, 0.5), (16, 1.0)], "16", "Dynamic"),
    ],
)
def test_rank_and_alpha_are_those_of_the_tensors(layers: list[tuple[int, float]], rank: str, alpha: str) -> None:
    weights = {str(i): LowRank(torch.ones(r, 8), torch.ones(8, r), scale) for i, (r, scale) in enumerate(layers)}
    assert network_fields({"unet": weights}) == {"ss_network_dim": rank, "ss_network_alpha": alpha}


def test_of_a_header_only_what_holds_of_other_tensors_is_carried() -> None:
    kept = {"modelspec.title": "rex", "ss_network_module": "networks.lora"}
    stale = dict.fromkeys(("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"), "0x12")
    assert carried(kept | stale | {"lora_adapter_metadata": "{}", "ss_network_args": '{"dora_wd": "True"}'}) == kept


def test_optional_facts_are_written_when_they_are_known() -> None:
    fields = metadata(facts())
    assert not {"modelspec.author", "modelspec.license"} & fields.keys()
    known = config(export={"author": "Alice", "license": "CC0"}, adapter={"text_encoder": True})
    fields = metadata(facts(config=known, buckets={}))
    assert (fields["modelspec.author"], fields["modelspec.license"]) == ("Alice", "CC0")
    assert fields["ss_text_encoder_lr"] == "1e-05"
    assert "ss_bucket_info" not in fields


def test_a_huge_config_is_left_out_and_said_so() -> None:
    long = config(preview={"prompts": ("a photo of {token} {class} " + "x" * 300_000,)})
    fields = metadata(facts(config=long))
    assert "left out" in json.loads(fields["lora_booth.config"])
    assert sum(map(len, fields.values())) < 1 << 16


def test_the_same_facts_give_the_same_fields() -> None:
    assert metadata(facts()) == metadata(replace(facts()))
    assert resolved_config(config()) == resolved_config(config())
