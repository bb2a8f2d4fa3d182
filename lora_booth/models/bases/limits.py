"""How large a base may be: a bound for every number in its configs.

Bounded is what decides how much is built or computed.

What lives here: the table, and refusing a base that exceeds it, from its configs alone, before a library builds
anything. What does not: what the numbers mean for a run (`identify.py`). Without bounds one wrong digit fills the
memory or takes for ever, since modules are built one by one before the weights show that they do not fit.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from lora_booth.errors import ModelError
from lora_booth.models.bases.architectures import Architecture, is_text
from lora_booth.models.bases.sources import AGAIN, read_json

MAX_LAYERS = 100
"""Of one kind, one after the other; the deepest real stack is SDXL's second text encoder with 32."""
MAX_BLOCKS = 400
"""Transformer blocks of a UNet; SDXL has 70."""
MAX_PARAMETERS = 7_000_000_000
"""Of a UNet, its VAE and text encoders together, as `parameters` counts; SDXL has 3.5 billion."""
MAX_NUMBER = 1_000_000
"""Of every other number; real ones are ids of tokens, up to 49,407, and small factors."""
MAX_TIMESTEPS = 100_000
UNEXPLAINED = 1.1
"""Times the numbers that weight files hold, and a million more: what `num_parameters` may say, which is an estimate."""

MOST: dict[str, dict[str, int]] = {
    "unet": {
        "sample_size": 4096,
        "in_channels": 64,
        "out_channels": 64,
        "block_out_channels": 8192,
        "layers_per_block": MAX_LAYERS,
        "transformer_layers_per_block": MAX_LAYERS,
        "reverse_transformer_layers_per_block": MAX_LAYERS,
        "cross_attention_dim": 16_384,
        "attention_head_dim": 1024,
        "num_attention_heads": 1024,
        "norm_num_groups": 1024,
        "downsample_padding": 9,
        "time_embedding_dim": 16_384,
        "addition_time_embed_dim": 4096,
        "projection_class_embeddings_input_dim": 65_536,
        "addition_embed_type_num_heads": 1024,
        "conv_in_kernel": 9,
        "conv_out_kernel": 9,
    },
    "vae": {
        "sample_size": 16_384,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": 8192,
        "layers_per_block": MAX_LAYERS,
        "norm_num_groups": 1024,
    },
    "text_encoder": {
        "vocab_size": 1_000_000,
        "hidden_size": 16_384,
        "intermediate_size": 65_536,
        "projection_dim": 16_384,
        "num_hidden_layers": MAX_LAYERS,
        "num_attention_heads": 1024,
        "max_position_embeddings": 1024,
        "num_labels": 1000,
    },
    "scheduler": {"num_train_timesteps": MAX_TIMESTEPS},
}
"""Component to what decides its size, each a count from 1 to this; null is the library's default."""
PER_LEVEL = {
    "unet": {
        "sample_size": 1,
        "block_out_channels": 1,
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "reverse_transformer_layers_per_block": 2,
        "cross_attention_dim": 1,
        "attention_head_dim": 1,
        "num_attention_heads": 1,
    },
    "vae": {"sample_size": 1, "block_out_channels": 1},
}
"""What may be a list of such counts, or with 2 a list of lists."""
FACTORS = {"vae": ("scaling_factor",)}
"""Numbers above 0 by which latents are multiplied."""
CHOICES: dict[str, dict[str, tuple[str | None, ...]]] = {
    "unet": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "time_embedding_type": ("positional",),
        "attention_type": ("default",),
        "encoder_hid_dim": (None,),
    },
    "vae": {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)},
}
"""What else decides which modules are built: one of these, or a list of them."""

Config = Mapping[str, Any]


