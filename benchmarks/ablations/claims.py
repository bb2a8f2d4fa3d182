"""What should come out, said beforehand: each claim a difference with the sign it should have.

From the DreamBooth paper (arXiv 2208.12242: prior preservation, table 3; class noun, table 4) where nothing else is
said, and from this project's own first measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.ablations.arms import ARMS, AVERAGED, END, STEPWISE, State
from benchmarks.ablations.statistics import Difference, Front, Place, Table


@dataclass(frozen=True)
class Claim:
    """A sentence, and the difference that decides it: `figure` of `a` less that of `b`, or with fronts likeness at
    equal drift. `expected`: "+", "-", or "0" for none that matters."""

    question: str
    text: str
    a: Place | Front
    b: Place | Front
    expected: str
    figure: str = "likeness at equal drift"

    def difference(self, table: Table) -> Difference:
        """What was measured of it."""
        (arm, ours), (other, theirs) = self.a, self.b
        if isinstance(ours, State) and isinstance(theirs, State):
            return table.difference((arm, ours), (other, theirs), self.figure)
        assert not isinstance(ours, State) and not isinstance(theirs, State), "a place is compared with a place"
        return table.at_equal_drift((arm, ours), (other, theirs))


def at_end(question: str, text: str, a: str, b: str, figure: str, expected: str) -> Claim:
    """A claim on two arms after all steps, at strength 1."""
    return Claim(question, text, (a, END), (b, END), expected, figure)


def on_fronts(question: str, text: str, a: str, b: str, states: Sequence[State] = ()) -> Claim:
    """That the first arm is better at equal drift, over `states` of both, or over the strengths of each."""
    return Claim(question, text, (a, states or ARMS[a].strengths), (b, states or ARMS[b].strengths), "+")


def claims() -> Iterator[Claim]:
    """All of them, in the order of their letters."""
    yield at_end("a", "Class images keep the bare class from becoming the subject", "images", "none", "leak", "-")
    yield at_end("a", "Class images keep other prompts", "images", "none", "other_change", "-")
    yield at_end("a", "Class images keep the subject's pictures diverse", "images", "none", "diversity", "+")
    yield on_fronts("a", "Class images pay at equal drift", "images", "none")
    yield at_end("b", "The right noun is better than a wrong one", "images", "noun-wrong", "likeness", "+")
    yield at_end("b", "A wrong noun is better than none", "noun-wrong", "noun-none", "likeness", "+")
    yield at_end("b", "The right noun is better than none", "images", "noun-none", "likeness", "+")
    for kind, adapter in (("full", "images"), ("full-none", "none")):
        which = "with class images" if kind == "full" else "without a prior"
        yield at_end("c", f"A full fine-tune {which} drifts more", kind, adapter, "other_change", "+")
        yield on_fronts("c", f"An adapter {which} is better than a full fine-tune", adapter, kind, STEPWISE)
    yield at_end("c", "An adapter with the model prior is more alike than a word", "model", "word", "likeness", "+")
    yield at_end("c", "An adapter changes other prompts more than a word", "model", "word", "other_change", "+")
    yield on_fronts("c", "A word beside the adapter pays", "model+word", "model")
    yield on_fronts("d", "The model prior beats class images", "model", "images")
    yield at_end("d", "The model prior drifts less than class images", "model", "images", "other_change", "-")
    yield at_end("d", "The model prior leaks less than class images", "model", "images", "leak", "-")
    for weight in ("3e-4", "3e-3"):
        yield on_fronts("d", f"Class images beat the norm of the update, λ {weight}", "images", f"weights-{weight}")
    yield on_fronts("d", "The norm on top of the model prior pays", "model+weights", "model")
    yield on_fronts("d", "DCO without a prior beats class images", "dco", "images")
    yield on_fronts("d", "DCO on top of the model prior pays", "model+dco", "model")
    for low, high in (("rank-4", "images"), ("images", "rank-64")):
        ranks = (
            f"{low.removeprefix('rank-').replace('images', '8')} to {high.removeprefix('rank-').replace('images', '8')}"
        )
        yield at_end("e", f"Likeness is flat from rank {ranks}", high, low, "likeness", "0")
        yield at_end("e", f"Drift rises from rank {ranks}", high, low, "other_change", "+")
    for weight, suffix in ((".25", "-0.25"), ("1", ""), ("4", "-4")):
        text = f"Over steps, λ {weight}: the model prior's front lies above that of class images"
        yield on_fronts("f", text, f"model{suffix}", f"images{suffix}", STEPWISE)
    for arm, which in (("images", "class images"), ("model", "the model prior")):
        drift, likeness = f"Strength 0.8 drifts less, {which}", f"Strength 0.8 costs no likeness, {which}"
        weak = (arm, State(strength=0.8))
        yield Claim("g", drift, weak, (arm, END), "-", "other_change")
        yield Claim("g", likeness, weak, (arm, END), "0", "likeness")
        average = f"The average over steps is better than the last step, {which}"
        yield Claim("g", average, (arm, (AVERAGED,)), (arm, ARMS[arm].strengths), "+")
