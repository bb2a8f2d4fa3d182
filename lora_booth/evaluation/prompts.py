"""What is drawn to judge an adapter: prompts of the subject, its class, and others.

The shipped lists (`assets/prompts`) have the structure of DreamBooth's (arXiv 2208.12242, supplement) in words of our
own: figures on them are not those of papers, which `dreambench.py` reads from the real set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_booth.config import inputs
from lora_booth.config.config import slot_faults
from lora_booth.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "assets" / "prompts"
LISTS = ("objects", "living", "miniature")
MAX_PROMPTS = 1000
SLOTS = ("token", "class")
PREDICTED_ROWS = 16
"""Noised pictures of the base at which its predictions are compared with an adapter's."""
_LIVING = "animal baby bear bird boy cat child cow dog fish fox girl horse kitten lion man monkey person pet pig pony"
_LIVING += " puppy rabbit sheep tiger wolf woman"
LIVING = frozenset(_LIVING.split())
"""Class nouns whose subjects wear outfits; of all others the list for objects is taken unless the user says so."""


@dataclass(frozen=True)
class Prompts:
    """`subject` and `classes` in pairs, the second without the token; `unrelated` name neither."""

    subject: tuple[str, ...]
    classes: tuple[str, ...]
    unrelated: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every one of them."""
        return (*self.subject, *self.classes, *self.unrelated)

    def num_pictures(self, per_prompt: int) -> int:
        """How many are drawn: `per_prompt` of each prompt of the subject, one of each other."""
        return len(self.subject) * per_prompt + len(self.classes) + len(self.unrelated)


def filled(templates: Sequence[str], unrelated: Sequence[str], *, token: str, class_noun: str) -> Prompts:
    """The prompts of one subject; unrelated ones that name its class are left out."""
    words = set(_words(class_noun))
    apart = tuple(prompt for prompt in unrelated if not words & set(_words(prompt)))
    subject = [template.replace("{token}", token).replace("{class}", class_noun) for template in templates]
    return Prompts(tuple(subject), tuple(class_prompt(t, class_noun) for t in templates), apart)


def class_prompt(template: str, class_noun: str) -> str:
    """ "a {token} {class} in the snow" as "an owl in the snow": what any subject of the class would be asked for."""
    text = re.sub(r"\{token\}\s*", "", template).replace("{class}", class_noun)
    text = re.sub(r"\ba(?= [aeiou])", "an", text)
    return re.sub(r"\ban(?= [^aeiou])", "a", text).strip()


def few(base: str, *, token: str, class_noun: str, number: int = 4) -> tuple[str, Prompts]:
    """The name of the shipped list that suits, and `number` of its prompts, evenly chosen, and of unrelated ones: for
    comparing checkpoints of one run, not for figures to be told."""
    name, templates = templates_for(base, class_noun, is_living=None)
    chosen = [templates[place * len(templates) // number] for place in range(number)]
    found = filled(chosen, unrelated_for(base), token=token, class_noun=class_noun)
    return name, replace(found, unrelated=found.unrelated[:number])


def templates_for(base: str | None, class_noun: str, *, is_living: bool | None) -> tuple[str, tuple[str, ...]]:
    """The shipped list that suits, by its name, and its templates. `is_living`: None to go by the class noun."""
    if base == "booth-mini":
        name = "miniature"
    else:
        guessed = bool(set(_words(class_noun)) & LIVING)
        name = "living" if (guessed if is_living is None else is_living) else "objects"
    return name, _lines(FOLDER / f"{name}.txt")


def unrelated_for(base: str | None) -> tuple[str, ...]:
    """The shipped prompts that have nothing to do with a subject, of which some name a class all the same."""
    return _lines(FOLDER / ("unrelated_miniature.txt" if base == "booth-mini" else "unrelated.txt"))


def read(path: Path) -> tuple[str, ...]:
    """The templates in a file of the user's: one for each line, blank ones and those that begin with # aside.

    Raises ConfigError for a file that cannot be read, holds none or too many, and for a line that lacks a slot.
    """
    found = _lines(path)
    where = inputs.shown_path(path)
    if not found:
        raise ConfigError(
            f'{where} holds no prompt; write one for each line, e.g. "a {{token}} {{class}} in the snow".'
        )
    if len(found) > MAX_PROMPTS:
        raise ConfigError(f"{where} holds {len(found)} prompts, at most {MAX_PROMPTS} are drawn; leave some out.")
    for line in found:
        faults = slot_faults(where, line, SLOTS)
        if faults:
            raise ConfigError(faults[0])
        if not all("{" + slot + "}" in line for slot in SLOTS):
            raise ConfigError(
                f'{where}: "{inputs.shown(line)}" lacks {{token}} or {{class}}; a prompt of the subject has both.'
            )
        inputs.word(line, where)
    return found


def _lines(path: Path) -> tuple[str, ...]:
    text = inputs.read_text(path, "give --prompts a text file with one prompt for each line", ConfigError)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
