"""Words to name a subject with: which are proposed, and what is said of unsuited ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_booth.cli import app
from lora_booth.config.settings import ModelConfig, SubjectConfig
from lora_booth.errors import ConfigError, ModelError
from lora_booth.models import loading, meanings
from lora_booth.models.bases import identifiers, vocabulary
from lora_booth.models.bases.sources import SHIPPED_CONFIGS
from lora_booth.models.families.components import shipped_tokenizer
from lora_booth.planning import decide
from lora_booth.verbs.tokens import tokens
from tests.conftest import MakeConfig
from tests.support.runs import Recorder

WORDS = ["sks", "ohwx", "zwx", "olis", "xxy5syt00", "Sks Dog", "naïve café", "don't", "a_b--c!", "2024", "日本", "🙂"]


@pytest.mark.parametrize("base", ["sd15", "sdxl", "booth-mini"])
def test_words_are_cut_as_the_real_tokenizer_cuts_them(base: str) -> None:
    facts = loading.facts(ModelConfig(base=base), needs_weights=False)
    (own,) = vocabulary.of_base(facts)
    if base == "booth-mini":
        real = loading.load(ModelConfig(base=base), device="cpu", dtype=torch.float32).tokenizers()["text_encoder"]
    else:
        real = shipped_tokenizer(SHIPPED_CONFIGS / ("sd1" if base == "sd15" else base) / "tokenizer")
    for word in WORDS:
        expected = real(word, add_special_tokens=False).input_ids
        unknown = real.unk_token_id  # of letters that a smaller vocabulary lacks
        assert [own.ids.get(piece, unknown) for piece in own.cut(word)] == expected, word


def test_ids_are_those_that_were_measured() -> None:
    own = vocabulary.shipped()
    assert {word: own.whole(word) for word in ("sks", "ohwx", "olis", "phol", "emo", "zwx")} == {
        "sks": 48136,
        "ohwx": 47993,
        "olis": 49397,
        "phol": 48140,
        "emo": 19381,
        "zwx": None,
    }


@pytest.mark.parametrize(
    ("token", "noun", "told"),
    [
        ("ohwx", "dog", []),
        ("sks", "dog", ["a rifle"]),
        ("zwx", "dog", ["2 tokens for this base (z + wx)"]),
        ("emo", "dog", ["a common word"]),
        ("MyDog", "dog", ["(my + dog)", "holds the class noun"]),
        ("dog", "dog", ["a common word", "holds the class noun"]),
    ],
)
def test_what_is_said_of_a_token(token: str, noun: str, told: list[str]) -> None:
    said = identifiers.faults(token, noun, [vocabulary.shipped()])
    assert len(said) == len(told) and all(part in fault for part, fault in zip(told, said, strict=True)), said
    assert all("lora-booth tokens" in fault for fault in said)


def test_nothing_is_said_of_the_usual_token() -> None:
    usual = SubjectConfig.model_fields["token"].default
    own = vocabulary.shipped()
    assert usual in {c.word for c in identifiers.candidates([own], "dog")}
    assert not identifiers.faults(usual, "dog", [own])


def test_proposals_are_rare_single_words_that_nothing_is_said_of() -> None:
    heard = Recorder()
    found = tokens(base="sdxl", class_noun="dog", report=heard)
    words = [p.candidate.word for p in found]
    assert len(set(words)) == 10 and not set(words) & identifiers.known_words()
    real = shipped_tokenizer(SHIPPED_CONFIGS / "sdxl" / "tokenizer")
    for proposal in found:
        ids = real(proposal.candidate.word, add_special_tokens=False).input_ids
        assert ids == [proposal.candidate.id] and ids[0] >= 40_000
        assert identifiers.faults(proposal.candidate.word, "dog", [vocabulary.shipped()]) == []
    assert any("was not measured" in text for text in heard.warnings)


def test_every_tokenizer_of_a_base_must_know_a_word_as_one() -> None:
    whole = vocabulary.shipped()
    first = identifiers.candidates([whole], "dog")[0].word
    merges = {pair: rank for pair, rank in whole.ranks.items() if "".join(pair) != first + vocabulary.END}
    other = vocabulary.Vocabulary(whole.ids, merges)
    words = {candidate.word for candidate in identifiers.candidates([whole, other], "dog")}
    assert len(words) > 100 and first not in words


def test_the_noun_is_in_no_proposal_and_no_proposal_in_the_noun() -> None:
    word = identifiers.candidates([vocabulary.shipped()], "dog")[0].word
    assert word not in {c.word for c in identifiers.candidates([vocabulary.shipped()], f"x{word}x")}


def test_a_word_that_is_another_has_no_isolation_and_one_that_changes_nothing_no_distance() -> None:
    family = meanings.readers(loading.facts(ModelConfig(base="booth-mini")))
    encoder: Any = family.text_encoders()["text_encoder"]
    table = encoder.get_input_embeddings().weight
    ids = {
        word: family.tokenizers()["text_encoder"](word, add_special_tokens=False).input_ids[0]
        for word in ("hen", "das")
    }
    before = meanings.measure(family, ["hen"], "dog")[0]
    assert before.cosine < 0.9 and before.distance > 0
    with torch.no_grad():
        table[ids["hen"]] = table[ids["das"]] * 100
    after = meanings.measure(family, ["hen"], "dog")[0]
    assert after.cosine == pytest.approx(1, abs=1e-4) and before.is_usual and not after.is_usual
    assert after.distance > before.distance


def test_pictures_of_each_word_are_drawn_once_alone_and_once_with_the_noun(tmp_path: Path) -> None:
    tokens(base="booth-mini", class_noun="dog", number=1, folder=tmp_path / "words", steps=1, report=Recorder())
    with Image.open(tmp_path / "words" / "tokens.png") as picture:
        assert picture.width == 2 * 24 + 8 * 192 + 7 * 10


def test_a_run_is_warned_once_and_a_good_word_and_the_miniature_are_not(make_config: MakeConfig) -> None:
    for base, token, count in (("sd15", "sks", 1), ("sd15", "ohwx", 0), ("booth-mini", "sks", 0)):
        heard = Recorder()
        decide.look(make_config(subject={"token": token}, model={"base": base}), heard, needs_weights=False)
        assert len([text for text in heard.warnings if "subject.token" in text]) == count


@pytest.mark.parametrize("number", [0, 10**9])
def test_a_number_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match="--number"):
        tokens(base="sd15", class_noun="dog", number=number, report=Recorder())


def test_an_unknown_base_an_empty_noun_and_no_word_left_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        tokens(base="./nowhere", class_noun="dog", report=Recorder())
    with pytest.raises(ConfigError, match="--class-noun"):
        tokens(base="sd15", class_noun=" ", report=Recorder())
    monkeypatch.setattr(identifiers, "candidates", lambda *_: [])
    with pytest.raises(ModelError, match="choose a token yourself"):
        tokens(base="sd15", class_noun="dog", report=Recorder())


def test_draw_and_out_go_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["--draw"], "add --out"), (["--out", "x"], "without --draw")):
        monkeypatch.setattr("sys.argv", ["lora-booth", "tokens", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_programs_get_a_line_for_each_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["lora-booth", "tokens", "--json", "--number", "3"])
    app.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len([line for line in lines if "word" in line]) == 3
