"""PEFT's LoRA layers, computed in the base's number type.

What lives here: the forward pass of one plain adapter in a linear layer or 2-D convolution. What does not: everything
else about such a layer (names, scale, merging, DoRA, several adapters), which stays PEFT's.

PEFT casts a layer's input to the adapter's type. With a float32 adapter in a bf16 base each layer then computes in
float32 and keeps a float32 copy of its input for the backward pass, even where q, k and v share one input. Here the two
small factors are cast instead: the input is kept once, as it is, and gradients reach the float32 parameters through the
cast.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from torch import Tensor, nn


class LeanLinear(Linear):
    """PEFT's `Linear`, casting its factors where PEFT casts the input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _castable_adapter(self, x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _cast_factors(self, adapter, x)
        output: Tensor = self.base_layer(x)
        return output + F.linear(F.linear(self.lora_dropout[adapter](x), down), up)


class LeanConv2d(Conv2d):
    """PEFT's `Conv2d`, casting its factors where PEFT casts the input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _castable_adapter(self, x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        down, up = _cast_factors(self, adapter, x)
        output: Tensor = self.base_layer(x)
        first, second = cast(nn.Conv2d, self.lora_A[adapter]), cast(nn.Conv2d, self.lora_B[adapter])
        hidden: Tensor = first._conv_forward(self.lora_dropout[adapter](x), down, None)
        update: Tensor = second._conv_forward(hidden, up, None)
        return output + update


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LeanLinear, nn.Conv2d: LeanConv2d}
"""Layer of a base to the adapted layer that PEFT shall build around it."""


def _castable_adapter(layer: LoraLayer, x: Tensor) -> str | None:
    """Name of the layer's only active adapter, if it is plain and of another type than `x`; None leaves it to PEFT.

    With equal types there is nothing to cast, so a float32 base computes PEFT's own numbers, bit for bit.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    name = names[0]
    is_plain = name not in layer.lora_variant and not layer.lora_bias[name]
    return name if is_plain and layer.lora_A[name].get_parameter("weight").dtype != x.dtype else None


def _cast_factors(layer: LoraLayer, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the type of `x`, the scale multiplied into the first before it is rounded."""
    # In fp16 the gradients of both pass through fp16, where PEFT's do not, as those of any weight do under autocast.
    # The loss scale makes it safe: on a tiny UNet they overflow at the same power of two as with PEFT's layers (2^22)
    # and are as near to float32's at 2^16, where GradScaler starts, and at 2^20. Unscaled, a fifth of them were 0.
    down, up = (factor[adapter].get_parameter("weight") for factor in (layer.lora_A, layer.lora_B))
    scale = layer.scaling[adapter]
    scaled = down if scale == 1 else down * scale
    return scaled.to(x.dtype), up.to(x.dtype)
