"""Targets, frozen base, float32 parameters, deterministic starts, strength, loading."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_booth.adapter import inject
from lora_booth.adapter.weights import delta
from lora_booth.config.patterns import Pattern
from lora_booth.config.settings import TARGET_PRESETS, AdapterConfig
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases import unets
from tests.support import adapted

KINDS: list[dict[str, Any]] = [
    {},
    {"dora": True},
    {"init": "gaussian", "rslora": True, "alpha": 3.0, "rank_pattern": {"to_q": 2}},
]


SOME = r"regex:(mid|down).*\.(attn1\.to_q|attn2\.to_v|proj_in|ff\.net\.2|conv2|time_emb_proj|conv_shortcut)|conv_in"
"""Every kind of layer a few times; PEFT's injection takes time per layer."""


def tiny_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    return unet.to(dtype).eval()


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = next(p for n, p in unet.named_parameters() if "lora" not in n).dtype
    noisy = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 5, 8, generator=generator).to(dtype)
    return unet(noisy, torch.tensor([3, 700]), context).sample


def tiny_text(kind: Callable[[CLIPTextConfig], nn.Module] = CLIPTextModel) -> nn.Module:
    return kind(CLIPTextConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
                               num_attention_heads=2, max_position_embeddings=8, projection_dim=8,
                               bos_token_id=48, eos_token_id=49))  # fmt: skip


def adapter(**values: Any) -> AdapterConfig:
    return AdapterConfig(**({"targets": SOME, "rank": 4} | values))


