"""Many parameters as one vector: the same numbers, in fewer operations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lora_booth.config.settings import OptimizerConfig
from lora_booth.planning import optimizer_states
from lora_booth.training import optimizers
from lora_booth.training.flat import ALIGNMENT, Flat, aligned

SHAPES = ((16, 320), (320, 16), (33,), (8, 4, 3, 3), (48, 128))


def parameters(shapes: Sequence[Sequence[int]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def give_gradients_(parts: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        part.grad = torch.randn(part.shape, generator=generator)


def test_the_parts_keep_their_numbers_and_look_at_the_vector() -> None:
    parts, before = parameters(), parameters()
    flat = Flat(parts)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert all(part.is_contiguous() and part.shape == old.shape for part, old in zip(parts, before, strict=True))
    with torch.no_grad():
        flat.vector.mul_(2)
        parts[1].data.copy_(torch.ones(320, 16))
    assert torch.equal(parts[0], 2 * before[0])
    assert float(flat.vector.sum()) == pytest.approx(float(sum(part.double().sum() for part in parts)), rel=1e-4)


def test_every_part_begins_at_a_block_of_8_bit_optimizers() -> None:
    parts = parameters()
    flat = Flat(parts)
    offsets = [part.storage_offset() for part in parts]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert flat.vector.numel() == sum(aligned(part.numel()) for part in parts) > sum(part.numel() for part in parts)
    assert (aligned(1), aligned(256), aligned(257)) == (256, 256, 512)


def test_gradients_move_and_a_missing_one_is_zeros() -> None:
    parts = parameters()
    flat = Flat(parts)
    give_gradients_(parts, 1)
    expected = [part.grad for part in parts]
    parts[2].grad = None
    flat.add_(flat.take())
    assert all(part.grad is None for part in parts)
    found = {id(part): gradient for part, gradient in flat.gradients()}
    for number, (part, gradient) in enumerate(zip(parts, expected, strict=True)):
        assert gradient is not None
        assert torch.equal(found[id(part)], gradient * (number != 2))
    assert flat.vector.grad is not None
    assert torch.count_nonzero(flat.vector.grad) == sum(part.numel() for part in parts) - 33


def test_a_single_part_is_its_own_vector() -> None:
    (part,) = parameters([(4, 5)])
    flat = Flat([part])
    assert flat.vector is part
    give_gradients_([part], 2)
    gradient = part.grad
    flat.add_(flat.take())
    ((one, gathered),) = flat.gradients()
    assert one is part and gradient is not None and torch.equal(gathered, gradient)


def test_passes_of_a_step_are_summed_and_the_next_step_begins_anew() -> None:
    parts = parameters()
    flat, sums = Flat(parts), [torch.zeros_like(part) for part in parts]
    for number in range(3):
        give_gradients_(parts, number)
        for total, part in zip(sums, parts, strict=True):
            assert part.grad is not None
            total.add_(part.grad)
        flat.add_(flat.take())
    assert all(torch.equal(found, total) for (_, found), total in zip(flat.gradients(), sums, strict=True))
    flat.vector.grad = None
    give_gradients_(parts, 7)
    expected = [part.grad for part in parts]
    flat.add_(flat.take())
    for (_, found), gradient in zip(flat.gradients(), expected, strict=True):
        assert gradient is not None and torch.equal(found, gradient)


@pytest.mark.parametrize("shapes", [SHAPES, [(4, 5)]])
def test_a_copy_of_two_bytes_is_read_and_its_gradients_are_summed_in_float32(shapes: Sequence[Sequence[int]]) -> None:
    parts = parameters(shapes)
    flat = Flat(parts, torch.bfloat16)
    assert list(flat.copies) == parts
    for part, copy in flat.copies.items():
        assert torch.equal(copy, part.bfloat16()) and copy.requires_grad and copy.is_leaf
    with torch.no_grad():
        flat.vector.mul_(2)
    flat.refresh_()
    assert all(torch.equal(copy, part.bfloat16()) for part, copy in flat.copies.items())
    for _ in range(3):  # 256 + 1 is 256 in bf16
        for number, copy in enumerate(flat.copies.values()):
            (copy * torch.full_like(copy, 256.0 if number == 0 else 1.0)).sum().backward()
        flat.add_(flat.take())
        for copy in flat.copies.values():
            assert copy.grad is None
            copy.sum().backward()
        flat.add_(flat.take())
    for number, (_, gradient) in enumerate(flat.gradients()):
        assert gradient.dtype == torch.float32 and bool((gradient == (771.0 if number == 0 else 6.0)).all())


def test_a_parameter_that_is_read_itself_gives_its_own_gradient() -> None:
    parts = parameters()
    flat = Flat(parts, torch.bfloat16)
    copies = list(flat.copies.values())
    (copies[0].float().sum() + 2 * parts[1].sum()).backward()
    flat.add_(flat.take())
    assert [float(gradient.unique().item()) for _, gradient in flat.gradients()] == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert all(part.grad is None for part in parts)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_computes_in_one_vector_what_it_computes_for_each_parameter(name: str) -> None:
    pytest.importorskip({"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(name, "torch"))
    if name.startswith("paged"):
        pytest.skip("needs a card")
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    shapes = [(16, 320), (320, 16), (64, 65), (33, 128)]  # bitsandbytes keeps fewer than 4,096 numbers in 32 bits
    alone, together = parameters(shapes), parameters(shapes)
    rate = {"lr": 1.0 if name == "prodigy" else 1e-3}
    one = optimizers.make([{"params": alone, **rate}], config, device_type="cpu")
    flats = optimizers.flatten(together, config, device_type="cpu")
    assert len(flats) == (len(shapes) if name == "adafactor" else 1)
    other = optimizers.make([{"params": [flat.vector for flat in flats], **rate}], config, device_type="cpu")
    start = [part.detach().clone() for part in alone]
    for step in range(4):
        for optimizer, parts in ((one, alone), (other, together)):
            give_gradients_(parts, step)
            optimizers.set_mode_(optimizer, training=True)
            if optimizer is other:
                for flat in flats:
                    flat.add_(flat.take())
            optimizer.step()
            optimizer.zero_grad()
            optimizers.set_mode_(optimizer, training=False)
    for a, b, before in zip(alone, together, start, strict=True):
        assert (a - before).abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit", "adafactor"])
def test_optimizers_store_what_is_predicted(name: str) -> None:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    parts = parameters([(16, 320), (320, 16), (64, 1280), (1280, 64), (16, 33)])
    flats = optimizers.flatten(parts, config, device_type="cpu")
    optimizer = optimizers.make([{"params": [flat.vector for flat in flats], "lr": 1e-3}], config, device_type="cpu")
    give_gradients_(parts, 0)
    for flat in flats:
        flat.add_(flat.take())
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() != 256}
    predicted = optimizer_states.state_bytes([part.shape for part in parts], config, device_type="cpu")
    assert predicted == pytest.approx(sum(stored.values()), rel=0.01, abs=512 * len(tensors))
