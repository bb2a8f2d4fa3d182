"""Training step 2: the contrastive pair of pictures and captions; its text half then conditions the denoiser.

InfoNCE both ways. Two drawings of one label (eight vendors share it) are no negatives of each other; two
pictures of one icon in different contexts are, so that the text half must read backgrounds, hats and
counts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from tools.booth_mini.ahead import drawn_ahead
from tools.booth_mini.compose import COLOURS, PLAIN, Composer, Picture
from tools.booth_mini.nouns import COMMON, is_training, is_validation
from tools.booth_mini.state import Training, autocast
from tools.booth_mini.train_vae import to_tensor

NOUN_BATCH_EVERY = 2


def train_clip(
    training: Training,
    composer: Composer,
    tokenizer: CLIPTokenizer,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    text_frozen: bool,
) -> None:
    """Runs `training` (of `make_clip()`) to its end; prints top-5 retrieval among 200 held-out pairs.

    With a frozen text half only the evaluator moves: the denoiser's conditioning stays what it was.
    """
    model = training.model
    assert isinstance(model, CLIPModel), "the second step trains a CLIPModel"
    if text_frozen:
        # The pool's conditioning comes from the EMA's text half: make it the one that stays.
        model.load_state_dict(training.ema.module.state_dict())
        model.text_model.requires_grad_(False)
    device = next(model.parameters()).device
    weights = _icon_weights(composer)
    held_out = retrieval_pairs(composer, 200)

    def draw(step: int) -> list[Picture]:
        rng = np.random.default_rng([seed, 2, step])
        return draw_batch(composer, rng, weights, batch_size, is_noun_batch=step % NOUN_BATCH_EVERY == 0)

    pictures = drawn_ahead(draw, training.steps_left, workers)

    def loss_at(step: int) -> Tensor:
        return contrastive_loss(model, tokenizer, next(pictures), device)

    def on_save(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, CLIPModel)
        top1, top5 = retrieval(ema, tokenizer, held_out)
        print(f"step {step} held-out retrieval top-1 {top1:.3f} top-5 {top5:.3f}", flush=True)

    training.run(loss_at, on_save)


def draw_batch(
    composer: Composer,
    rng: np.random.Generator,
    weights: NDArray[np.float64],
    batch_size: int,
    *,
    is_noun_batch: bool,
) -> list[Picture]:
    """A batch of pictures: a quarter of its icons twice, in two contexts; or one picture an icon, all alike but for
    the icon.

    In ordinary batches backgrounds alone tell most pictures apart, and bare nouns end up near one another; in a noun
    batch, plain icons on one colour, only the noun does.
    """
    if is_noun_batch:
        colour = "white" if rng.random() < 0.5 else str(rng.choice(list(COLOURS)))
        icons = rng.choice(len(weights), size=batch_size, p=weights)
        return [composer.draw(int(icon), rng, PLAIN, colour=colour) for icon in icons]
    singles = rng.choice(len(weights), size=3 * batch_size // 4, p=weights)
    return [composer.draw(int(icon), rng) for icon in (*singles, *singles[: batch_size // 4])]


def contrastive_loss(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Sequence[Picture], device: torch.device
) -> Tensor:
    """Symmetric InfoNCE of a batch of pictures with their captions."""
    with autocast(device):
        images = embed_pictures(model, pictures, device)
        texts = embed_captions(model, tokenizer, [picture.caption for picture in pictures], device)
    scale = model.logit_scale.exp().clamp(max=100.0)
    logits = scale * images.float() @ texts.float().T
    is_positive, is_ignored = (torch.from_numpy(mask).to(device) for mask in pair_masks(pictures))
    logits = logits.masked_fill(is_ignored, -1e4)
    target = is_positive.float() / is_positive.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pair_masks(pictures: Sequence[Picture]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(positive, ignored) [B, B]: same caption; and same label from another icon with another caption."""
    captions = np.array([picture.caption for picture in pictures])
    labels = np.array([picture.label for picture in pictures])
    icons = np.array([picture.icon for picture in pictures])
    is_positive = captions[:, None] == captions[None]
    is_same_label = labels[:, None] == labels[None]
    is_ignored = is_same_label & (icons[:, None] != icons[None]) & ~is_positive
    return is_positive, is_ignored


def embed_pictures(model: CLIPModel, pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """Unit vectors [B, 192] of pictures."""
    pixels = to_tensor(np.stack([picture.pixels for picture in pictures])).to(device)
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def embed_captions(model: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str], device: torch.device) -> Tensor:
    """Unit vectors [B, 192] of captions; padded to the longest only, which attention by causal mask cannot see."""
    ids = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").input_ids.to(device)
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def retrieval_pairs(composer: Composer, count: int) -> list[Picture]:
    """Pictures with captions of icons that no training step has shown, one per label."""
    rng = np.random.default_rng(4321)
    icons = [index for index, name in enumerate(composer.names) if is_validation(name)]
    by_label = {composer.names[int(index)].label: int(index) for index in rng.permutation(icons)}
    return [composer.draw(index, rng) for index in list(by_label.values())[:count]]


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Sequence[Picture]) -> tuple[float, float]:
    """Share of pictures whose own caption is the first, and among the first five, of all captions given."""
    device = next(model.parameters()).device
    images = embed_pictures(model, pictures, device)
    texts = embed_captions(model, tokenizer, [picture.caption for picture in pictures], device)
    order = (images @ texts.T).argsort(dim=1, descending=True)
    own = torch.arange(len(pictures), device=device)[:, None]
    is_own = order == own
    return float(is_own[:, :1].any(1).float().mean()), float(is_own[:, :5].any(1).float().mean())


def _icon_weights(composer: Composer) -> NDArray[np.float64]:
    """Half of the draws fall on common nouns , half on all training icons alike."""
    common = np.array([float(n.label in COMMON and is_training(n)) for n in composer.names])
    every = np.array([float(is_training(n)) for n in composer.names])
    return 0.5 * common / common.sum() + 0.5 * every / every.sum()
