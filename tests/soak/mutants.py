"""Mutated adapter files: every way we know that a file on the internet can be broken or hostile."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

HUGE = 1 << 40
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "?")
SMALL_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E5M2": 8, "C64": 64}
"""Types that torch cannot make or not compute with, to the bits of a number."""
FOREIGN = {
    "bundle_emb.x.string_to_param": (2, 32),
    "lora_unet_mid_block_resnets_0_norm1.w_norm": (32,),
    "lora_unet_mid_block_resnets_0_norm1.b_norm": (32,),
    "lora_unet_conv_in.diff_b": (16,),
    "lora_unet_conv_out.diff": (4, 16, 3, 3),
    "lora_te2_text_projection.lora_up.weight": (32, 2),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (32, 2),
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 32),
    "diffusion_model.input_blocks.0.0.diff_b": (16,),
    "down_blocks.0.resnets.0.conv1.diff_b": (16,),
    "lora_unet_mid_block_resnets_0_conv1.oft_blocks": (2, 4, 4),
    "lora_unet_mid_block_resnets_0_conv1.a1.weight": (2, 4),
    "unet.mid_block.resnets.0.conv1.lora_B.bias": (32,),
    "lora_unet_mid_block_resnets_0_norm1.diff": (32,),
    "lora_unet_mid_block_resnets_0_norm2.w_norm": (32, 2),
}
"""Keys that others write, and shapes; some are sound beside a LoRA, some are no layer at all."""


def mutant(content: bytes, seed: int) -> tuple[str, bytes]:
    """The name of the mutation and the bytes; the same seed gives the same file, seeds in a row all mutations."""
    rng = random.Random(seed)
    name, change = MUTATIONS[seed % len(MUTATIONS)]
    return name, change(content, rng)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 4096))


def _flip_bits(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_header(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    end = 8 + _length(content)
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _lie_about_length(content: bytes, rng: random.Random) -> bytes:
    lie = rng.choice((0, 1, _length(content) - 1, _length(content) + 1, 1 << 20, 1 << 62, (1 << 64) - 1))
    return struct.pack("<Q", lie) + content[8:]


def _noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(3000))


def _pickle_start(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"PK\x03\x04", b"\x80\x02}", b"version https://git-lfs")) + content[8:]


def _of_header(edit: Callable[[dict[str, Any], str, random.Random], object]) -> Callable[[bytes, random.Random], bytes]:
    """A mutation of the JSON header: `edit` changes the dictionary, given the name of one tensor in it."""

    def change(content: bytes, rng: random.Random) -> bytes:
        header = json.loads(content[8 : 8 + _length(content)])
        name = rng.choice([key for key in header if key != "__metadata__"])
        edit(header, name, rng)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + _length(content) :]

    return change


def _rename(header: dict[str, Any], name: str, rng: random.Random) -> None:
    to = rng.choice(
        ("x", "", "../../etc/passwd", "bundle_emb.a.b", name + "2", name.replace("_", "."), "\x00", "é" * 50)
    )
    header[to] = header.pop(name)


def _shape(header: dict[str, Any], name: str, rng: random.Random) -> None:
    shape = header[name]["shape"]
    if shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, -1, HUGE, 1 << 63, 3.5, "4", None))
    else:
        header[name]["shape"] = rng.choice(([HUGE, HUGE], [1, 1], [0]))


def _transpose(header: dict[str, Any], name: str, rng: random.Random) -> None:
    header[name]["shape"].reverse()


def _flatten(header: dict[str, Any], name: str, rng: random.Random) -> None:
    count = 1
    for side in header[name]["shape"]:
        count *= side
    header[name]["shape"] = rng.choice(([count], [1, count], [count, 1], [1] * 6 + [count]))


def _dtype(header: dict[str, Any], name: str, rng: random.Random) -> None:
    header[name]["dtype"] = rng.choice(DTYPES)


def _every_dtype(header: dict[str, Any], name: str, rng: random.Random) -> None:
    dtype = rng.choice(("BF16", "I16", "U16"))
    for key, entry in header.items():
        if key != "__metadata__" and entry["dtype"] == "F16":
            entry["dtype"] = dtype


def _offsets(header: dict[str, Any], name: str, rng: random.Random) -> None:
    start, end = header[name]["data_offsets"]
    lies = ([end, start], [0, HUGE], [start, start], [-1, end], [start + 1, end + 1], ["0", "4"], [start], 7)
    header[name]["data_offsets"] = rng.choice(lies)


def _share_data(header: dict[str, Any], name: str, rng: random.Random) -> None:
    other = rng.choice([key for key in header if key != "__metadata__"])
    header[name] = dict(header[other])


def _drop(header: dict[str, Any], name: str, rng: random.Random) -> None:
    del header[name]


def _metadata(header: dict[str, Any], name: str, rng: random.Random) -> None:
    deep = '{"a":' * 3000 + "1" + "}" * 3000
    header["__metadata__"] = rng.choice(
        (
            {"modelspec.title": 7},
            {"lora_adapter_metadata": deep},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "nan", "unet.r": 0}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": -Infinity}'},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"},
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 3}}'},
            {"lora_adapter_metadata": '{"unet.alpha": 8, "unet.r": 0}'},
            {"modelspec.title": "\x1b]0;owned\x07" + "A" * 200_000, "ss_base_model_version": "sdxl_base_v1-0"},
            {"x": "y" * 2_000_000},
            ["not", "a", "mapping"],
        )
    )


def _extra_layer(header: dict[str, Any], name: str, rng: random.Random) -> None:
    layer = name.partition(".")[0]
    leaves = ("dora_scale", "hada_w1_a", "lora_mid.weight", "diff", "oft_diag")
    header[rng.choice([key for leaf in leaves if (key := f"{layer}.{leaf}") not in header])] = dict(header[name])


def _of_tensors(edit: Callable[[dict[str, Tensor], str, random.Random], object]) -> Callable[..., bytes]:
    """A mutation of the tensors: `edit` changes the dictionary, given the name of one of them. The file is whole."""

    def change(content: bytes, rng: random.Random) -> bytes:
        header = json.loads(content[8 : 8 + _length(content)])
        tensors = load(content)
        edit(tensors, rng.choice(list(tensors)), rng)
        return save({key: tensor.clone() for key, tensor in tensors.items()}, header.get("__metadata__"))

    return change


def _empty(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    shape = list(tensors[name].shape) or [1]
    shape[rng.randrange(len(shape))] = 0
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)


def _scalar(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensors[name] = torch.ones(rng.choice(((), (1,), (1, 1))), dtype=tensors[name].dtype)


def _huge(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    value = rng.choice((1e30, -1e30, 1e-40, 0.0, float("inf"), float("nan"), 3e38))
    tensors[name] = torch.full_like(tensors[name], value, dtype=torch.float32)


def _zeros(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    part = rng.choice(("alpha", "down", "up", "lora_A", "lora_B", ""))
    for key in tensors:
        if part in key:
            tensors[key] = torch.zeros_like(tensors[key])


def _layer(name: str) -> str:
    """The layer's part of a key of either naming."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[:-1])


