"""Number types by their names: as settings, as torch and as safetensors files call them."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""What settings and options call a type, to torch's."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""torch's type to what settings call it."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls a type, to torch's: those that are read and computed with."""
