"""Importing this loads a tiny base and draws with it, so that what libraries import and compile at first use is there.

The server of `cli/crash.py` imports it before it forks; a process that is born of it saves half a second.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from lora_booth.config.settings import ModelConfig
from lora_booth.models import loading
from lora_booth.models.sampling import Sampling, draw
from tests.support import tiny

torch.set_num_threads(1)  # a pool of threads does not outlive a fork
with tempfile.TemporaryDirectory() as _folder, torch.no_grad():
    _base = ModelConfig(base=str(tiny.tiny_sdxl(Path(_folder) / "base")))
    _family = loading.load(_base, device="cpu", dtype=torch.float32)
    _prompts = _family.encode_prompts([""])
    list(draw(_family, [_prompts], _prompts, Sampling(32, 32, "ddim", 1, 2.0), seeds=[0]))
