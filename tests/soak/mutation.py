"""Do the tests notice wrong code? One small change of the source at a time, and the tests that belong to it.

    python -m tests.soak.mutation                                # 30 mutants of each module, about a quarter of an hour
    python -m tests.soak.mutation --only lora_booth/run/folder.py --count 1000

Each mutant gets a process of its own, forked from one that has imported torch but nothing of ours, on a copy of the
sources. A mutant that no test notices is told with its line: it wants a test, or changes nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = {
    "lora_booth/run/folder.py": ("tests/run/test_folder.py",),
    "lora_booth/run/checkpoints.py": ("tests/run/test_folder.py",),
    "lora_booth/data/images.py": (
        "tests/data/test_images.py",
        "tests/data/test_images_crop.py",
        "tests/data/test_duplicates.py",
    ),
    "lora_booth/adapter/files/storage.py": (
        "tests/adapter/test_storage.py",
        "tests/adapter/test_delivery.py",
        "tests/adapter/test_kinds.py",
    ),
    "lora_booth/run/disk.py": ("tests/run/test_disk.py", "tests/run/test_cache.py", "tests/verbs/test_merge.py"),
}
"""Module to the tests that claim to hold it."""
MAX_SECONDS = 300.0
Change = Callable[[Any], object]
"""Changes one node of a syntax tree."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
}  # fmt: skip


def main() -> int:
    """Print the share of mutants that were noticed, and those that were not; 1 when it is below 85 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(TESTS), default=list(TESTS))
    parser.add_argument("--count", type=int, default=30, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import diffusers
    import peft
    import pytest
    import torch

    assert torch and diffusers and peft and pytest, "imported once, for all processes that are forked from here"
    assert not any(name.startswith("lora_booth") for name in sys.modules), "the mutants would not be imported"
    tried = noticed = 0
    for module in arguments.only:
        source = Path(module).read_text(encoding="utf-8")
        found = list(mutants(source))
        chosen = random.Random(arguments.seed).sample(found, min(arguments.count, len(found)))
        with _copied() as folder:
            assert not _is_noticed(folder, module, source), f"the tests of {module} fail on the code as it is"
            survivors = [what for what, text in chosen if not _is_noticed(folder, module, text)]
        tried, noticed = tried + len(chosen), noticed + len(chosen) - len(survivors)
        print(f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} noticed, of {len(found)} mutants", flush=True)
        for what in survivors:
            print(f"  {what}", flush=True)
    print(f"{noticed} of {tried} noticed, {noticed / tried:.0%}")
    return int(noticed < 0.85 * tried)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """What was changed, with its line, and the changed source; texts of messages and annotations stay."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for what, change in _changes(node):
            mutant = copy.deepcopy(tree)
            place = next(n for i, n in enumerate(ast.walk(mutant)) if i == number)
            change(place)
            yield f"line {getattr(node, 'lineno', '?')}: {what}: {ast.unparse(node)[:90]!r}", ast.unparse(mutant)


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "other comparison", lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
        yield "other operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.If | ast.IfExp):
        yield "never", lambda n: setattr(n, "test", ast.Constant(False))
        yield "always", lambda n: setattr(n, "test", ast.Constant(True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "without not", lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "other truth", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "one more", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.FunctionDef | ast.With | ast.If | ast.For | ast.Try):
        for i, statement in enumerate(node.body):
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if is_call or isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue):
                yield f"without {ast.unparse(statement)[:60]!r}", lambda n, i=i: n.body.__setitem__(i, ast.Pass())


@contextmanager
def _copied() -> Iterator[Path]:
    """A folder with what the tests need."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lora_booth", "tests", "configs"):
            shutil.copytree(name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", "booth_mini"))
        shutil.copy("pyproject.toml", folder)
        yield Path(folder)


def _is_noticed(folder: Path, module: str, text: str) -> bool:
    """Whether a test fails, or none ends, when `module` reads `text`."""
    (folder / module).write_text(text, encoding="utf-8")
    process = multiprocessing.get_context("fork").Process(target=_test, args=(folder, TESTS[module]))
    process.start()
    process.join(MAX_SECONDS)
    is_endless = process.is_alive()
    process.kill()
    process.join()
    return is_endless or process.exitcode != 0


def _test(folder: Path, tests: tuple[str, ...]) -> None:
    """The child: the tests in `folder`, until the first that fails."""
    import pytest
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # two mutants of one second and one size would be taken for each other
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    sys.exit(main())
