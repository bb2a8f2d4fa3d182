"""Whole runs that learn a word: alone or beside the adapter, killed, split into micro-batches, judged, handed over."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_booth.adapter.embeddings import LENGTHS, VECTORS
from lora_booth.adapter.files import embedding, storage
from lora_booth.config.resolved import Filled
from lora_booth.errors import ConfigError, Interrupted
from lora_booth.models import loading
from lora_booth.planning import decide, memory
from lora_booth.run.report import Silent
from lora_booth.training import session as sessions
from lora_booth.verbs import generate, train
from lora_booth.verbs.evaluate import Method, evaluate
from lora_booth.verbs.export import export
from lora_booth.verbs.inspect import inspect
from lora_booth.verbs.resize import resize
from tests.conftest import MakeConfig
from tests.evaluation.towers import tiny_clip
from tests.support.runs import At, Recorder, assert_equal, assert_near, session_of, trained

ONLY: dict[str, Any] = {"adapter": {"embedding": "only", "rank": 16}, "prior": {"mode": "none"}}
TOO: dict[str, Any] = {"adapter": {"embedding": "too"}}


def stop_at(step: int) -> At:
    return At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(("base", "keys"), [("sd1", {"yql"}), ("sdxl", {"clip_l", "clip_g"})])
def test_a_word_alone_leaves_its_file_and_no_adapter(
    base: str, keys: set[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    recorder = Recorder()
    pictures = {"images_per_prompt": 1, "sampler_steps": 2, "sampler": "ddim", "prompts": ["a {token} {class}"]}
    summary = train.train(make_config(base, **ONLY, preview=pictures), report=recorder)
    folder = tmp_path / "run"
    assert set(summary.files) == {"embedding"}
    assert {path.name for path in folder.glob("*.safetensors")} == {"yql.safetensors"}
    assert set(load_file(folder / "yql.safetensors")) == keys
    found = embedding.read(folder / "yql.safetensors")
    assert (found.word, found.num_vectors) == ("yql", 1)
    assert ("word", '"yql" is learnt as 1 vector in ' + " and ".join(found.vectors) + ", learning rate 0.001") in (
        recorder.events
    )
    assert any(
        "ComfyUI: yql.safetensors in models/embeddings/; a prompt says embedding:yql" in text
        for _, text in recorder.events
    )
    assert summary.num_parameters == sum(rows.numel() for rows in found.vectors.values())
    with Image.open(folder / "before_after.png") as grid:
        assert grid.width > 2 * 32


def test_the_word_moves_at_its_rate_in_every_encoder_and_keeps_its_length(make_config: MakeConfig) -> None:
    optimizer = {"embedding_learning_rate": 0.05}
    tensors = trained(make_config("sdxl", **ONLY, optimizer=optimizer))
    names = ("text_encoder", "text_encoder_2")
    assert set(tensors) == {f"{name}.{part}" for name in names for part in (VECTORS, LENGTHS)}
    slow = trained(make_config("sdxl", "slow", **ONLY, optimizer={"embedding_learning_rate": 1e-6}))
    for name in names:
        moved = (tensors[f"{name}.{VECTORS}"] - slow[f"{name}.{VECTORS}"]).abs()
        assert 0.03 < float(moved.max()) < 0.25, moved.max()
        assert torch.equal(tensors[f"{name}.{LENGTHS}"], slow[f"{name}.{LENGTHS}"])


@pytest.mark.parametrize("settings", [ONLY, TOO | {"prior": {"mode": "model", "captions": ["a cat"]}}])
@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(step: int, settings: dict[str, Any], make_config: MakeConfig) -> None:
    straight = trained(make_config(name="straight", **settings))
    with pytest.raises(Interrupted):
        train.train(make_config(**settings), report=stop_at(step))
    assert_equal(trained(make_config(**settings)), straight)
    folders = [make_config(name=name, **settings).folder for name in ("straight", "run")]
    words = [load_file(folder / "yql.safetensors")["yql"] for folder in folders]
    assert torch.equal(*words)


def test_micro_batches_do_not_change_what_is_learnt(make_config: MakeConfig) -> None:
    rows = {"images_per_step": 2, "batch_size": 4}
    together = trained(make_config(**TOO, train=rows))
    apart = trained(make_config(name="apart", **TOO, train={**rows, "batch_size": 1}))
    assert_near(together, apart, 1e-4)


def test_too_hands_over_both_files_which_know_each_other(make_config: MakeConfig, tmp_path: Path) -> None:
    summary = train.train(make_config("sd1", **TOO))
    assert set(summary.files) == {"kohya", "diffusers", "embedding"}
    for name in ("yql_dog", "yql_dog_diffusers"):
        header = storage.read_metadata(tmp_path / "run" / f"{name}.safetensors")
        told = embedding.told_beside(header)
        assert told is not None and told[0] == "yql.safetensors"
        recorder = Recorder()
        assert len(embedding.told_apart([tmp_path / "run" / f"{name}.safetensors"], recorder)[1]) == 1
        assert recorder.warnings == []
    paths = export(file=tmp_path / "run", step="last", out=tmp_path / "again")
    assert set(paths) == {"kohya", "diffusers", "embedding"}
    assert load_file(paths["embedding"])["yql"].equal(load_file(tmp_path / "run" / "yql.safetensors")["yql"])
    with pytest.raises(ConfigError, match=r"yql\.safetensors is there already"):
        export(file=tmp_path / "run", step="last", out=tmp_path / "again", name="other")
    recorder = Recorder()
    resize(file=tmp_path / "run" / "yql_dog.safetensors", rank=1, report=recorder)
    assert any("take that file along" in text for text in recorder.warnings)
    inspect(tmp_path / "run" / "yql_dog_rank1.safetensors", recorder)
    inspect(tmp_path / "run" / "yql_dog.safetensors", recorder)
    assert any("learnt with it, in yql.safetensors" in text for _, text in recorder.events)
    inspect(tmp_path / "run" / "yql.safetensors", recorder)
    assert any("a learnt word (textual inversion)" in text for _, text in recorder.events)


def test_before_pictures_are_those_of_the_base(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    s = session_of(make_config(**TOO), monkeypatch)
    base = s.base_condition(["a photo of yql dog"])
    assert s.word is not None
    for layer in s.word.layers.values():
        layer.vectors.data += 1.0
    with sessions.base_alone(s):
        alone = s.condition(["a photo of yql dog"])
    assert all(torch.equal(alone[name], rows) for name, rows in base.items())
    assert not torch.equal(s.condition(["a photo of yql dog"])["embeddings"], base["embeddings"])


def test_generate_draws_with_the_word_and_with_strength_zero_without_it(
    make_config: MakeConfig, bases: dict[str, Path], tmp_path: Path
) -> None:
    train.train(make_config("sd1", **ONLY, optimizer={"embedding_learning_rate": 0.5}))
    file, picture = tmp_path / "run" / "yql.safetensors", generate.PictureSettings(sampler="ddim", sampler_steps=2)
    settings = {"base": str(bases["sd1"]), "prompts": ["a yql dog", "a cat"], "picture": picture}
    generate.generate(**settings, folder=tmp_path / "base")
    generate.generate(**settings, adapters=[(file, 1.0)], strengths=(0, 1), folder=tmp_path / "word")
    base, without, with_word = (
        [
            (tmp_path / folder / f"0{n}_{words}_{strength}.png").read_bytes()
            for n, words in enumerate(("a_yql_dog", "a_cat"))
        ]
        for folder, strength in (("base", 1), ("word", 0), ("word", 1))
    )
    assert without == base
    assert with_word[0] != base[0] and with_word[1] == base[1]
    with pytest.raises(ConfigError, match="has no strength"):
        generate.generate(**settings, adapters=[(file, 0.5)], folder=tmp_path / "half")


def test_evaluate_measures_each_kept_word(make_config: MakeConfig, tmp_path: Path) -> None:
    train.train(make_config("sd1", **ONLY, optimizer={"embedding_learning_rate": 0.5}))
    clip, prompts = str(tiny_clip(tmp_path / "clip")), ["a {token} {class}"]
    method = Method(encoder_names=[clip], templates=prompts, wishes={"sampler": "ddim", "sampler_steps": 2})
    found = evaluate(tmp_path / "run", method=method).encoders[0]
    assert [(one.step, one.strength) for one in found.candidates] == [(2, 1.0), (4, 1.0)]
    for one in found.candidates:
        assert one.metrics["subject_change"].mean > 0
        assert one.metrics["prediction_drift"].mean == 0  # prompts without the word are what they were
    assert found.candidates[0].metrics["subject_change"] != found.candidates[1].metrics["subject_change"]


def test_the_best_of_kept_words_is_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    evaluated = {"choose": "best", "encoder": "miniature", "max_share": 100}
    recorder = Recorder()
    summary = train.train(make_config("sd1", **ONLY, evaluate=evaluated), report=recorder)
    assert summary.exported_strength == 1.0 and summary.exported_step in (2, 4)
    best = tmp_path / "run" / "checkpoints" / f"step-{summary.exported_step:06d}" / "adapter.safetensors"
    tensors = load_file(best)
    direction, length = tensors[f"text_encoder.{VECTORS}"], tensors[f"text_encoder.{LENGTHS}"]
    rows = direction / direction.norm(dim=-1, keepdim=True) * length
    assert torch.allclose(load_file(tmp_path / "run" / "yql.safetensors")["yql"], rows, atol=1e-6)


def test_the_text_encoders_are_counted_in_every_step_with_all_that_runs_through_them(make_config: MakeConfig) -> None:
    def modules_of(name: str, **settings: Any) -> tuple[memory.Modules, Filled]:
        config = make_config(name=name, **settings)
        filled = decide.filled(config, decide.look(config, Silent()))
        return memory.Modules.of(filled, loading.facts(config.model)), filled

    found = {
        "none": modules_of("none", prior=ONLY["prior"]),
        "only": modules_of("only", **ONLY),
        "too": modules_of("too", **TOO, prior=ONLY["prior"]),
    }
    encoders = found["none"][0].size("text encoders")
    sizes = {name: modules.size("base") for name, (modules, _) in found.items()}
    assert sizes["only"] == sizes["too"] == sizes["none"] + encoders
    steps = {name: modules.step(config, None) for name, (modules, config) in found.items()}
    assert steps["too"].parts["activations"] > steps["none"].parts["activations"]
    vectors = found["only"][0].built.trained
    assert [tuple(flat.vector.shape) for flat in vectors] == [(1, 32)] and not found["only"][0].built.adapted.get(
        "unet"
    )


def test_a_vector_without_gradient_ends_the_run_at_its_first_step(make_config: MakeConfig) -> None:
    with pytest.raises(Exception, match="no adapted layer gets a gradient"):
        train.train(make_config(**ONLY, subject={"prompt": "a photo of {class}"}))
