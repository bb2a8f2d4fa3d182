"""The same adapter as PEFT's layers, in the base's type, with less kept for the backward pass."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from lora_booth.adapter import inject, peft_layers
from lora_booth.training.flat import Flat
from tests.adapter.test_inject import adapter, forward, tiny_unet
from tests.support import adapted

RANK = 4


class Shared(nn.Module):
    """Queries, keys and values of one input, as in self-attention, and a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def attend(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def injected(module: nn.Module, *, by_peft: bool = False, **config: Any) -> list[nn.Parameter]:
    """Random adapter parameters put into `module` with our layers, or with PEFT's."""
    with mock.patch.object(peft_layers, "LAYERS", {} if by_peft else peft_layers.LAYERS):
        parameters = inject.inject_({"unet": module}, adapter(rank=RANK, **config))["unet"]
    adapted.randomise_({"unet": module})
    return parameters


def layer_types(module: nn.Module) -> set[type]:
    return {type(child) for child in module.modules() if isinstance(child, inject.LoraLayer)}


def output_and_gradients(unet: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(1)  # of dropout
    output = forward(unet)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_pefts_layers(dtype: torch.dtype, dropout: float) -> None:
    config: dict[str, Any] = {"alpha": 3.0, "dropout": dropout}
    ours, pefts = tiny_unet(dtype).train(), tiny_unet(dtype).train()
    our_parameters, their_parameters = injected(ours, **config), injected(pefts, by_peft=True, **config)
    for parameter in their_parameters:
        parameter.data = parameter.data.to(dtype)  # else PEFT rounds its input to float32
    assert layer_types(ours) == {peft_layers.BaseTypeLinear, peft_layers.BaseTypeConv2d}
    assert layer_types(pefts) == {peft_layer.Linear, peft_layer.Conv2d}
    one, other = output_and_gradients(ours, our_parameters), output_and_gradients(pefts, their_parameters)
    assert len(one) == len(other) == 1 + len(our_parameters) > 20
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in our_parameters)
    for a, b in zip(one, other, strict=True):
        # float64 runs through our own arithmetic; what differs is the rounding of parameters and gradients to float32
        assert torch.equal(a, b) if dtype == torch.float32 else adapted.relative_difference(a, b) < 1e-6


@pytest.mark.parametrize("alpha", [3.0, RANK])
@pytest.mark.parametrize("own_backward", [False, True])
def test_one_layer_s_output_and_gradients_are_pefts_to_a_millionth(
    own_backward: bool, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_backward:  # as in a base of two bytes
        monkeypatch.setattr(peft_layers, "HALVES", (torch.float32,))
    found = []
    for by_peft in (False, True):
        module = Shared()
        parameters = injected(module, by_peft=by_peft, targets="regex:.*", alpha=alpha)
        generator = torch.Generator().manual_seed(3)
        x, image = torch.randn(2, 50, 64, generator=generator), torch.randn(2, 8, 12, 12, generator=generator)
        x.requires_grad_()
        outputs = [module.attend(x), module.conv(image)]
        sum(output.square().sum() for output in outputs).backward()
        found.append([*outputs, x.grad, *(p.grad for p in parameters)])
    for ours, pefts in zip(*found, strict=True):
        assert adapted.relative_difference(ours, pefts) < 1e-6


def test_the_backward_pass_of_a_linear_layer_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = ((5, 7), (6, 7), (6,), (3, 7), (6, 3))
    x, weight, bias, down, up = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for tensor in (x, down, up):
        tensor.requires_grad_()
    apply = peft_layers._LowRankLinear.apply
    for scale, added in ((1.0, bias), (0.75, bias), (2.0, None)):
        assert torch.autograd.gradcheck(lambda a, d, u, s=scale, b=added: apply(a, weight, b, d, u, s), (x, down, up))
        expected = x @ weight.T + scale * (x @ down.T) @ up.T + (0 if added is None else added)
        assert torch.allclose(apply(x, weight, added, down, up, scale), expected)


def test_an_input_that_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Shared().bfloat16()
    parameters = injected(module, targets="regex:.*")
    x = torch.randn(2, 5, 64).bfloat16()
    module.q(x).sum().backward()
    assert x.grad is None and parameters[0].grad is not None


def test_passes_with_gradients_read_the_copies_and_all_others_the_parameters() -> None:
    module = Shared().bfloat16()
    parameters = injected(module, targets="regex:[qkv]")
    flat = Flat(parameters, inject.reads_in({"unet": module}, torch.bfloat16))
    inject.give_copies_({"unet": module}, flat.copies)
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        before = module.attend(x)
        assert torch.equal(module.attend(x), before)
        flat.vector.mul_(3)
        after = module.attend(x)
    assert torch.equal(module.attend(x), before), "the copies are as they were"
    assert not torch.equal(after, before)
    flat.refresh_()
    output = module.attend(x)
    assert torch.equal(output, after)
    output.float().sum().backward()
    assert all(p.grad is None for p in parameters)
    assert all(gradient is not None and bool(gradient.any()) for gradient in flat.take())


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [({}, torch.float32, None), ({}, torch.float16, torch.float16), ({"dora": True}, torch.bfloat16, None)],
)
def test_copies_are_made_where_layers_read_them(config: dict[str, Any], dtype: torch.dtype, expected: Any) -> None:
    module = Shared().to(dtype)
    injected(module, targets="regex:.*", **config)
    assert inject.reads_in({"unet": module}, dtype) == expected


def displacement(dtype: torch.dtype, held_in: torch.dtype, *, adapters_in: torch.dtype = torch.float32) -> Tensor:
    """Where 100 steps of AdamW take the adapter of one attention, whose weights are rounded to `dtype`, as `training`
    takes them."""
    base = tiny_unet().get_submodule("mid_block.attentions.0").to(dtype).to(held_in)
    parameters = inject.inject_({"unet": base}, adapter(targets=r"regex:.*(to_[qkv]|to_out\.0|net\.2|proj_.*)"))["unet"]
    for parameter in parameters:
        parameter.data = parameter.data.to(adapters_in)
    start = [p.detach().clone() for p in parameters]
    flat = Flat(parameters, inject.reads_in({"unet": base}, held_in) if adapters_in == torch.float32 else None)
    inject.give_copies_({"unet": base}, flat.copies)
    optimizer = torch.optim.AdamW([flat.vector], lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=held_in == torch.float16)
    generator = torch.Generator().manual_seed(2)
    context, target = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (2, 16, 8, 8)))
    for _ in range(100):
        flat.refresh_()
        x = torch.randn(2, 16, 8, 8, generator=generator)
        output = base(x.to(held_in), context.to(held_in)).sample
        scaler.scale((output.float() - target).square().mean()).backward()
        flat.add_(flat.take())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not scaler.is_enabled() or scaler.get_scale() == 2**16, "a step overflowed and was skipped"
    return torch.cat([(p.detach() - s).float().flatten() for p, s in zip(parameters, start, strict=True)])


