"""A learnt word in text encoders, and its file: what it changes, what it leaves alone, and who can read it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_booth.adapter import attach
from lora_booth.adapter.embeddings import LearntWord
from lora_booth.adapter.files import embedding
from lora_booth.adapter.files.embedding import Embedding
from lora_booth.config.settings import ModelConfig
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models import loading
from lora_booth.models.families.family import Family
from tests.support.runs import Recorder

PROMPTS = ["a photo of yql dog", "yql", "a yql, and the Yql!", "", "a cat on the beach", "a dog " * 20 + "yql"]
WITHOUT = [prompt for prompt in PROMPTS if "yql" not in prompt.lower()]


def family_of(bases: dict[str, Path], name: str) -> Family:
    return loading.load(ModelConfig(base=str(bases[name])), device="cpu", dtype=torch.float32)


@torch.no_grad()
def encoded(family: Family, prompts: list[str]) -> dict[str, Tensor]:
    return family.encode_prompts(prompts)


def some_word(family: Family, num_vectors: int, seed: int = 0) -> dict[str, Tensor]:
    """Vectors that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: module.config.hidden_size for name, module in family.text_encoders().items()}  # type: ignore[union-attr]
    return {name: torch.randn(num_vectors, width, generator=generator) for name, width in widths.items()}


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_a_new_word_means_what_its_tokens_mean(base: str, bases: dict[str, Path]) -> None:
    family = family_of(bases, base)
    before = encoded(family, PROMPTS)
    word = LearntWord.new(family, "yql")
    after = encoded(family, PROMPTS)
    for name, rows in before.items():
        assert torch.allclose(after[name].float(), rows.float(), atol=1e-6), name
    assert all(torch.equal(encoded(family, WITHOUT)[n], encoded(family_of(bases, base), WITHOUT)[n]) for n in before)
    with word.disabled():
        assert all(torch.equal(encoded(family, PROMPTS)[name], rows) for name, rows in before.items())
    for layer in word.layers.values():
        layer.vectors.data += 1.0
    changed = encoded(family, PROMPTS)
    assert not torch.equal(changed["embeddings"][0], before["embeddings"][0])
    without = [PROMPTS.index(prompt) for prompt in WITHOUT]
    assert all(torch.equal(changed[name][without], after[name][without]) for name in before)
    word.forget_()
    assert all(torch.equal(encoded(family, PROMPTS)[name], rows) for name, rows in before.items())


def test_vectors_keep_their_length_and_learn_a_direction(bases: dict[str, Path]) -> None:
    family = family_of(bases, "sd1")
    word = LearntWord.new(family, "yql", 3)
    (layer,) = word.layers.values()
    lengths = layer.rows.norm(dim=-1)
    layer.vectors.data = 5 * layer.vectors.data + 0.3
    assert torch.allclose(layer.rows.norm(dim=-1), lengths, rtol=1e-5)
    family.encode_prompts(["a yql dog"])["embeddings"].square().sum().backward()
    gradient = layer.vectors.grad
    assert gradient is not None and bool(gradient.any())
    along = (gradient * layer.vectors.data).sum(dim=-1) / (gradient.norm(dim=-1) * layer.vectors.data.norm(dim=-1))
    assert float(along.abs().max()) < 1e-4


def test_prompts_are_written_as_the_tokenizer_writes_them_but_for_the_word(bases: dict[str, Path]) -> None:
    family = family_of(bases, "sd1")
    tokens = family.tokens("text_encoder")
    plain = tokens.ids(PROMPTS)
    (number,) = tokens.word("yql")
    tokens.learnt = {(number,): (-1, -2, -3)}
    written = tokens.ids(PROMPTS)
    assert written.shape == plain.shape
    start, end = tokens.tokenizer.bos_token_id, tokens.tokenizer.eos_token_id
    for row, prompt in zip(written.tolist(), plain.tolist(), strict=True):
        inner = prompt[1 : prompt.index(end)]
        wanted = [part for one in inner for part in ((-1, -2, -3) if one == number else (one,))][: tokens.window - 2]
        assert row[: len(wanted) + 2] == [start, *wanted, end]
        assert set(row[len(wanted) + 2 :]) <= {tokens.tokenizer.pad_token_id}
    long = "yql " * 8
    assert tokens.cut([long]) == {long: "yql"}  # 24 ids where 22 can be seen: the eighth is cut in the middle


