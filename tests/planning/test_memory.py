"""Memory is counted right: against hand-made numbers, against real tensors on the CPU, and against published sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_booth.adapter import inject
from lora_booth.config.resolved import Filled
from lora_booth.config.settings import OptimizerConfig
from lora_booth.errors import ModelError
from lora_booth.models import cards, devices, loading
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.families.components import without_weights
from lora_booth.models.families.family import Family
from lora_booth.planning import budget, built, decide, memory, optimizer_states, tracing
from lora_booth.planning.budget import Option
from lora_booth.planning.tracing import LiveBytes, fused_attention, held_bytes, tensors_of
from lora_booth.training.batch import Reference, sample_losses
from lora_booth.training.flat import Flat
from lora_booth.training.objective import objective_for
from lora_booth.verbs import plan
from tests.conftest import MakeConfig

FULL_SIZE = {"sd1": ("sd1", 512), "sd2": ("sd2_v", 768), "sdxl": ("sdxl", 1024)}
MIB = 2**20

CPU = torch.device("cpu")


def full_size(family: str) -> BaseFacts:
    """The facts of a base of real size, without its weights. The path is any file: it is not read as weights."""
    folder, side = FULL_SIZE[family]
    return BaseFacts(Path(__file__), SHIPPED_CONFIGS / folder, family, "epsilon", side, 64, {})  # type: ignore[arg-type]


def config_of(**sections: dict[str, Any]) -> Filled:
    values = {"model": {"base": "x"}, "subject": {"images": "x", "class_noun": "dog"}, **sections}
    chosen = {
        "prior": {"mode": "images"},
        "data": {"resolution": 512, "bucket_step": 64},
        "optimizer": {"warmup_steps": 0},
    }
    chosen["train"] = {"steps": 400, "save_every_steps": 80}
    return Filled.model_validate(values | {name: pairs | values.get(name, {}) for name, pairs in chosen.items()})


class TestTheCount:
    def test_a_storage_counts_once_from_birth_to_death_in_blocks_of_512_bytes(self) -> None:
        known = torch.empty(1000, device="meta")
        with LiveBytes("meta", [known]) as live:
            assert known.view(10, 100).t().shape == (100, 10)
            assert live.live == 0
            first = torch.empty(100, device="meta")  # 400 bytes
            view = first[:50]
            second = torch.empty(129, device="meta")  # 516 bytes
            assert (live.live, live.peak) == (512 + 1024, 1536)
            del first
            assert live.live == 1536, "a view keeps the storage"
            del view, second
            assert (live.live, live.peak) == (0, 1536)

    def test_what_is_remembered_of_an_operation_is_what_torch_gives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, net = torch.empty(2, 3, dtype=torch.int64, device="meta"), nn.Conv2d(3, 8, 3, device="meta")
        narrow = torch.empty(1, 3, dtype=torch.int64, device="meta")
        picture = torch.empty(2, 3, 8, 8, device="meta").to(memory_format=torch.channels_last)

        def asked() -> list[Any]:
            found = [
                whole + 1,
                whole + 1.0,
                whole + True,
                whole.clone(),
                whole.half(),
            ]
            found += [torch.native_dropout(whole.float(), 0.0, False)[0], whole.float().add_(2), whole.t() + 1]
            found += [narrow.expand(4, 3) + 1, whole.repeat(8, 1)[:1].expand(4, 3) + 1]  # of other storages
            found += [functional.group_norm(net(picture), 2), torch.empty(4), torch.empty(4, device="meta")]
            found[-3].sum().backward()  # the picture's gradient is not asked for
            return [*((f.shape, f.stride(), f.dtype, f.device) if isinstance(f, Tensor) else f for f in found)]

        def counted() -> tuple[Any, ...]:
            net.zero_grad()
            with LiveBytes("meta", [whole, narrow, picture, *net.parameters()]) as live:
                shapes = asked()
            return shapes, live.live, live.peak, live.work.flops, live.work.seconds(cards.named("RTX 3060"))

        monkeypatch.setattr(tracing, "_KNOWN", {})
        first, again = counted(), counted()
        kept = [known.kept for known in tracing._KNOWN.values()]
        assert kept.count("the first input") >= 1 and sum(isinstance(one, tuple) for one in kept) > 10
        monkeypatch.setattr(tracing, "_without_numbers", tracing._run)
        assert first == again == counted()

    def test_only_what_was_born_before_the_peak_is_in_it(self) -> None:
        with LiveBytes("meta", []) as live:
            early = torch.empty(128, device="meta")
            big = torch.empty(1280, device="meta")
            del big
            late = torch.empty(128, device="meta")
        assert live.at_peak([early, late]) == 512

    def test_attention_keeps_inputs_output_and_row_sums_and_restores_torch(self) -> None:
        original = functional.scaled_dot_product_attention
        query, key, value = (torch.zeros(1, 2, 4096, 64, device="meta", requires_grad=True) for _ in range(3))
        tensor, rows = 2 * 4096 * 64 * 4, 2 * 4096 * 4
        with LiveBytes("meta", [query, key, value]) as live, fused_attention(live.work):
            out = functional.scaled_dot_product_attention(query, key, value)
            assert live.live == tensor + rows
            out.sum().backward()
        assert live.peak == 4 * tensor + rows + 2 * 512  # the sum and its gradient; N×N scores would be 64 tensors
        assert functional.scaled_dot_product_attention is original


def adapted(config: Filled, family: Family, parts: list[nn.Module]) -> tuple[list[Flat], list[Tensor]]:
    groups = inject.inject_({"unet": family.denoiser}, config.adapter)
    family.denoiser.train()
    gradient_checkpointing = bool(config.train.gradient_checkpointing)
    family.prepare_denoiser_(gradient_checkpointing=gradient_checkpointing, attention="sdpa")
    return [Flat(groups["unet"])], tensors_of([family.denoiser, *parts])


def both(config: Filled) -> list[tuple[Family, list[Flat], list[Tensor], torch.device]]:
    """The same base on the CPU with its weights, and on meta without."""
    found = []
    for device in (torch.device("cpu"), torch.device("meta")):
        if device.type == "cpu":
            family = loading.load(config.model, device=device, dtype=torch.float32)
        else:
            facts = loading.facts(config.model)
            family = loading.around(facts, without_weights(facts, torch.float32))
        found.append((family, *adapted(config, family, list(family.text_encoders().values())), device))
    return found


@pytest.mark.parametrize(("name", "gradient_checkpointing"), [("sd1", False), ("sd2", True), ("sdxl", False)])
def test_a_real_step_on_the_cpu_holds_what_the_trace_says(
    name: str, gradient_checkpointing: bool, make_config: MakeConfig
) -> None:
    config = make_config(name, train={"gradient_checkpointing": gradient_checkpointing})
    peaks = []
    for family, trained, known, device in both(config):
        batch = built.make_batch(family, 2, (4, 32, 32), family.encode_prompts([""]), device=device)
        objective = objective_for(config.objective, family.schedule)
        gradients, others, _ = built.trace_step(family, objective, batch, trained, known)
        assert all(flat.vector.grad is not None for flat in trained)
        peaks.append((gradients, others, held_bytes(known)))
    (real_gradients, real, base), (traced_gradients, traced, traced_base) = peaks
    assert traced == pytest.approx(real, rel=0.02)
    assert traced_gradients == pytest.approx(real_gradients, rel=0.02)
    assert traced_base == base


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_what_the_base_predicts_for_comparison_makes_no_step_larger(
    gradient_checkpointing: bool, make_config: MakeConfig
) -> None:
    config = make_config("sd1", train={"gradient_checkpointing": gradient_checkpointing})
    family, trained, known, device = next(iter(both(config)))
    batch = built.make_batch(family, 2, (4, 32, 32), family.encode_prompts([""]), device=device)
    objective = objective_for(config.objective, family.schedule)
    assert batch.conditioning is not None
    injected = inject.Injected({"unet": family.denoiser})
    reference = Reference(1, 1, 2, {k: v[1:] for k, v in batch.conditioning.items()}, injected.disabled)
    peaks = []
    for compared in (None, None, reference):  # the first one also makes the schedule's tables
        _, others, _ = built.trace_step(family, objective, replace(batch, reference=compared), trained, known)
        for flat in trained:
            flat.vector.grad = None
        peaks.append(others)
    assert peaks[1] == peaks[2]


@pytest.mark.parametrize("name", ["sd1"])
def test_what_autograd_saves_is_what_lives_at_the_end_of_the_forward(name: str, make_config: MakeConfig) -> None:
    config = make_config(name)
    for family, _, known, device in both(config):
        batch = built.make_batch(family, 2, (4, 32, 32), family.encode_prompts([""]), device=device)
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.detach()
            return tensor

        objective = objective_for(config.objective, family.schedule)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with LiveBytes(device.type, [*known, *batch.tensors]) as live, fused_attention(live.work), hooks:
            losses = sample_losses(family, objective, batch)
        before = {tensor.untyped_storage()._cdata for tensor in (*known, *batch.tensors)}
        held = held_bytes(t for key, t in saved.items() if key not in before and t.device.type == device.type)
        assert live.live == pytest.approx(held, rel=0.01), losses.shape


@pytest.mark.parametrize(("name", "count"), [("sd1", 859_520_964), ("sdxl", 2_567_463_684)])
def test_a_base_without_weights_has_the_published_number_of_parameters(name: str, count: int) -> None:
    unet = without_weights(full_size(name), torch.bfloat16).denoiser
    assert sum(p.numel() for p in unet.parameters()) == count
    assert held_bytes(tensors_of([unet])) == pytest.approx(2 * count, rel=1e-3)  # whole blocks of 512 bytes


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("sd1", 780, 1035),
        pytest.param("sd2", 1660, 2225, marks=pytest.mark.slow),
        pytest.param("sdxl", 5390, 7600, marks=pytest.mark.slow),
    ],
)
def test_activations_of_a_full_size_step_lie_where_independent_counts_put_them(
    name: str, least: float, most: float
) -> None:
    # From a layer that keeps its inputs in the base's type to one that keeps a float32 copy; MiB, bf16, rank 16.
    train = {"batch_size": 1, "gradient_checkpointing": False}
    config = config_of(model={"base": "x", "precision": "bf16"}, train=train)
    modules = memory.Modules.of(config, full_size(name))
    plain = modules.step(config, None).parts
    assert least < plain["activations"] / MIB < most
    assert plain["gradients"] == plain["adapter"], "the class row comes after another micro-step"
    saving = modules.step(config.with_values({"train": {"gradient_checkpointing": True}}), None).parts
    assert saving["activations"] < 0.3 * plain["activations"]
    settings = {"train": {"gradient_checkpointing": True}, "memory": {"offload_activations": True}}
    offloading = modules.step(config.with_values(settings), None).parts
    assert 0.4 * saving["activations"] < offloading["activations"] < 0.85 * saving["activations"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adamw", 8 * 51_200),  # two float32 moments
        ("adamw8bit", 2 * (51_200 + 4 * 200)),  # two 8-bit moments, a float32 maximum for each 256 numbers
        ("paged_adamw8bit", 2 * (51_200 + 4 * 200)),
        ("lion8bit", 51_200 + 4 * 200),
        ("adafactor", 512 + 12_800 + 512),  # a row of 16, a column of 3,200, a mean
        ("auto", 2 * (51_200 + 4 * 200)),
    ],
)
def test_optimizers_keep_what_they_really_store(name: str, size: int) -> None:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    shape = (16, 3200)
    assert optimizer_states.state_bytes([shape], config, device_type="cuda") == pytest.approx(size, abs=512)
    assert optimizer_states.state_bytes([shape, shape], config, device_type="cuda") == pytest.approx(2 * size, abs=512)


def test_large_pictures_are_drawn_together_but_decoded_one_by_one(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_booth.config.settings import ModelConfig
    from lora_booth.models import at_once, sampling

    family = loading.load(ModelConfig(base=str(bases["sd1"])), device="cpu", dtype=torch.float32)
    prompt = family.encode_prompts(["a dog"])
    seen: list[int] = []
    decoder = family.pipeline("ddim").vae.decoder
    decoder.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    settings = sampling.Sampling(32, 32, "ddim", 1, 5.0)
    together = list(sampling.draw(family, [prompt] * 3, prompt, settings, seeds=[1, 2, 3]))
    monkeypatch.setattr(at_once, "PIXELS_AT_ONCE", 32 * 32)
    alone = list(sampling.draw(family, [prompt] * 3, prompt, settings, seeds=[1, 2, 3]))
    assert seen == [3, 1, 1, 1]
    for one, other in zip(together, alone, strict=True):
        assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


@pytest.fixture
def _modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building and tracing take a second or two each; within a test the same need not be done again."""
    build, known = memory.Modules.of, {}

    def once(config: Filled, facts: BaseFacts, *, is_kept: bool = False) -> memory.Modules:
        key = config.model.model_dump_json() + config.adapter.model_dump_json()
        if key not in known:
            known[key] = build(config, facts)
        return known[key]

    monkeypatch.setattr(memory.Modules, "of", once)


