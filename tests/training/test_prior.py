"""What keeps the base: the model's own predictions, the norm of the update, and direct consistency optimization."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_booth.adapter import inject
from lora_booth.adapter.weights import delta
from lora_booth.config import captions
from lora_booth.config.config import Config, without_token
from lora_booth.data.subject import plain_prompt, prompt_of
from lora_booth.errors import Interrupted
from lora_booth.models.families.noise import Diffusion
from lora_booth.planning import decide
from lora_booth.run.report import Silent
from lora_booth.training import loop, reach
from lora_booth.training.loop import MicroStep
from lora_booth.training.objective import Comparison, Draws, Objective, draw
from lora_booth.training.order import Item, Order
from lora_booth.training.session import Session
from lora_booth.verbs import train
from tests.conftest import MakeConfig
from tests.support.runs import At, assert_equal, assert_near, distance, session_of, trained

FAMILIES = ("sd1", "sd2", "sdxl")
GENERICS = ("a cat", "a house", "a tree")
MODEL = {"mode": "model", "captions": GENERICS}


def micro(s: Session, rows: Any, step: int = 0) -> MicroStep:
    return loop.micro_step(s, rows, step)


def moved(s: Session, size: float = 0.05) -> None:
    """Puts the adapter somewhere, as training would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in s.parameters:
        parameter.data.normal_(0, size, generator=generator)


def item(number: int, plain: str | None = "a dog") -> Item:
    name = f"i{number}"
    return Item("instance", name, name, (4, 8, 8), "a yql dog", (64, 64, 0, 0, 64, 64), plain)


