"""A run is continued only as what it was: each thing its result depends on is told by name when it has changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_booth.adapter import inject
from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.errors import ConfigError, DataError, DiskError, Interrupted, ModelError
from lora_booth.models import abilities, devices
from lora_booth.models.bases import sources
from lora_booth.planning import decide
from lora_booth.run import identity
from lora_booth.run.folder import Run
from lora_booth.run.report import Silent
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support import tiny
from tests.support.runs import At, assert_equal, session_of, trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def begun(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped after its second step, and all that it reads."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(bases["sd1"], root / "base")
    for name in ("pictures", "classes", "held_out"):
        first, *_ = tiny.tiny_pictures(root / name, 3)
        first.with_suffix(".txt").write_text(f"a {{token}} {{class}} of {name}")
    first = config_of(root, run="first", steps=1, continued=False)
    train.train(first)
    shutil.copy(root / "first" / "yql_dog_diffusers.safetensors", root / "start.safetensors")
    with pytest.raises(Interrupted):
        train.train(config_of(root), report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    return root


def config_of(root: Path, run: str = "run", steps: int = 4, continued: bool = True) -> Config:
    adapter: dict[str, Any] = {"rank": 2, "targets": r"regex:.*mid_block.*attn2\.to_k"}
    return Config.model_validate(
        {
            "model": {"base": str(root / "base")},
            "subject": {"images": root / "pictures", "class_noun": "dog", "held_out": root / "held_out"},
            "data": {"resolution": 32, "bucket_step": 16},
            "prior": {"mode": "images", "folder": root / "classes"},
            "adapter": adapter | ({"continue_from": root / "start.safetensors"} if continued else {}),
            "optimizer": {"learning_rate": 1e-2},
            "train": {"steps": steps, "save_every_steps": 2},
            "preview": {"images_per_prompt": 0},
            "run": {"folder": root / run, "cache": root / "cache"},
        }
    )


@pytest.fixture
def again(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun` that may be harmed, with its paths written anew."""
    root = tmp_path / "again"
    shutil.copytree(begun, root)
    path = root / "run" / "config.toml"
    path.write_text(path.read_text().replace(str(begun), str(root)))
    return root


