"""Extracting an adapter: what was added to a base by hand comes back, and what does not fit an adapter is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter import inject
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import AdapterWeights, delta
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases import identify
from lora_booth.verbs.extract import extract
from tests.support.adapted import adapted_pipeline, components, draw, pipeline, relative_difference
from tests.support.runs import Recorder
from tests.support.tiny import tiny_sd, tiny_sd2, tiny_sdxl, tiny_single_file

FEW = r"regex:(mid_block|up_blocks\.1)\..+(attn1\.to_q|attn2\.to_k|proj_in|ff\.net\.2|conv2|samplers\.0\.conv)"
WEIGHT_FILES = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}


def edited(base: Path, folder: Path, edits: dict[str, Callable[[dict[str, Tensor]], None]]) -> Path:
    """A copy of a base whose components' tensors were put through a function, names without `text_model.`."""
    shutil.copytree(base, folder)
    for component, edit in edits.items():
        path = folder / component / f"{WEIGHT_FILES[component]}.safetensors"
        stored = load_file(path)
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
        edit(tensors)
        new = {name: tensors[name.removeprefix("text_model.")].contiguous() for name in stored}
        save_file(new, path, metadata={"format": "pt"})
    return folder


def merged(base: Path, folder: Path, weights: AdapterWeights) -> Path:
    """A copy of a base with the adapter's changes added to its weights."""

    def adder(component: str) -> Callable[[dict[str, Tensor]], None]:
        def add(tensors: dict[str, Tensor]) -> None:
            for path, low in weights[component].items():
                tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + delta(low)

        return add

    return edited(base, folder, {component: adder(component) for component in weights})


def change(name: str, amount: float = 0.1) -> Callable[[dict[str, Tensor]], None]:
    """Adds random numbers to one tensor."""

    def add(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(len(name))
        tensors[name] = tensors[name] + amount * torch.randn(tensors[name].shape, generator=generator)

    return add


def told(recorder: Recorder, kind: str) -> list[str]:
    return [text for found, text in recorder.events if found == kind]


@pytest.mark.parametrize("format", storage.FORMATS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_adapter_merged_into_a_base_comes_back(
    family: str, format: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = adapted_pipeline(family, bases, targets=FEW, rank=3, alpha=2.0)
    weights, expected = inject.collect(components(adapted)), draw(adapted)
    tuned = merged(bases[family], tmp_path / "tuned", weights)
    recorder = Recorder()
    out = extract(
        base=str(bases[family]),
        tuned=str(tuned),
        out=tmp_path / "found.safetensors",
        rank=3,
        format=format,
        dtype="fp32",
        report=recorder,
    )
    assert (out, storage.detect(out)) == (tmp_path / "found.safetensors", format)
    found = storage.read(out)
    assert {c: set(layers) for c, layers in found.items()} == {c: set(layers) for c, layers in weights.items()}
    for component, layers in weights.items():
        for path, low in layers.items():
            assert found[component][path].rank == 3
            # the sum with the base, of size 0.2, was rounded to float32; the changes are of size 0.01
            assert relative_difference(delta(found[component][path]), delta(low)) < 2e-5
    assert not told(recorder, "outside")
    assert float(told(recorder, "error")[-1].split()[-1].rstrip("%")) < 0.01
    pipe = pipeline(family, bases)
    assert relative_difference(expected, draw(pipe)) > 1e-2
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    assert relative_difference(draw(pipe), expected) < 1e-4


SINGLE = {
    "sd1": (tiny_sd, "sd1", {}),
    "sd2": (tiny_sd2, "sd2_v", {"modelspec.prediction_type": "v"}),
    "sdxl": (tiny_sdxl, "sdxl", {}),
}


@pytest.mark.parametrize("family", SINGLE)
def test_folders_and_single_files_give_the_same_adapter(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, architecture, metadata = SINGLE[family]
    base = make(tmp_path / "architectures" / architecture)
    monkeypatch.setattr(identify, "SHIPPED_CONFIGS", tmp_path / "architectures")
    edits = {"unet": change("mid_block.attentions.0.proj_in.weight")}
    texts = [name for name in ("text_encoder", "text_encoder_2") if (base / name).is_dir()]
    edits |= {name: change("encoder.layers.1.self_attn.k_proj.weight") for name in texts}
    tuned = edited(base, tmp_path / "tuned", edits)
    files = [
        tiny_single_file(folder, tmp_path / f"{n}.safetensors", metadata=metadata)
        for n, folder in enumerate((base, tuned))
    ]
    settings = {"rank": 4, "dtype": "fp32"}
    found = [
        load_file(extract(base=str(a), tuned=str(b), out=tmp_path / "out" / f"{n}.safetensors", **settings))
        for n, (a, b) in enumerate([(base, tuned), tuple(files), (base, files[1]), (files[0], tuned)])
    ]
    assert len(found[0]) == 3 * (1 + len(texts))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in found[0].items())


def test_text_encoders_are_compared_unless_they_are_not_wanted(bases: dict[str, Path], tmp_path: Path) -> None:
    layers = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]

    def edit(tensors: dict[str, Tensor]) -> None:
        for layer in layers:
            change(f"encoder.layers.0.{layer}.weight")(tensors)

    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    tuned = edited(bases["sdxl"], tmp_path / "tuned", {"text_encoder_2": edit, "unet": change(f"{unet}.weight")})
    settings = {"base": str(bases["sdxl"]), "tuned": str(tuned), "rank": 2}
    whole = storage.read(extract(**settings, out=tmp_path / "whole.safetensors"))
    assert {c: set(found) for c, found in whole.items()} == {
        "unet": {unet},
        "text_encoder_2": {f"encoder.layers.0.{layer}" for layer in layers},
    }
    recorder = Recorder()
    part = extract(**settings, out=tmp_path / "part.safetensors", text_encoders=False, report=recorder)
    assert {c: set(found) for c, found in storage.read(part).items()} == {"unet": {unet}}
    assert "text_encoder" not in recorder.tasks


def test_what_no_target_holds_is_told_as_a_share_of_the_change(bases: dict[str, Path], tmp_path: Path) -> None:
    target, norm = "mid_block.attentions.0.proj_in.weight", "mid_block.attentions.0.norm.weight"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[target].view(-1)[0] += 4.0
        tensors[norm][1] += 2.0
        tensors["conv_in.bias"][0] += 1.0

    recorder = Recorder()
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"unet": edit})
    out = extract(base=str(bases["sd1"]), tuned=str(tuned), out=tmp_path / "a.safetensors", energy=0.9, report=recorder)
    (text,) = told(recorder, "outside")
    assert text.startswith("23.810% of the change")  # (2^2 + 1^2) / (4^2 + 2^2 + 1^2)
    assert "2 tensors" in text and f"unet.{norm}" in text
    note = json.loads(storage.read_metadata(out)["lora_booth.extracted"])
    assert note["outside"] == pytest.approx(5 / 21, abs=1e-5)
    assert (note["error"], note["energy"], note["base"]) == (pytest.approx(0, abs=1e-5), 0.9, "sd1")
    assert "rank" not in note


