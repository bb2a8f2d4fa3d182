"""Under the rules of Windows the demo trains, survives a kill to the same bytes, and every verb works on what it made.

Nothing is imported here that a rule could miss: all of it runs in processes that have had the rules since their start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from lora_booth.cli.demo import MASCOT
from lora_booth.config import presets
from lora_booth.run.folder import Run
from tests.support import windows_rules

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "windows"), str(ROOT)]),
    "PYTHONIOENCODING": "cp1252",  # as a console of Western Europe
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
RULES = """
import json, mmap, os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path

def outcome(attempt):
    try:
        attempt()
    except Exception as error:
        return getattr(error, "winerror", None) or type(error).__name__
    return "done"

def synced():
    with open("other", "r+b") as file:
        os.fsync(file.fileno())

os.chdir(sys.argv[1])
for name in ("open", "free", "mapped", "frozen", "other"):
    Path(name).write_bytes(b"x" * 5000)
os.mkdir("folder")
os.mkdir("empty")
Path("folder/inside").write_text("x")
os.chmod("frozen", 0o444)
held, inside = open("open", "rb"), open("folder/inside", "rb")
with open("mapped", "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
child = subprocess.Popen([sys.executable, "-c", "f = open('free'); print(1, flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
attempts = {
    "a handle of a folder": lambda: os.open("empty", os.O_RDONLY),
    "fsync of a handle that reads": lambda: os.fsync(held.fileno()),
    "fsync of a handle that writes": synced,
    "replacing an open file": lambda: os.replace("other", "open"),
    "replacing a mapped file": lambda: os.replace("other", "mapped"),
    "renaming an open file": lambda: os.rename("open", "new"),
    "renaming onto a file": lambda: Path("other").rename("frozen"),
    "renaming a folder with an open file": lambda: os.rename("folder", "new"),
    "replacing a folder": lambda: os.replace("folder", "empty"),
    "removing an open file": lambda: os.remove("open"),
    "removing a mapped file": lambda: Path("mapped").unlink(),
    "removing a file that a child has open": lambda: os.remove("free"),
    "removing a read-only file": lambda: os.remove("frozen"),
    "removing a tree with an open file": lambda: shutil.rmtree("folder"),
    "cutting a mapped file": lambda: open("mapped", "wb"),
    "a device": lambda: open("aux.txt", "w"),
    "a folder of a device's name": lambda: os.mkdir("COM1"),
    "a colon": lambda: open("a:b", "w"),
    "a name that ends with a dot": lambda: os.mkdir("dog."),
    "a name that ends with a space": lambda: open("dog ", "w"),
    "a path of 260 characters": lambda: open("x" * (260 - len(os.path.abspath("."))), "w"),
    "a name in another case": lambda: open("OTHER", "w"),
    "a link": lambda: os.symlink("other", "link"),
    "resource": lambda: exec("import resource"),
    "fcntl": lambda: exec("import fcntl"),
    "SIGUSR1": lambda: signal.SIGUSR1,
    "SIGKILL": lambda: signal.SIGKILL,
    "a handler of a signal of Linux": lambda: signal.signal(10, signal.SIG_DFL),
    "fork": lambda: os.fork(),
    "O_DIRECTORY": lambda: os.O_DIRECTORY,
    "preexec_fn": lambda: subprocess.Popen(["true"], preexec_fn=print),
    "writing, replacing and removing what nobody has open": lambda: [
        Path("new").write_text("1"), os.replace("new", "other"), Path("other").unlink(), os.rmdir("empty")],
}
print(json.dumps({name: outcome(attempt) for name, attempt in attempts.items()}))
child.communicate(b"\\n")
"""
EXPECTED = {
    "a handle of a folder": windows_rules.DENIED,
    "fsync of a handle that reads": "OSError",
    "fsync of a handle that writes": "done",
    "replacing an open file": windows_rules.DENIED,
    "replacing a mapped file": windows_rules.DENIED,
    "renaming an open file": windows_rules.SHARED,
    "renaming onto a file": windows_rules.EXISTS,
    "renaming a folder with an open file": windows_rules.DENIED,
    "replacing a folder": windows_rules.DENIED,
    "removing an open file": windows_rules.SHARED,
    "removing a mapped file": windows_rules.SHARED,
    "removing a file that a child has open": windows_rules.SHARED,
    "removing a read-only file": windows_rules.DENIED,
    "removing a tree with an open file": windows_rules.SHARED,
    "cutting a mapped file": windows_rules.MAPPED,
    "a device": windows_rules.BAD_NAME,
    "a folder of a device's name": windows_rules.BAD_NAME,
    "a colon": windows_rules.BAD_NAME,
    "a name that ends with a dot": windows_rules.BAD_NAME,
    "a name that ends with a space": windows_rules.BAD_NAME,
    "a path of 260 characters": windows_rules.NOT_FOUND,
    "a name in another case": windows_rules.EXISTS,
    "a link": windows_rules.NO_PRIVILEGE,
    "resource": "ModuleNotFoundError",
    "fcntl": "ModuleNotFoundError",
    "SIGUSR1": "AttributeError",
    "SIGKILL": "AttributeError",
    "a handler of a signal of Linux": "ValueError",
    "fork": "AttributeError",
    "O_DIRECTORY": "AttributeError",
    "preexec_fn": "ValueError",
    "writing, replacing and removing what nobody has open": "done",
}
VERBS = """
import json, sys
from lora_booth.cli import app
for words in json.loads(sys.argv[1]):
    sys.argv = ["lora-booth", *words]
    app.main()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int | str]:
    words = [sys.executable, "-c", RULES, str(tmp_path_factory.mktemp("rules"))]
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, int | str] = json.loads(ended.stdout)
    assert found.keys() == EXPECTED.keys()
    return found


@pytest.mark.parametrize("rule", EXPECTED)
def test_the_rules_refuse_what_windows_refuses(rule: str, outcomes: dict[str, int | str]) -> None:
    assert outcomes[rule] == EXPECTED[rule]


@dataclass(frozen=True)
class Job:
    """`straight`: the run folder of a run that nobody stopped; `killed`: of one that was killed and continued."""

    straight: Path
    killed: Path
    output: str


def _train(folder: Path) -> list[str]:
    settings = {
        "subject.images": MASCOT / "instance",
        "run.folder": folder,
        "run.cache": folder.parent / "cache",
        "prior.mode": "images",
        "prior.num_images": 4,
        "prior.sampler_steps": 4,
        "train.steps": 20,
        "train.images_per_step": 2,
        "train.save_every_steps": 5,
        "train.keep_last": 1,
        "preview.prompts": '["a {token} {class}"]',
        "preview.images_per_prompt": 1,
        "preview.sampler_steps": 2,
        "preview.every_steps": 10,
    }
    return ["train", str(presets.MINIATURE), *(f"{key}={value}" for key, value in settings.items())]


def _verbs(folder: Path, adapter: Path) -> list[list[str]]:
    """Everything that can be done with an adapter, into `folder`, which the first verb makes."""
    base = ["--base", "booth-mini"]
    return [
        ["inspect", str(adapter), "--picture", str(folder / "norms.png")],
        ["export", str(adapter), "--out", str(folder / "out"), "--dtype", "fp32"],
        ["merge", f"{adapter}:0.5", *base, "--out", str(folder / "merged")],
        ["merge", str(adapter), str(adapter), "--out", str(folder / "both.safetensors")],
        ["resize", str(adapter), "--rank", "2", "--out", str(folder / "small.safetensors")],
        ["generate", *base, "--adapter", str(adapter), "--prompt", 'a dog: "what?"', "--steps", "1",
         "--out", str(folder / "pictures")],
    ]  # fmt: skip


def _under_rules(commands: list[list[str]]) -> str:
    """What one process says that does all `commands`."""
    words = [sys.executable, "-c", VERBS, json.dumps(commands)]
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode("cp1252")
    return ended.stdout.decode("cp1252")


def _killed_after(step: int, command: list[str]) -> None:
    """Do `command` and end its process as Windows ends one, when it has told of `step`."""
    words = [sys.executable, "-c", VERBS, json.dumps([[*command, "--json"]])]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        told = json.loads(line)
        if told.get("task") == "train" and told["done"] >= step:
            break
    process.kill()
    process.communicate()
    assert process.returncode == -9


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Of several processes that run tests, the first one does it."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "windows"
    said = root / "said.txt"
    found = Job(root / "straight", root / "killed", "")
    with FileLock(root.with_suffix(".lock")):
        if not said.exists():
            root.mkdir()
            adapter = found.straight / "emo_dog.safetensors"
            _killed_after(12, _train(found.killed))
            words = [_train(found.killed), _train(found.straight), *_verbs(root / "made", adapter)]
            said.write_text(_under_rules(words), encoding="utf-8")
    return Job(found.straight, found.killed, said.read_text(encoding="utf-8"))


def test_the_demo_trains_and_hands_over_its_files(job: Job) -> None:
    names = {path.name for path in job.straight.iterdir()}
    files = {"emo_dog.safetensors", "emo_dog_diffusers.safetensors", "before_after.png", "contact_sheet.png"}
    assert files <= names
    assert len((job.straight / "metrics.jsonl").read_bytes().splitlines()) == 20
    assert {path.name for path in (job.straight / "previews").iterdir()} == {"step-000000.png", "step-000010.png"}


def test_a_killed_run_goes_on_to_the_same_bytes(job: Job) -> None:
    assert "continuing after step 1" in job.output
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        straight, killed = (
            (folder / "checkpoints" / "step-000020" / name).read_bytes() for folder in (job.straight, job.killed)
        )
        assert straight == killed


def test_old_checkpoints_go_and_nothing_half_written_stays(job: Job) -> None:
    for folder in (job.straight, job.killed):
        kept = {path.name for path in (folder / "checkpoints").iterdir()}
        assert kept == {"step-000020", f"step-{Run(folder).best_step():06d}"}
        assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".saving")]


@pytest.mark.parametrize(
    ("verb", "made"),
    [
        ("inspect", "norms.png"),
        ("export", "out/emo_dog_diffusers.safetensors"),
        ("merge into a base", "merged/unet/diffusion_pytorch_model.safetensors"),
        ("merge", "both.safetensors"),
        ("resize", "small.safetensors"),
        ("generate", "pictures/grid.png"),
        ("generate", "pictures/00_a_dog___what_1.png"),
    ],
)
def test_every_verb_works_on_what_was_made(verb: str, made: str, job: Job) -> None:
    assert (job.straight.parent / "made" / made).stat().st_size > 0, verb