def needs_of(config: Filled, facts: BaseFacts, savings: Sequence[tuple[float, bool]]) -> dict[Option, float]:
    """GiB of every option of computing a step, in the order in which they are tried."""
    modules = memory.Modules.of(config, facts)
    needs = {}
    for option in (Option(rows, *saving) for saving in savings for rows in (2, 1)):
        needs[option] = modules.step(config.with_values(option.changes), None).gib + memory.OUTSIDE_GIB
    return needs


@pytest.mark.usefixtures("_modules_once")
def test_the_fastest_option_that_fits_is_chosen_and_nothing_that_changes_the_result(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "SHARES", (0.0, 0.5, 1.0))  # a trace takes a second
    monkeypatch.setattr(devices, "OFFLOADED_BYTES", 0)  # all tensors are small here
    config = make_config(data={"resolution": 256, "bucket_step": 32}, optimizer={"name": "adamw"})
    facts = loading.facts(config.model)
    needs = needs_of(config, facts, savings=[(0.0, False), (0.5, False), (1.0, False), (1.0, True)])
    two = [need for option, need in needs.items() if option.rows == 2]
    assert sorted(set(two), reverse=True) == two, "each saves more than the one before"
    assert two[-1] > needs[1, 1, True]

    def chosen(config: Filled, gib: float) -> Option:
        changes = budget.choose(config, facts, gib).changes
        return Option(*changes["train"].values(), changes["memory"]["offload_activations"])

    for need in needs.values():
        fitting = next(option for option, other in needs.items() if other <= need + 1e-9)
        assert chosen(config, need + 1e-9) == fitting, "the first in the order of speed"
    assert chosen(config, 0.01) == (1, 1, True)
    assert chosen(config.with_values({"memory": {"offload_activations": False}}), 0.01) == (1, 1, False)
    assert chosen(config.with_values({"train": {"gradient_checkpointing": 0.0}}), 0.01) == (1, 0, False)
    assert chosen(config.with_values({"train": {"gradient_checkpointing": 0.5}}), 0.01) == (1, 0.5, True)
    plan_of_one = budget.choose(config, facts, needs[1, 0, False] + 1e-9)
    assert plan_of_one.changes.keys() == {"train", "memory"}
    assert plan_of_one.reasons[0] == f"train.batch_size = 1 (same result): 2 needs {needs[2, 0, False]:.1f} GiB"
    found = budget.choose(config, facts, needs[2, 1, True] + 1e-9)
    assert found.reasons[1].startswith("train.gradient_checkpointing = ")
    assert "slower): with " in found.reasons[1]
    least = f"(same result): without, a step needs {needs[1, 1, False]:.1f} GiB"
    assert budget.choose(config, facts, 0.01).reasons[2] == f"memory.offload_activations = true {least}"