def test_a_long_word_leaves_the_pooled_vector_at_the_end_of_the_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    """Configs that ship with SDXL say that the end token is 2, and then transformers takes the largest id as the end,
    which a word that is added to the vocabulary would be."""
    base = shutil.copytree(bases["sdxl"], tmp_path / "sdxl")
    path = base / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    family = loading.load(ModelConfig(base=str(base)), device="cpu", dtype=torch.float32)
    word = LearntWord(family, "yql", some_word(family, 4))
    encoder: Any = family.text_encoders()["text_encoder_2"]
    tokens = family.tokens("text_encoder_2")
    ids = tokens.ids(["a yql dog"])
    end = ids[0].tolist().index(tokens.tokenizer.eos_token_id)
    with torch.no_grad():
        output = encoder(ids)
        at_end = encoder.text_projection(output.last_hidden_state[0, end])
    assert end == 1 + 6 and len(word.layers) == 2
    assert torch.allclose(encoded(family, ["a yql dog"])["pooled"][0], at_end, atol=1e-6)
    assert not torch.allclose(at_end, encoder.text_projection(output.last_hidden_state[0, 2]), atol=1e-3)


@pytest.mark.parametrize(("base", "keys"), [("sd1", {"yql"}), ("sdxl", {"clip_l", "clip_g"})])
def test_a_file_has_the_keys_that_programs_ask_for_and_comes_back(
    base: str, keys: set[str], bases: dict[str, Path], tmp_path: Path
) -> None:
    family = family_of(bases, base)
    vectors = some_word(family, 3)
    word = Embedding("yql", vectors, {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_steps": "4"})
    content = embedding.content(word, family.name)
    assert content == embedding.content(word, family.name)
    path = tmp_path / "yql.safetensors"
    path.write_bytes(content)
    assert set(load_file(path)) == keys
    found = embedding.read(path)
    assert found.word == "yql" and found.num_vectors == 3
    assert found.header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert "ss_steps" not in found.header
    assert all(torch.equal(found.vectors[name], rows) for name, rows in vectors.items())


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_diffusers_reads_the_file_and_its_prompts_mean_the_same(
    base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    family = family_of(bases, base)
    vectors = some_word(family, 2)
    path = tmp_path / "yql.safetensors"
    path.write_bytes(embedding.content(Embedding("yql", vectors, {}), family.name))
    with attach.words_learnt(family, [embedding.read(path)]):
        own = encoded(family, ["a yql dog"])
    pipeline = family_of(bases, base).pipeline("ddim")
    for name in ("tokenizer", "tokenizer_2"):  # it writes into them, and all families of a base share theirs
        if hasattr(pipeline, name):
            setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
    if base == "sd1":
        pipeline.load_textual_inversion(str(path), token="<yql>")
    else:
        state = load_file(path)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            parts = {"text_encoder": f"text_encoder{number}", "tokenizer": f"tokenizer{number}"}
            parts = {name: getattr(pipeline, part) for name, part in parts.items()}
            pipeline.load_textual_inversion(state[key], token="<yql>", **parts)
    with torch.no_grad():
        settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        theirs = pipeline.encode_prompt("a <yql> dog", **settings)
    assert torch.allclose(own["embeddings"], theirs[0], atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"yql": torch.full((2, 8), float("nan"))}, "NaN"),
        ({"yql": torch.zeros(2, 8)}, "empty vectors"),
        ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(1, 8)}, "not as many"),
        ({"yql": torch.ones(2, 8, 3)}, "no embedding"),
        ({"yql": torch.ones(80, 8)}, "no embedding"),
        ({"yql": torch.ones(2, 8, dtype=torch.int64)}, "no embedding"),
        ({"a": torch.ones(2, 8), "b": torch.ones(2, 8)}, "no embedding"),
    ],
)
def test_what_is_no_sound_word_is_refused(tensors: dict[str, Tensor], why: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "yql.safetensors")
    with pytest.raises(ModelError, match=why):
        embedding.read(tmp_path / "yql.safetensors")


