"""Trains booth-mini: `python -m tools.booth_mini.train {vae,clip,unet,all} --data DIR --out DIR`.

`all` trains the three in order and exports the model. The same command again continues from the saved states in
--out; without them, --from MODEL starts at shipped weights. OMP_NUM_THREADS decides the threads; on CPUs, one.
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from tools.booth_mini.compose import Composer
from tools.booth_mini.data import load_icons
from tools.booth_mini.export import export_model, load_parts
from tools.booth_mini.models import make_clip, make_unet, make_vae
from tools.booth_mini.muon import MuonAdamW
from tools.booth_mini.state import Schedule, Training
from tools.booth_mini.train_clip import train_clip
from tools.booth_mini.train_unet import train_unet
from tools.booth_mini.train_vae import train_vae

PARTS = ("vae", "clip", "unet")
STEPS = {"vae": 4500, "clip": 3500, "unet": 9000}
LEARNING_RATES = {"vae": 1e-3, "clip": 1e-3, "unet": 4e-3}
BATCH_SIZES = {"vae": 8, "clip": 128, "unet": 32}
EMA_DECAYS = {"vae": 0.999, "clip": 0.997, "unet": 0.996}


def main() -> None:
    """Command line of the training steps."""
    arguments = _parse()
    torch.manual_seed(arguments.seed)
    for part in PARTS if arguments.part == "all" else (arguments.part,):
        train_part(part, arguments)
    if arguments.part == "all":
        export_model(arguments.data, arguments.out, arguments.model)


def train_part(part: str, arguments: argparse.Namespace) -> None:
    """Trains one part to the end of its schedule, from its saved state, the shipped weights or nothing."""
    batch_size, seed = arguments.batch_size or BATCH_SIZES[part], arguments.seed
    training = _begin(part, arguments)
    if part == "unet":
        for other in ("vae", "clip"):
            if arguments.shipped is not None and not (arguments.out / f"{other}.pt").exists():
                _begin(other, arguments).save()
        train_unet(training, arguments.data, arguments.out, batch_size=batch_size, seed=seed, pool_size=arguments.pool)
        return
    composer = Composer(*load_icons(arguments.data))
    frozen = arguments.freeze
    if part == "vae":
        train_vae(training, composer, batch_size=batch_size, seed=seed, encoder_frozen=frozen)
        return
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    train_clip(training, composer, tokenizer, batch_size=batch_size, seed=seed, text_frozen=frozen)


def _begin(part: str, arguments: argparse.Namespace) -> Training:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = Schedule(arguments.steps or STEPS[part], arguments.learning_rate or LEARNING_RATES[part])
    model: nn.Module = {"vae": make_vae, "clip": make_clip, "unet": make_unet}[part]().to(device)
    optimizer = MuonAdamW(model, schedule.learning_rate) if part == "unet" else None
    path = arguments.out / f"{part}.pt"
    training = Training(model, path, schedule, optimizer=optimizer, ema_decay=EMA_DECAYS[part])
    if arguments.shipped is not None:
        training.start_from(_shipped_part(part, arguments.shipped).state_dict())
    return training


def _shipped_part(part: str, model: Path) -> nn.Module:
    vae, unet, clip, _ = load_parts(model)
    assert isinstance(unet, UNet2DConditionModel)
    return {"vae": vae, "clip": clip, "unet": unet}[part]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--data", type=Path, default=Path("build/booth_mini"))
    parser.add_argument("--out", type=Path, default=Path("build/booth_mini/train"), help="saved states, sample sheets")
    parser.add_argument("--model", type=Path, default=Path("lora_booth/assets/booth_mini"), help="all: exported here")
    parser.add_argument("--steps", type=int, help="the schedule's end, counted from the very start")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--pool", type=int, default=20_000, help="unet: pictures in the pool of latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--freeze",
        action="store_true",
        help="vae: train the decoder only; clip: the evaluator only. What the denoiser was trained on stays",
    )
    parser.add_argument("--from", dest="shipped", type=Path, help="start at the weights of this model folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