@pytest.mark.usefixtures("_modules_once")
def test_as_many_pictures_go_together_as_fit_and_tiles_only_where_whole_ones_do_not(make_config: MakeConfig) -> None:
    preview = {"images_per_prompt": 8}
    config = make_config(data={"resolution": 256, "bucket_step": 32}, preview=preview, prior={"num_images": 8})
    facts = loading.facts(config.model)
    modules = memory.Modules.of(config, facts)

    def need(at_once: int) -> float:
        settings = {"pictures_at_once": at_once, "tiled_decoding": False, "offload_denoiser": False}
        option = config.with_values({"memory": settings})
        return max(modules.draw_class_images(option, None).gib, modules.draw(option, None).gib) + memory.OUTSIDE_GIB

    def chosen(gib: float, config: Filled = config) -> dict[str, Any]:
        changes = budget.choose(config, facts, gib).changes["memory"]
        return {key: changes[key] for key in ("pictures_at_once", "tiled_decoding", "offload_denoiser")}

    whole = {"tiled_decoding": False, "offload_denoiser": False}
    assert need(8) > need(4)
    assert chosen(need(8) + 1e-9) == {"pictures_at_once": 8} | whole
    assert chosen(need(8) - 1e-9) == {"pictures_at_once": 4} | whole
    smallest = {"pictures_at_once": 1, "tiled_decoding": False, "offload_denoiser": True}
    assert chosen(0.01) == smallest, "tiles are no smaller"
    settings = {"pictures_at_once": 3, "tiled_decoding": True, "offload_denoiser": True}
    assert chosen(1000.0, config.with_values({"memory": settings})) == settings


