"""The cache as a whole: what is told of it, what is cleared and when, its limit, live runs, and two users."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_booth.adapter.files import storage
from lora_booth.errors import ConfigError, DiskError
from lora_booth.run import cache_folder
from lora_booth.run.cache import TensorCache, key
from lora_booth.verbs import cache, train
from tests.cli.test_app import in_process
from tests.conftest import MakeConfig
from tests.support.runs import Recorder

TENSORS = {"t": torch.arange(1000.0)}
DAY_S = 86_400
fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="importing torch twice takes long"
)
root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may be other users")


def fill(root: Path, kind: str, name: str, base: str = "sd15", *, days_ago: float = 0.0) -> Path:
    """One entry of the cache in `root`, used so many days ago; the file of its tensors."""
    folder = root / kind / key("group")[:24] if kind == "class_images" else root / kind
    about = {"base": base, "fingerprint": key(base)} if base else {}
    stem = f"{int(name):05d}" if kind == "class_images" else key(name)
    store = TensorCache(folder, about)
    store.put(stem, TENSORS)
    paths = [store.path(stem)]
    if kind == "class_images":
        paths.append(paths[0].with_suffix(".png"))
        paths[1].write_bytes(b"picture")
    for path in paths:
        os.utime(path, times=(time.time() - days_ago * DAY_S,) * 2)
    return paths[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of two bases and an older version, with a file that is none of ours in each folder."""
    root = tmp_path / "cache"
    fill(root, "latents", "a")
    fill(root, "latents", "b", "sdxl", days_ago=40)
    fill(root, "prompts", "a", days_ago=31)
    fill(root, "class_images", "0", days_ago=10)
    fill(root, "class_images", "1", "", days_ago=50)
    (root / "compiling.json").write_text("{}")
    for folder in ("", "latents", "prompts", "class_images", f"class_images/{key('group')[:24]}"):
        (root / folder / "mine.safetensors").write_bytes(b"not of the cache")
        (root / folder / "12.png").write_bytes(b"nor this")
    return root


def events(folder: Path, **settings: Any) -> list[tuple[str, str]]:
    recorder = Recorder()
    cache.cache(folder, recorder, **settings)
    return recorder.events


def test_it_is_told_where_how_much_and_of_which_bases(root: Path) -> None:
    with cache_folder.in_use(root, run_folder=Path("runs/rex"), base="sd15"):
        told = dict(events(root))
        rows = [text.split() for kind, text in events(root) if kind == "base"]
    assert told["cache"].startswith(f"cache    {root}: 5 entries, 0.0 MiB")
    assert [row[:5] for row in rows] == [
        ["unknown", "base", "0", "0", "1"],
        ["sd15", f"({key('sd15')[:8]})", "1", "1", "1"],
        ["sdxl", f"({key('sdxl')[:8]})", "1", "0", "0"],
    ]
    assert told["run"] == f"run      {Path('runs/rex').absolute()} (sd15) uses it now"
    assert "used it on 20" in dict(events(root))["run"]


