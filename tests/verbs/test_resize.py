"""Resizing files: the best approximation is written, its error is told, what is small enough keeps its bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter import inject
from lora_booth.adapter.decompose import approximate
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import AdapterWeights, LowRank, delta, find_module
from lora_booth.errors import ConfigError, ModelError
from lora_booth.verbs.resize import resize
from tests.support import adapted
from tests.support.adapted import MIXED, adapted_pipeline, components, draw, pipeline, relative_difference
from tests.support.runs import Recorder

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "mid_block.resnets.0.conv1"
TEXT = "encoder.layers.1.self_attn.q_proj"
FEW = r"regex:mid_block\..+(attn1\.to_q|attn2\.to_k|proj_in|conv1)"
"""One of each kind of layer."""


def low_rank(rank: int, *tail: int, scale: float = 0.5, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 16, *tail, generator=generator)
    return LowRank(down, torch.randn(24, rank, *(1 for _ in tail), generator=generator), scale)


def adapter() -> AdapterWeights:
    """Ranks 8, 6 and 2, all of alpha 4."""
    return {
        "unet": {LINEAR: low_rank(8), CONVOLUTION: low_rank(6, 3, 3, scale=4 / 6)},
        "text_encoder": {TEXT: low_rank(2, scale=2.0)},
    }


def written(path: Path, weights: AdapterWeights, format: str = "kohya", dtype: torch.dtype = torch.float32) -> Path:
    storage.FORMATS[format].write(path, weights, "sd1", dtype, {"ss_network_dim": "8", "modelspec.title": "rex"})
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    return {f"{c}.{p}": delta(update) for c, layers in storage.read(path).items() for p, update in layers.items()}


def told_errors(recorder: Recorder) -> dict[str, float]:
    lines = [text.split() for kind, text in recorder.events if kind == "error"]
    return {line[0]: float(line[-1].rstrip("%")) / 100 for line in lines}


@pytest.mark.parametrize("format", storage.FORMATS)
def test_the_told_errors_are_those_between_the_two_files(format: str, tmp_path: Path) -> None:
    recorder = Recorder()
    file = written(tmp_path / "rex.safetensors", adapter(), format)
    out = resize(file=file, rank=3, report=recorder)
    assert out == tmp_path / "rex_rank3.safetensors"
    assert storage.detect(out) == format
    before, after = deltas(file), deltas(out)
    assert before.keys() == after.keys()
    lost = {name: float((after[name] - change).norm()) for name, change in before.items()}
    norms = {name: float(change.norm()) for name, change in before.items()}
    found = told_errors(recorder)
    assert found.keys() == {"down_blocks.1", "mid_block", "text_encoder", "all"}
    linear, convolution, text = f"unet.{LINEAR}", f"unet.{CONVOLUTION}", f"text_encoder.{TEXT}"
    assert found["down_blocks.1"] == pytest.approx(lost[linear] / norms[linear], abs=1e-5)
    assert found["mid_block"] == pytest.approx(lost[convolution] / norms[convolution], abs=1e-5)
    assert found["text_encoder"] == lost[text] == 0
    whole = sum(v * v for v in lost.values()) ** 0.5 / sum(v * v for v in norms.values()) ** 0.5
    assert found["all"] == pytest.approx(whole, abs=1e-5) and whole > 0.1
    best = approximate(before[linear], rank=3).error
    assert lost[linear] / norms[linear] == pytest.approx(best, abs=1e-5)
    note = json.loads(storage.read_metadata(out)["lora_booth.resized"])
    assert note == {"file": "rex.safetensors", "rank": 3, "error": pytest.approx(whole, abs=1e-5)}


@pytest.mark.parametrize("format", storage.FORMATS)
def test_layers_of_low_enough_rank_keep_their_bits(format: str, tmp_path: Path) -> None:
    file = written(tmp_path / "rex.safetensors", adapter(), format, torch.float16)
    out = resize(file=file, rank=2)
    before, after = (storage.read(path)["text_encoder"][TEXT] for path in (file, out))
    assert torch.equal(before.down, after.down) and torch.equal(before.up, after.up)
    assert before.scale == after.scale
    same = resize(file=file, rank=8)
    old, new = load_file(file), load_file(same)
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[key]) and tensor.dtype == new[key].dtype for key, tensor in old.items())


def test_a_layer_beside_resized_ones_keeps_its_bits_in_the_same_component(tmp_path: Path) -> None:
    weights: AdapterWeights = {"unet": {LINEAR: low_rank(8), CONVOLUTION: low_rank(3, 3, 3, scale=4 / 3)}}
    file = written(tmp_path / "rex.safetensors", weights, dtype=torch.float16)
    old, new = load_file(file), load_file(resize(file=file, rank=5))
    kept = [key for key in old if "resnets" in key]
    assert len(kept) == 3
    assert all(torch.equal(old[key], new[key]) for key in kept)
    assert {float(value) for key, value in new.items() if key.endswith("alpha")} == {4.0}


def test_energy_gives_each_layer_its_own_rank(tmp_path: Path) -> None:
    values = torch.tensor([10.0, 1.0, 0.1, 0.01])
    steep = LowRank(torch.eye(4, 16), torch.eye(24, 4) * values, 1.0)
    flat = LowRank(torch.eye(4, 16), torch.eye(24, 4), 1.0)
    file = written(tmp_path / "rex.safetensors", {"unet": {LINEAR: steep}, "text_encoder": {TEXT: flat}})
    out = resize(file=file, energy=0.95)
    assert out.name == "rex_energy95.safetensors"
    found = storage.read(out)
    assert (found["unet"][LINEAR].rank, found["text_encoder"][TEXT].rank) == (1, 4)
    fields = storage.read_metadata(out)
    assert (fields["ss_network_dim"], fields["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert resize(file=file, energy=0.999).name == "rex_energy99.9.safetensors"


def test_metadata_is_carried_over_with_rank_alpha_name_and_hashes_of_the_new_file(tmp_path: Path) -> None:
    weights: AdapterWeights = {"unet": {LINEAR: low_rank(8)}}
    path = tmp_path / "rex.safetensors"
    header = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "modelspec.title": "rex", "ss_output_name": "rex"}
    header |= {"ss_network_args": '{"conv_dim": "4"}', "sshs_legacy_hash": "abcd", "ss_steps": "400"}
    storage.FORMATS["kohya"].write(path, weights, "sd1", torch.float16, header)
    out = resize(file=path, out=tmp_path / "small" / "one.safetensors", rank=2)
    old, new = storage.read_metadata(path), storage.read_metadata(out)
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("2", "4.0")
    assert (new["modelspec.title"], new["ss_steps"], new["ss_output_name"]) == ("rex", "400", "one")
    assert not {"ss_network_args", "sshs_legacy_hash"} & new.keys()
    assert new["sshs_model_hash"] != old["sshs_model_hash"]
    assert load_file(out)[next(key for key in load_file(out) if "lora_up" in key)].dtype == torch.float16


def test_a_header_that_scales_is_not_applied_twice(tmp_path: Path) -> None:
    tensors = {f"unet.{LINEAR}.lora_A.weight": low_rank(4).down, f"unet.{LINEAR}.lora_B.weight": low_rank(4).up}
    path = tmp_path / "peft.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 4})})
    out = resize(file=path, rank=4)
    assert relative_difference(deltas(out)[f"unet.{LINEAR}"], delta(low_rank(4, scale=0.5))) < 1e-6
    assert "lora_adapter_metadata" not in storage.read_metadata(out)


@pytest.mark.parametrize("format", storage.FORMATS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_adapter_resized_to_its_own_rank_draws_the_same_picture(
    family: str, format: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = adapted_pipeline(family, bases, targets=FEW, rank=4, alpha=3.0)
    weights, expected = inject.collect(components(adapted)), draw(adapted)
    doubled = {c: {p: _in_twice_the_rank(low) for p, low in layers.items()} for c, layers in weights.items()}
    file = tmp_path / "a.safetensors"
    storage.FORMATS[format].write(file, doubled, family, torch.float32, {})
    out = resize(file=file, rank=4)
    assert {low.rank for layers in storage.read(out).values() for low in layers.values()} == {4}
    pipe = pipeline(family, bases)
    assert relative_difference(expected, draw(pipe)) > 1e-2
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    assert relative_difference(draw(pipe), expected) < 1e-4


def _in_twice_the_rank(low: LowRank) -> LowRank:
    """The same update with every inner dimension split in two, so that resizing has work to do."""
    return LowRank(torch.cat([low.down, low.down]), torch.cat([low.up * 0.25, low.up * 0.75], dim=1), low.scale)


def test_the_family_of_a_portable_file_is_known_from_its_layers(bases: dict[str, Path], tmp_path: Path) -> None:
    pipe = adapted_pipeline("sdxl", bases, **MIXED)
    unet = inject.collect(components(pipe))["unet"]
    file = tmp_path / "a.safetensors"
    storage.FORMATS["kohya"].write(file, {"unet": unet}, "sdxl", torch.float16, {})
    out = resize(file=file, rank=1)
    assert load_file(out).keys() == load_file(file).keys()
    assert sum("input_blocks" in key for key in load_file(out)) > 50


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_dora_with_its_base_becomes_a_plain_lora_of_the_true_change(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pipe = adapted_pipeline(family, bases, targets=FEW, rank=2, dora=True)
    modules, plain = components(pipe), components(pipeline(family, bases))
    dora, expected = inject.collect(modules), draw(pipe)
    file = tmp_path / "dora.safetensors"
    storage.FORMATS["diffusers"].write(file, dora, family, torch.float32, {})
    recorder = Recorder()
    out = resize(
        file=file, rank=512, base=str(bases[family]), format="kohya", out=tmp_path / "x.safetensors", report=recorder
    )
    assert told_errors(recorder)["all"] < 1e-5
    found, checked = storage.read(out), 0
    for component, layers in dora.items():
        for path, update in layers.items():
            weight = find_module(plain[component], path).get_parameter("weight")
            assert found[component][path].magnitude is None
            merged = adapted.merged_weight(weight, found[component][path])
            assert relative_difference(merged, adapted.merged_weight(weight, update)) < 1e-5
            checked += 1
    assert checked >= 4 + 12
    pipe = pipeline(family, bases)
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    assert relative_difference(draw(pipe), expected) < 1e-4
    assert resize(file=file, rank=2, base=str(bases[family])) == tmp_path / "dora_rank2.safetensors"
    assert json.loads(storage.read_metadata(out)["lora_booth.resized"])["base"] == bases[family].name


def test_dora_needs_the_base_it_was_made_for(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    good = LowRank(torch.ones(2, 16), torch.ones(16, 2), 1.0, magnitude=torch.ones(16))
    wide = LowRank(torch.ones(2, 20), torch.ones(20, 2), 1.0, magnitude=torch.ones(20))
    unknown = {"unet": {"down_blocks.7.attn1.to_q": good}}
    cases: list[tuple[AdapterWeights, str | None, str]] = [
        ({"unet": {name: good}}, None, "name the base that it was trained on with --base"),
        ({"unet": {name: wide}}, "sd1", r"unet\.down_blocks\.0.+ does not fit the base"),
        (unknown, "sd1", r"unet\.down_blocks\.7\.attn1\.to_q does not fit the base: UNet2DConditionModel has no layer"),
        ({"text_encoder_2": {TEXT: good}}, "sd1", "changes text_encoder_2, which .* lacks"),
    ]
    for number, (weights, family, message) in enumerate(cases):
        file = written(tmp_path / f"{number}.safetensors", weights, "diffusers")
        with pytest.raises(ModelError, match=message):
            resize(file=file, rank=1, base=None if family is None else str(bases[family]))
    assert len(list(tmp_path.iterdir())) == len(cases)


def test_a_base_that_is_not_needed_is_told_and_not_read(tmp_path: Path) -> None:
    recorder = Recorder()
    resize(file=written(tmp_path / "rex.safetensors", adapter()), rank=2, base="no/such_base", report=recorder)
    assert any("without --base" in text for text in recorder.warnings)


def test_other_kinds_become_plain_lora(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)}
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{key}.{name}": torch.randn(shape, generator=generator) for name, shape in names.items()}
    save_file(tensors | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "loha.safetensors")
    out = resize(file=tmp_path / "loha.safetensors", rank=4)  # an entrywise product of ranks 2 and 2 has rank 4
    first, second = (tensors[f"{key}.hada_w{n}_a"] @ tensors[f"{key}.hada_w{n}_b"] for n in "12")
    assert relative_difference(deltas(out)[f"unet.{LINEAR}"], 0.5 * first * second) < 1e-5


@pytest.mark.parametrize("dtype", storage.DTYPES)
def test_the_type_is_the_sources_unless_another_is_asked_for(dtype: str, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", adapter(), dtype=storage.DTYPES[dtype])
    assert _factor_types(resize(file=file, rank=2)) == {storage.DTYPES[dtype]}
    other = resize(file=file, rank=2, dtype="fp32", format="diffusers", out=tmp_path / "b.safetensors")
    assert _factor_types(other) == {torch.float32}
    assert storage.detect(other) == "diffusers"


def _factor_types(path: Path) -> set[torch.dtype]:
    with safe_open(path, "pt") as file:
        return {file.get_tensor(key).dtype for key in file.keys() if not key.endswith("alpha")}  # noqa: SIM118


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    file = written(tmp_path / "rex.safetensors", adapter())
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        resize(file=file, out=file, rank=2)
    out = resize(file=file, rank=2)
    kept = out.read_bytes()
    with pytest.raises(ConfigError, match=r"rex_rank2\.safetensors exists"):
        resize(file=file, rank=2)
    assert (file.read_bytes(), out.read_bytes()) == (before, kept)


def test_contradicting_settings_and_broken_files_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "rex.safetensors", adapter())
    with pytest.raises(ConfigError, match="either a rank or an energy"):
        resize(file=file)
    with pytest.raises(ConfigError, match="either a rank or an energy"):
        resize(file=file, rank=2, energy=0.5)
    with pytest.raises(ConfigError, match='--format "a1111" is unknown; use diffusers or kohya'):
        resize(file=file, rank=2, format="a1111")
    with pytest.raises(ConfigError, match='--dtype "fp8" is unknown'):
        resize(file=file, rank=2, dtype="fp8")
    (tmp_path / "bad.safetensors").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match="bad"):
        resize(file=tmp_path / "bad.safetensors", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "rex.safetensors"]