def test_files_of_others_are_called_by_their_name(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases, "sd1")
    width = some_word(family, 1)["text_encoder"].shape[1]
    save_file({"emb_params": torch.ones(width)}, tmp_path / "a-nice Style_2.safetensors")
    found = embedding.read(tmp_path / "a-nice Style_2.safetensors")
    assert (found.word, found.num_vectors) == ("a-nice Style_2", 1)
    before = encoded(family, ["a dog in a-nice style_2"])["embeddings"]
    with attach.words_learnt(family, [found]):
        assert not torch.equal(encoded(family, ["a dog in a-nice style_2"])["embeddings"], before)
    assert torch.equal(encoded(family, ["a dog in a-nice style_2"])["embeddings"], before)


def test_several_words_are_read_side_by_side(bases: dict[str, Path]) -> None:
    family = family_of(bases, "sdxl")
    words = [Embedding(name, some_word(family, n, seed=n), {}) for n, name in enumerate(("yql", "red", "toy"), start=1)]
    alone = []
    for word in words:
        with attach.words_learnt(family, [word]):
            alone.append(encoded(family, [f"a {word.word}"])["embeddings"])
    with attach.words_learnt(family, words):
        for word, rows in zip(words, alone, strict=True):
            assert torch.allclose(encoded(family, [f"a {word.word}"])["embeddings"], rows, atol=1e-6)
    assert family.tokens("text_encoder").learnt == {}


def test_a_word_of_another_base_or_one_that_is_there_is_refused_and_nothing_is_changed(bases: dict[str, Path]) -> None:
    family, other = family_of(bases, "sd1"), family_of(bases, "sdxl")
    before = encoded(family, PROMPTS)["embeddings"]
    with pytest.raises(ModelError, match="but the base, a sd1 model, reads 32 numbers for text_encoder"):
        LearntWord(family, "yql", some_word(other, 1))
    with pytest.raises(ModelError, match="has no letter"):
        LearntWord(family, " ", some_word(family, 1))
    assert torch.equal(encoded(family, PROMPTS)["embeddings"], before)
    LearntWord(family, "yql", some_word(family, 1))
    with pytest.raises(ModelError, match="is learnt already"):
        LearntWord(family, "YQL", some_word(family, 1))


def test_an_adapter_tells_of_its_word_and_it_is_taken_from_beside_it(bases: dict[str, Path], tmp_path: Path) -> None:
    family = family_of(bases, "sd1")
    word = Embedding("yql", some_word(family, 2), {})
    content = embedding.content(word, "sd1")
    header = embedding.beside(word, content)
    (tmp_path / "yql.safetensors").write_bytes(content)
    down, up = torch.ones(2, 16), torch.ones(16, 2)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    adapter = tmp_path / "yql_dog.safetensors"
    save_file(tensors, adapter, metadata=header)
    recorder = Recorder()
    files, words = embedding.told_apart([adapter, tmp_path / "yql.safetensors"], recorder)
    assert files == [adapter] and [one.word for one in words] == ["yql"] and recorder.warnings == []
    changed = Embedding("yql", some_word(family, 1, seed=3), {})
    (tmp_path / "yql.safetensors").write_bytes(embedding.content(changed, "sd1"))
    assert len(embedding.told_apart([adapter], recorder)[1]) == 1
    assert "is not the word that it was trained with" in recorder.warnings[-1]
    (tmp_path / "yql.safetensors").unlink()
    assert embedding.told_apart([adapter], recorder) == ([adapter], [])
    assert "was trained together with the word in yql.safetensors" in recorder.warnings[-1]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "yql.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="are both the word yql"):
        embedding.told_apart([tmp_path / name / "yql.safetensors" for name in ("one", "two")], recorder)


def test_a_header_cannot_name_a_file_elsewhere() -> None:
    for name in ("../yql.safetensors", "/etc/passwd", "a/b.safetensors", "yql.ckpt", ".safetensors", ""):
        assert embedding.told_beside({embedding.BESIDE_FIELD: f"{name} abc"}) is None
