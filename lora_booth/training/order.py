"""The order in which training sees images, as a function of config and step.

So a resumed run needs no memory of it.

Words: an *item* is one image ready to train on; a *row* is one sample of a step's effective batch, at a *position*
that names it whatever micro-batch or process it falls into. Weights are numbers on rows: nothing is chunked by
position, micro-batches may be short, and no image is dropped for lack of a full batch. A class row is taken from the
bucket of the instance row that it joins, so that both fit one pass; a prior row is that very picture under a prompt
that does not name the subject.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import lcm
from typing import Literal

from lora_booth.run.randomness import generator_for

Role = Literal["instance", "class", "prior"]
"""instance: the subject; class: a class image, which is learnt too; prior: an instance image under a prompt without the
token, where the base's own prediction is to be kept."""
Shape = tuple[int, int, int]
Geometry = tuple[int, int, int, int, int, int]
EMPTY_EVERY = 8
"""As often as in the first measurement of this prior, where "" was one of eight captions."""
VALIDATION_QUANTILES = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True)
class Item:
    """One training image. `latent_key` finds its latent moments, of `shape` `[C, h, w]`, in the cache.

    `plain_prompt`: that of an instance image with the token left out; None where it has none. `mask_key` finds the
    mask of one that has any. `in_turn`: prompts that it comes under, with their plain ones; none where it has but one.
    """

    role: Role
    name: str
    latent_key: str
    shape: Shape
    prompt: str
    geometry: Geometry
    plain_prompt: str | None = None
    mask_key: str | None = None
    in_turn: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Row:
    """One sample of a step. `weight`: 1 / N for instance images, loss_weight / N for all others; N per role."""

    item: Item
    position: int
    weight: float


