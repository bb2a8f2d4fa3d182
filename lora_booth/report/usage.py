"""How an adapter's file is used in each program: folder, words, strength."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_booth.adapter.files import embedding
from lora_booth.adapter.programs.verdicts import Verdict, verdicts_of_file
from lora_booth.config import inputs
from lora_booth.errors import ModelError
from lora_booth.report.record import Record
from lora_booth.run import systems

HOW = {
    "AUTOMATIC1111": ("<lora:{name}:1> {words}", "in the prompt"),
    "Forge": ("<lora:{name}:1> {words}", "in the prompt"),
    "SD.Next": ("<lora:{name}:1> {words}", "in the prompt"),
    "ComfyUI": ("{words}", "in the prompt; a Load LoRA node with {file}, strength_model 1 and strength_clip 1"),
    "InvokeAI": ("{words}", "in the prompt; the LoRA {name} added to it at weight 1"),
    "kohya sd-scripts": ("--models {file} --ratios 1", "merges it into a base, whose prompts then say: {words}"),
    "stable-diffusion.cpp": ("<lora:{name}:1> {words}", "in the prompt"),
    "diffusers": ('pipe.load_lora_weights(".", weight_name="{file}")', "then a prompt with: {words}"),
}
"""What is written in each program, and where."""
OWN = "lora-booth"


@dataclass(frozen=True)
class Use:
    """One program: where the file goes, what is written, and where; `told`: what it takes of the file, `notes`: what is
    lost or changed there, empty when nothing is."""

    program: str
    folder: str
    written: str
    where: str
    told: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A file of the adapter that was handed over."""

    name: str
    num_bytes: int
    kind: str

    @property
    def size(self) -> str:
        """As people say it."""
        size = self.num_bytes / 1e6
        return f"{size:.1f} MB" if size >= 0.1 else f"{1e3 * size:.1f} kB"


def files(record: Record) -> list[File]:
    """The adapter's files that are still in the run folder, the portable one first."""
    made = {} if record.summary is None else record.summary.files
    kinds = {
        "kohya": "for every program",
        "diffusers": "for diffusers and PEFT",
        "embedding": "the learnt word, for every program",
    }
    there = {kind: record.folder / Path(made[kind]).name for kind in kinds if kind in made}
    return [
        File(path.name, path.stat().st_size, kinds[kind]) for kind, path in there.items() if inputs.is_plain_file(path)
    ]


def uses(record: Record) -> list[Use]:
    """A row for each program and file, lora_booth's own command first; empty where there is no file yet. The miniature
    has but that one: no other program draws with it."""
    found = files(record)
    if not found:
        return []
    file, config = found[0], record.config
    base = config.model.base if not Path(config.model.base).is_absolute() else Path(config.model.base).name
    words = record.words
    prompt = config.fill(config.subject.prompt)
    command = [OWN, "generate", "--base", base, "--adapter", file.name, "--prompt", prompt]
    own = Use(OWN, "any", systems.command_line(command), "in the file's folder; FILE:0.8 is a strength of 0.8")
    if config.model.base == "booth-mini":
        return [own]
    learnt = [_use_of_word(program, config.subject.token) for program in embedding.PLACE]
    if config.adapter.embedding == "only":
        return [own, *learnt]
    try:
        verdicts = verdicts_of_file(record.folder / file.name)
    except ModelError:  # of a family that no program is known to take
        return [own]
    slots = {"name": Path(file.name).stem, "file": file.name, "words": words}
    known = [_use(verdict, slots) for verdict in verdicts if verdict.matched]
    return [own, *known, *(learnt if config.adapter.embedding == "too" else [])]


def _use_of_word(program: str, word: str) -> Use:
    place, written = embedding.PLACE[program]
    told = f"the word, in {word}.safetensors"
    return Use(program, place, written.format(word=word), "in the prompt, in place of the word", told)


def _use(verdict: Verdict, slots: dict[str, str]) -> Use:
    written, where = (text.format(**slots) for text in HOW.get(verdict.loader, ("{words}", "in the prompt")))
    told = "all layers" if verdict.matched == verdict.total else f"{verdict.matched} of {verdict.total} layers"
    return Use(verdict.loader, verdict.folder, written, where, told, verdict.notes)