def test_other_parts_need_less_without_the_denoiser_beside_them() -> None:
    preview = {"images_per_prompt": 1, "prompts": ("a",), "guidance_scale": 0.0}
    sections = {"model": {"base": "x", "precision": "bf16"}, "preview": preview, "adapter": {"text_encoder": True}}
    config = config_of(**sections, prior={"num_images": 0, "loss_weight": 0.0})
    modules = memory.Modules.of(config, full_size("sd1"))
    beside, alone = (config.with_values({"memory": {"offload_denoiser": x}}) for x in (False, True))
    denoiser = held_bytes(p for p in modules.built.family.denoiser.parameters() if not p.requires_grad)
    reading = modules._encode_prompts(beside), modules._encode_prompts(alone)
    assert sum(reading[0].parts.values()) - sum(reading[1].parts.values()) == denoiser
    encoding = modules.encode(beside, None), modules.encode(alone, None)
    assert sum(encoding[0].parts.values()) - sum(encoding[1].parts.values()) == denoiser
    assert "text encoders" in encoding[1].parts
    held = modules._without_denoiser(alone, modules._lasting(alone, None))
    assert held["base"] == encoding[1].parts["text encoders"], "they are trained, and stay"
    drawing = modules.draw(beside, None).parts, modules.draw(alone, None).parts
    assert "decoding" in drawing[0]
    assert "denoising" in drawing[1], "since decoding is now the smaller moment"


