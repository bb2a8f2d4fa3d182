"""PEFT's LoRA layers, computed in the base's number type with fewer passes.

What lives here: the forward pass of one plain adapter in a linear layer or 2-D convolution, and a linear layer's
backward pass. What does not: everything else about such a layer (names, scale, merging, DoRA, several adapters), which
stays PEFT's.

PEFT casts a layer's input to the adapter's type. With a float32 adapter in a bf16 base each layer then computes in
float32 and keeps a float32 copy of its input for the backward pass, even where q, k and v share one input. Here the two
small factors are read in the base's type instead: a pass with gradients reads the copies that `Flat` keeps of them,
which get the gradients, any other casts them. The input is kept once, as it is. Updates are added to the output where
it lies; in a type of two bytes a linear layer's second product is scaled and added in one operation, which rounds once
instead of three times. A float32 base computes PEFT's own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_booth.run import imports

with imports.sparing():
    from peft import import_utils
    from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer

HALVES = (torch.bfloat16, torch.float16)


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ over a frozen W, in as few operations as there are products.

    `x`: `[N, in]`, `down` = A: `[r, in]`, `up` = B: `[out, r]`, all of one type. Autograd would sum the two gradients
    of `x` in an operation of its own, and scale in another.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = F.linear(x, down)
        ctx.save_for_backward(x, weight, down, up, hidden)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(hidden, up.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, hidden = ctx.saved_tensors
        of_hidden, of_up = gradient @ up, gradient.t() @ hidden
        if ctx.scale != 1:
            of_hidden, of_up = of_hidden.mul_(ctx.scale), of_up.mul_(ctx.scale)
        of_x = (gradient @ weight).addmm_(of_hidden, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_hidden.t() @ x, of_up, None


class BaseTypeLinear(Linear):
    """PEFT's `Linear`, reading its factors in the base's type and adding to the output in place."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _plain_adapter(self)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _factors_in(self, adapter, x.dtype)
        base, dropout, scale = self.base_layer, self.lora_dropout[adapter], self.scaling[adapter]
        if x.dtype not in HALVES:  # PEFT's own sums, in its order: the same numbers bit for bit
            output: Tensor = base(x)
            return _add_(output, F.linear(F.linear(dropout(x), down), up), scale)
        rows = x.reshape(-1, x.shape[-1])
        if type(base) is nn.Linear and type(dropout) is nn.Identity:
            output = cast(Tensor, _LowRankLinear.apply(rows, base.weight, base.bias, down, up, scale))  # type: ignore[no-untyped-call]
        else:
            output = base(rows).addmm_(F.linear(dropout(rows), down), up.t(), alpha=scale)
        return output.view(*x.shape[:-1], -1)


class BaseTypeConv2d(Conv2d):
    """PEFT's `Conv2d`, reading its factors in the base's type."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _plain_adapter(self)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _factors_in(self, adapter, x.dtype)
        output: Tensor = self.base_layer(x)
        first, second = cast(nn.Conv2d, self.lora_A[adapter]), cast(nn.Conv2d, self.lora_B[adapter])
        hidden: Tensor = first._conv_forward(self.lora_dropout[adapter](x), down, None)
        update: Tensor = second._conv_forward(hidden, up, None)
        return _add_(output, update, self.scaling[adapter])


@contextmanager
def knowing_loaded_quantizers() -> Iterator[None]:
    """Inside, PEFT holds bitsandbytes for installed only where it is loaded, as it is when a base has layers of it.

    Else PEFT would import it to look for them.
    PEFT asks once and keeps the answer, which another base may change.
    """
    questions = (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available)
    for ask in questions:
        ask.cache_clear()
        with imports.hidden("bitsandbytes"):
            ask()
    yield
    for ask in questions:
        ask.cache_clear()


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: BaseTypeLinear, nn.Conv2d: BaseTypeConv2d}
"""Layer of a base to the adapted layer that PEFT shall build around it."""


def _add_(output: Tensor, update: Tensor, scale: float) -> Tensor:
    """`output` with `update` times `scale` added in place, the product rounded first, as PEFT does."""
    return output.add_(update if scale == 1 else update * scale)


def _plain_adapter(layer: LoraLayer) -> str | None:
    """Name of the layer's only active adapter, if it is plain LoRA; None leaves the layer to PEFT."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    name = names[0]
    return None if name in layer.lora_variant or layer.lora_bias[name] else name


def give_copies_(layer: LoraLayer, adapter: str, copies: Mapping[nn.Parameter, Tensor]) -> None:
    """Let passes with gradients read the factors of `layer` from `copies`, of the base's type, by parameter."""
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        cast(Any, factor).in_base_type = copies.get(factor.get_parameter("weight"))


def reads_copies(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer is computed here, so that copies of its factors would be read."""
    return isinstance(layer, tuple(LAYERS.values())) and adapter not in layer.lora_variant


def _factors_in(layer: LoraLayer, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors in `dtype`, that of the layer's input."""
    # In fp16 the gradients of both pass through fp16, where PEFT's do not, as those of any weight do under autocast.
    # The loss scale makes it safe: on a tiny UNet they overflow at the same power of two as with PEFT's layers (2^22)
    # and are as near to float32's at 2^16, where GradScaler starts, and at 2^20. Unscaled, a fifth of them were 0.
    return _factor_in(layer.lora_A[adapter], dtype), _factor_in(layer.lora_B[adapter], dtype)


def _factor_in(factor: nn.Module, dtype: torch.dtype) -> Tensor:
    copy: Tensor | None = getattr(factor, "in_base_type", None)
    if copy is not None and copy.dtype == dtype and torch.is_grad_enabled():
        return copy
    return factor.get_parameter("weight").to(dtype)