def require(configs: Path, row: Architecture, held: Mapping[str, int] | None = None) -> None:
    """Raises ModelError, naming file and key, when a number in the configs of a base of this family exceeds its bound.

    `block_out_channels` of UNet and VAE must be lists. `held`: component to the numbers that its weight files hold,
    where they are known: a library makes up what is missing, in full size, before it says so.
    """
    found: dict[str, Config] = {}
    for name in (name for name in row.parts if not name.startswith("tokenizer")):
        path = configs / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        found[name] = read_json(path)
        kind = name.removesuffix("_2")
        _require_values(path, kind, found[name], row.bounds if name == row.denoiser and row.bounds else MOST[kind])
    blocks = _num_blocks(found["unet"]) if "unet" in found else 0
    if blocks > MAX_BLOCKS:
        path = configs / "unet" / "config.json"
        raise ModelError(f"{path} asks for {blocks} transformer blocks, which is more than {MAX_BLOCKS}; {AGAIN}.")
    asked = num_parameters(found)
    if sum(asked.values()) > MAX_PARAMETERS:
        told = f"the configs of {configs} ask for {sum(asked.values()) / 1e9:,.1f} billion weights"
        raise ModelError(f"{told}, which is more than {MAX_PARAMETERS / 1e9:g}; {AGAIN}.")
    for name, count in asked.items():
        if held is not None and count > UNEXPLAINED * held[name] + MAX_NUMBER:
            told = f"{configs / name} has a config of {count / 1e6:,.0f} million weights and files of"
            raise ModelError(f"{told} {held[name] / 1e6:,.0f} million; {AGAIN}.")


def num_parameters(configs: Mapping[str, Config]) -> dict[str, int]:
    """Weights of UNet, VAE and text encoders by their configs, but for biases and norms: to a few hundredths.

    Another denoiser is not counted; the bounds of its family hold it.
    """
    counts = {"unet": _of_unet, "vae": _of_vae}
    found = {name: counts[name](config) for name, config in configs.items() if name in counts}
    return found | {name: _of_text(name, config) for name, config in configs.items() if is_text(name)}


def _require_values(path: Path, component: str, config: Config, most: Mapping[str, int]) -> None:
    choices = CHOICES.get(component, {})
    for key, value in config.items():
        if key in most:
            _require_counts(path, key, value, most[key], depth=PER_LEVEL.get(component, {}).get(key, 0))
        elif key in FACTORS.get(component, ()) and not (_is_number(value) and 0 < value <= MAX_NUMBER):
            raise ModelError(f"{path} has {key} = {reprlib.repr(value)}, which is no factor; {AGAIN}.")
        elif key in choices and not all(
            item in choices[key] for item in (value if isinstance(value, list) else [value])
        ):
            known = ", ".join(str(choice) for choice in choices[key])
            raise ModelError(f"{path} has {key} = {reprlib.repr(value)}; no base that is known has other than {known}.")
        elif key == "_diffusers_version" and not _is_version(value):  # which pipelines compare with their own
            raise ModelError(f"{path} has {key} = {reprlib.repr(value)}, which is no version; {AGAIN}.")
        for number in _numbers(value):
            if not -MAX_NUMBER <= number <= MAX_NUMBER:  # NaN too
                raise ModelError(f"{path} has {reprlib.repr(number)} in {key}, which no base has; {AGAIN}.")


def _require_counts(path: Path, key: str, value: Any, most: int, *, depth: int) -> None:
    if depth and isinstance(value, list) and len(value) <= MAX_LAYERS:
        for item in value:
            _require_counts(path, key, item, most, depth=depth - 1)
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most):
        what = "number of layers" if "layers" in key else "size"
        raise ModelError(f"{path} has {key} = {reprlib.repr(value)}, which is no {what} up to {most}; {AGAIN}.")


def _is_version(value: Any) -> bool:
    try:
        Version(value)
    except (InvalidVersion, TypeError):
        return False
    return True


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif _is_number(value):
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _per_level(config: Config, key: str, default: int) -> list[Any]:
    """A setting of each level of a network, whether it is given once or for each."""
    value, levels = config.get(key) or default, len(config["block_out_channels"])
    return ([*value, *value[-1:] * levels] if isinstance(value, list) else [value] * levels)[:levels]