class TestRows:
    def test_a_prior_row_is_the_picture_of_its_instance_row_under_other_words(self) -> None:
        order = Order([item(n) for n in range(5)], (), 4, 0.5, seed=0, captions=GENERICS)
        for step in range(20):
            rows = order.at(step)
            assert [row.weight for row in rows] == [0.25] * 4 + [0.125] * 4
            for instance, prior in zip(rows[:4], rows[4:], strict=True):
                assert (prior.item.role, prior.item.name) == ("prior", instance.item.name)
                assert prior.item.prompt in ("a dog", "", *GENERICS)

    @pytest.mark.parametrize("images_per_step", [1, 4])
    def test_half_are_without_the_token_an_eighth_of_the_rest_empty_and_captions_come_evenly(
        self, images_per_step: int
    ) -> None:
        order = Order([item(n) for n in range(5)], (), images_per_step, 1.0, seed=0, captions=GENERICS)
        rows = [row for step in range(960 // images_per_step) for row in order.at(step)]
        prompts = Counter(row.item.prompt for row in rows if row.item.role == "prior")
        assert (prompts["a dog"], prompts[""]) == (480, 60)
        assert all(110 <= prompts[caption] <= 170 for caption in GENERICS), prompts

    def test_a_picture_whose_prompt_does_not_name_the_subject_gets_captions_alone(self) -> None:
        order = Order([item(0, plain=None)], (), 2, 1.0, seed=0, captions=GENERICS)
        prompts = {row.item.prompt for step in range(40) for row in order.at(step) if row.item.role == "prior"}
        assert prompts == {"", *GENERICS}

    def test_a_step_is_a_function_of_seed_and_step(self) -> None:
        one, same, other = (Order([item(n) for n in range(5)], (), 3, 1.0, s, GENERICS) for s in (0, 0, 1))
        assert [one.at(s) for s in range(9)] == [same.at(s) for s in range(9)] != [other.at(s) for s in range(9)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of yql dog", "a photo of dog"),
        ("a YQL dog", "a dog"),
        ("yql", ""),
        ("a dog, yql.", "a dog, ."),
        ("a photo of yql", "a photo of"),
        ("a husks dog", "a husks dog"),
        ("yql-like yql", "-like"),
        ("a dog", "a dog"),
    ],
)
def test_the_token_is_left_out_as_a_word(text: str, expected: str) -> None:
    assert without_token(text, "yql") == expected


def test_a_token_that_looks_like_a_pattern_is_a_word_like_others() -> None:
    assert without_token("a (.*) dog", "(.*)") == "a dog"


def test_captions_of_files_lose_the_token_too_and_all_prompts_are_reached(
    make_config: MakeConfig, tmp_path: Path, pictures: Path
) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    first, second = sorted(folder.glob("*.png"))[:2]
    first.with_suffix(".txt").write_text("{token} {class} in the snow")
    second.with_suffix(".txt").write_text("only snow")
    config = make_config(prior=MODEL, subject={"images": folder}, train={"steps": 100})
    inputs = decide.look(config, Silent())
    plain = [plain_prompt(config, item, prompt_of(config, item)) for item in inputs.pictures.instances.pictures]
    assert plain[:3] == ["dog in the snow", None, "a photo of dog"]
    shape = {"fingerprint": "", "latent_shape": lambda width, height: (4, height, width), "validation_rows": 4}
    found = reach.of(decide.filled(config, inputs), inputs.pictures, [], **shape)
    prompts = {item.prompt for item in found.items if item.role == "prior"}
    assert prompts == {"", *GENERICS, "dog in the snow", "a photo of dog"}


def test_the_shipped_captions_are_short_plain_and_name_no_subject() -> None:
    found = captions.generic()
    assert len(found) == len(set(found)) == 64
    assert all(len(caption.split()) <= 8 and caption == caption.strip() for caption in found)
    assert sum(caption.startswith("a photo of") for caption in found) >= 28
    assert not any("{" in caption for caption in found)


class TestModel:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dora", [False, True])
    def test_the_term_is_exactly_zero_before_the_first_step(
        self, family: str, dora: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make_config(family, prior=MODEL, adapter={"dora": dora}, train={"images_per_step": 2})
        s = session_of(config, monkeypatch)
        rows = s.prepared.order.at(0)
        alone = [loop.losses_of(s, micro(s, [row])).item() for row in rows]
        assert all(loss > 0.01 for loss in alone[:2])
        assert alone[2:] == ([0.0, 0.0] if not dora else pytest.approx([0.0, 0.0], abs=1e-10))
        together = loop.losses_of(s, micro(s, rows))
        assert float(together[2:].max()) < 1e-9 * alone[0], "another order of summation"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_the_square_of_what_the_adapter_changes_at_the_instance_latents(
        self, family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        s = session_of(make_config(family, prior=MODEL), monkeypatch)
        moved(s)
        instance, row = s.prepared.order.at(3)
        assert row.item.latent_key == instance.item.latent_key and row.item.prompt != instance.item.prompt
        draws, latent_noise = draw(0, 3, [row.position], row.item.shape, s.family.schedule)
        moments = s.prepared.latents[row.item.latent_key]
        noisy = s.family.schedule.noised(moments.mean + moments.std * latent_noise, draws.noise, draws.timesteps)
        geometry = torch.tensor([row.item.geometry], dtype=torch.float32)
        condition = s.base_condition([row.item.prompt])
        with torch.no_grad():
            on = s.family.predict(noisy, draws.timesteps, condition, geometry)
            with inject.disabled(s.adapted):
                off = s.family.predict(noisy, draws.timesteps, condition, geometry)
        expected = ((on - off) ** 2).mean()
        assert expected > 1e-6
        assert loop.losses_of(s, micro(s, [row], 3)).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_base_gets_no_gradient_and_the_adapter_gets_that_of_the_square(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        s = session_of(make_config(prior=MODEL), monkeypatch)
        moved(s)
        row = s.prepared.order.at(0)[1]
        loop.losses_of(s, micro(s, [row])).sum().backward()
        trainable = {id(p) for p in s.parameters}
        everything = list(s.family.denoiser.parameters())
        assert (
            {id(p) for p in everything if p.grad is not None}
            == trainable
            == {id(p) for p in everything if p.requires_grad}
        )
        assert all(bool(p.grad.any()) for p in s.parameters if p.grad is not None)

    def test_each_row_is_compared_at_its_own_place(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        s = session_of(make_config("sdxl", prior=MODEL, preview={"prompts": ["a cat"]}), monkeypatch)
        moved(s)
        one, other = s.prepared.order.at(0)
        items = [
            (one, (64, 64, 0, 0, 32, 32), one.item.prompt),
            (other, (96, 32, 8, 0, 32, 32), "a cat"),
            (other, (32, 96, 0, 8, 32, 32), ""),
        ]
        rows = [
            replace(row, item=replace(row.item, geometry=geometry, prompt=prompt), position=n)
            for n, (row, geometry, prompt) in enumerate(items)
        ]
        with torch.no_grad():
            together = loop.losses_of(s, micro(s, rows))
            alone = torch.cat([loop.losses_of(s, micro(s, [row])) for row in rows])
        assert torch.allclose(together, alone, rtol=1e-4, atol=0), (together, alone)

    def test_a_run_draws_no_class_images_and_logs_the_term_apart(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(prior=MODEL, run={"cache": tmp_path / "cache"})
        train.train(config)
        assert not (tmp_path / "cache" / "class_images").exists()
        assert config.run.folder is not None
        lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 4 and not any("class_loss" in line or "norm_loss" in line for line in lines)
        assert lines[0]["prior_loss"] == pytest.approx(0, abs=1e-10) and lines[-1]["prior_loss"] > 1e-8

    @pytest.mark.parametrize("family", ["sd2", "sdxl"])
    def test_one_batch_of_four_equals_four_micro_steps_of_one(self, family: str, make_config: MakeConfig) -> None:
        step = {"images_per_step": 2, "steps": 2}
        together = trained(make_config(family, "together", prior=MODEL, train={**step, "batch_size": 4}))
        apart = trained(make_config(family, "apart", prior=MODEL, train={**step, "batch_size": 1}))
        assert_near(together, apart, 2e-4)
        assert distance(together, trained(make_config(family, "none", prior={"mode": "none"}, train=step))) > 1e-3

    @pytest.mark.parametrize("text_encoder", [False, True])
    def test_a_killed_run_goes_on_to_the_same_bytes(self, text_encoder: bool, make_config: MakeConfig) -> None:
        def config(name: str) -> Config:
            adapter = {"dropout": 0.1, "text_encoder": text_encoder}
            prior = {**MODEL, "norm_weight": 1e-3}
            return make_config("sd1", name, prior=prior, train={"steps": 5}, adapter=adapter)

        straight, interrupted = trained(config("straight")), config("interrupted")
        with pytest.raises(Interrupted):
            train.train(interrupted, report=At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert_equal(straight, trained(interrupted))

    @pytest.mark.parametrize("family", ["sd1", "sdxl"])
    def test_with_trained_text_encoders_the_base_reads_prompts_as_it_did(
        self, family: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make_config(family, prior=MODEL, adapter={"text_encoder": True})
        s = session_of(config, monkeypatch)
        row = s.prepared.order.at(0)[1]
        before = micro(s, [row]).batch
        assert loop.losses_of(s, micro(s, [row])).item() == pytest.approx(0, abs=1e-9)
        moved(s, 0.5)
        after = micro(s, [row]).batch
        assert before.reference is not None and after.reference is not None and after.conditioning is None
        for name, tensor in before.reference.conditioning.items():
            assert torch.equal(tensor, after.reference.conditioning[name])
        assert not torch.allclose(
            s.family.encode_prompts([row.item.prompt])["embeddings"], after.reference.conditioning["embeddings"]
        )

    def test_it_keeps_the_base_nearer_than_no_prior_does(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_settings = {"steps": 30, "save_every_steps": 30}

        def drift(name: str, prior: dict[str, Any]) -> float:
            """Of predictions for a picture under a caption that no prior had."""
            config = make_config(name=name, prior=prior, train=train_settings)
            weights = trained(config)
            s = session_of(make_config(name=f"{name}_again", prior=prior, train=train_settings), monkeypatch)
            inject.load_state_into_(s.adapted, weights)
            noisy = torch.randn(8, *s.prepared.order.instances[0].shape, generator=torch.Generator().manual_seed(3))
            steps = torch.arange(100, 900, 100)
            condition = {k: v.expand(8, *v.shape[1:]) for k, v in s.prepared.prompts[""].items()}
            with torch.no_grad():
                on = s.family.predict(noisy, steps, condition, torch.ones(8, 6))
                with inject.disabled(s.adapted):
                    off = s.family.predict(noisy, steps, condition, torch.ones(8, 6))
            return float(((on - off) ** 2).mean() / (off**2).mean())

        without, kept = drift("without", {"mode": "none"}), drift("kept", MODEL)
        heavy = drift("heavy", {**MODEL, "loss_weight": 10.0})
        assert heavy < kept < 0.7 * without

    def test_weight_zero_equals_no_prior(self, make_config: MakeConfig) -> None:
        weightless = trained(make_config(name="weightless", prior={**MODEL, "loss_weight": 1e-30}))
        assert_near(weightless, trained(make_config(name="without", prior={"mode": "none"})), 1e-4)


class TestWeights:
    @pytest.mark.parametrize("rslora", [False, True])
    def test_the_norm_is_that_of_the_update_layer_by_layer(
        self, rslora: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = {"targets": "attention+ff+conv", "rank": 3, "alpha": 5.0, "rslora": rslora, "text_encoder": True}
        s = session_of(make_config("sd1", adapter=adapter), monkeypatch)
        moved(s)
        layers = [layer for part in inject.collect(s.adapted).values() for layer in part.values()]
        expected = sum(float((delta(layer).double() ** 2).sum()) for layer in layers)
        assert len(layers) > 20 and s.injected.squared_norm().item() == pytest.approx(expected, rel=1e-5)

    def test_it_is_logged_weighted_and_makes_updates_smaller(self, make_config: MakeConfig) -> None:
        def config(name: str, **prior: Any) -> Config:
            return make_config(name=name, prior=prior, train={"steps": 12, "save_every_steps": 12})

        def norm(weights: dict[str, Tensor]) -> float:
            ups = [(name, t) for name, t in weights.items() if "lora_B" in name]
            return sum(float((t @ weights[name.replace("lora_B", "lora_A")]).square().sum()) for name, t in ups)

        free = norm(trained(config("free", mode="none")))
        held = config("held", mode="weights", norm_weight=10.0)
        assert norm(trained(held)) < 0.5 * free
        assert held.run.folder is not None
        lines = [json.loads(line) for line in (held.run.folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["norm_loss"] == 0 < lines[-1]["norm_loss"]
        assert not any("prior_loss" in line or "class_loss" in line for line in lines)

    def test_it_joins_class_images(self, make_config: MakeConfig) -> None:
        plain = trained(make_config(name="plain"))
        joined = make_config(name="joined", prior={"norm_weight": 10.0})
        assert distance(plain, trained(joined)) > 1e-3
        assert joined.run.folder is not None
        last = json.loads((joined.run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["class_loss"] > 0 and last["norm_loss"] > 0


class TestConsistency:
    OBJECTIVE = Objective(Diffusion(torch.tensor([0.5], dtype=torch.float64), "epsilon"), dco_beta=100.0)
    LATENTS = torch.zeros(1, 1, 1, 2)
    DRAWS = Draws(torch.tensor([0]), torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 1))

    def loss(self, prediction: float, of_base: float) -> Tensor:
        value = torch.full((1, 1, 1, 2), prediction, requires_grad=True)
        compared = Comparison(0, 1, 1, lambda noisy, t: torch.full_like(noisy, of_base))
        loss = self.OBJECTIVE.loss(lambda noisy, t: value, self.LATENTS, self.DRAWS, compared)
        loss.sum().backward()
        assert value.grad is not None
        return torch.stack([loss.detach()[0], value.grad.sum()])

    def test_it_is_two_over_beta_softplus_of_beta_times_the_gain(self) -> None:
        # target 1: predictions 0.9 and 0.8 have losses .01 and .04; softplus(100 * -.03) = log(1 + exp(-3)).
        expected = math.log1p(math.exp(-3)) * 2 / 100
        assert self.loss(0.9, 0.8)[0].item() == pytest.approx(expected, rel=1e-4)

    def test_it_begins_with_the_plain_gradient_and_ends_where_the_base_is_left_behind(self) -> None:
        plain = 2 * (0.8 - 1)  # of the mean square, summed over two elements
        assert self.loss(0.8, 0.8)[1].item() == pytest.approx(plain, rel=1e-4)
        assert abs(self.loss(0.999, 0.5)[1].item()) < 1e-9

    def test_rows_of_a_prior_keep_their_own_losses(self) -> None:
        predicted = torch.tensor([0.8, 0.5]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
        draws = Draws(torch.tensor([0, 0]), torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1, 1))
        of_base = torch.tensor([0.8, 0.7]).view(2, 1, 1, 1).expand(2, 1, 1, 2)

        def loss(first: int, last: int) -> list[float]:
            compared = Comparison(first, 1, last, lambda noisy, t: of_base[first:last])
            return self.OBJECTIVE.loss(lambda noisy, t: predicted, torch.zeros(2, 1, 1, 2), draws, compared).tolist()

        assert loss(0, 2) == pytest.approx([math.log(2) * 2 / 100, 0.04])  # both
        assert loss(1, 2) == pytest.approx([0.04, 0.04])  # the prior alone: .2² from the target, .2² from the base
        assert loss(0, 1) == pytest.approx([math.log(2) * 2 / 100, 0.25])  # a class image learns its own noise

    def test_a_run_with_it_resumes_bit_for_bit_and_validates_by_the_plain_loss(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def config(name: str, beta: float | None = 1000.0) -> Config:
            return make_config(name=name, prior=MODEL, objective={"dco_beta": beta})

        straight, interrupted = trained(config("straight")), config("interrupted")
        with pytest.raises(Interrupted):
            train.train(interrupted, report=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert_equal(straight, trained(interrupted))
        with_it, without = (
            loop.session.validation_loss(session_of(config(name, beta), monkeypatch))
            for name, beta in (("with", 1000.0), ("without", None))
        )
        assert with_it == without