def resumed(config: Config) -> None:
    """As far as `train` goes before it computes anything."""
    inputs = decide.look(config, Silent())
    resolved = decide.resolve(config, inputs, Silent(), device=CPU, free_gib=None)
    Run.open(config.folder, resolved, inputs.identity(), inputs.to_pin()).close()


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def redraw(path: Path) -> None:
    tiny.tiny_pictures(path.parent / "other", 9)
    shutil.move(path.parent / "other" / "picture_08.png", path)
    shutil.rmtree(path.parent / "other")


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a picture": ("pictures/picture_00.png", redraw, r"pictures: picture_00\.png has changed"),
    "a picture less": ("pictures/picture_02.png", Path.unlink, r"at least 3 are needed"),
    "a caption": ("pictures/picture_00.txt", lambda p: p.write_text("a {class}"), r"captions: picture_00\.txt has ch"),
    "a caption less": ("pictures/picture_00.txt", Path.unlink, r"captions: picture_00\.txt is gone"),
    "a caption more": ("pictures/picture_01.txt", lambda p: p.write_text("x"), r"captions: picture_01\.txt is new"),
    "a class picture": ("classes/picture_00.png", redraw, r"class pictures: picture_00\.png has changed"),
    "a class picture less": ("classes/picture_02.png", Path.unlink, r"class pictures: picture_02\.png is gone"),
    "a class caption": ("classes/picture_00.txt", Path.unlink, r"class captions: picture_00\.txt is gone"),
    "a held-out picture": ("held_out/picture_00.png", redraw, r"held out pictures: picture_00\.png has changed"),
    "a held-out caption": ("held_out/picture_00.txt", Path.unlink, r"held out captions: picture_00\.txt is gone"),
    "the continued adapter": ("start.safetensors", flip_last_byte, r"continued adapter: start\.safetensors has ch"),
    "no continued adapter": ("start.safetensors", Path.unlink, r"start\.safetensors cannot be read: it is missing"),
    "the unet": ("base/unet/diffusion_pytorch_model.safetensors", flip_last_byte, r"model\.base: the files of the"),
    "the vae": ("base/vae/diffusion_pytorch_model.safetensors", flip_last_byte, r"model\.base: the files of the"),
    "the text encoder": ("base/text_encoder/model.safetensors", flip_last_byte, r"model\.base: the files of the"),
    "the tokenizer": ("base/tokenizer/merges.txt", lambda p: p.write_text(p.read_text() + "\n"), r"model\.base: the"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_run_is_not_continued_with_another(what: str, again: Path) -> None:
    name, change, expected = FILES[what]
    resumed(config_of(again))
    change(again / name)
    with pytest.raises((ConfigError, DataError, ModelError), match=expected):
        resumed(config_of(again))


OTHER: dict[str, Any] = {
    "model.precision": "bf16",
    "model.quantize": "int8",
    "model.prediction_type": "v_prediction",
    "model.attention": "xformers",
    "subject.prompt": "a drawing of {token} {class}",
    "subject.captions": "off",
    "subject.held_out": None,
    "subject.masks": "off",
    "subject.templates": ("a {token} {class}",),
    "prior.folder": None,
    "prior.prompts": ("a drawing of a {class}",),
    "prior.captions": ("a cat",),
    "prior.sampler": "ddim",
    "adapter.targets": "attention",
    "adapter.alpha": 3.0,
    "adapter.rank_pattern": {"to_k": 4},
    "adapter.alpha_pattern": {"to_k": 4.0},
    "adapter.init": "gaussian",
    "adapter.embedding": "too",
    "adapter.embedding_vectors": 2,
    "adapter.continue_from": None,
    "objective.min_snr_gamma": 5.0,
    "objective.loss": "huber",
    "objective.timestep_range": (0.0, 0.5),
    "optimizer.name": "adafactor",
    "optimizer.betas": (0.8, 0.99),
    "optimizer.ema_decay": 0.9,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 1,
    "preview.prompts": ("a {class}",),
    "preview.every_steps": 1,
    "preview.sampler": "euler",
    "data.resolution": 48,
    "data.bucket_step": 8,
}
"""A valid other value, where adding one, or taking the opposite, is none."""
ELSEWHERE = {"model.base", "model.revision", "objective.zero_terminal_snr", "objective.huber_delta", "prior.mode"}
"""Refused before the run is looked at, or tested with what they need."""


WITH: dict[str, dict[str, Any]] = {
    "objective.huber_delta": {"objective": {"loss": "huber"}},
    "adapter.embedding_vectors": {"adapter": {"embedding": "too", "continue_from": None}},
    "adapter.embedding": {"adapter": {"continue_from": None}},
}
"""What must change too, or the value would be a contradiction."""


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value + 1 if isinstance(value, int) else value / 2 if value else 0.5


@pytest.mark.parametrize("mode", ["images", "none"])
def test_a_run_is_not_continued_with_another_prior(mode: str, make_config: MakeConfig) -> None:
    model = {"mode": "model", "captions": ("a cat",)}
    with pytest.raises(Interrupted):
        train.train(make_config(prior=model), report=At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(ConfigError, match=f'prior.mode: "model" -> "{mode}"'):
        train.train(make_config(prior={**model, "mode": mode}))


def test_a_run_is_not_continued_with_another_value_of_any_setting_that_counts(again: Path) -> None:
    config, checked = config_of(again), 0
    keys = [(s, key) for s, section in config for key in type(section).model_fields]
    for section, key in keys:
        name = f"{section}.{key}"
        if name in identity.FREE_TO_CHANGE or name in ELSEWHERE:
            continue
        value = OTHER[name] if name in OTHER else other(getattr(getattr(config, section), key))
        changes = {section: {key: value}}
        for other_section, pairs in WITH.get(name, {}).items():
            changes[other_section] = {**changes.get(other_section, {}), **pairs}
        changed = config.with_values(changes)
        with pytest.raises(ConfigError) as caught:
            resumed(changed)
        assert f"{name}: " in str(caught.value), name
        checked += 1
    assert checked > 45


def test_a_run_is_continued_to_the_same_bytes_when_only_free_settings_change(again: Path, begun: Path) -> None:
    straight = trained(config_of(again, run="straight"))
    changed = config_of(again).with_values(
        {
            "train": {"save_every_steps": 1, "keep_last": 5, "compile": False},
            "memory": {"pictures_at_once": 1, "tiled_decoding": True, "offload_denoiser": True},
            "run": {"cache": again / "another cache"},
            "subject": {"images": shutil.move(again / "pictures", again / "moved")},
            "export": {"name": "other", "dtype": "fp32", "author": "me", "license": "MIT", "formats": ("kohya",)},
        }
    )
    train.train(changed)
    newest = max((again / "run" / "checkpoints").iterdir())
    assert_equal(straight, load_file(newest / "adapter.safetensors"))


def test_what_is_auto_is_settled_before_it_is_kept(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = toml.load(begun / "run" / "config.toml")
    assert (stored.optimizer.name, stored.model.precision, stored.train.compile) == ("adamw", "fp32", False)
    assert stored.memory.device == "auto", "the file may go to a machine that has another one"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    cuda = abilities.decided(
        config_of(begun).with_values({"model": {"precision": "bf16"}}), devices.abilities(torch.device("cuda"))
    )
    assert (cuda.optimizer.name, cuda.train.compile) == ("adamw8bit", "trial")


def test_a_run_begun_on_another_device_is_refused_by_what_auto_meant_there(again: Path) -> None:
    path = again / "run" / "config.toml"
    text = path.read_text().replace('precision = "fp32"', 'precision = "bf16"').replace('"adamw"', '"adamw8bit"')
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"model\.precision: \"bf16\" -> \"fp32\"\n  optimizer\.name: \"adamw8bit\" ->"
    ):
        resumed(config_of(again))


def test_a_finished_run_of_another_device_is_shown_as_finished(again: Path) -> None:
    config = config_of(again)
    summary, path = train.train(config), again / "run" / "config.toml"
    path.write_text(path.read_text().replace('"adamw"', '"adamw8bit"').replace('"fp32"', '"bf16"'))
    assert train.train(config) == summary
    with pytest.raises(ConfigError, match=r"optimizer\.name"):
        train.train(config.with_values({"optimizer": {"name": "prodigy"}}))


def test_compiling_counts_where_it_changes_what_dropout_draws(begun: Path) -> None:
    config = config_of(begun)
    assert "train.compile" in identity.free(config)
    assert "train.compile" not in identity.free(config.with_values({"adapter": {"dropout": 0.1}}))


def test_a_run_of_a_version_that_kept_less_is_not_continued(again: Path) -> None:
    path = again / "run" / "inputs.json"
    path.write_text(json.dumps({"base": "abc", "pictures": {}, "started_at": 1.0}))
    with pytest.raises(ConfigError, match="begun by another version of lora_booth"):
        resumed(config_of(again))


@pytest.mark.parametrize(
    "harm", [{"inputs": None}, {"pinned": 1}, {"started_at": "x"}, {"started_at": 1e300}, {"inputs": {"base": 1}}]
)
def test_inputs_of_another_shape_are_told_as_damaged(harm: dict[str, Any], again: Path) -> None:
    path = again / "run" / "inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    with pytest.raises(DiskError, match=r"inputs\.json is damaged: .*; put it back"):
        resumed(config_of(again))


def test_a_run_goes_on_with_the_commit_of_the_base_that_it_began_with(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repository: str, revision: str | None, config: Any, *, needs_weights: bool) -> sources.Found:
        asked.append((repository, revision))
        return sources.Found(again / "base", repository, revision or f"commit{len(asked)}")

    monkeypatch.setattr(sources, "_download", download)
    config = config_of(again, run="of the hub").with_values({"model": {"base": "owner/name"}})
    with pytest.raises(Interrupted):
        train.train(config, report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert asked == [("owner/name", None)], "a run asks once"
    assert json.loads((again / "of the hub" / "inputs.json").read_text())["pinned"]["revision"] == "commit1"
    train.train(config)
    assert asked[1:] == [("owner/name", "commit1")]
    assert "owner/name at commit1" in decide.described(config, decide.look(config, Silent()).facts)


def test_a_layer_of_another_rank_has_scale_one_unless_alpha_is_given(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session_of(make_config(adapter={"rank": 8, "rank_pattern": {"to_k": 4}}), monkeypatch)
    layers = inject.collect(s.adapted)["unet"].values()
    assert {(low.rank, low.scale) for low in layers} == {(8, 1.0), (4, 1.0)}


class Other:
    """The second of two processes, whose first has the digest `main`."""

    num_processes, process_index, is_main_process, device = 2, 1, False, CPU

    def __init__(self, main: str) -> None:
        self.main = main

    def reduce(self, own: torch.Tensor, _: str) -> torch.Tensor:
        return own + torch.tensor([float(int(self.main[i : i + 4], 16)) for i in range(0, 64, 4)])


def test_processes_that_would_train_different_runs_do_not_begin(begun: Path) -> None:
    config = config_of(begun)
    given = decide.look(config, Silent()).identity()
    first = identity.digest(config, given)
    second = identity.digest(config, given | {"captions": {}})
    train._require_one_run(Other(first), first)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"process 1 of 2 reads other pictures, captions or files of the base than"):
        train._require_one_run(Other(first), second)  # type: ignore[arg-type]


def test_the_digest_of_a_run_knows_all_that_counts_and_no_place(begun: Path, again: Path) -> None:
    one, other = config_of(begun), config_of(again, run="elsewhere")
    given = decide.look(one, Silent()).identity()
    digest = identity.digest(one, given)
    assert digest == identity.digest(other, given)
    assert digest == identity.digest(one.with_values({"train": {"batch_size": 7}}), given)
    assert digest != identity.digest(one.with_values({"train": {"seed": 7}}), given)
    assert digest != identity.digest(one, given | {"held_out_captions": {}})