COUNTS = {
    # SD 1.5 has 16 transformer blocks: 16 x 2 attentions x 4 = 128, + 2 ff each = 160, + 16 proj_in, proj_out = 192.
    # Convolutional side: 22 resnets x 3 + 14 shortcuts + 3 down + 3 up = 86.
    "sd1": {"attention": 128, "attention+ff": 160, "all-linear": 192, "+conv": 86},
    # SDXL has 70 transformer blocks in 11 attentions, 17 resnets with 11 shortcuts, 2 + 2 samplers: 788 in all, as many
    # as sd-scripts' LoRA network makes (interop notes, 1.6).
    "sdxl": {"attention": 560, "attention+ff": 700, "all-linear": 722, "+conv": 66},
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_presets_find_the_known_number_of_layers_in_the_real_unets(family: str) -> None:
    unet, counts = adapted.full_size_unet(family), COUNTS[family]
    for preset in TARGET_PRESETS:
        expected = counts[preset.removesuffix("+conv")] + (counts["+conv"] if preset.endswith("+conv") else 0)
        names = inject.target_modules(unet, preset)
        assert len(names) == len(set(names)) == expected, preset
        assert not [n for n in names if not n.startswith(("down_blocks.", "mid_block.", "up_blocks."))]


def test_regex_targets_match_whole_names_of_linear_and_convolutional_layers_only() -> None:
    unet = tiny_unet()
    names = inject.target_modules(unet, r"regex:mid_block\..*\.attn2\..*")
    assert names == [
        f"mid_block.attentions.0.transformer_blocks.0.attn2.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    ]  # to_out itself and to_out.1, the dropout, match too and are no layers with a weight


def test_targets_that_match_nothing_are_refused_with_the_nearest_names() -> None:
    with pytest.raises(ModelError, match=r"mid_block\.attentions\.0\.proj_ni.*matches none of the \d+ .*proj_in"):
        inject.target_modules(tiny_unet(), "regex:mid_block.attentions.0.proj_ni")
    with pytest.raises(ModelError, match="whole name"):
        inject.target_modules(tiny_unet(), "regex:attn1")
    with pytest.raises(ConfigError, match="use one of attention"):
        inject.target_modules(tiny_unet(), "attentions")
    with pytest.raises(ConfigError, match="not a regular expression"):
        inject.target_modules(tiny_unet(), "regex:(")


HOSTILE = r"(.*.*.*.*)*(\w+\.?)+(a|aa)+!"
"""On a name of fifty letters Python's own engine goes back and tries again for longer than the sun will shine."""


@pytest.mark.parametrize("text", [HOSTILE, f"{HOSTILE}|mid_block.+", "(" * 500 + "x" + ")*" * 500])
def test_a_pattern_that_would_take_for_ever_is_matched_in_one_pass_over_each_name(text: str) -> None:
    unet = tiny_unet()
    expected = {n for n in plain_layers(unet) if n.startswith("mid_block.")} if "mid_block" in text else set()
    if expected:
        assert set(inject.target_modules(unet, f"regex:{text}")) == expected
    else:
        with pytest.raises(ModelError, match="matches none"):
            inject.target_modules(unet, f"regex:{text}")
    with pytest.raises(ModelError, match="matches no adapted layer"):
        inject.inject_({"unet": unet}, adapter(rank_pattern={HOSTILE: 2}))


def test_patterns_mean_what_they_mean_to_pythons_engine() -> None:
    """Of those that both know: RE2 is told to match whole names, and ends of names, as `re` was."""
    names = [f"unet.{name}" for name in plain_layers(tiny_unet())]
    texts = [
        *unets.TARGETS.values(),
        *inject._TEXT_TARGETS.values(),
        SOME.removeprefix("regex:"),
        "to_[qk]",
        r"\d\.proj_in",
        "(?i)TO_Q",
        "a|b",
        "",
        ".*",
    ]
    matched = 0
    for text in texts:
        whole, end = Pattern(text, "x"), Pattern(text, "x", is_end=True)
        for name in names:
            flags = re.IGNORECASE if text.startswith("(?i)") else 0
            plain = text.removeprefix("(?i)")
            assert whole.matches(name) == bool(re.fullmatch(plain, name, flags)), (text, name)
            assert end.matches(name) == bool(re.match(rf"(.*\.)?({plain})$", name, flags)), (text, name)
            matched += end.matches(name)
    assert matched > 300


def plain_layers(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_get_all_four_projections_of_the_layers_that_are_read(kind: Any) -> None:
    text = tiny_text(kind)
    inject.inject_({"text_encoder": text}, adapter(), num_used_text_layers={"text_encoder": 2})
    paths = list(inject.collect({"text_encoder": text})["text_encoder"])
    leaves = ("k_proj", "v_proj", "q_proj", "out_proj")
    assert sorted(paths) == sorted(f"encoder.layers.{i}.self_attn.{leaf}" for i in (0, 1) for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_adapter_changes_nothing(kind: dict[str, Any], dtype: torch.dtype) -> None:
    unet = tiny_unet(dtype)
    with torch.no_grad():
        base = forward(unet)
        inject.inject_({"unet": unet}, adapter(**kind))
        assert torch.equal(forward(unet), base)


def test_untrained_orthogonal_adapter_changes_only_the_rounding() -> None:
    unet = tiny_unet()
    with torch.no_grad():
        base = forward(unet)
        inject.inject_({"unet": unet}, adapter(init="orthogonal"))
        # up @ down is 0 in exact numbers; each of about 10 layers adds some float32 roundings of 1e-7
        assert (forward(unet) - base).abs().max() < 1e-5
    for low_rank in inject.collect({"unet": unet})["unet"].values():
        assert low_rank.up.abs().max() > 0
        assert delta(low_rank).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "with_autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_trainable_parameters_are_float32_and_nothing_else_has_gradients(
    kind: dict[str, Any], dtype: torch.dtype, with_autocast: bool
) -> None:
    unet = tiny_unet(dtype)
    parameters = inject.inject_({"unet": unet}, adapter(**kind))["unet"]
    adapted.randomise_({"unet": unet})
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        output = forward(unet)
    assert output.dtype == (torch.bfloat16 if with_autocast else dtype)
    output.float().square().sum().backward()
    ours = {id(p) for p in parameters}
    assert {p.dtype for p in parameters} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in parameters)
    others = [p for p in unet.parameters() if id(p) not in ours]
    assert others
    assert not any(p.requires_grad or p.grad is not None for p in others)
    assert {p.dtype for p in others} == {dtype}


def starts(unet: nn.Module, seed: int = 0, **values: Any) -> dict[str, Tensor]:
    inject.inject_({"unet": unet}, adapter(**values), seed=seed)
    return {path: low_rank.down for path, low_rank in inject.collect({"unet": unet})["unet"].items()}


def test_initial_values_depend_on_seed_and_layer_alone() -> None:
    first = starts(tiny_unet())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    narrow = tiny_unet(torch.bfloat16)
    torch.set_rng_state(before)
    second = starts(narrow, targets=r"regex:mid.*attn1\.to_q")
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
    assert 0 < len(second) < len(first)
    assert all(torch.equal(first[path], down) for path, down in second.items())
    other = starts(tiny_unet(), seed=1)
    assert not any(torch.equal(first[path], other[path]) for path in first)


def test_initial_values_have_pefts_distributions() -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"  # 64 inputs
    down = starts(tiny_unet(), rank=64)[path]
    assert down.shape == (64, 64)
    assert 0.98 / 8 < down.abs().max() <= 1 / 8, "uniform within 1 / sqrt(fan_in)"
    assert math.isclose(down.std().item(), 1 / 8 / math.sqrt(3), rel_tol=0.05)
    gaussian = starts(tiny_unet(), rank=64, init="gaussian")[path]
    assert math.isclose(gaussian.std().item(), 1 / 64, rel_tol=0.05)  # 4096 draws: 1 % is one standard error


def test_patterns_and_rslora_set_rank_and_scale_layer_by_layer() -> None:
    unet, text = tiny_unet(), tiny_text()
    config = adapter(
        targets="attention",
        rank_pattern={r"attn1\.to_q": 2, r"text_encoder\..*": 6},
        alpha_pattern={r"unet\..*\.to_v": 2.0},
    )
    inject.inject_({"unet": unet, "text_encoder": text}, config)
    weights = inject.collect({"unet": unet, "text_encoder": text})
    for path, low_rank in weights["unet"].items():
        rank = 2 if path.endswith("attn1.to_q") else 4
        scale = 0.5 if path.endswith("to_v") else 1.0  # alpha None is the layer's own rank
        assert (low_rank.rank, low_rank.scale) == (rank, scale), path
    assert {low_rank.rank for low_rank in weights["text_encoder"].values()} == {6}

    unet = tiny_unet()
    inject.inject_({"unet": unet}, adapter(rank=4, alpha=3.0, rslora=True))
    assert {low.scale for low in inject.collect({"unet": unet})["unet"].values()} == {1.5}  # 3 / sqrt(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_pattern": {"to_z": 2}}, 'has "to_z", which matches no adapted layer'),
        ({"alpha_pattern": {"(": 2.0}}, "not a regular expression"),
        ({"init": "orthogonal", "rank": 3}, "needs an even rank"),
        ({"targets": "regex:nothing"}, "matches none"),
    ],
)
def test_a_refused_adapter_leaves_every_module_untouched(values: dict[str, Any], message: str) -> None:
    unet, text = tiny_unet(), tiny_text()
    with pytest.raises((ModelError, ConfigError), match=message):
        inject.inject_({"text_encoder": text, "unet": unet}, adapter(**values))
    for module in (unet, text):
        assert not any(isinstance(child, LoraLayer) for child in module.modules())
        assert all(p.requires_grad for p in module.parameters())


