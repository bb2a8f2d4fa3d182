"""The objective against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lora_booth.config.settings import ObjectiveConfig
from lora_booth.models.bases.architectures import PredictionType
from lora_booth.models.families.noise import Diffusion, NoiseSchedule, RectifiedFlow
from lora_booth.training.objective import Draws, Objective, draw, elementwise_loss, objective_for

ALPHAS = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
LEVELS = Diffusion(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64), "epsilon")


def draws_at(timesteps: list[int], noise: torch.Tensor) -> Draws:
    return Draws(torch.tensor(timesteps), noise, torch.zeros_like(noise[:, :, :1, :1]))


@pytest.mark.parametrize(("prediction", "expected"), [("epsilon", 4.0), ("v_prediction", 0.5)])
def test_loss_of_a_zero_prediction_is_the_mean_square_of_the_target(
    prediction: PredictionType, expected: float
) -> None:
    # alpha_bar = 0.5, x0 = 1, noise = 2: epsilon target 2, v target sqrt(.5) * 2 - sqrt(.5) * 1 = sqrt(.5).
    objective = Objective(Diffusion(ALPHAS, prediction))
    latents, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)
    loss = objective.loss(lambda noisy, t: torch.zeros_like(noisy), latents, draws_at([1], noise))
    assert loss.tolist() == pytest.approx([expected])


def test_noisy_latents_follow_ddpm_equation_4() -> None:
    objective = Objective(Diffusion(ALPHAS, "epsilon"))
    seen = {}

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen["noisy"] = noisy
        return noisy

    objective.loss(predict, torch.full((1, 1, 1, 1), 3.0), draws_at([0], torch.full((1, 1, 1, 1), 2.0)))
    assert seen["noisy"].item() == pytest.approx(math.sqrt(0.9) * 3 + math.sqrt(0.1) * 2)


def test_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    objective = Objective(Diffusion(ALPHAS, "epsilon"), min_snr_gamma=5)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    together = objective.loss(lambda noisy, t: noisy, latents, draws_at([0, 1, 2], noise))
    alone = [objective.loss(lambda n, t: n, latents[i : i + 1], draws_at([i], noise[i : i + 1])) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    # SNR = 9, 1, 1/9 and gamma = 5: epsilon min(SNR, 5) / SNR; v min(SNR, 5) / (SNR + 1).
    [("epsilon", [5 / 9, 1.0, 1.0]), ("v_prediction", [0.5, 0.5, 0.1])],
)
def test_min_snr_weight_has_the_right_formula_for_each_prediction_type(
    prediction: PredictionType, expected: list[float]
) -> None:
    weights = Diffusion(ALPHAS, prediction).weight(torch.tensor([0, 1, 2]), 5)
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", [1 / 3, 1.0, 3.0]), ("v_prediction", [0.3, 0.5, 0.3])]
)
def test_debiased_weights_are_the_same_on_the_noise_for_each_prediction_type(
    prediction: PredictionType, expected: list[float]
) -> None:
    """SNR = 9, 1, 1/9: 1 / sqrt(SNR); of v, whose error is that of the noise over alpha_bar = .9, .5, .1."""
    schedule, timesteps = Diffusion(ALPHAS, prediction), torch.tensor([0, 1, 2])
    assert schedule.weight(timesteps, None, is_debiased=True).tolist() == pytest.approx(expected)
    assert schedule.weight(timesteps, None).tolist() == [1.0] * 3
    objective = objective_for(ObjectiveConfig(debiased=True), schedule)
    noise = torch.ones(3, 1, 1, 1)
    losses = objective.loss(
        lambda noisy, t: torch.zeros_like(noisy), torch.zeros_like(noise), draws_at([0, 1, 2], noise)
    )
    squares = [1.0] * 3 if prediction == "epsilon" else [0.9, 0.5, 0.1]
    assert losses.tolist() == pytest.approx([a * b for a, b in zip(squares, expected, strict=True)])


@pytest.mark.parametrize("schedule", [LEVELS, RectifiedFlow(shift=3)])
def test_levels_are_drawn_from_the_wanted_range(schedule: NoiseSchedule) -> None:
    wanted = objective_for(ObjectiveConfig(timestep_range=(0.25, 0.5)), schedule).levels
    ends = schedule.timesteps_at(list(wanted)).tolist()
    drawn = [int(draw(0, step, [0], (1, 1, 1), schedule, wanted)[0].timesteps) for step in range(300)]
    assert min(drawn) >= int(ends[0]) and max(drawn) <= ends[1]
    span = ends[1] - ends[0]
    assert max(drawn) - min(drawn) > 0.6 * span


def test_all_levels_are_drawn_as_before_there_was_a_range() -> None:
    whole = [draw(3, step, [0], (1, 1, 1), LEVELS)[0].timesteps for step in range(50)]
    named = [draw(3, step, [0], (1, 1, 1), LEVELS, (0.0, 1.0))[0].timesteps for step in range(50)]
    assert torch.equal(torch.stack(whole), torch.stack(named))


def test_min_snr_weight_is_finite_at_zero_terminal_snr() -> None:
    schedule = Diffusion(ALPHAS, "epsilon").rescaled_to_zero_terminal_snr()
    assert schedule.weight(torch.tensor([2]), 5).tolist() == [1.0]


def test_zero_terminal_snr_keeps_the_first_level_and_zeroes_the_last() -> None:
    rescaled = Diffusion(ALPHAS, "v_prediction").rescaled_to_zero_terminal_snr()
    assert rescaled.has_zero_terminal_snr
    assert not Diffusion(ALPHAS, "v_prediction").has_zero_terminal_snr
    # sqrt(.5) shifted and scaled: (sqrt(.5) - sqrt(.1)) * sqrt(.9) / (sqrt(.9) - sqrt(.1)), squared.
    middle = (math.sqrt(0.5) - math.sqrt(0.1)) * math.sqrt(0.9) / (math.sqrt(0.9) - math.sqrt(0.1))
    assert rescaled.alphas_cumprod.tolist() == pytest.approx([0.9, middle**2, 0.0])


def test_snr_weights_follow_the_rescaled_schedule() -> None:
    schedule = Diffusion(ALPHAS, "v_prediction")
    before = schedule.weight(torch.tensor([1]), 5)
    after = schedule.rescaled_to_zero_terminal_snr().weight(torch.tensor([1]), 5)
    assert after.item() < before.item()


def test_noise_offset_is_part_of_the_target() -> None:
    noise = torch.zeros(1, 2, 2, 2)
    offsets = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    draws = Draws(torch.tensor([0]), noise, offsets)
    objective = Objective(Diffusion(ALPHAS, "epsilon"), noise_offset=0.5)
    assert objective.loss(lambda n, t: torch.zeros_like(n), noise, draws).tolist() == pytest.approx([0.25])


def test_huber_equals_the_square_for_small_errors_and_grows_linearly_for_large_ones() -> None:
    zero = torch.zeros(1)
    assert elementwise_loss(torch.tensor([0.05]), zero, 0.1).item() == pytest.approx(0.05**2)
    assert elementwise_loss(torch.tensor([3.0]), zero, 0.1).item() == pytest.approx(2 * 0.1 * (3 - 0.05))


def test_a_draw_depends_on_seed_step_and_position_alone() -> None:
    torch.manual_seed(1)
    together, latent_noises = draw(0, 7, [0, 1, 5], (4, 2, 3), LEVELS)
    torch.manual_seed(2)
    alone, latent_noise = draw(0, 7, [5], (4, 2, 3), LEVELS)
    for one, many in zip(vars(alone).values(), vars(together).values(), strict=True):
        assert torch.equal(one[0], many[2])
    assert torch.equal(latent_noise[0], latent_noises[2])
    for key in ((1, 7, [5]), (0, 8, [5]), (0, 7, [4])):
        other, other_latent_noise = draw(*key, (4, 2, 3), LEVELS)
        assert not torch.equal(alone.noise, other.noise)
        assert not torch.equal(latent_noise, other_latent_noise)


def test_draws_are_normal_and_timesteps_uniform() -> None:
    draws, latent_noise = draw(3, 0, range(400), (4, 8, 8), LEVELS)
    assert abs(draws.noise.mean().item()) < 0.02  # 102,400 numbers: standard error 0.003
    assert abs(draws.noise.std().item() - 1) < 0.02
    assert not torch.equal(draws.noise, latent_noise)
    assert draws.timesteps.min() >= 0 and draws.timesteps.max() < 1000
    assert abs(draws.timesteps.float().mean().item() - 499.5) < 60  # standard error 14


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_asks_the_device_for_no_number(prediction: PredictionType) -> None:
    # Tensors without data have none to give: whatever would wait for a card raises here.
    objective = Objective(Diffusion(ALPHAS, prediction), min_snr_gamma=5, noise_offset=0.1, huber_delta=0.1)
    latents, noise = (torch.empty(2, 4, 2, 2, device="meta") for _ in range(2))
    draws = Draws(torch.empty(2, dtype=torch.int64, device="meta"), noise, torch.empty(2, 4, 1, 1, device="meta"))
    loss = objective.loss(lambda noisy, timesteps: noisy * timesteps.view(-1, 1, 1, 1), latents, draws)
    assert loss.device.type == "meta" and loss.shape == (2,)
    with pytest.raises(NotImplementedError):
        draws.timesteps.cpu()


def test_a_rectified_flow_mixes_along_a_straight_line_and_asks_for_its_direction() -> None:
    # sigma = 0.25, x0 = 4, n = 8: x_t = 0.75 * 4 + 0.25 * 8 = 5, target 8 - 4 = 4; a prediction of 1 is wrong by 3.
    seen = {}

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.update(noisy=noisy, t=t)
        return torch.ones_like(noisy)

    latents, noise = torch.full((1, 4, 2, 2), 4.0), torch.full((1, 4, 2, 2), 8.0)
    draws = Draws(torch.tensor([250.0]), noise, torch.zeros(1, 4, 1, 1))
    loss = Objective(RectifiedFlow()).loss(predict, latents, draws)
    assert torch.equal(seen["noisy"], torch.full_like(latents, 5.0)) and seen["t"].tolist() == [250.0]
    assert loss.tolist() == [9.0]


def test_a_shift_moves_the_levels_of_a_flow_towards_noise() -> None:
    # 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the ends stay.
    assert RectifiedFlow(shift=3).timesteps_at([0.0, 0.5, 1.0]).tolist() == [0.0, 750.0, 1000.0]
    assert RectifiedFlow().timesteps_at([0.125, 0.875]).tolist() == [125.0, 875.0]


def test_levels_of_a_flow_are_logit_normal_and_of_a_diffusion_uniform() -> None:
    # The sigmoid of a normal number has the median 0.5 and, at one standard deviation, 1 / (1 + 1 / e) = 0.731.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([RectifiedFlow().draw_timestep(generator) for _ in range(4000)]) / 1000
    assert drawn.min() > 0 and drawn.max() < 1 and drawn.dtype == torch.float32
    shares = [(drawn < level).float().mean().item() for level in (1 - 0.7311, 0.5, 0.7311)]
    assert shares == pytest.approx([0.1587, 0.5, 0.8413], abs=0.03)  # standard error 0.008
    shifted = torch.stack([RectifiedFlow(shift=3).draw_timestep(generator) for _ in range(4000)]) / 1000
    assert (shifted < 0.75).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_min_snr_is_no_weight_of_a_flow() -> None:
    assert RectifiedFlow().weight(torch.tensor([1.0, 999.0]), None).tolist() == [1.0, 1.0]
    with pytest.raises(AssertionError, match="refused"):
        RectifiedFlow().weight(torch.tensor([1.0]), 5.0)
