"""Mutated adapter files: every way we know that a file on the internet can be broken or hostile."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

HUGE = 1 << 40
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "?")


def mutant(content: bytes, seed: int) -> tuple[str, bytes]:
    """The name of the mutation and the bytes; the same seed gives the same file."""
    rng = random.Random(seed)
    name, change = rng.choice(MUTATIONS)
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
            {"modelspec.title": "\x1b]0;owned\x07" + "A" * 200_000, "ss_base_model_version": "sdxl_base_v1-0"},
            {"x": "y" * 2_000_000},
            ["not", "a", "mapping"],
        )
    )


def _extra_layer(header: dict[str, Any], name: str, rng: random.Random) -> None:
    header[
        name.partition(".")[0] + "." + rng.choice(("dora_scale", "hada_w1_a", "lora_mid.weight", "diff", "oft_diag"))
    ] = dict(header[name])


MUTATIONS: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("cut", _cut),
    ("longer", _longer),
    ("bits", _flip_bits),
    ("header bits", _flip_header),
    ("length", _lie_about_length),
    ("noise", _noise),
    ("pickle", _pickle_start),
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
