"""Each metric falls when it should, measured by the miniature's own tower on the mascot and on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_booth.evaluation import metrics
from lora_booth.evaluation.encoders import encoder_named
from lora_booth.evaluation.features import Encoder
from lora_booth.evaluation.measure import Drawn, Features, features_of, intervals, values_of
from lora_booth.models.bases.sources import EMBEDDED

MASCOT = EMBEDDED.parent / "mascot"
COLOURS = ("red", "green", "blue", "orange")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return encoder_named("miniature", torch.device("cpu"))


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB").resize((64, 64)) for path in sorted(folder.glob("*.png"))]


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def plain(*colours: str) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", (64, 64), colour) for colour in colours)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def drawn(
    subject: list[Image.Image],
    classes: tuple[Image.Image, ...] = plain(*COLOURS[:2]),
    unrelated: tuple[Image.Image, ...] = plain("black", "pink"),
) -> Drawn:
    return Drawn(((subject[0], subject[1]), (subject[2], subject[3])), classes, unrelated)


@pytest.fixture(scope="module")
def real(encoder: Encoder) -> Tensor:
    return encoder.embed_images(opened(MASCOT / "held_out"))


@pytest.fixture(scope="module")
def base(encoder: Encoder) -> Features:
    return features_of(drawn(list(plain(*COLOURS))), encoder)


def test_subject_fidelity_falls_for_another_subject_and_for_a_broken_adapter(
    encoder: Encoder, real: Tensor, base: Features
) -> None:
    candidates = {"mascot": opened(MASCOT / "instance"), "other": list(plain(*COLOURS)), "broken": noise(4)}
    found = {name: values_of(features_of(drawn(p), encoder), base, real, None) for name, p in candidates.items()}
    likeness = {name: mean(values["subject_fidelity"]) for name, values in found.items()}
    # pixels of pure noise, of which the tower has seen none, come near; a broken adapter is tried in tests/verbs
    assert likeness["mascot"] > likeness["other"] + 0.2 and likeness["mascot"] > likeness["broken"]
    assert mean(found["other"]["subject_change"]) == pytest.approx(0, abs=1e-5)
    assert mean(found["mascot"]["subject_change"]) > 0.3


def test_leak_rises_and_preservation_worsens_when_the_class_becomes_the_subject(
    encoder: Encoder, real: Tensor, base: Features
) -> None:
    mascot = opened(MASCOT / "instance")
    kept = values_of(features_of(drawn(mascot), encoder), base, real, None)
    lost = values_of(features_of(drawn(mascot, classes=(mascot[0], mascot[1])), encoder), base, real, None)
    assert mean(kept["leak"]) == pytest.approx(0, abs=1e-5)
    assert mean(lost["leak"]) > 0.3 and mean(lost["preservation"]) > mean(kept["preservation"]) + 0.2


def test_drift_rises_when_unrelated_pictures_change(encoder: Encoder, real: Tensor, base: Features) -> None:
    mascot = opened(MASCOT / "instance")
    same = values_of(features_of(drawn(mascot), encoder), base, real, None)
    changed = values_of(features_of(drawn(mascot, unrelated=(mascot[0], mascot[2])), encoder), base, real, None)
    assert mean(same["drift"]) == pytest.approx(0, abs=1e-5) and mean(changed["drift"]) > 0.3


def test_diversity_falls_when_all_pictures_of_a_prompt_are_the_same(encoder: Encoder, base: Features) -> None:
    mascot = opened(MASCOT / "instance")
    many = values_of(features_of(drawn(mascot), encoder), base, None, None)
    one = values_of(features_of(drawn([mascot[0], mascot[0], mascot[1], mascot[1]]), encoder), base, None, None)
    assert mean(one["diversity"]) == pytest.approx(0, abs=1e-5) and mean(many["diversity"]) > 0.05
    assert "subject_fidelity" not in one and "prompt_fidelity" not in one and "leak" not in one


def test_prompt_fidelity_falls_when_the_background_is_not_the_one_asked_for(encoder: Encoder, base: Features) -> None:
    texts = encoder.embed_texts(["a red background", "a green background"])
    right = features_of(drawn(list(plain("red", "red", "green", "green"))), encoder)
    wrong = features_of(drawn(list(plain("green", "green", "red", "red"))), encoder)
    values = [mean(values_of(each, base, None, texts)["prompt_fidelity"]) for each in (right, wrong)]
    assert values[0] > values[1] + 0.05


def test_share_is_the_way_from_the_base_to_the_ceiling() -> None:
    values = {"subject_fidelity": [0.6, 0.6], "drift": [0.1, 0.1]}
    assert intervals(values, 0.2, 0.8)["share"].mean == pytest.approx(2 / 3)
    for before, ceiling in ((None, 0.8), (0.2, None), (0.8, 0.8)):
        assert "share" not in intervals(values, before, ceiling)


def test_what_all_pictures_share_does_not_hide_a_change() -> None:
    """A base whose pictures lie within ten degrees of each other: one that leaves them all drifts by far more than the
    cosine alone says."""

    def at(*degrees: float) -> Tensor:
        radians = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    before = Features(at(0, 2), at(0, 10), at(2, 8), 1)
    after = Features(at(0, 2), at(0, 10), at(8, 2), 1)
    assert mean(metrics.drift(before.unrelated, after.unrelated)) < 0.01
    assert mean(values_of(after, before, None, None)["drift"]) > 1.9
