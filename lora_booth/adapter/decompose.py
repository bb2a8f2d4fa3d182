"""From a change of a weight to its best low-rank form, by singular values.

Also from one rank to another.

The best form of rank r, in the Frobenius norm, keeps the r largest singular values; its error is the root of the sum of
the squares of the others (Eckart and Young 1936).

Words: *error* is |change - form| / |change| in the Frobenius norm; *energy* is the share of the squared norm that is
kept, 1 - error^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_booth.adapter.weights import Dense, LowRank, block_of, delta
from lora_booth.errors import ConfigError, ModelError, NumericError
from lora_booth.run.report import Report

_EXACT_SIDE = 640
"""Up to this smaller side all singular values are computed. Seconds of `approximate` at rank 32, exact and with the
range finder, one thread of an AMD EPYC (family 25, model 17) with a second job running, torch 2.13.0, 2026-11-22:
640x640 0.09 and 0.01; 1280x1280 0.69 and 0.04; 1280x1280x3x3 2.2 and 0.7; 2560x1280x3x3 17.8 and 1.3. SDXL has some
700 layers of the second size: eight minutes or half a one."""
_POWER_ITERATIONS = 4
"""On spectra that fall as slowly as 1/k^0.7 the error was at most 1.004 times the best one (after 2: 1.02)."""
_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding: float32 entries carry 1.2e-7."""

_NOT_FINITE = "The change of a layer holds NaN or infinity; use a file whose training did not diverge."


@dataclass(frozen=True)
class Approximation:
    """A low-rank form of a change and how much of it is kept.

    `low_rank`: float32, scale 1, both factors of equal norm. `error`: relative Frobenius error, |change - form| /
    |change|, in [0, 1]; 0 for a change of zero. `norm`: |change|.
    """

    low_rank: LowRank
    error: float
    norm: float


def approximate(
    update: LowRank | Dense | Tensor, *, rank: int | None = None, energy: float | None = None
) -> Approximation:
    """The best low-rank form of a change `[out, in]` or `[out, in, k, k]`, of `rank` or of the smallest that keeps
    `energy` (0 to 1]; never of a higher rank than the change has, and of rank 1 where that is zero.

    Where the smaller side exceeds 640 and the rank is small beside it, a randomised range finder takes the place of
    the full decomposition: then the error is up to half a percent above the best, and the rank for `energy` may be a
    little above the smallest. The result depends on the arguments alone, not on the global random state.
    Raises ConfigError unless exactly one of `rank` and `energy` is given and in range, ModelError for DoRA, whose
    change needs the base's weight, and NumericError for a NaN or an infinity.
    """
    require_choice(rank, energy)
    if not isinstance(update, Tensor) and update.magnitude is not None:
        raise ModelError("A DoRA layer has no change of its own: it depends on the base's weight. Name the base.")
    if isinstance(update, LowRank):
        return _of_factors(update, rank, energy)
    change = delta(update) if isinstance(update, Dense) else update.float()
    return _of_matrix(change, rank, energy)


def require_choice(rank: int | None, energy: float | None) -> None:
    """Raise ConfigError unless exactly one of rank (1 or more) and energy (above 0, up to 1) is given."""
    if (rank is None) == (energy is None):
        raise ConfigError("Give either a rank or an energy: --rank 8 or --energy 0.95.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}; use 1 or more, usually 4 to 64.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}; it is the share of the squared norm to keep, above 0 and up to 1.")


def whole_error(parts: Iterable[Approximation]) -> float:
    """The relative error of many layers as one: the root of summed squared errors over summed squared norms."""
    squares = [((part.error * part.norm) ** 2, part.norm**2) for part in parts]
    total = sum(norm for _, norm in squares)
    return math.sqrt(sum(lost for lost, _ in squares) / total) if total > 0 else 0.0


def tell_errors(parts: Mapping[str, Mapping[str, Approximation]], report: Report) -> None:
    """Report the error of each block and of the whole; `parts`: component to module path to its approximation.

    A block is `down_blocks.0`, `mid_block` … of the UNet, or a whole text encoder.
    """
    blocks: dict[str, list[Approximation]] = {}
    for component, layers in parts.items():
        for path, part in layers.items():
            blocks.setdefault(block_of(component, path), []).append(part)
    everything = [part for layers in blocks.values() for part in layers]
    width = max(map(len, (*blocks, "all")))
    for name, block in (*blocks.items(), ("all", everything)):
        error, ranks = whole_error(block), {part.low_rank.rank for part in block}
        rank = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        text = f"{name:<{width}}  {len(block):>4} layers, rank {rank:<10}  error {error:8.3%}"
        report.event("error", text, block=name, layers=len(block), error=error)