@pytest.mark.slow
def test_tiles_are_taken_where_even_alone_the_vae_cannot_decode_a_whole_picture() -> None:
    config = config_of(model={"base": "x", "precision": "bf16", "quantize": "nf4"})
    found = budget.choose(config, full_size("sdxl"), 4.0)
    assert (found.changes["memory"]["offload_denoiser"], found.changes["memory"]["tiled_decoding"]) == (True, True)
    assert not found.too_large
    found = budget.choose(config, full_size("sdxl"), 5.0)
    assert (found.changes["memory"]["offload_denoiser"], found.changes["memory"]["tiled_decoding"]) == (True, False)
    found = budget.choose(config.with_values({"model": {"quantize": "none"}}), full_size("sdxl"), 6.0)
    assert not found.changes["memory"]["tiled_decoding"], "the denoiser needs more than the decoder, tiled or not"


def test_a_tile_takes_the_memory_of_a_tile() -> None:
    config = config_of(model={"base": "x", "precision": "bf16"}, data={"resolution": 1024})
    modules = memory.Modules.of(config, full_size("sdxl"))
    decoding = []
    for is_tiled in (False, True):
        decoding.append(modules.built.decode(1, modules.square(config), is_tiled=is_tiled).peak / memory.GIB)
    assert decoding == [pytest.approx(3.0, rel=0.05), pytest.approx(1.73, rel=0.05)]


def test_pictures_that_choose_a_checkpoint_are_planned_without_previews_too() -> None:
    shown = {"images_per_prompt": 0}
    silent = config_of(preview=shown, evaluate={"choose": "last"}, prior={"mode": "none"})
    choosing = config_of(preview=shown, prior={"mode": "none"})
    assert [phase.name for phase in memory.Modules.of(silent, full_size("sd1")).phases(silent, None)][-1] == "validate"
    budget_gib = 3.5
    found = budget.choose(choosing, full_size("sd1"), budget_gib)
    assert found.phases[-1].name == "draw" and not found.too_large
    assert found.changes["memory"]["pictures_at_once"] < budget.MAX_PICTURES_AT_ONCE


@pytest.mark.usefixtures("_modules_once")
def test_levers_in_order_save_what_the_smaller_run_does_not_hold(make_config: MakeConfig) -> None:
    adapter = {"rank": 2, "text_encoder": True}
    config = make_config(data={"resolution": 256, "bucket_step": 32}, optimizer={"name": "adamw"}, adapter=adapter)
    facts = loading.facts(config.model)
    found = budget.savings(config, facts)
    assert [lever.settings for lever in found] == [
        "train.batch_size = 1",
        "train.gradient_checkpointing = 1",
        "memory.offload_activations = true",
        "optimizer.name = adamw8bit",
        "adapter.text_encoder = false",
        "model.quantize = nf4",
        "data.resolution = 192",
    ]
    needs = needs_of(config, facts, savings=[(0.0, False), (1.0, False), (1.0, True)])
    smaller = [needs[2, 0, False], needs[1, 0, False], needs[1, 1, False], needs[1, 1, True]]
    saved = [before - after for before, after in pairwise(smaller)]
    assert [lever.saved_gib for lever in found[:3]] == pytest.approx(saved)
    assert all(lever.saved_gib is not None and lever.saved_gib >= 0 for lever in found)