def _num_blocks(unet: Config) -> int:
    """Transformer blocks, counted as if every level had attention."""
    layers, deep = _per_level(unet, "layers_per_block", 2), _per_level(unet, "transformer_layers_per_block", 1)
    up = _per_level(unet, "reverse_transformer_layers_per_block", 0)
    pairs = list(zip(layers, deep, [u or d for u, d in zip(up, reversed(deep), strict=True)], strict=True))
    return sum(_stack(down, count) + _stack(upward, count + 1) for count, down, upward in pairs) + _largest(deep[-1])


def _stack(depth: Any, count: int) -> int:
    """Blocks of `count` attentions, each of `depth`, or of the depths listed."""
    return sum(depth) if isinstance(depth, list) else depth * count


def _largest(depth: Any) -> int:
    return max(depth, default=1) if isinstance(depth, list) else depth


def _of_unet(unet: Config) -> int:
    widths, layers = unet["block_out_channels"], _per_level(unet, "layers_per_block", 2)
    deep, cross = _per_level(unet, "transformer_layers_per_block", 1), _per_level(unet, "cross_attention_dim", 1280)
    types = [*(unet.get("down_block_types") or [*["CrossAttn"] * 3, ""]), *[""] * len(widths)]
    time = unet.get("time_embedding_dim") or 4 * widths[0]
    count: int = widths[0] * time + time**2 + 2 * 4 * 9 * widths[0]
    count += (unet.get("projection_class_embeddings_input_dim") or 0) * time
    count += time**2 if unet.get("addition_embed_type") else 0
    for i, width in enumerate(widths):
        before, after = widths[max(0, i - 1)], widths[min(i + 1, len(widths) - 1)]
        count += _resnet(before, width, time) + (layers[i] - 1) * _resnet(width, width, time)
        count += (
            _samplers(widths, i)
            + _resnet(after + width, width, time)
            + (layers[i] - 1) * _resnet(2 * width, width, time)
        )
        count += _resnet(width + before, width, time)
        if "CrossAttn" in types[i]:
            block = 18 * width**2 + 2 * width * cross[i]
            count += block * (_stack(deep[i], layers[i]) + _stack(deep[i], layers[i] + 1))
            count += 2 * width**2 * (2 * layers[i] + 1)
    last = widths[-1]
    count += 2 * _resnet(last, last, time) + _largest(deep[-1]) * (18 * last**2 + 2 * last * cross[-1]) + 2 * last**2
    return count


def _of_vae(vae: Config) -> int:
    widths, layers = vae["block_out_channels"], _per_level(vae, "layers_per_block", 1)
    count: int = 4 * _resnet(widths[-1], widths[-1], 0) + 8 * widths[-1] ** 2
    for i, width in enumerate(widths):
        before, after = widths[max(0, i - 1)], widths[min(i + 1, len(widths) - 1)]
        count += _resnet(before, width, 0) + _resnet(after, width, 0) + _samplers(widths, i)
        count += (2 * layers[i] - 1) * _resnet(width, width, 0)
    return count


def _resnet(taken: int, made: int, time: int) -> int:
    return 9 * taken * made + 9 * made**2 + time * made + (taken * made if taken != made else 0)


def _samplers(widths: Sequence[int], level: int) -> int:
    """Down- and upsampler of a level; the ends have one of them."""
    return 9 * widths[level] ** 2 * ((level < len(widths) - 1) + (level > 0))


def _of_text(name: str, text: Config) -> int:
    width, inner = text.get("hidden_size") or 512, text.get("intermediate_size") or 2048
    ends = (text.get("vocab_size") or 49_408) + (text.get("max_position_embeddings") or 77)
    ends += (text.get("projection_dim") or 512) if name.endswith("_2") else 0
    return ends * width + (text.get("num_hidden_layers") or 12) * (4 * width**2 + 2 * width * inner)
