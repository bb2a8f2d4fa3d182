"""The arithmetic of likeness and forgetting, on features of pictures.

What lives here: arithmetic on unit vectors, float32 `[N, D]`, one row for each picture. What does not: where features
come from (`encoders.py`), and how far a mean may be trusted (`intervals.py`).

Every metric is a list of values, one for each picture or prompt; their mean is the figure that papers print. Cosines
lie in [-1, 1], changes (1 - cosine) in [0, 2]. Figures of different encoders cannot be compared.

Words, as in DreamBooth (arXiv 2208.12242, sections 4.2 and 4.3, and the supplement): *subject fidelity* (DINO, CLIP-I)
and *prompt fidelity* (CLIP-T); *preservation* (PRES) is the likeness of class pictures to the subject, where less is
better, and *leak* its rise over the base's; *diversity* (DIV) is told apart within a prompt. *Drift* is the change of
pictures that have nothing to do with the subject.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def subject_fidelity(generated: Tensor, real: Tensor) -> list[float]:
    """Of each generated picture `[N, D]` the mean cosine to all real ones `[M, D]`; N values in [-1, 1].

    Their mean is that of all N × M pairs. Meant for pictures that were not trained on; on those that were it also
    rewards copying, and is called in-sample.
    """
    _require_unit(generated, real)
    return _floats((generated @ real.T).mean(dim=1))


def prompt_fidelity(pictures: Tensor, texts: Tensor) -> list[float]:
    """Cosine of each picture to the text of its own prompt, both `[N, D]`; N values in [-1, 1].

    The token is to be left out of the texts: the text encoder knows it as something else, or not at all.
    """
    _require_unit(pictures, texts)
    assert len(pictures) == len(texts), f"{len(pictures)} pictures have {len(texts)} texts"
    return _floats((pictures * texts).sum(dim=1))


def preservation(class_pictures: Tensor, real: Tensor) -> list[float]:
    """PRES: of each picture of a class prompt `[N, D]` the mean cosine to the real subject `[M, D]`; less is better.

    It is never zero, since a subject is like its class: what an adapter does to it says `leak`.
    """
    return subject_fidelity(class_pictures, real)


def leak(after: Sequence[float], before: Sequence[float]) -> list[float]:
    """The rise of `preservation` over the base's for the same prompts and noise, in [-2, 2]."""
    assert len(after) == len(before), f"{len(after)} values cannot be paired with {len(before)}"
    return [value - own for value, own in zip(after, before, strict=True)]


def diversity(by_prompt: Sequence[Tensor]) -> list[float]:
    """DIV: for each prompt 1 - mean cosine of its different pictures, `[N, D]` with N > 1; in [0, 2], more is better.

    DreamBooth takes LPIPS for the distance, whose networks come with torchvision, which is no dependency here: the
    figures are not those of the paper.
    """
    return [1 - sum(_to_others(pictures)) / len(pictures) for pictures in by_prompt]


def drift(before: Tensor, after: Tensor) -> list[float]:
    """1 - cosine of the pictures of the same prompt and noise, without and with the adapter, both `[N, D]`; in
    [0, 2]."""
    _require_unit(before, after)
    assert len(before) == len(after), f"{len(before)} pictures cannot be paired with {len(after)}"
    return _floats(1 - (before * after).sum(dim=1))


def ceiling(real: Tensor) -> list[float]:
    """Of each real picture `[M, D]`, M > 1, the mean cosine to the others: what a perfect likeness would reach."""
    return _to_others(real)


def share(likeness: float, before: float, ceiling: float) -> float:
    """(L - L0) / (ceiling - L0): 0 is the base, 1 a picture as like the subject as its real ones are each other.

    Not a number where the base is already there.
    """
    return (likeness - before) / (ceiling - before) if ceiling != before else float("nan")


def centred(features: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors of `features` `[N, D]` after `mean` `[D]` is subtracted.

    What all pictures have in common, as a style or a background, makes every cosine large and says nothing of a
    subject (NearID, arXiv 2604.01973, ranks an impostor on the same background above the true object).
    """
    return normalize(features - mean, dim=-1)


def nearest_is_same(features: Tensor, labels: Sequence[str]) -> float:
    """Share of the pictures `[N, D]` whose nearest neighbour has the same label."""
    _require_unit(features)
    assert len(features) == len(labels) > 1, "each of several pictures has a label"
    cosines = (features @ features.T).fill_diagonal_(-torch.inf)
    nearest: list[int] = cosines.argmax(dim=1).tolist()
    hits = [label == labels[other] for label, other in zip(labels, nearest, strict=True)]
    return sum(hits) / len(hits)


def separation(same: Sequence[float], different: Sequence[float]) -> float:
    """AUC: the chance that a pair of the same subject has a larger cosine than one of different subjects; ties count a
    half (Mann & Whitney 1947)."""
    from scipy import stats  # half a second, which runs that compare nothing need not pay

    wins = float(stats.mannwhitneyu(same, different).statistic)
    return wins / (len(same) * len(different))


def pairs(features: Tensor, labels: Sequence[str]) -> tuple[list[float], list[float]]:
    """Cosines of all pairs of different pictures: those with the same label, and those with different ones."""
    cosines = features @ features.T
    same: list[float] = []
    different: list[float] = []
    for i, label in enumerate(labels):
        for j in range(i):
            (same if label == labels[j] else different).append(float(cosines[i, j]))
    return same, different


def _to_others(features: Tensor) -> list[float]:
    """Of each row the mean cosine to the other rows."""
    _require_unit(features)
    assert len(features) > 1, "one picture has nothing to be compared with"
    cosines = features @ features.T
    return _floats((cosines.sum(dim=1) - cosines.diagonal()) / (len(features) - 1))


def _require_unit(*features: Tensor) -> None:
    for rows in features:
        assert rows.ndim == 2 and len(rows), f"features have shape {list(rows.shape)}"
        norms = rows.norm(dim=1)
        assert bool(((norms - 1).abs() < 1e-3).all()), "features are not of unit length"


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]
