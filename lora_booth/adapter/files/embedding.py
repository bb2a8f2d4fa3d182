"""The file of a learnt word, which programs load as an embedding.

What lives here: writing it for A1111, Forge, SD.Next, ComfyUI, InvokeAI and diffusers, and reading anybody's. What does
not: what a base makes of it (`adapter/embeddings.py`).

Bases with one text encoder have one tensor `[n, width]`, by the word itself: A1111 asserts that there is no other
(modules/textual_inversion/textual_inversion.py), diffusers takes the key as the word. SDXL's have `clip_l` and
`clip_g`, which all but diffusers take as they are; it is told them one by one. Every program but diffusers calls the
word by the name of the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from lora_booth.adapter.embeddings import WordVectors
from lora_booth.adapter.files import storage
from lora_booth.adapter.files.metadata import with_metadata
from lora_booth.config import inputs
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases.architectures import ARCHITECTURES
from lora_booth.run import disk
from lora_booth.run.report import Report

OTHERS_KEY = "emb_params"
"""What files that were made from A1111's pickles call the vectors of the only text encoder."""
WORD_FIELD = "lora_booth.word"
BESIDE_FIELD = "lora_booth.embedding"
"""In an adapter's header: name and SHA-256 of the file of the word that was learnt with it."""
MAX_VECTORS = 75
"""Of a word: as many as a prompt has room for."""
PLACE = {
    "AUTOMATIC1111": ("in embeddings/", "{word}"),
    "Forge": ("in embeddings/", "{word}"),
    "SD.Next": ("in models/embeddings/", "{word}"),
    "ComfyUI": ("in models/embeddings/", "embedding:{word}"),
    "InvokeAI": ("added in the Model Manager", "<{word}>"),
}
"""Program to where the file goes, and how a prompt calls it."""


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors. `header`: what its file says of itself."""

    word: str
    vectors: WordVectors
    header: Mapping[str, str]

    @property
    def file_name(self) -> str:
        """By which programs call it."""
        return f"{self.word}.safetensors"

    @property
    def num_vectors(self) -> int:
        """Tokens of a prompt that it takes up."""
        return len(next(iter(self.vectors.values())))


def content(embedding: Embedding, family: str) -> bytes:
    """The bytes of the file, float32, the same for the same word and header."""
    keys = ARCHITECTURES[family].embedding_keys
    tensors = {keys.get(name, embedding.word): rows.float().contiguous() for name, rows in embedding.vectors.items()}
    return with_metadata(save(tensors), {**_described(embedding.header), WORD_FIELD: embedding.word})


def beside(embedding: Embedding, content: bytes) -> dict[str, str]:
    """What the header of an adapter says of the word that was learnt with it."""
    return {BESIDE_FIELD: f"{embedding.file_name} {hashlib.sha256(content).hexdigest()}"}


def told_beside(header: Mapping[str, str]) -> tuple[str, str] | None:
    """Name and SHA-256 of the file that an adapter's header names; None where it names none."""
    name, _, digest = header.get(BESIDE_FIELD, "").rpartition(" ")
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.safetensors", name) is not None
    return (name, digest) if is_plain else None


def told_apart(paths: Sequence[Path], report: Report) -> tuple[list[Path], list[Embedding]]:
    """Of `paths` those of adapters, and the words of the others and of the files that adapters say they were trained
    with, where these lie beside them; a missing one is told.

    Raises ConfigError for two files of one word, ModelError as `read` does.
    """
    adapters = [path for path in paths if not is_one(path)]
    files = {path.resolve(): path for path in paths if path not in adapters}
    for path in adapters:
        told = told_beside(storage.read_metadata(path))
        if told is None:
            continue
        name, digest = told
        found = path.with_name(name)
        if not inputs.is_plain_file(found):
            report.warn(
                f"{path.name} was trained together with the word in {name}, which is not beside it: prompts mean less "
                "without it. Put it there."
            )
            continue
        if disk.sha256(found) != digest:
            report.warn(f"{name} beside {path.name} is not the word that it was trained with; it is used all the same.")
        files.setdefault(found.resolve(), found)
    words = [read(path) for path in files.values()]
    for word in words:
        twins = [path for path, other in zip(files.values(), words, strict=True) if other.word == word.word]
        if len(twins) > 1:
            raise ConfigError(f"{' and '.join(map(str, twins))} are both the word {word.word}; give one of them.")
    return adapters, words


