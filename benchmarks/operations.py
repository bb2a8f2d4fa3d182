"""How many operations one training step starts, counted on tensors without data: what binds a fast card.

    python -m benchmarks.operations                   # SD 1.5 and SDXL, one row, bf16
    python -m benchmarks.operations --kinds           # which ones

A step is what `lora_booth.training` runs for one micro-step: the adapter's numbers as the pass reads them, forward,
loss, backward, and the gradient as the optimizer reads it; not the optimizer itself, which is a few operations more.
Operations that only look at a tensor in another shape start nothing on a card and are counted apart. Attention counts
as one operation forward and one backward, as its fused kernels do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_booth.config.resolved import Filled
from lora_booth.models.bases.identify import BaseFacts
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.planning.built import make_batch
from lora_booth.planning.memory import Modules
from lora_booth.planning.tracing import fused_attention, moves_nothing
from lora_booth.planning.work import Work
from lora_booth.training.batch import sample_losses
from lora_booth.training.objective import objective_for

SIDES_PX = {"sd1": 512, "sdxl": 1024}


class Starts(TorchDispatchMode):
    """Counts the operations that start something on a card, by name, and the others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computing, self.looking = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        (self.looking if moves_nothing(func) else self.computing)[name] += 1
        return out


def modules_of(architecture: str, *, rank: int = 8) -> tuple[Modules, Filled]:
    """The modules of `architecture`, a key of SIDES_PX, in bf16 and without data, and settings of one row a step."""
    side = SIDES_PX[architecture]
    facts = BaseFacts(Path(), SHIPPED_CONFIGS / architecture, architecture, "epsilon", side, 64, {})  # type: ignore[arg-type]
    config = _config(side, rank)
    return Modules.of(config, facts), config


def of_step(architecture: str, *, rank: int = 8) -> Starts:
    """The operations of one micro-step of one row."""
    modules, config = modules_of(architecture, rank=rank)
    built, shape = modules.built, modules.latent_shape(modules.square(config))
    with torch.no_grad():
        encoded = built.family.encode_prompts([""])
    batch = make_batch(built.family, 1, shape, encoded, device=torch.device("meta"))
    for module in built.adapted.values():
        module.train()
    built.family.prepare_denoiser_(gradient_checkpointing=0.0, attention="sdpa", is_offloading=False)
    objective, starts, attention = objective_for(config.objective, built.family.schedule), Starts(), Work()
    with fused_attention(attention), starts:
        for flat in built.trained:
            flat.refresh_()
        sample_losses(built.family, objective, batch).sum().backward()
        for flat in built.trained:
            flat.add_(flat.take())
    starts.computing["attention"] = round(attention.num_operations)
    return starts


def _config(side_px: int, rank: int) -> Filled:
    values = {
        "model": {"base": "x", "precision": "bf16"},
        "subject": {"images": "x", "class_noun": "dog"},
        "data": {"resolution": side_px, "bucket_step": 64},
        "adapter": {"rank": rank},
        "prior": {"mode": "none"},
        "optimizer": {"warmup_steps": 0},
        "train": {"steps": 1, "save_every_steps": 1, "batch_size": 1},
    }
    return Filled.model_validate(values)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--kinds", action="store_true", help="which operations they are")
    arguments = parser.parse_args()
    for architecture in SIDES_PX:
        starts = of_step(architecture, rank=arguments.rank)
        computing, looking = starts.computing.total(), starts.looking.total()
        print(f"{architecture:<6} {computing:6,d} computing operations, {looking:6,d} that look in another shape")
        if arguments.kinds:
            for name, count in starts.computing.most_common():
                print(f"       {count:6,d} {name}")


if __name__ == "__main__":
    main()