def test_a_second_adapter_is_refused() -> None:
    unet = tiny_unet()
    inject.inject_({"unet": unet}, adapter())
    with pytest.raises(ModelError, match="already has an adapter"):
        inject.inject_({"unet": unet}, adapter())


def test_dropout_follows_the_mode_of_the_module() -> None:
    unet = tiny_unet().eval()
    inject.inject_({"unet": unet}, adapter(dropout=0.5))
    adapted.randomise_({"unet": unet})
    with torch.no_grad():
        assert torch.equal(forward(unet), forward(unet))
        assert not torch.equal(forward(unet.train()), forward(unet))


def test_number_of_parameters_is_rank_times_inputs_plus_outputs() -> None:
    unet = tiny_unet()
    parameters = inject.inject_({"unet": unet}, adapter(targets=r"regex:mid_block\.attentions\.0\.proj_in"))
    assert inject.num_parameters(parameters) == 4 * 16 + 16 * 4


@pytest.mark.parametrize(("kind", "dtype"), [(KINDS[0], torch.bfloat16), (KINDS[1], torch.float32)])
def test_strength_0_is_the_base_bit_for_bit(kind: dict[str, Any], dtype: torch.dtype) -> None:
    unet = tiny_unet(dtype)
    modules = {"unet": unet}
    with torch.no_grad():
        base = forward(unet)
        inject.inject_(modules, adapter(**kind))
        adapted.randomise_(modules)
        full = forward(unet)
        assert not torch.equal(full, base)
        adapted.set_adapter_scale_(modules, 0.0)
        assert torch.equal(forward(unet), base)
        adapted.set_adapter_scale_(modules, 1.0)
        assert torch.equal(forward(unet), full)