def test_100_steps_in_the_bases_type_move_the_adapter_as_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        expected = displacement(dtype, torch.float32)
        distance = (displacement(dtype, dtype) - expected).norm() / expected.norm()
        assert 0 < distance < 0.02, dtype  # 0.0057 in bf16, as with PEFT's layers: the rounding of the base's outputs
    expected = displacement(torch.bfloat16, torch.float32)
    rounded = displacement(torch.bfloat16, torch.bfloat16, adapters_in=torch.bfloat16)
    assert (rounded - expected).norm() > 0.5 * expected.norm(), "this test does not see what bf16 parameters lose"


def saved_bytes(module: nn.Module, compute: Any, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of `compute(x)`, each storage once, parameters left out."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute(x)
    assert output.dtype == x.dtype
    for parameter in module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_a_bf16_base_keeps_its_input_once_and_not_in_float32() -> None:
    ours, pefts = Shared().bfloat16(), Shared().bfloat16()
    injected(ours, targets="regex:.*")
    injected(pefts, by_peft=True, targets="regex:.*")
    x = torch.randn(2, 512, 64).bfloat16().requires_grad_()
    hidden, factors = 3 * 2 * 512 * RANK, 3 * (RANK * 64 + 64 * RANK)
    assert saved_bytes(ours, ours.attend, x) == 2 * (x.numel() + hidden + factors)
    assert saved_bytes(pefts, pefts.attend, x) == 4 * (3 * x.numel() + hidden)
    image = torch.randn(2, 8, 32, 32).bfloat16().requires_grad_()
    hidden, factors = 2 * RANK * 16 * 16, RANK * 8 * 9 + 16 * RANK
    assert saved_bytes(ours, ours.conv, image) == 2 * (image.numel() + hidden + factors)
    # the base's convolution keeps its bf16 input too, frozen or not
    assert saved_bytes(pefts, pefts.conv, image) == 2 * image.numel() + 4 * (image.numel() + hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strength_0_and_disabled_are_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    unet = tiny_unet(dtype)
    modules = {"unet": unet}
    with torch.no_grad():
        base = forward(unet)
        injected(unet)
        full = forward(unet)
        assert not torch.equal(full, base)
        with inject.disabled(modules):
            assert torch.equal(forward(unet), base)
        adapted.set_adapter_scale_(modules, 0.0)
        assert torch.equal(forward(unet), base)
        adapted.set_adapter_scale_(modules, 1.0)
        assert torch.equal(forward(unet), full)


# float32 rounds at 1e-7, bf16 at 4e-3: the merged weight, the update and their sum each once
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pefts_merge_and_unmerge_work(dtype: torch.dtype, tolerance: float) -> None:
    module = Shared().to(dtype)
    injected(module, targets="regex:.*", alpha=2.0)
    inputs = {"q": torch.randn(3, 5, 64).to(dtype), "conv": torch.randn(2, 8, 6, 6).to(dtype)}
    with torch.no_grad():
        for name, x in inputs.items():
            layer: Any = module.get_submodule(name)
            weight, base, expected = layer.base_layer.weight.clone(), layer.base_layer(x), layer(x)
            assert adapted.relative_difference(base, expected) > 0.1
            layer.merge(safe_merge=True)
            assert layer.merged
            assert torch.equal(layer(x), layer.base_layer(x))
            assert adapted.relative_difference(layer(x), expected) < tolerance
            layer.unmerge()
            assert adapted.relative_difference(layer.base_layer.weight, weight) < tolerance
            assert adapted.relative_difference(layer(x), expected) < tolerance


@pytest.mark.parametrize("dora", [False, True])
def test_names_are_pefts_and_dora_is_left_to_peft(dora: bool) -> None:
    ours, pefts = tiny_unet(torch.bfloat16), tiny_unet(torch.bfloat16)
    injected(ours, dora=dora)
    injected(pefts, by_peft=True, dora=dora)

    def named(tensors: Any) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}

    assert named(ours.named_parameters()) == named(pefts.named_parameters())
    assert named(ours.state_dict().items()) == named(pefts.state_dict().items())
    assert named(get_peft_model_state_dict(ours).items()) == named(get_peft_model_state_dict(pefts).items())
    if dora:
        assert torch.equal(forward(ours), forward(pefts))


@pytest.mark.parametrize("case", ["two active adapters", "bias"])
def test_what_is_not_one_plain_adapter_is_left_to_peft(case: str) -> None:
    outputs = []
    for by_peft in (False, True):
        module: Any = Shared().bfloat16()
        injected(module, by_peft=by_peft, targets="regex:.*")
        config = copy.deepcopy(module.peft_config[inject.ADAPTER])
        config.lora_bias = case == "bias"
        for layer in (module.q, module.conv):
            layer.update_layer("second", RANK, lora_alpha=RANK, config=config)
            layer.set_adapter("second" if case == "bias" else [inject.ADAPTER, "second"])
        adapted.randomise_({"unet": module})
        outputs.append([module.q(torch.ones(3, 64).bfloat16()), module.conv(torch.ones(1, 8, 6, 6).bfloat16())])
    assert all(torch.equal(ours, pefts) for ours, pefts in zip(*outputs, strict=True))