def remind(paths: Sequence[Path], report: Report) -> None:
    """Tell of each adapter that was trained with a word, whose file what is made of the adapter still needs."""
    for path in paths:
        told = told_beside(storage.read_metadata(path))
        if told is not None:
            report.warn(f"{path.name} was trained together with the word in {told[0]}: take that file along.")


def is_one(path: Path) -> bool:
    """Whether the file is that of a word, by the names and shapes of its tensors. Raises ModelError when it is no
    safetensors file."""
    return _components(_shapes(path)) is not None


def read(path: Path) -> Embedding:
    """The word in a file, its vectors float32 on the CPU. Raises ModelError when it is something else, damaged, or not
    finite."""
    found = _components(_shapes(path))
    if found is None:
        raise ModelError(f"{path.name} is no embedding of a word; `lora-booth inspect` tells what it is.")
    with storage.opened(path) as file:
        header = dict(file.metadata() or {})
        vectors = {name: torch.atleast_2d(file.get_tensor(key).float()) for name, key in found.items()}
    if not all(bool(rows.isfinite().all()) for rows in vectors.values()):
        raise ModelError(f"{path.name} holds NaN or infinity, so its training diverged; use another.")
    if len({len(rows) for rows in vectors.values()}) != 1 or not all(
        (rows != 0).any(dim=-1).all() for rows in vectors.values()
    ):
        raise ModelError(f"{path.name} has empty vectors, or not as many for each text encoder; fetch it again.")
    said = header.get(WORD_FIELD, "")
    return Embedding(said if said and said == path.stem else path.stem, vectors, header)


def family_of(embedding: Embedding) -> str | None:
    """The family whose text encoders read such vectors; None where none of full size does."""
    names = set(embedding.vectors)
    widths = {name: rows.shape[1] for name, rows in embedding.vectors.items()}
    for row in ARCHITECTURES.values():
        if set(row.text_encoders) == names and row.text_widths == widths:
            return row.name
    return None


def _shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key to type and shape of every tensor."""
    with storage.opened(path) as file:
        slices = {key: file.get_slice(key) for key in list(file.keys())}
        return {key: (str(found.get_dtype()), tuple(found.get_shape())) for key, found in slices.items()}


def _components(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str] | None:
    """Text encoder to the key of its vectors; None where the tensors are no word."""
    for row in ARCHITECTURES.values():
        if row.embedding_keys and set(tensors) == set(row.embedding_keys.values()):
            found = dict(row.embedding_keys)
            break
    else:
        if len(tensors) != 1:
            return None
        (key,) = tensors
        if "." in key:  # which names a layer, and no word
            return None
        found = {"text_encoder": key}
    for dtype, shape in tensors.values():
        if dtype not in storage.STORED or len(shape) not in (1, 2) or not 0 < shape[-1] <= 4096:
            return None
        if len(shape) == 2 and not 0 < shape[0] <= MAX_VECTORS:
            return None
    return found


def _described(header: Mapping[str, str]) -> dict[str, str]:
    """What of an adapter's header is true of its word too."""
    fields = {name: text for name, text in header.items() if name.startswith(("modelspec.", "lora_booth."))}
    architecture = fields.get("modelspec.architecture", "")
    fields["modelspec.architecture"] = re.sub("/lora$", "/textual-inversion", architecture)
    return {name: text for name, text in fields.items() if text and name not in ("modelspec.title", BESIDE_FIELD)}
