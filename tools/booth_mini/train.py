"""Trains booth-mini: `python -m tools.booth_mini.train {vae,clip,unet,all} --data DIR --out DIR`.

`all` trains the three in order and exports the model. The same command again goes on wherever the states saved in --out
stand; a part without one starts at --from MODEL, widened where the new one is wider, or from nothing. PLANS says how
long each part trains on CPUs (days beside other work; OMP_NUM_THREADS decides the threads, one is best) and on a GPU.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from tools.booth_mini.compose import Composer
from tools.booth_mini.data import PERCEPTUAL_FILE, load_icons
from tools.booth_mini.export import export_model, load_parts
from tools.booth_mini.models import make_clip, make_unet, make_vae
from tools.booth_mini.muon import MuonAdamW
from tools.booth_mini.perceptual import Perceptual
from tools.booth_mini.state import Schedule, Training
from tools.booth_mini.train_clip import train_clip
from tools.booth_mini.train_unet import train_unet
from tools.booth_mini.train_vae import train_vae
from tools.booth_mini.widen import widen

MAKERS = {"vae": make_vae, "clip": make_clip, "unet": make_unet}


@dataclass(frozen=True)
class Plan:
    """How one part is trained; `steps` counts from the very start."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float


PLANS: dict[str, dict[str, Plan]] = {
    "cpu": {
        "vae": Plan(steps=12_000, batch_size=8, learning_rate=1e-3, ema_decay=0.998),
        "clip": Plan(steps=5_000, batch_size=128, learning_rate=1e-3, ema_decay=0.997),
        "unet": Plan(steps=47_000, batch_size=32, learning_rate=4e-3, ema_decay=0.996),
    },
    "cuda": {
        "vae": Plan(steps=6_000, batch_size=64, learning_rate=3e-3, ema_decay=0.998),
        "clip": Plan(steps=2_500, batch_size=512, learning_rate=1e-3, ema_decay=0.997),
        "unet": Plan(steps=10_000, batch_size=256, learning_rate=6e-3, ema_decay=0.999),
    },
}
"""Device to part to plan. 1.5 million pictures for the denoiser on CPUs, 2.5 million on a GPU."""


def main() -> None:
    """Command line of the training steps."""
    arguments = _parse()
    torch.manual_seed(arguments.seed)
    for part in MAKERS if arguments.part == "all" else (arguments.part,):
        train_part(part, arguments)
    if arguments.part == "all":
        export_model(arguments.data, arguments.out, arguments.model)


def train_part(part: str, arguments: argparse.Namespace) -> None:
    """Trains one part to the end of its plan, from its saved state, the shipped weights or nothing."""
    training = _begin(part, arguments)
    if training.step >= training.schedule.steps:
        print(f"{part} is done at step {training.step}", flush=True)
        return
    if part == "unet":
        for other in ("vae", "clip"):
            if arguments.shipped is not None and not (arguments.out / f"{other}.pt").exists():
                _begin(other, arguments).save()
    batch_size = arguments.batch_size or PLANS[arguments.device.type][part].batch_size
    shared = {"batch_size": batch_size, "seed": arguments.seed, "workers": arguments.workers}
    if part == "unet":
        train_unet(training, arguments.data, arguments.out, pool_size=arguments.pool, **shared)
        return
    composer = Composer(*load_icons(arguments.data))
    if part == "vae":
        perceptual = Perceptual((arguments.data / PERCEPTUAL_FILE).read_bytes())
        frozen = load_parts(arguments.shipped)[0] if "vae" in arguments.freeze else None
        train_vae(training, composer, perceptual, frozen=frozen, **shared)
        return
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    train_clip(training, composer, tokenizer, text_frozen="clip" in arguments.freeze, **shared)


def _begin(part: str, arguments: argparse.Namespace) -> Training:
    plan = PLANS[arguments.device.type][part]
    schedule = Schedule(arguments.steps or plan.steps, arguments.learning_rate or plan.learning_rate)
    model: nn.Module = MAKERS[part]().to(arguments.device)
    if part == "vae" and "vae" in arguments.freeze:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    optimizer = MuonAdamW(model, schedule.learning_rate) if part != "clip" else None
    training = Training(model, arguments.out / f"{part}.pt", schedule, optimizer=optimizer, ema_decay=plan.ema_decay)
    if training.step == 0 and arguments.shipped is not None:
        wider = MAKERS[part]()
        widen(_shipped_part(part, arguments.shipped), wider, trainable="decoder." if part in arguments.freeze else "")
        training.start_from(wider.state_dict())
    return training


def _shipped_part(part: str, model: Path) -> nn.Module:
    vae, unet, clip, _ = load_parts(model)
    assert isinstance(unet, UNet2DConditionModel)
    return {"vae": vae, "clip": clip, "unet": unet}[part]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*MAKERS, "all"))
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--out", type=Path, default=Path("build/booth_mini/train"), help="saved states, sample sheets")
    parser.add_argument("--model", type=Path, default=Path("lora_booth/assets/booth_mini"), help="all: exported here")
    parser.add_argument("--from", dest="shipped", type=Path, help="start at the weights of this model folder")
    parser.add_argument(
        "--freeze",
        nargs="*",
        choices=("vae", "clip"),
        default=[],
        help="vae: only the decoder moves, so that latents stay; clip: only the evaluator, so that conditioning does",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures ahead; 0: none")
    parser.add_argument("--steps", type=int, help="the plan's end, counted from the very start")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--pool", type=int, default=20_000, help="unet: pictures in each pool of latents")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if "vae" in arguments.freeze and arguments.shipped is None:
        parser.error("--freeze vae needs --from MODEL: the model whose encoder stays")
    return arguments


if __name__ == "__main__":
    main()