def _tucker(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    rank, other = rng.choice((1, 2, 4)), rng.choice((1, 2, 4))
    if rng.random() < 0.5:
        tensors[f"{_layer(name)}.lora_mid.weight"] = torch.ones(rank, other, 3, 3)
        return
    shapes = {"lokr_w1": (2, 2), "lokr_t2": (rank, other, 3, 3), "lokr_w2_a": (rank, 16), "lokr_w2_b": (rank, 16)}
    tensors |= {f"{_layer(name)}.{leaf}": torch.ones(shape) for leaf, shape in shapes.items()}


def _dora(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    count = rng.choice((1, 4, 16, 32, 64))
    shape = rng.choice(((count, 1), (1, count), (count,), (1, count, 1, 1), (count, 1, 1, 1), (count, count), ()))
    leaf = rng.choice(("dora_scale", "lora_magnitude_vector", "dora_scale.weight"))
    tensors[f"{_layer(name)}.{leaf}"] = torch.ones(shape)


def _foreign(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    for key in rng.sample(sorted(FOREIGN), rng.choice((1, 1, 2, 5))):
        tensors[key] = torch.ones(FOREIGN[key])


def _small_type(content: bytes, rng: random.Random) -> bytes:
    """One tensor, or all, in a type of other size, with the bytes that it needs."""
    header = json.loads(content[8 : 8 + _length(content)])
    dtype, data, body = rng.choice(sorted(SMALL_BITS)), b"", content[8 + _length(content) :]
    names = [key for key in header if key != "__metadata__"]
    chosen = set(names) if rng.random() < 0.3 else {rng.choice(names)}
    for key in sorted(names, key=lambda key: int(header[key]["data_offsets"][0])):
        entry, count = header[key], 1
        for side in entry["shape"]:
            count *= side
        piece = body[slice(*entry["data_offsets"])]
        if key in chosen and count * SMALL_BITS[dtype] % 8 == 0:
            entry["dtype"], piece = dtype, rng.randbytes(count * SMALL_BITS[dtype] // 8)
        entry["data_offsets"] = [len(data), len(data) + len(piece)]
        data += piece
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


MUTATIONS: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("cut", _cut),
    ("longer", _longer),
    ("bits", _flip_bits),
    ("header bits", _flip_header),
    ("length", _lie_about_length),
    ("noise", _noise),
    ("pickle", _pickle_start),
    ("small type", _small_type),
    *(
        (name, _of_tensors(edit))
        for name, edit in (
            ("empty", _empty),
            ("scalar", _scalar),
            ("huge", _huge),
            ("zeros", _zeros),
            ("tucker", _tucker),
            ("dora", _dora),
            ("foreign", _foreign),
        )
    ),
    *(
        (name, _of_header(edit))
        for name, edit in (
            ("rename", _rename),
            ("shape", _shape),
            ("transpose", _transpose),
            ("flatten", _flatten),
            ("dtype", _dtype),
            ("every dtype", _every_dtype),
            ("offsets", _offsets),
            ("shared data", _share_data),
            ("drop", _drop),
            ("metadata", _metadata),
            ("extra layer", _extra_layer),
        )
    ),
)


def _length(content: bytes) -> int:
    return int(struct.unpack("<Q", content[:8])[0])