def test_the_command_line_tells_it_as_json(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = in_process(["cache", "--folder", str(root), "--json"], capsys, monkeypatch)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert (rows[0]["kind"], rows[0]["folder"], rows[0]["entries"]) == ("cache", str(root), 5)
    assert rows[0]["bytes"] == sum(row["bytes"] for row in rows if row["kind"] == "base") > 20_000
    code, out, _ = in_process(["cache", "--folder", str(root), "--clear"], capsys, monkeypatch)
    assert (code, out.startswith("cleared  5 entries")) == (0, True)
    assert in_process(["cache", "--folder", str(root / "nowhere")], capsys, monkeypatch)[0] == 0
    code, _, told = in_process(["cache", "--older-than", "soon"], capsys, monkeypatch)
    assert (code, '--older-than "soon" is no age; write hours, days or weeks' in told) == (2, True)


def left(root: Path) -> int:
    """Entries in the cache; what is not its own must be there still."""
    assert len(list(root.rglob("mine.safetensors"))) == len(list(root.rglob("12.png"))) == 5
    return len(cache_folder.entries(root))


@pytest.mark.parametrize(
    ("settings", "num_left"),
    [
        ({"older_than": "30d"}, 2),
        ({"older_than": "6w"}, 4),
        ({"older_than": "1h"}, 1),
        ({"base": "sd15"}, 2),
        ({"base": "unknown base"}, 4),
        ({"base": key("sdxl")[:8]}, 4),
        ({"base": "sd15", "older_than": "30d"}, 4),
        ({}, 0),
    ],
)
def test_clearing_removes_what_is_named_and_nothing_else(root: Path, settings: dict[str, str], num_left: int) -> None:
    shown = dict(events(root, **settings))["cache"]
    assert f": {5 - num_left} entries" in shown, "without --clear the same is only shown"
    assert left(root) == 5
    assert f"cleared  {5 - num_left} entries" in dict(events(root, clear=True, **settings))["cleared"]
    assert left(root) == num_left
    assert (root / "compiling.json").exists() == bool(settings)
    assert not list(root.rglob("*00001.png")) or num_left, "a class image goes with its latents"


def test_an_unknown_base_is_told_with_those_that_are_there(root: Path) -> None:
    with pytest.raises(ConfigError, match="those in it are: sd15, sdxl, unknown base"):
        events(root, base="sd1", clear=True)
    assert left(root) == 5


def test_reading_is_using(root: Path) -> None:
    path = fill(root, "prompts", "old", days_ago=99)
    store = TensorCache(path.parent)
    assert cache_folder.entries(root)[0].paths == (path,)
    assert store.get(path.stem) is not None
    assert cache_folder.entries(root)[-1].paths == (path,)


def test_beyond_its_limit_what_was_not_used_for_the_longest_goes(root: Path) -> None:
    sizes = [entry.num_bytes for entry in cache_folder.entries(root)]
    told: list[str] = []
    cache_folder.trim(root, sum(sizes), told.append)
    assert (left(root), told) == (5, [])
    kept = [entry.paths for entry in cache_folder.entries(root)[2:]]
    cache_folder.trim(root, sum(sizes) - sizes[0] - 1, told.append)
    assert [entry.paths for entry in cache_folder.entries(root)] == kept
    assert left(root) == 3
    assert "has reached run.cache_limit_gib; 2 entries (0 MiB) longest unused were removed" in told[0]


def test_a_run_keeps_the_cache_within_its_limit(make_config: MakeConfig, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(root, "latents", "old", days_ago=9)
    recorder = Recorder()
    config = make_config(
        "sd1", run={"cache": root, "folder": tmp_path / "run", "cache_limit_gib": 1e-6}, train={"steps": 1}
    )
    train.train(config, report=recorder)
    assert [text for kind, text in recorder.events if kind == "cache"]
    assert sum(entry.num_bytes for entry in cache_folder.entries(root)) <= 1e-6 * 2**30
    (use,) = cache_folder.uses(root)
    assert (use.folder, use.base, use.is_live) == (str(tmp_path / "run"), "sd1", False)


def use_and_wait(root: Path, names: list[str], is_ready: Any, may_end: Any) -> None:
    """A run in a process of its own, which has used entries and is not yet done with them."""
    with cache_folder.in_use(root, run_folder=root / "run", base="sd15"):
        for name in names:
            assert TensorCache(root / "latents").get(key(name)) is not None
        is_ready.set()
        may_end.wait()


@fork
def test_what_a_live_run_in_another_process_has_used_is_kept_until_it_ends(root: Path) -> None:
    for name in "cdef":
        fill(root, "latents", name, days_ago=60)
    context = multiprocessing.get_context("fork")
    is_ready, may_end = context.Event(), context.Event()
    run = context.Process(target=use_and_wait, args=(root, ["b", "c", "d"], is_ready, may_end))
    run.start()
    try:
        assert is_ready.wait(60)
        told: list[str] = []
        cache_folder.trim(root, 1, told.append)
        assert left(root) == 3 and told
        found = dict(events(root, clear=True))
        assert "cleared  0 entries" in found["cleared"] and "3 entries that a live run has used" in found["kept"]
        assert {path.stem for entry in cache_folder.entries(root) for path in entry.paths} == {
            key(name) for name in "bcd"
        }
    finally:
        may_end.set()
        run.join(60)
    assert run.exitcode == 0
    events(root, clear=True)
    assert left(root) == 0


@fork
def test_a_killed_run_keeps_nothing(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    is_ready = context.Event()
    run = context.Process(target=use_and_wait, args=(root, ["a", "b"], is_ready, context.Event()))
    run.start()
    assert is_ready.wait(60)
    run.kill()
    run.join(60)
    events(root, clear=True)
    assert left(root) == 0


class Clearing(Recorder):
    """Removes everything in the cache, in use or not, once at the first word of each kind that a run reports."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.met = root, set[str]()

    def event(self, kind: str, text: str, **values: Any) -> None:
        super().event(kind, text, **values)
        self.clear(kind)

    def progress(self, task: str, done: int, total: int, **values: Any) -> None:
        super().progress(task, done, total, **values)
        self.clear(f"{task} {done}")

    def clear(self, word: str) -> None:
        if word not in self.met:
            self.met.add(word)
            cache_folder.remove(cache_folder.entries(self.root))


def test_a_run_whose_cache_is_cleared_at_every_moment_makes_it_again_to_the_same_bytes(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    hashes = []
    for name, report in (("plain", Recorder()), ("cleared", Clearing(tmp_path / "cleared-cache"))):
        config = make_config(name=name, run={"folder": tmp_path / name, "cache": tmp_path / f"{name}-cache"})
        summary = train.train(config, report=report)
        hashes.append(storage.read_metadata(Path(summary.files["kohya"]))["sshs_model_hash"])
    assert hashes[0] == hashes[1]
    assert isinstance(report, Clearing)
    assert {"class_images", "encode images 1", "draw class images 3", "encode prompts 1"} <= report.met


@contextmanager
def other_user(number: int, umask: int) -> Iterator[None]:
    """Inside, this process is another user's, as far as files go."""
    before = os.umask(umask)
    os.setegid(4242)  # one group for all
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.umask(before)


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder that every user may enter and write into."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@root_only
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_two_users_share_a_cache_as_far_as_the_first_ones_umask_lets_them(shared: Path, umask: int) -> None:
    store = TensorCache(shared / "cache" / "latents")
    with other_user(5001, umask), cache_folder.in_use(shared / "cache", run_folder=shared / "one", base="x"):
        store.put(key("a"), TENSORS)
    with other_user(5002, 0o022), cache_folder.in_use(shared / "cache", run_folder=shared / "two", base="x"):
        assert (store.get(key("a")) is not None) == (umask != 0o077)
        if umask == 0o002:
            store.put(key("b"), TENSORS)
        else:
            TensorCache(store.folder)  # looks for what killed writers have left
            with pytest.raises(DiskError, match=r"Permission denied.*of the cache, whose folder run\.cache"):
                store.put(key("b"), TENSORS)
        cache_folder.remove(cache_folder.entries(shared / "cache"))
    assert store.path(key("a")).exists() == (umask != 0o002), "nobody removes what another's folder does not let them"


@root_only
def test_a_file_of_another_user_that_may_not_be_replaced_serves_if_it_is_whole(shared: Path) -> None:
    shared.chmod(0o1777)  # as /tmp: only an owner removes or replaces
    store = TensorCache(shared)
    with other_user(5001, 0o022):
        store.put(key("a"), TENSORS)
    with other_user(5002, 0o022):
        store.put(key("a"), TENSORS)  # both were computing it
        store.path(key("b")).write_bytes(b"")
    before = store.path(key("a")).read_bytes()
    with other_user(5001, 0o022), pytest.raises(DiskError, match=r"run\.cache sets"):
        store.put(key("b"), TENSORS)  # damaged, and not ours
    assert store.path(key("a")).read_bytes() == before


def test_odd_things_in_place_of_the_cache_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "cache" / "class_images").mkdir(parents=True)
    (tmp_path / "cache" / "latents").write_text("x")
    (tmp_path / "cache" / "runs").mkdir()
    (tmp_path / "cache" / "runs" / "a.json").write_text("[]")
    (tmp_path / "cache" / "runs" / "b.json").mkdir()
    os.mkfifo(tmp_path / "cache" / "runs" / "c.json")
    for folder in (tmp_path / "file", tmp_path / "cache", tmp_path / "nowhere"):
        assert [kind for kind, _ in events(folder)] == ["cache"]
        assert "0 entries" in dict(events(folder, clear=True))["cleared"]
    assert (tmp_path / "cache" / "latents").read_text() == "x"
