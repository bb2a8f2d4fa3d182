"""The mutants of tests/soak/mutation.py are programs, and other ones."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.soak.mutation import TESTS, mutants


def test_every_mutant_is_another_program_and_names_its_line() -> None:
    source = Path(__file__).parents[2] / "lora_booth" / "run" / "disk.py"
    text = source.read_text()
    found = list(mutants(text))
    assert len(found) > 20
    for what, mutant in found:
        compile(mutant, "mutant", "exec")
        assert mutant != ast.unparse(ast.parse(text)), what
        assert what.startswith("line "), what


def test_the_tests_of_each_module_are_there() -> None:
    root = Path(__file__).parents[2]
    assert all((root / name).exists() for module, tests in TESTS.items() for name in (module, *tests))
