"""The first merges of CLIP's own byte-pair encoding, as a standard CLIPTokenizer folder.

Merges are ordered by frequency, so a cut is itself a valid CLIP tokenizer: ids are renumbered, pieces are
CLIP's.
"""

import gzip
import json
from pathlib import Path

VOCAB_SIZE = 8192
MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(merges_gz: bytes, folder: Path) -> None:
    """Writes vocab.json, merges.txt and the config files of an 8,192-entry CLIPTokenizer that pads to 32 with END."""
    lines = gzip.decompress(merges_gz).decode("utf-8").split("\n")[1:]
    letters = list(_byte_letters())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = [tuple(line.split()) for line in lines[: VOCAB_SIZE - len(pieces) - 2]]
    pieces += ["".join(merge) for merge in merges] + [START, END]
    assert len(set(pieces)) == len(pieces) == VOCAB_SIZE, "the cut vocabulary has the wrong size"
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    _write_json(folder / "vocab.json", vocab)
    text = "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(folder / "special_tokens_map.json", specials)
    config = {
        **specials,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _byte_letters() -> list[str]:
    """One printable character for each of the 256 byte values, in CLIP's order (Radford et al. 2019, GPT-2 BPE)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