@dataclass(frozen=True)
class Order:
    """All steps of a run. With neither class items nor captions there is no prior.

    Every step holds `images_per_step` instance rows and, with class items, as many class rows. Each role is shuffled by
    its own random stream; an epoch is one pass over the instance items. A class row comes from the bucket of the
    instance row it joins, where there are class items of that bucket, so that both fit one micro-batch.

    With captions there are as many prior rows instead: every other one is its instance row's picture under the plain
    prompt of that picture, the others are theirs under a caption.

    `dropout`: the chance that an instance row has the empty prompt.
    """

    instances: Sequence[Item]
    classes: Sequence[Item]
    images_per_step: int
    loss_weight: float
    seed: int
    captions: Sequence[str] = ()
    dropout: float = 0.0

    def at(self, step: int) -> tuple[Row, ...]:
        """Rows of `step` (0-based): instance rows at positions 0 to N-1, class or prior rows at N to 2N-1."""
        count = self.images_per_step
        draws = range(step * count, (step + 1) * count)
        instances = [self._captioned(draw) for draw in draws]
        rows = [Row(item, position, 1.0 / count) for position, item in enumerate(instances)]
        joining = self._class if self.classes else self._prior if self.captions else None
        if joining is not None:
            weight = self.loss_weight / count
            rows += [Row(joining(draw), count + i, weight) for i, draw in enumerate(draws)]
        return tuple(rows)

    def reached(self, steps: Iterable[int]) -> frozenset[Item]:
        """Items of the rows of `steps`, with every image and every prompt that comes; it ends as soon as all are
        reached, so a long run takes no longer."""
        own = {pair for item in self.instances for pair in item.in_turn or [(item.prompt, item.plain_prompt)]}
        captioned = {"", *self.captions, *(plain or "" for _, plain in own)} if self.captions else ()
        images = {item.latent_key for item in (*self.instances, *self.classes)}
        prompts = {prompt for prompt, _ in own} | {item.prompt for item in self.classes} | set(captioned)
        prompts |= {""} if self.dropout else set()
        found: set[Item] = set()
        for step in steps:
            new = {row.item for row in self.at(step)} - found
            found |= new
            images -= {item.latent_key for item in new}
            prompts -= {item.prompt for item in new}
            if not images and not prompts:
                break
        return frozenset(found)

    def has_all(self, num_steps: int) -> bool:
        """Whether the first `num_steps` come to every image, as far as counting tells: nothing is shuffled, so a "no"
        may be wrong."""
        epochs = num_steps * self.images_per_step // len(self.instances)
        per_epoch = Counter(item.shape for item in self.instances)
        return epochs > 0 and all(epochs * per_epoch[shape] >= len(pool) for shape, pool in self._class_pools.items())

    @cached_property
    def _class_pools(self) -> dict[Shape, list[Item]]:
        pools: dict[Shape, list[Item]] = {}
        for item in self.classes:
            pools.setdefault(item.shape, []).append(item)
        return pools

    def _instance(self, draw: int) -> Item:
        epoch, place = divmod(draw, len(self.instances))
        return self.instances[_shuffled(self.seed, "instance", epoch, len(self.instances))[place]]

    def _captioned(self, draw: int) -> Item:
        """The `draw`-th instance row's item, under its prompt or the empty one."""
        item = self._prompted(draw)
        if not self.dropout:
            return item
        import torch

        is_dropped = torch.rand((), generator=generator_for(self.seed, "caption dropout", draw)) < self.dropout
        return replace(item, prompt="") if is_dropped else item

    def _prompted(self, draw: int) -> Item:
        """The `draw`-th instance row's item, under the prompt whose turn it is."""
        item = self._instance(draw)
        if not item.in_turn:
            return item
        epoch, place = divmod(draw, len(item.in_turn))
        order = _shuffled(self.seed, "template", epoch, len(item.in_turn))
        prompt, plain = item.in_turn[order[place]]
        return replace(item, prompt=prompt, plain_prompt=plain, in_turn=())

    def _class(self, draw: int) -> Item:
        """The class item that joins the `draw`-th instance row: the next of that row's bucket."""
        shape = self._instance(draw).shape
        own = self._class_pools.get(shape)
        pool, turn = (self.classes, draw) if own is None else (own, self._draws_of_shape(draw, shape))
        epoch, place = divmod(turn, len(pool))
        return pool[_shuffled(self.seed, f"class {shape}", epoch, len(pool))[place]]

    def _prior(self, draw: int) -> Item:
        """The picture of the `draw`-th instance row under another prompt."""
        item = self._prompted(draw)
        prompt = item.plain_prompt if draw % 2 == 0 else None
        prompt = self._caption(draw) if prompt is None else prompt
        return replace(item, role="prior", prompt=prompt, mask_key=None)  # all of it is to be kept

    def _caption(self, draw: int) -> str:
        """The caption for the `draw`-th instance row: at every eighth other one the empty prompt, which guidance
        needs, else the next in an order of its own."""
        if draw // 2 % EMPTY_EVERY == 0:
            return ""
        epoch, place = divmod(draw, len(self.captions))
        return self.captions[_shuffled(self.seed, "caption", epoch, len(self.captions))[place]]

    def _draws_of_shape(self, draw: int, shape: Shape) -> int:
        """How many instance rows of `shape` came before the `draw`-th."""
        epoch, place = divmod(draw, len(self.instances))
        per_epoch = sum(item.shape == shape for item in self.instances)
        order = _shuffled(self.seed, "instance", epoch, len(self.instances))
        return epoch * per_epoch + sum(self.instances[index].shape == shape for index in order[:place])


def micro_batches(
    rows: Sequence[Row], batch_size: int, *, process: int = 0, num_processes: int = 1
) -> list[tuple[Row, ...]]:
    """This process's share of a step's rows, in micro-batches of one shape and at most `batch_size` rows.

    No row is dropped and none is repeated: a micro-batch may be short, because rows carry their own weight.
    """
    groups: dict[Shape, list[Row]] = {}
    for row in rows[process::num_processes]:
        groups.setdefault(row.item.shape, []).append(row)
    return [
        tuple(group[start : start + batch_size])
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def validation_levels(number: int, count: int, rows: int) -> list[float]:
    """Noise levels of image `number` of `count`, as shares of all, when `rows` are looked at: images and levels take
    turns, so that all levels come equally often, and no image has one twice."""
    num_levels = len(VALIDATION_QUANTILES)
    rounds = lcm(count, num_levels)  # then images would meet the same levels again
    places = range(number, min(rows, count * num_levels), count)
    return [VALIDATION_QUANTILES[(place + place // rounds) % num_levels] for place in places]


@lru_cache(maxsize=64)
def _shuffled(seed: int, stream: str, epoch: int, count: int) -> tuple[int, ...]:
    import torch

    generator = generator_for(seed, "order", stream, epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())
