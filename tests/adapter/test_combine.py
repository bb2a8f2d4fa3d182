"""Several adapters as one: exact sums, best approximations, hand-computed elections, and what cannot be combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter.combine import METHODS, WITH_RANK, Adapter, Recipe, combine
from lora_booth.adapter.files import storage
from lora_booth.adapter.weights import AnyWeights, Dense, LowRank, delta
from lora_booth.errors import ConfigError, ModelError
from lora_booth.run import disk
from lora_booth.verbs.merge import merge_adapters, merge_into_base
from tests.support import adapted
from tests.support.runs import Recorder

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def layer(
    rank: int = 2, scale: float = 0.5, inputs: int = 8, outputs: int = 10, seed: int = 0, tail: int = 0
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    kernel = (tail, tail) if tail else ()
    down = torch.randn(rank, inputs, *kernel, generator=generator)
    return LowRank(down, torch.randn(outputs, rank, *([1, 1] if tail else []), generator=generator), scale)


def one(update: LowRank | Dense, strength: float = 1.0, name: str = "a") -> Adapter:
    return Adapter(name, {"unet": {LAYER: update}}, strength)


def combined(adapters: list[Adapter], **recipe: Any) -> Tensor:
    """The combined change of the one layer."""
    return delta(combine(adapters, Recipe(**recipe)).weights["unet"][LAYER])


@pytest.mark.parametrize("tail", [0, 3])
def test_concat_is_exactly_the_sum_of_the_changes_and_its_rank_the_sum_of_ranks(tail: int) -> None:
    updates = [layer(2, 0.5, seed=1, tail=tail), layer(3, -2.0, seed=2, tail=tail), layer(1, 1.0, seed=3, tail=tail)]
    adapters = [one(update, strength) for update, strength in zip(updates, (1.0, 0.3, -0.7), strict=True)]
    result = combine(adapters, Recipe("concat"))
    low = result.weights["unet"][LAYER]
    assert (low.rank, low.scale, result.steps) == (6, 1.0, {})
    expected = delta(updates[0]).double() + 0.3 * delta(updates[1]).double() - 0.7 * delta(updates[2]).double()
    assert torch.allclose(delta(low).double(), expected, atol=1e-5)  # float32 sums of products of size 1 to 10


def test_svd_at_full_rank_is_exact_and_at_less_the_best_there_is() -> None:
    updates = [layer(2, seed=1), layer(3, seed=2)]
    adapters = [one(updates[0]), one(updates[1], 0.5)]
    expected = delta(updates[0]) + 0.5 * delta(updates[1])
    assert torch.allclose(combined(adapters, method="svd", rank=5), expected, atol=1e-5)
    result = combine(adapters, Recipe("svd", rank=2))
    assert result.weights["unet"][LAYER].rank == 2
    values = torch.linalg.svdvals(expected.double())
    best = float(values[2:].norm() / values.norm())
    assert result.steps["unet"][LAYER].error == pytest.approx(best, rel=1e-4)
    found = delta(result.weights["unet"][LAYER])
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(best, rel=1e-4)


def test_svd_takes_kinds_without_factors_and_the_largest_rank_where_none_is_given() -> None:
    dense = Dense("diff", torch.randn(10, 8, generator=torch.Generator().manual_seed(4)))
    adapters = [one(layer(7, seed=1)), one(dense, 2.0)]
    assert torch.allclose(
        combined(adapters, method="svd", rank=8), delta(layer(7, seed=1)) + 2 * dense.delta, atol=1e-4
    )
    assert combine(adapters, Recipe("svd")).weights["unet"][LAYER].rank == 7
    with pytest.raises(ConfigError, match="None of the adapters has a rank"):
        combine([one(dense)], Recipe("svd"))


def test_linear_of_equal_adapters_is_the_adapter_and_of_others_the_product_of_means() -> None:
    update, other = layer(seed=1), layer(seed=2)
    same = combined([one(update, 0.5), one(update, 0.5)], method="linear")
    assert torch.allclose(same, delta(update), atol=1e-6)
    twice = combined([one(update, 1.0), one(update, 1.0)], method="linear")
    assert torch.allclose(twice, 2 * delta(update), atol=1e-6)
    down, up = 0.25 * update.down + 0.75 * other.down, 0.25 * update.up + 0.75 * other.up
    mixed = combined([one(update, 0.25), one(other, 0.75)], method="linear")
    assert torch.allclose(mixed, 0.5 * up @ down, atol=1e-6)


def matrix(*rows: list[float]) -> Dense:
    return Dense("diff", torch.tensor(rows))


def test_ties_keeps_the_largest_elects_signs_and_averages_those_that_agree() -> None:
    first = matrix([4.0, -1.0, 0.5], [-2.0, 3.0, 0.1])
    second = matrix([-1.0, -5.0, 0.2], [-4.0, 2.0, 0.3])
    found = combined([one(first), one(second)], method="ties", rank=2, density=0.5)
    # half of 6 entries each: first keeps 4, 3, -2; second keeps -5, -4, 2. Signs elected: +, -, none, -, +, none.
    # Averaged over those that agree: 4; -5; 0; (-2 - 4) / 2; (3 + 2) / 2; 0.
    assert torch.allclose(found, torch.tensor([[4.0, -5.0, 0.0], [-3.0, 2.5, 0.0]]), atol=1e-5)


def test_ties_drops_the_minority_and_weighs_by_strength() -> None:
    first, second = matrix([4.0, 1.0]), matrix([-1.0, 3.0])
    found = combined([one(first, 0.5), one(second, 2.0)], method="ties", rank=1, density=1.0)
    # sums 3 and 4 elect + and +: the first column has 0.5 * 4 alone, the second (0.5 * 1 + 2 * 3) / 2
    assert torch.allclose(found, torch.tensor([[2.0, 3.25]]), atol=1e-5)


def test_dare_at_density_1_is_the_sum_and_below_keeps_a_share_scaled_up() -> None:
    first, second = torch.full((40, 30), 2.0), torch.full((40, 30), 0.5)
    adapters = [one(Dense("diff", first)), one(Dense("diff", second), 2.0)]
    assert torch.allclose(combined(adapters, method="dare_linear", rank=30, density=1.0), first + 2 * second, atol=1e-4)
    found = combined(adapters, method="dare_linear", rank=30, density=0.25)
    # each entry is kept with 1/4 and then four times as large: 8 from the first, 2 * 2 from the second
    possible = torch.tensor([0.0, 4.0, 8.0, 12.0])
    assert (found[..., None] - possible).abs().min(-1).values.max() < 1e-3
    assert float(found.mean()) == pytest.approx(3.0, rel=0.2)  # 1200 entries of deviation 3.9: 0.11 of the mean
    elected = combined(adapters, method="dare_ties", rank=30, density=0.25)
    # all signs are +: where both are kept, their mean
    assert (elected[..., None] - torch.tensor([0.0, 4.0, 6.0, 8.0])).abs().min(-1).values.max() < 1e-3


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_depends_on_its_seed_and_the_layer_alone_and_leaves_the_global_state(method: str) -> None:
    adapters = [one(layer(seed=1)), one(layer(seed=2))]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = combined(adapters, method=method, rank=8, density=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(combined(adapters, method=method, rank=8, density=0.5, seed=3), first)
    assert not torch.equal(combined(adapters, method=method, rank=8, density=0.5, seed=4), first)
    more = [
        Adapter(a.name, {"unet": dict.fromkeys(("conv_in", LAYER), a.weights["unet"][LAYER])}, 1.0) for a in adapters
    ]
    weights = combine(more, Recipe(method, 8, 0.5, 3)).weights["unet"]
    assert torch.equal(delta(weights[LAYER]), first)
    assert not torch.equal(delta(weights["conv_in"]), first)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
def test_a_layer_that_an_adapter_lacks_counts_as_no_change(method: str) -> None:
    update = layer(seed=1)
    weights: AnyWeights = {"text_encoder": {"encoder.layers.0.mlp.fc1": layer(seed=3)}}
    result = combine(
        [one(update, 0.5), Adapter("b", weights, 1.0)], Recipe(method, 8 if method in WITH_RANK else None, 1.0)
    )
    assert {component: list(layers) for component, layers in result.weights.items()} == {
        "unet": [LAYER],
        "text_encoder": ["encoder.layers.0.mlp.fc1"],
    }
    assert torch.allclose(delta(result.weights["unet"][LAYER]), 0.5 * delta(update), atol=1e-5)


def test_linear_and_1x1_convolution_spellings_of_one_layer_are_added() -> None:
    linear, convolution = layer(seed=1), layer(seed=2, tail=1)
    for method in ("concat", "svd"):
        found = combined([one(linear), one(convolution)], method=method, rank=4 if method == "svd" else None)
        assert torch.allclose(found, delta(linear)[..., None, None] + delta(convolution), atol=1e-5)


def test_progress_is_told_layer_by_layer() -> None:
    told: list[tuple[int, int]] = []
    weights: AnyWeights = {"unet": {LAYER: layer(), "conv_in": layer()}}
    combine([Adapter("a", weights, 1.0)], Recipe(), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("adapters", "recipe", "error", "message"),
    [
        ([one(layer())], {"method": "mean"}, ConfigError, 'method "mean" is unknown; use one of concat, svd'),
        ([one(layer())], {"method": "concat", "rank": 4}, ConfigError, "no choice of rank"),
        ([one(layer())], {"method": "svd", "rank": 0}, ConfigError, "rank is 0"),
        ([one(layer())], {"method": "ties", "density": 0.0}, ConfigError, "density is 0"),
        ([one(layer(), 0.0)], {}, ConfigError, "All strengths are 0"),
        ([one(layer(), 1.0), one(layer(), -1.0)], {"method": "linear"}, ConfigError, "sum up to 0"),
        ([one(layer(2)), one(layer(3), name="b")], {"method": "linear"}, ModelError, "rank 2, 3 in a, b; linear"),
        ([one(layer()), Adapter("b", {"unet": {"conv_in": layer()}}, 1.0)], {"method": "linear"}, ModelError, "2, 0"),
        ([one(layer()), one(layer(inputs=9))], {}, ModelError, r"\[10, 8\] and \[10, 9\].*different bases"),
        ([one(layer()), one(layer(tail=3))], {}, ModelError, "different bases"),
        ([one(Dense("loha", torch.ones(10, 8)), name="x")], {}, ModelError, "x is loha at .*use method svd"),
        ([one(LowRank(torch.ones(1, 8), torch.ones(10, 1), 1.0, torch.ones(10)), name="d")], {}, ModelError,
         "d is DoRA.*depends on the base"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(
    adapters: list[Adapter], recipe: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        combine(adapters, Recipe(**recipe))


def written(path: Path, seed: int, *, width: int = 768, family: str = "sd1", **header: str) -> Path:
    weights: AnyWeights = {"unet": {LAYER: layer(inputs=width, outputs=32, seed=seed)}}
    storage.FORMATS["kohya"].write(path, weights, family, torch.float32, header)
    return path


def test_a_merged_file_says_what_went_in_and_keeps_what_the_others_agree_on(tmp_path: Path) -> None:
    header = {"modelspec.resolution": "512x512", "ss_base_model_version": "sd_v1"}
    one = written(tmp_path / "dog.safetensors", 1, **header, **{"modelspec.trigger_phrase": "yql dog"})
    two = written(tmp_path / "cat.safetensors", 2, **header, **{"modelspec.trigger_phrase": "ohwx cat"})
    recorder = Recorder()
    out = merge_adapters(
        adapters=[(one, 1.0), (two, 0.5)],
        out=tmp_path / "both.safetensors",
        formats=("kohya", "diffusers"),
        dtype="fp32",
        report=recorder,
    )
    expected = delta(storage.read(one)["unet"][LAYER]) + 0.5 * delta(storage.read(two)["unet"][LAYER])
    for path in (out, tmp_path / "both_diffusers.safetensors"):
        assert torch.allclose(delta(storage.read(path)["unet"][LAYER]), expected, atol=1e-5)
        found = storage.read_metadata(path)
        assert found["modelspec.merged_from"] == "dog.safetensors, cat.safetensors"
        assert found["modelspec.trigger_phrase"] == "yql dog, ohwx cat"
        assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert (found["ss_base_model_version"], found["ss_v2"]) == ("sd_v1", "False")
        assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
        assert (found["modelspec.title"], found["modelspec.resolution"]) == ("both", "512x512")
        merged = json.loads(found["lora_booth.merged"])
        assert merged["adapters"][1] == {"file": "cat.safetensors", "sha256": disk.sha256(two), "strength": 0.5}
        assert merged["method"] == "concat"
        assert str(tmp_path) not in json.dumps(found)
    assert recorder.tasks == {"layers": 1}
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}


def test_the_family_is_told_by_the_files_and_must_be_one(tmp_path: Path) -> None:
    one, two = (
        written(tmp_path / "one.safetensors", 1),
        written(tmp_path / "xl.safetensors", 2, width=2048, family="sdxl"),
    )
    out = tmp_path / "out.safetensors"
    with pytest.raises(ModelError, match=r"one\.safetensors \(sd1\) and xl\.safetensors \(sdxl\) were made for differ"):
        merge_adapters(adapters=[(one, 1.0), (two, 1.0)], out=out)
    with pytest.raises(ModelError, match="made for sd1, not sdxl"):
        merge_adapters(adapters=[(one, 1.0)], out=out, family="sdxl")
    with pytest.raises(ConfigError, match='family "sd3" is unknown'):
        merge_adapters(adapters=[(one, 1.0)], out=out, family="sd3")
    small = written(tmp_path / "small.safetensors", 1, width=32)
    with pytest.raises(ModelError, match=r"small\.safetensors do not tell.*sd1, sd2, sdxl"):
        merge_adapters(adapters=[(small, 1.0)], out=out)
    mini = written(tmp_path / "mini.safetensors", 1, width=192)
    with pytest.raises(ModelError, match=r"text width \(768\).*text width \(192\)"):
        merge_adapters(adapters=[(one, 1.0), (mini, 1.0)], out=out)
    assert not out.exists()
    merge_adapters(adapters=[(two, 1.0)], out=out)
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.alpha" in load_file(out)
    told = written(tmp_path / "told.safetensors", 1, width=32, ss_base_model_version="sd_v2_v")
    merge_adapters(adapters=[(told, 1.0)], out=tmp_path / "v.safetensors")
    found = storage.read_metadata(tmp_path / "v.safetensors")
    assert (found["ss_base_model_version"], found["modelspec.prediction_type"]) == ("sd_v2_v", "v")
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, '--dtype "int8" is unknown'),
        ({"formats": ("gguf",)}, "use diffusers or kohya"),
        ({"formats": ()}, "use diffusers or kohya"),
        ({"out": "one.safetensors"}, "exists and is not replaced"),
        ({"out": "two"}, r"must end in \.safetensors"),
        ({"formats": ("kohya", "diffusers")}, r"out_diffusers\.safetensors exists"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "one.safetensors", 1)
    (tmp_path / "out_diffusers.safetensors").write_text("mine")
    names = {path.name for path in tmp_path.iterdir()}
    out = tmp_path / settings.pop("out", "out.safetensors")
    with pytest.raises(ConfigError, match=message):
        merge_adapters(adapters=[(file, 1.0)], out=out, **settings)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_errors_of_the_low_rank_step_are_reported(tmp_path: Path) -> None:
    adapters = [(written(tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in range(3)]
    recorder = Recorder()
    out = merge_adapters(
        adapters=adapters, out=tmp_path / "out.safetensors", method="ties", rank=2, density=0.5, report=recorder
    )
    assert storage.read(out)["unet"][LAYER].rank == 2
    assert any(kind == "error" and "mid_block" in text for kind, text in recorder.events)
    assert json.loads(storage.read_metadata(out)["lora_booth.merged"])["density"] == 0.5


def test_merging_one_by_one_and_merging_the_combined_adapter_give_the_same_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    weights, _ = adapted.trained_mixed("sdxl", bases)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    storage.FORMATS["kohya"].write(one, weights, "sdxl", torch.float32, {"ss_base_model_version": "sdxl_base_v1-0"})
    save_file({key: tensor * 0.7 for key, tensor in load_file(one).items()}, two)
    adapters = [(one, 0.8), (two, -0.4)]
    whole = merge_adapters(adapters=adapters, out=tmp_path / "whole.safetensors", dtype="fp32")
    apart = merge_into_base(base=str(bases["sdxl"]), adapters=adapters, out=tmp_path / "apart")
    together = merge_into_base(base=str(bases["sdxl"]), adapters=[(whole, 1.0)], out=tmp_path / "together")
    checked = 0
    for path in apart.rglob("*.safetensors"):
        found = load_file(together / path.relative_to(apart))
        for key, tensor in load_file(path).items():
            assert torch.allclose(found[key], tensor, atol=1e-5), key
            checked += 1
    assert checked > 500
