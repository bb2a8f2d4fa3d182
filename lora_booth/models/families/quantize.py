"""The linear layers of the frozen base in 4 or 8 bits, by bitsandbytes.

What lives here: replacing layers. What does not: loading weights (`components.py`). diffusers' own way is not taken: it
refuses machines without a GPU, which tests have, and reads single files in another order.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

Quantization = Literal["nf4", "int8"]

_BLOCKS = re.compile(r"(?:^|\.)(?:transformer_blocks|encoder\.layers)\.\d+\.")
"""Where nearly all weights of a UNet and a text encoder are. Convolutions, time and size embeddings stay as they are:
they are few, and every block depends on them."""


def quantize_(module: nn.Module, kind: Quantization, device: torch.device) -> int:
    """Put quantised layers into `module`, each quantised on `device`; the rest stays where it is. Returns their count.

    nf4: 4-bit NormalFloat in blocks of 64 with quantised scales, 4.13 bits a weight (QLoRA, arXiv 2305.14314, sections
    2 and 3). int8: one scale for each row, and outlying inputs in 16 bits (LLM.int8(), arXiv 2208.07339). Results are
    computed in the type that the layer had.
    """
    if device.type == "mps":
        _without_fetched_kernels()
    found = _layers(module)
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, _quantized(layer, kind).to(device))
    return len(found)


def move_frozen_(module: nn.Module, device: torch.device | str) -> None:
    """Move all of `module` but what is trained, which an optimizer holds too, quantised layers among it.

    `Module.to` would break the link of trained parameters to the vector that they are views of, and leave the 8-bit
    weights that bitsandbytes keeps by a second name (`CB`) behind.
    """
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if not weight.requires_grad:
                weight.data = weight.data.to(device)
                state = getattr(weight, "quant_state", None)
                if state is not None:
                    state.to(device)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
        holder: Any
        for holder in (getattr(part, "weight", None), getattr(part, "state", None)):
            if isinstance(getattr(holder, "CB", None), torch.Tensor):
                holder.CB, holder.SCB = part.weight.data, holder.SCB.to(device)


def saved_bytes(module: nn.Module, kind: Quantization) -> int:
    """Bytes that `quantize_` would save in `module`, which may be on the meta device: scales are counted in."""
    saved = 0
    for _, layer in _layers(module):
        weight = layer.weight
        scales = weight.numel() // 64 + weight.numel() // 64 // 256 * 4 if kind == "nf4" else 4 * layer.out_features
        saved += weight.numel() * weight.element_size() - weight.numel() // (2 if kind == "nf4" else 1) - scales
    return saved


def _without_fetched_kernels() -> None:
    """Keep bitsandbytes from downloading kernels from the hub and running them, as it does on macOS 26 where the
    package "kernels" is installed; its own are slower."""
    from bitsandbytes.backends.mps import ops

    ops._kernel_load_failed = True


def _layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    found = module.named_modules()
    return [(name, layer) for name, layer in found if type(layer) is nn.Linear and _BLOCKS.search(f"{name}.")]


def _quantized(layer: nn.Linear, kind: Quantization) -> nn.Module:
    """The layer as bitsandbytes has it; its weight is quantised when it is moved to a device."""
    from bitsandbytes.nn import modules as layers

    weight, has_bias = layer.weight.data, layer.bias is not None
    new: Any  # of classes without types
    with torch.device("meta"):
        if kind == "nf4":
            settings: dict[str, Any] = {"compute_dtype": weight.dtype, "quant_type": "nf4", "compress_statistics": True}
            new = layers.Linear4bit(layer.in_features, layer.out_features, bias=has_bias, **settings)
        else:
            new = layers.Linear8bitLt(layer.in_features, layer.out_features, bias=has_bias, has_fp16_weights=False)
    if kind == "nf4":
        new.support_avx512bf16_for_cpu = False  # it would repack weights for inference, without gradients
        new.weight = layers.Params4bit(weight, False, quant_type="nf4", compress_statistics=True, module=new)
    else:
        new.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if has_bias:
        new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    quantized: nn.Module = new
    return quantized
