"""The map of the house: imports point only down, files and functions stay short, nothing unsafe is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lora_booth"
FLOORS = {
    0: (
        "errors",
        "cards",
        "config",
        "config_checks",
        "config_file",
        "presets",
        "files",
        "report",
        "interrupts",
        "inputs",
        "identity",
        "patterns",
        "names",
        "systems",
        "headers",
        "versions",
        "crash",
        "streams",
    ),
    1: (
        "run",
        "checkpoints",
        "objectives",
        "optim",
        "flat",
        "tracing",
        "devices",
        "subject",
        "charts",
        "watchdog",
        "kept",
        "data",
        "adapter",
        "export",
    ),
    2: ("families", "class_images", "batch", "trial", "memory", "budget", "duration", "checks"),
    3: ("prepare", "preview", "plan", "generate", "inspect", "deliver", "merge", "resize", "extract", "cache"),
    4: ("loop", "compiling"),
    5: ("train",),
    6: ("demo", "console", "cli", "cli_adapters", "doctor", "__init__", "__main__"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
THIRD_PARTY = {
    "peft": ("adapter",),
    "diffusers": ("families",),
    "transformers": ("families",),
    "accelerate": ("train", "loop", "generate"),
    "typer": ("cli", "cli_adapters"),
    "rich": ("console",),
    "matplotlib": ("charts",),
    "re2": ("patterns",),
    "psutil": ("systems",),
    "pydantic": ("config", "config_file"),
}
"""Where a library may be imported. torch, numpy, Pillow and safetensors are everywhere above floor 0."""
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@lru_cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) >= 40
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): (p, ast.parse(p.read_text())) for p in paths}


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(dotted: str) -> str:
    return dotted.split(".")[0]


def test_every_module_stands_on_a_floor() -> None:
    assert {room(name) for name in sources()} == set(FLOOR_OF)


def test_imports_point_only_down() -> None:
    checked = 0
    for name, (path, tree) in sources().items():
        if room(name) in ("__init__", "__main__"):
            continue
        for target in imported(tree):
            if target.startswith("lora_booth."):
                other = room(target.removeprefix("lora_booth."))
                assert room(name) == other or FLOOR_OF[other] < FLOOR_OF[room(name)] or sideways(room(name), other), (
                    f"{path.name} imports {target}"
                )
                checked += 1
    assert checked > 100


def sideways(name: str, other: str) -> bool:
    """On one floor parts may use parts; verbs may not use verbs, and only `train` and its loop stand above them."""
    return FLOOR_OF[name] == FLOOR_OF[other] != 3


def test_families_never_import_each_other() -> None:
    for name in ("families.stable_diffusion", "families.sdxl"):
        _, tree = sources()[name]
        others = {"stable_diffusion", "sdxl"} - {name.split(".")[1]}
        assert not {t for t in imported(tree) if t.split(".")[2:3] and t.split(".")[2] in others}


def test_libraries_stay_in_their_rooms() -> None:
    checked = 0
    for name, (path, tree) in sources().items():
        for target in imported(tree):
            library = target.split(".")[0]
            if library in THIRD_PARTY:
                assert room(name) in THIRD_PARTY[library], f"{path.name} imports {library}"
                checked += 1
            if library == "torch":
                assert FLOOR_OF[room(name)] > 0, f"{path.name} imports torch"
    assert checked > 15


def test_files_and_functions_stay_short() -> None:
    functions = 0
    for path, tree in sources().values():
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{path.name} {node.name}"
                functions += 1
    assert functions > 200


def test_nothing_can_run_code_from_a_file() -> None:
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    calls = {"eval", "exec", "torch.load", "os.system", "os.popen", "yaml.load", "subprocess.run", "subprocess.Popen"}
    # this very Python, with a fixed program and no shell
    allowed = {"data.worker": {"subprocess.Popen"}, "doctor": {"subprocess.run"}}
    words = {"shell", "trust_remote_code", "allow_pickle"}
    checked = 0
    for name, (path, tree) in sources().items():
        assert not {t.split(".")[0] for t in imported(tree)} & modules, path
        banned = calls - allowed.get(name, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in banned, f"{path.name}:{node.lineno}"
                assert not {k.arg for k in node.keywords} & words, f"{path.name}:{node.lineno}"
                checked += 1
    assert checked > 1000


def test_the_command_line_needs_no_torch_for_help_errors_and_facts() -> None:
    for name in ("cli", "cache", "data.cached", "console", "plan", "subject", "presets", "demo"):
        _, tree = sources()[name]
        heavy = {"torch", "diffusers", "transformers", "accelerate", "peft"}
        top = {t.split(".")[0] for node in tree.body for t in imported(ast.Module([node], []))}
        assert not top & heavy, name


def test_plan_tells_bad_input_and_all_facts_before_torch_is_imported(bases: dict[str, Path], pictures: Path) -> None:
    program = """
import sys
from lora_booth.cli import app
from lora_booth.verbs import plan
from lora_booth.errors import DataError

class Told:
    def event(self, kind, text, **values):
        assert (kind in ("memory", "time")) == ("torch" in sys.modules), text
        told.append(kind)
    def warn(self, text): ...

told, (folder, base) = [], sys.argv[1:]
try:
    plan.show(app._config(None, "nowhere", "dog", None, base), Told())
except DataError:
    told.append("error")
assert "torch" not in sys.modules
plan.show(app._config(["data.resolution=32", "data.bucket_step=16"], folder, "dog", None, base), Told())
print(*dict.fromkeys(told))
"""
    words = [sys.executable, "-c", program, str(pictures), str(bases["sd1"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    facts = ["subject", "base", "adapter", "prior", "steps", "writes", "picture"]
    assert done.stdout.split() == ["error", *facts, "memory", "time"], done.stderr