def test_the_told_error_is_that_of_the_file(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "up_blocks.2.resnets.0.conv1"
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"unet": change(f"{name}.weight")})
    recorder = Recorder()
    settings = {"base": str(bases["sd1"]), "tuned": str(tuned), "dtype": "fp32"}
    out = extract(**settings, out=tmp_path / "a.safetensors", rank=4, report=recorder)
    before, after = (
        load_file(folder / "unet/diffusion_pytorch_model.safetensors")[f"{name}.weight"]
        for folder in (bases["sd1"], tuned)
    )
    true = after - before
    lost = float((delta(storage.read(out)["unet"][name]) - true).norm() / true.norm())
    lines = [text.split() for text in told(recorder, "error")]
    assert [line[0] for line in lines] == ["up_blocks.2", "all"]
    assert all(float(line[-1].rstrip("%")) / 100 == pytest.approx(lost, abs=1e-5) for line in lines)
    assert lost > 0.1


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_file_says_what_it_is_for(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = edited(bases[family], tmp_path / "tuned", {"unet": change("mid_block.resnets.0.conv1.weight")})
    out = extract(base=str(bases[family]), tuned=str(tuned), out=tmp_path / "my style.safetensors", rank=2)
    fields = storage.read_metadata(out)
    version, architecture = {
        "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
        "sd2": ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    }[family]
    assert (fields["ss_base_model_version"], fields["modelspec.architecture"]) == (version, architecture)
    assert (fields["ss_network_module"], fields["ss_network_dim"], fields["ss_network_alpha"]) == (
        "networks.lora",
        "2",
        "2.0",
    )
    assert (fields["ss_output_name"], fields["modelspec.title"]) == ("my style", "my style")
    assert fields["ss_sd_model_name"] == family
    assert fields["modelspec.resolution"] == "32x32"
    assert fields["modelspec.hash_sha256"].startswith("0x")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", fields["modelspec.date"])
    assert str(tmp_path) not in json.dumps(fields)


def test_identical_models_hold_no_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Nothing differs between the UNets and text encoders"):
        extract(base=str(bases["sd1"]), tuned=str(bases["sd1"]), out=tmp_path / "a.safetensors", rank=2)
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"text_encoder": change("encoder.layers.0.mlp.fc1.weight")})
    settings = {"base": str(bases["sd1"]), "tuned": str(tuned), "out": tmp_path / "a.safetensors", "rank": 2}
    with pytest.raises(ModelError, match="Nothing differs between the UNets of"):
        extract(**settings, text_encoders=False)
    tuned = edited(bases["sd1"], tmp_path / "bias", {"unet": change("conv_in.bias")})
    with pytest.raises(ModelError, match=r"only 1 tensors differ, first unet\.conv_in\.bias"):
        extract(**settings | {"tuned": str(tuned)})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_tuned_rounded", [True, False])