@pytest.mark.usefixtures("_modules_once")
def test_training_tells_what_it_chose_and_warns_with_remedies_when_nothing_fits(make_config: MakeConfig) -> None:
    class Warned(Lines):
        def warn(self, text: str) -> None:
            self.lines.append(f"warning: {text}")

    report, config = Warned(), make_config()
    decide.resolve(config, decide.look(config, Lines()), report, device=CPU, free_gib=100.0)
    assert [line for line in report.lines if "of 100.0 GiB predicted, with train.batch_size = 2, train.grad" in line]
    assert not [line for line in report.lines if line.startswith("warning")]
    decide.resolve(config, decide.look(config, Lines()), report, device=CPU, free_gib=0.1)
    (warning,) = [line for line in report.lines if line.startswith("warning")]
    assert "of 0.1 GiB, so the run may end for want of memory. What would help: " in warning
    assert "model.quantize = nf4 (changes the result a little" in warning


def test_targets_that_match_nothing_are_told_as_training_would(make_config: MakeConfig) -> None:
    config = make_config(adapter={"targets": "regex:nothing"})
    with pytest.raises(ModelError, match="matches none"):
        memory.Modules.of(config, loading.facts(config.model))


class Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, kind: str, text: str, **values: Any) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None: ...

    def progress(self, task: str, done: int, total: int, **values: Any) -> None: ...


@pytest.mark.usefixtures("_modules_once")
def test_of_a_long_list_plan_tells_the_length(make_config: MakeConfig) -> None:
    report = Lines()
    plan.show(make_config(prior={"mode": "model"}), report)
    assert "prior.captions = [64 of them]" in report.lines[-1] and "bicycle" not in report.lines[-1]


@pytest.mark.usefixtures("_modules_once")
def test_plan_prints_every_part_aligned_and_with_a_budget_what_was_chosen_and_why(make_config: MakeConfig) -> None:
    report = Lines()
    plan.show(make_config(preview={"images_per_prompt": 1}), report)
    start = next(i for i, line in enumerate(report.lines) if "predicted for a CUDA card, not measured" in line)
    end = next(i for i, line in enumerate(report.lines) if line.startswith("time"))
    *before, watching, choices = report.lines
    assert watching.startswith("watching ") and watching.endswith(
        "% of the work: 4 rows of validation at each of 2 saves"
    )
    table, (*times, other) = before[start + 1 : end], before[end + 1 :]
    assert other.strip().startswith('with prior.mode = "model" no class images are drawn: 0:')
    assert choices.startswith("chosen   ") and "train.gradient_checkpointing = 0.0" in choices
    assert len({len(line) for line in times}) == 1
    assert times[0].split()[0] == "card"
    assert [line.split()[:2] for line in times[1:]] == [name.split()[:2] for name in cards.USUAL]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["GiB", "prepare", "train", "validate", "draw"]
    for part in ("base", "adapter", "gradients", "optimizer", "activations", "VAE", "in all"):
        assert any(line.strip().startswith(part) for line in table), part
    report = Lines()
    plan.show(make_config(memory={"budget_gib": 0.5}, prior={"loss_weight": 0.0}), report)
    text = "\n".join(report.lines)
    assert "for 0.5 GiB: train.gradient_checkpointing = 1 (same result" in text
    assert "of 0.5 GiB; what would help, in this order:" in text
    assert "  model.quantize = nf4 (saves" in text
    assert "draw" not in text.partition("GiB  ")[2].partition("\n")[0]
    assert "prior.mode" not in text, "without a prior there is no other one"


def test_without_a_budget_nothing_is_traced_and_a_failing_trace_stops_nobody(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel")

    config = make_config()
    inputs = decide.look(config, Lines())
    monkeypatch.setattr(budget, "choose", fail)
    monkeypatch.setattr(budget, "savings", fail)
    assert decide.resolve(config, inputs, Lines(), device=CPU, free_gib=None).train.gradient_checkpointing == 0
    assert caplog.text == ""
    resolved = decide.resolve(config, inputs, Lines(), device=CPU, free_gib=4.0)
    assert resolved.train.gradient_checkpointing == 1
    assert "no kernel" in caplog.text
    assert "train.batch_size = 1 (same result" in decide.memory_advice(resolved, inputs.facts)
