"""Micro-steps as CUDA graphs: recorded once for each shape, and then started as one operation.

A card that computes a step faster than Python starts its thousands of operations waits for Python; a graph is started
in one call (https://pytorch.org/docs/stable/notes/cuda.html, CUDA graphs). It reads its inputs and writes its
gradients where they lay when it was recorded, so inputs are copied there, and all that depends on a step, its
randomness included, is among them.

A graph keeps the memory of its step for itself. So graphs are forgotten before anything else is drawn or measured, and
recorded again at the next step, which takes about as long as a step without them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_booth.errors import lacks_memory
from lora_booth.models import devices
from lora_booth.training import loop
from lora_booth.training.loop import MicroStep, Scale
from lora_booth.training.session import Session

MAX_SHAPES = 8
"""Of which there are graphs at once; others are computed without. Each holds a step's gradients."""
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""From what runs operations to what runs the very same ones again, on the same memory."""


def why_not(s: Session) -> str | None:
    """Why the steps of `s` cannot be recorded, as one clause; None where they can."""
    config, missing = s.config, devices.lacks(s.accelerator.device)
    reasons = {
        f"the device has none ({missing.get('graphs')})": "graphs" in missing,
        "text encoders are trained, whose prompts are read on the CPU": s.is_text_trained,
        "adapter.dropout draws other numbers in each step": bool(config.adapter.dropout),
        "memory.offload_activations moves them to the CPU": config.memory.offload_activations,
        "train.gradient_checkpointing asks for the random state": bool(config.train.gradient_checkpointing),
        "model.quantize brings operations that wait": config.model.quantize != "none",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `run`, whose every operation ran once before, so that kernels and tables are there."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


@dataclass(frozen=True)
class _Graph:
    """A recorded micro-step. `inputs`: what it reads; `losses`, `gradients`: what it writes."""

    inputs: Sequence[Tensor]
    losses: Tensor
    gradients: Sequence[Sequence[Tensor | None]]
    replay: Callable[[], None]


class Graphs:
    """Runs micro-steps as `loop.run_pass` does: the first of a shape as it is, later ones by a graph."""

    def __init__(self, s: Session, scale: Scale | None = None, record: Record = record) -> None:
        self._s, self._scale, self._record = s, scale, record
        self._seen, self._made = set[Hashable](), dict[Hashable, _Graph]()
        self._is_given_up = False

    def __call__(self, micro: MicroStep) -> Tensor:
        """Losses of the micro-step, float32 `[B]`, until the next one; its gradients are added to the step's."""
        graph = self._graph_of(micro)
        if graph is None:
            return loop.run_pass(self._s, micro, self._scale)
        for held, tensor in zip(graph.inputs, _inputs(micro), strict=True):
            held.copy_(tensor)
        graph.replay()
        for flat, gradients in zip(self._s.trained, graph.gradients, strict=True):
            flat.add_(gradients)
        return graph.losses

    @property
    def count(self) -> int:
        """How many shapes are recorded now."""
        return len(self._made)

    def forget(self) -> None:
        """Give the memory of all graphs back; they are recorded again when they are needed."""
        self._made.clear()

    def _graph_of(self, micro: MicroStep) -> _Graph | None:
        key = _shape(micro)
        is_new = key not in self._seen
        self._seen.add(key)
        if key in self._made:
            return self._made[key]
        if is_new or self._is_given_up or len(self._made) == MAX_SHAPES:
            return None
        try:
            self._made[key] = self._recorded(micro)
        except RuntimeError as error:  # a lack of memory too: graphs are a matter of speed alone
            self._is_given_up = True
            self.forget()
            for flat in self._s.trained:
                flat.take()
            why = "memory does not suffice" if lacks_memory(error) else next(iter(str(error).splitlines()), "")
            self._s.report.warn(f"a step could not be recorded as a graph ({why}); the run goes on without.")
            return None
        return self._made[key]

    def _recorded(self, micro: MicroStep) -> _Graph:
        held = replace(micro, batch=micro.batch.mapped(torch.clone), weights=micro.weights.clone())
        losses, gradients = list[Tensor](), list[list[Tensor | None]]()

        def run() -> None:
            loss = loop.backward(self._s, held, self._scale)
            losses.append(loss)
            gradients.extend(flat.take() for flat in self._s.trained)

        replay = self._record(run)
        return _Graph(_inputs(held), losses[0], gradients, replay)


def _inputs(micro: MicroStep) -> list[Tensor]:
    """All that a micro-step reads on the device, but for weights that are the same in every one."""
    return [*micro.batch.tensors, micro.weights]


def _shape(micro: MicroStep) -> Hashable:
    """What two micro-steps have in common that one graph serves."""
    reference = micro.batch.reference
    compared = None if reference is None else (reference.first, reference.num_instances, reference.last)
    return (compared, *((tuple(tensor.shape), tensor.dtype) for tensor in _inputs(micro)))