def test_strength_multiplies_the_update_and_not_what_is_saved() -> None:
    unet = tiny_unet()
    modules = {"unet": unet}
    inject.inject_(modules, adapter(targets=r"regex:mid_block\.attentions\.0\.proj_in", alpha=2.0))
    adapted.randomise_(modules)
    adapted.set_adapter_scale_(modules, -1.5)
    layer = unet.get_submodule("mid_block.attentions.0.proj_in")
    low_rank = inject.collect(modules)["unet"]["mid_block.attentions.0.proj_in"]
    assert low_rank.scale == 0.5
    inputs = torch.randn(1, 16, 3, 3)
    weight = layer.base_layer.weight - 1.5 * 0.5 * (low_rank.up[..., 0, 0] @ low_rank.down[..., 0, 0])[..., None, None]
    expected = nn.functional.conv2d(inputs, weight, layer.base_layer.bias)
    assert torch.allclose(layer(inputs), expected, atol=1e-5)  # float32 sums of 16 products
    with pytest.raises(ConfigError, match="finite"):
        adapted.set_adapter_scale_(modules, math.nan)


@pytest.mark.parametrize("kind", [{}, {"dora": True}])
def test_disabled_computes_the_base_and_restores_everything(kind: dict[str, Any]) -> None:
    unet = tiny_unet()
    modules = {"unet": unet}
    base = forward(unet).detach()
    parameters = inject.inject_(modules, adapter(**kind))["unet"]
    adapted.randomise_(modules)
    adapted.set_adapter_scale_(modules, 0.7)
    with torch.no_grad():
        before = forward(unet)
        with inject.disabled(modules):
            with inject.disabled(modules):
                assert torch.equal(forward(unet), base)
            assert torch.equal(forward(unet), base)
        assert torch.equal(forward(unet), before)
        with contextlib.suppress(KeyboardInterrupt), inject.disabled(modules):
            raise KeyboardInterrupt
        assert torch.equal(forward(unet), before)
    assert all(p.requires_grad for p in parameters)
    frozen = parameters[0].requires_grad_(False)
    with inject.disabled(modules):
        pass
    assert not frozen.requires_grad


@pytest.mark.parametrize("dora", [False, True])
def test_collected_weights_load_into_another_adapter_with_the_same_effect(dora: bool) -> None:
    first, second = tiny_unet(), tiny_unet()
    inject.inject_({"unet": first}, adapter(alpha=3.0, dora=dora))
    inject.inject_({"unet": second}, adapter(alpha=8.0, dora=dora), seed=9)
    adapted.randomise_({"unet": first})
    adapted.set_adapter_scale_({"unet": first}, 0.25)  # not part of the weights
    weights = inject.collect({"unet": first})
    adapted.set_adapter_scale_({"unet": first}, 1.0)
    for low_rank in weights["unet"].values():
        assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in low_rank.tensors)
    inject.load_into_({"unet": second}, weights)
    with torch.no_grad():
        # the alphas differ, so up is multiplied by 3/8: one rounding per number
        assert torch.allclose(forward(second), forward(first), atol=1e-4)
    third = tiny_unet()
    inject.inject_({"unet": third}, adapter(alpha=3.0, dora=dora), seed=9)
    inject.load_into_({"unet": third}, weights)
    with torch.no_grad():
        assert torch.equal(forward(third), forward(first))


