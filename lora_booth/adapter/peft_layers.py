"""PEFT's LoRA layers, computed in the base's number type with fewer passes.

What lives here: the forward pass of one plain adapter in a linear layer or 2-D convolution. What does not: everything
else about such a layer (names, scale, merging, DoRA, several adapters), which stays PEFT's.

PEFT casts a layer's input to the adapter's type. With a float32 adapter in a bf16 base each layer then computes in
float32 and keeps a float32 copy of its input for the backward pass, even where q, k and v share one input. Here the two
small factors are cast instead: the input is kept once, as it is, and gradients reach the float32 parameters through the
cast. Updates are added to the output where it lies; in a type of two bytes a linear layer's second product is scaled
and added in one operation, which rounds once instead of three times. A float32 base computes PEFT's own numbers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from torch import Tensor, nn


class BaseTypeLinear(Linear):
    """PEFT's `Linear`, casting its factors where PEFT casts the input, and adding to the output in place."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _plain_adapter(self)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _cast_factors(self, adapter, x)
        scale = self.scaling[adapter]
        if x.dtype == torch.float32:  # PEFT's own sums, in its order: the same numbers bit for bit
            output: Tensor = self.base_layer(x)
            return _add_(output, F.linear(F.linear(self.lora_dropout[adapter](x), down), up), scale)
        rows = x.reshape(-1, x.shape[-1])
        output = self.base_layer(rows)
        output.addmm_(F.linear(self.lora_dropout[adapter](rows), down), up.t(), alpha=scale)
        return output.view(*x.shape[:-1], -1)


class BaseTypeConv2d(Conv2d):
    """PEFT's `Conv2d`, casting its factors where PEFT casts the input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _plain_adapter(self)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _cast_factors(self, adapter, x)
        output: Tensor = self.base_layer(x)
        first, second = cast(nn.Conv2d, self.lora_A[adapter]), cast(nn.Conv2d, self.lora_B[adapter])
        hidden: Tensor = first._conv_forward(self.lora_dropout[adapter](x), down, None)
        update: Tensor = second._conv_forward(hidden, up, None)
        return _add_(output, update, self.scaling[adapter])


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


def _cast_factors(layer: LoraLayer, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the type of `x`."""
    # In fp16 the gradients of both pass through fp16, where PEFT's do not, as those of any weight do under autocast.
    # The loss scale makes it safe: on a tiny UNet they overflow at the same power of two as with PEFT's layers (2^22)
    # and are as near to float32's at 2^16, where GradScaler starts, and at 2^20. Unscaled, a fifth of them were 0.
    down, up = (factor[adapter].get_parameter("weight") for factor in (layer.lora_A, layer.lora_B))
    return down.to(x.dtype), up.to(x.dtype)
