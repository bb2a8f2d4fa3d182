"""Which number type a base is computed in."""

from __future__ import annotations

import torch

from lora_booth.config import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of `model.precision` on `device`; "auto": float32 on a CPU, bf16 where the card has it, else fp16."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