def test_weights_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    unet = tiny_unet()
    modules = {"unet": unet}
    inject.inject_(modules, adapter(targets="attention"))
    good = inject.collect(modules)["unet"]
    paths = list(good)
    values = inject.state(modules)

    def refused(weights: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            inject.load_into_(modules, weights)
        assert all(torch.equal(values[name], tensor) for name, tensor in inject.state(modules).items())

    def other(**config: Any) -> dict[str, Any]:
        module = tiny_unet()
        inject.inject_({"unet": module}, adapter(targets="attention", **config))
        return inject.collect({"unet": module})

    missing = {path: good[path] for path in paths[1:]}
    refused({"unet": missing}, f"lacks 1 of {len(paths)}, first {paths[0]}")
    refused({"unet": good | {"mid_block.x": good[paths[0]]}}, "has 1 that nothing takes, first mid_block.x")
    refused({"unet": good, "text_encoder": good}, "first text_encoder")
    refused({}, "lacks 1 of 1, first unet")
    refused(other(rank=8), "has rank 8, expected 4; change adapter.rank")
    refused(other(dora=True), "is DoRA; change adapter.dora")
    wide = {path: type(low)(torch.zeros(4, 5), low.up, 1.0) for path, low in good.items()}
    refused({"unet": wide}, r"has shapes \[4, 5\].*And \d+ more")
    broken = type(good[paths[0]])(good[paths[0]].down, torch.full_like(good[paths[0]].up, math.inf), 1.0)
    refused({"unet": good | {paths[0]: broken}}, "NaN or infinity")


def test_state_comes_back_bit_for_bit_and_only_into_the_same_adapter() -> None:
    first, second, other = tiny_unet(), tiny_unet(), tiny_unet()
    config = adapter(alpha=3.0, rslora=True, dora=True)
    for module, seed in ((first, 0), (second, 1)):
        inject.inject_({"unet": module}, config, seed=seed)
    adapted.randomise_({"unet": first})
    saved = inject.state({"unet": first})
    inject.load_state_into_({"unet": second}, saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in inject.state({"unet": second}).items())
    with torch.no_grad():
        assert torch.equal(forward(first), forward(second))
    inject.inject_({"unet": other}, adapter(rank=2, dora=True))
    with pytest.raises(ModelError, match="has shape"):
        inject.load_state_into_({"unet": other}, saved)
    with pytest.raises(ModelError, match="lacks 1 of"):
        inject.load_state_into_({"unet": second}, dict(list(saved.items())[1:]))


def test_diffusers_own_adapter_functions_work_on_what_we_injected(bases: dict[str, Path]) -> None:
    pipe = adapted.pipeline("sd1", bases)
    base = adapted.draw(pipe)
    inject.inject_(adapted.components(pipe), adapter(targets="attention"))
    adapted.randomise_(adapted.components(pipe))
    full = adapted.draw(pipe)
    assert pipe.get_active_adapters() == [inject.ADAPTER]
    for module in adapted.components(pipe).values():
        assert module.active_adapters() == [inject.ADAPTER]
    pipe.set_adapters(inject.ADAPTER, 0.0)
    assert torch.equal(adapted.draw(pipe), base)
    pipe.set_adapters(inject.ADAPTER, 1.0)
    assert torch.equal(adapted.draw(pipe), full)
    pipe.disable_lora()
    assert torch.equal(adapted.draw(pipe), base)