def test_rounding_alone_is_no_change(
    dtype: torch.dtype, is_tuned_rounded: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    name = "mid_block.resnets.1.conv2.weight"

    def rounded(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    def changed_and_rounded(tensors: dict[str, Tensor]) -> None:
        change(name)(tensors)
        rounded(tensors)

    texts = {"text_encoder": rounded}
    half = edited(bases["sd1"], tmp_path / "half", {"unet": rounded, **texts})
    pair = [str(bases["sd1"]), str(half)] if is_tuned_rounded else [str(half), str(bases["sd1"])]
    with pytest.raises(ModelError, match="Nothing differs"):
        extract(base=pair[0], tuned=pair[1], out=tmp_path / "a.safetensors", rank=2)
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"unet": changed_and_rounded, **texts})
    out = extract(base=str(bases["sd1"]), tuned=str(tuned), out=tmp_path / "a.safetensors", rank=2)
    assert list(storage.read(out)["unet"]) == [name.removesuffix(".weight")]


def test_models_of_another_family_or_build_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a sdxl model, but the base .* is sd1"):
        extract(base=str(bases["sd1"]), tuned=str(bases["sdxl"]), out=tmp_path / "a.safetensors", rank=2)
    other = shutil.copytree(bases["sd1"], tmp_path / "other")
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(other / "text_encoder")
    config = encoder.config
    config.num_hidden_layers = 2
    CLIPTextModel(config).save_pretrained(other / "text_encoder")
    with pytest.raises(ModelError, match=r"not built alike: text_encoder\.encoder\.layers\.2\..+ in the base and None"):
        extract(base=str(bases["sd1"]), tuned=str(other), out=tmp_path / "a.safetensors", rank=2)
    with pytest.raises(ModelError, match="is no file or folder here"):
        extract(base=str(bases["sd1"]), tuned=str(tmp_path / "none"), out=tmp_path / "a.safetensors", rank=2)
    assert not (tmp_path / "a.safetensors").exists()


def test_another_prediction_type_is_warned_of(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"unet": change("mid_block.resnets.0.conv1.weight")})
    path = tuned / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    recorder = Recorder()
    extract(base=str(bases["sd1"]), tuned=str(tuned), out=tmp_path / "a.safetensors", rank=2, report=recorder)
    assert any("predicts v_prediction, the base epsilon" in text for text in recorder.warnings)


def test_a_model_with_nan_is_refused_by_layer(bases: dict[str, Path], tmp_path: Path) -> None:
    tuned = edited(bases["sd1"], tmp_path / "tuned", {"unet": change("conv_out.weight", float("nan"))})
    with pytest.raises(ModelError, match=r"unet\.conv_out\.weight holds NaN"):
        extract(base=str(bases["sd1"]), tuned=str(tuned), out=tmp_path / "a.safetensors", rank=2)


def test_an_existing_file_is_never_replaced_and_is_looked_for_first(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        extract(base="none", tuned="none", out=out, rank=2)
    with pytest.raises(ConfigError, match="either a rank or an energy"):
        extract(base="none", tuned="none", out=tmp_path / "b.safetensors")
    for choice in ({"format": "a1111"}, {"dtype": "fp8"}):
        with pytest.raises(ConfigError, match="is unknown"):
            extract(base="none", tuned="none", out=tmp_path / "b.safetensors", rank=2, **choice)
    assert out.read_bytes() == b"mine"