def _of_factors(update: LowRank, rank: int | None, energy: float | None) -> Approximation:
    """Without the dense matrix: up = Q_u R_u and down^T = Q_d R_d, so the singular values are those of R_u R_d^T."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in update.tensors):
        raise NumericError(_NOT_FINITE)
    left, core_left = torch.linalg.qr(update.up.double().flatten(1))
    right, core_right = torch.linalg.qr(update.down.double().flatten(1).T)
    u, values, v = torch.linalg.svd(update.scale * core_left @ core_right.T, full_matrices=False)
    squares = values.square()
    kept = _kept(squares, rank, energy, total=float(squares.sum()))
    root = values[:kept].sqrt()
    low_rank = _shaped((left @ u)[:, :kept] * root, root[:, None] * (v @ right.T)[:kept], update.down.shape[1:])
    norm = math.sqrt(float(squares.sum()))
    lost = math.sqrt(float(squares[kept:].sum()))
    return Approximation(low_rank, min(1.0, lost / norm) if norm > 0 else 0.0, norm)


def _of_matrix(change: Tensor, rank: int | None, energy: float | None) -> Approximation:
    wide = change.flatten(1)
    is_tall = wide.shape[0] > wide.shape[1]
    matrix = wide.T if is_tall else wide
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if not math.isfinite(norm):
        raise NumericError(_NOT_FINITE)
    basis, squares = _directions(matrix, rank, energy, norm)
    kept = _kept(squares, rank, energy, total=norm**2)
    basis = basis[:, :kept]
    root = squares[:kept].sqrt().sqrt()
    safe = torch.where(root > 0, root, torch.ones_like(root))
    left = (basis * root).float()
    right = ((basis.T @ matrix.to(basis.dtype)) / safe[:, None]).float()
    up, down = (right.T, left.T) if is_tall else (left, right)
    lost = float(torch.linalg.vector_norm(wide - up @ down, dtype=torch.float64))
    return Approximation(_shaped(up, down, change.shape[1:]), min(1.0, lost / norm) if norm > 0 else 0.0, norm)


def _directions(matrix: Tensor, rank: int | None, energy: float | None, norm: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors in columns and squared singular values, falling: all of them, or enough for the request."""
    side = matrix.shape[0]
    width = 32 if rank is None else rank
    while side > _EXACT_SIDE and width <= side // 8:
        basis, squares = _range(matrix, width)
        if energy is None or float(squares.sum()) >= energy * norm**2:
            return basis, squares
        width *= 2
    double = matrix.double()
    squares, basis = torch.linalg.eigh(double @ double.T)
    return basis.flip(1), squares.flip(0).clamp_min(0)


def _range(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The leading `width` left singular vectors, nearly: Halko, Martinsson and Tropp 2011 (SIAM Review 53), algorithms
    4.4 and 5.1, with half as many directions again, 16 at least."""
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], width + max(16, width // 2), generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :width], values[:width].double().square()


def _kept(squares: Tensor, rank: int | None, energy: float | None, *, total: float) -> int:
    """How many singular values to keep, given the falling squares of the largest and the sum of all."""
    real = int((squares > _NEGLIGIBLE**2 * squares[0]).sum())
    if rank is None:
        assert energy is not None, "require_choice was not called"
        enough = squares.cumsum(0) >= energy * total
        rank = int((~enough).sum()) + 1
    return max(1, min(rank, real))


def _shaped(up: Tensor, down: Tensor, input_shape: torch.Size) -> LowRank:
    """Matrices `[out, r]` and `[r, in k k]` as factors of a layer whose weight is `[out, *input_shape]`."""
    tail = (1,) * (len(input_shape) - 1)
    up, down = up.float().contiguous(), down.float().contiguous()
    return LowRank(down.reshape(down.shape[0], *input_shape), up.reshape(*up.shape, *tail), 1.0)
