"""Importing this loads a tiny base and draws with it, so that what libraries import and compile at first use is there.

The server of `crash.py` imports it before it forks; a process that is born of it saves half a second.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from lora_booth import families
from lora_booth.config import ModelConfig
from lora_booth.families.sampling import draw
from tests import tiny

torch.set_num_threads(1)  # a pool of threads does not outlive a fork
with tempfile.TemporaryDirectory() as _folder, torch.no_grad():
    _base = ModelConfig(base=str(tiny.tiny_sdxl(Path(_folder) / "base")))
    _family = families.load(_base, device="cpu", dtype=torch.float32)
    _prompts = _family.encode_prompts([""])
    _size = {"width_px": 32, "height_px": 32}
    list(draw(_family, [_prompts], _prompts, **_size, seeds=[0], sampler="ddim", sampler_steps=1, guidance_scale=2.0))
