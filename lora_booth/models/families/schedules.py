"""A base's scheduler config as a noise schedule for training, and as a solver for drawing."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_booth.errors import ConfigError, ModelError
from lora_booth.models.bases.identify import FLOW_SOLVERS
from lora_booth.models.bases.limits import MAX_TIMESTEPS
from lora_booth.models.families.noise import Diffusion, NoiseSchedule, RectifiedFlow

SPACINGS = ("linspace", "leading", "trailing")
"""How a solver chooses its timesteps (arXiv 2305.08891, table 2), as diffusers names them."""
MAX_SHIFT = 100
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
}
"""Sampler name to diffusers class and what is set over the base's config. Latents are not bounded, so nothing clips."""


def noise_schedule(config: Mapping[str, Any], *, source: object = "the base") -> NoiseSchedule:
    """The schedule that a scheduler config describes, computed in float64. `source`: named in a ModelError."""
    if config.get("_class_name") in FLOW_SOLVERS:
        return RectifiedFlow(shift=_shift(config, source))
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"{source} predicts {prediction_type!r}; only epsilon and v_prediction can be trained.")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        told = f"{source} has timestep_spacing {reprlib.repr(spacing)}"
        raise ModelError(f"{told}; known are {', '.join(SPACINGS)}. Download the base again.")
    try:
        betas = _betas(config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ModelError(
            f"{source} has no noise schedule that can be read ({error}); download the base again."
        ) from error
    if betas.ndim != 1 or not 2 <= len(betas) <= MAX_TIMESTEPS or not ((betas > 0) & (betas <= 1)).all():
        raise ModelError(f"the noise schedule of {source} leaves its range; download the base again.")
    schedule = Diffusion((1 - betas).cumprod(0), prediction_type)
    return schedule.rescaled_to_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def solver(name: str, config: Mapping[str, Any], schedule: NoiseSchedule) -> Any:
    """A diffusers scheduler: the named solver on the base's config, or the base's own for "base".

    Where `schedule` was rescaled to zero terminal SNR and the base's is not, the solver is rescaled alike and starts at
    the last timestep (arXiv 2305.08891, sections 3.1 and 3.3).
    """
    import diffusers

    class_name, changes = (config["_class_name"], {}) if name == "base" else SOLVERS[name]
    assert isinstance(schedule, Diffusion), "these solvers are of diffusion"
    if schedule.has_zero_terminal_snr and not config.get("rescale_betas_zero_snr"):
        changes = changes | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    solver_class = getattr(diffusers, class_name)
    if schedule.has_zero_terminal_snr and "rescale_betas_zero_snr" not in solver_class._get_init_keys(solver_class):
        raise ConfigError(f'sampler "base" is {class_name}, which knows no zero terminal SNR; set sampler = "ddim".')
    settings = {key: value for key, value in config.items() if not key.startswith("_")} | changes
    return solver_class.from_config(
        {k: v for k, v in settings.items() if k in solver_class._get_init_keys(solver_class)}
    )


def _shift(config: Mapping[str, Any], source: object) -> float:
    """The constant shift of a flow's config; how it may depend on the picture's size is left to its family."""
    shift = config.get("shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= MAX_SHIFT:
        raise ModelError(f"{source} has shift {reprlib.repr(shift)}, and it must lie in (0, {MAX_SHIFT}].")
    return float(shift)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Betas of the three schedules that bases use, float64 `[T]`; defaults are diffusers'."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    count, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if isinstance(count, bool) or not isinstance(count, int) or count > MAX_TIMESTEPS:
        raise ValueError("num_train_timesteps is no count of steps")
    shapes: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: torch.linspace(start, end, count, dtype=torch.float64),
        "scaled_linear": lambda: torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2,
        "squaredcos_cap_v2": lambda: _cosine_betas(count),
    }
    if not isinstance(kind, str) or kind not in shapes:
        raise ValueError(f"beta_schedule is {reprlib.repr(kind)}; known are {', '.join(shapes)}")
    return shapes[kind]()


def _cosine_betas(count: int) -> Tensor:
    """arXiv 2102.09672, eq. 17, betas at most 0.999."""
    time = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    alpha_bar = ((time + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
