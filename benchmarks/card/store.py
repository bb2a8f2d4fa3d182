"""docs/card.json: for each card what it is, and a record of every job of every part.

A record has a `state`, the `date` of the kit's call and the `commit` that it was measured with, and `figures`, or the
`message` that says why there are none. The file is written whole at every change, so a killed kit keeps what it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lora_booth.run import disk

State = Literal["waiting", "running", "done", "not offered", "out of memory", "out of time", "failed", "crashed"]
"""`waiting` and `running` are left by a kit that was killed. `not offered`: by this code or this device, as the message
says. `failed` raised an error, `crashed` ended its process."""
Record = dict[str, Any]
MAX_MESSAGE_CHARACTERS = 1_000
DECIDING = ("torch", "diffusers", "transformers", "peft")
"""Packages of which other versions compute a step in another way."""


class Results:
    """The entry of one card in the file at `path`, read anew before every change."""

    def __init__(self, path: Path, card: str) -> None:
        self.path, self.card = path, card

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Keep what the card is. What was measured with another driver or other versions of `DECIDING` goes."""
        cards = read(self.path)
        entry = cards.get(self.card)
        if entry is None or _deciding(entry["facts"]) != _deciding(facts):
            entry = {"facts": {}, "parts": {}}
        cards[self.card] = entry | {"facts": dict(facts)}
        self._write(cards)

    def part(self, part: str) -> dict[str, Record]:
        """Job to record, in the order in which they were first told of."""
        found: dict[str, Record] = self._entry(read(self.path))["parts"].get(part, {})
        return found

    def figures(self, part: str, job: str) -> dict[str, Any]:
        """The figures of a job that is done, else none."""
        record = self.part(part).get(job, {})
        return dict(record.get("figures", {})) if record.get("state") == "done" else {}

    def put(self, part: str, job: str, state: State, **values: Any) -> None:
        """Set the state of a job and what is given of `message`, `figures`, `date`, `commit` and `seconds`."""
        cards = read(self.path)
        jobs = self._entry(cards)["parts"].setdefault(part, {})
        kept = {} if state in ("waiting", "running") and "figures" not in values else jobs.get(job, {})
        if "message" in values:
            values["message"] = values["message"][-MAX_MESSAGE_CHARACTERS:]
        jobs[job] = {**kept, **values, "state": state}
        if state == "done":
            jobs[job].pop("message", None)
        self._write(cards)

    def forget(self, part: str, job: str) -> None:
        """Remove a record."""
        cards = read(self.path)
        if self._entry(cards)["parts"].get(part, {}).pop(job, None) is not None:
            self._write(cards)

    def _entry(self, cards: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = cards.setdefault(self.card, {"facts": {}, "parts": {}})
        return entry

    def _write(self, cards: Mapping[str, Any]) -> None:
        disk.write_text(self.path, json.dumps(cards, indent=1, ensure_ascii=False) + "\n")


def _deciding(facts: Mapping[str, Any]) -> list[Any]:
    return [facts["driver"], *(facts["versions"].get(name) for name in DECIDING)]


def read(path: Path) -> dict[str, Any]:
    """Card to {"facts": …, "parts": {part: {job: record}}}; nothing where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
