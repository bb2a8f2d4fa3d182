"""The command `report` as a user types it: what it writes, prints and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_app import in_process
from tests.report.reading import Page

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an own folder: its exit code, what it printed, and its message."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: in_process(["report", *words], capsys, monkeypatch)


def test_it_makes_the_page_of_a_run_anew(typed: Run, copied: Callable[..., Path]) -> None:
    folder = copied("one")
    (folder / "report.html").unlink()
    assert typed("one") == (0, "report: one/report.html\n", "")
    page = Page((folder / "report.html").read_text())
    assert "lora-booth train one/config.toml run.folder=one-again" in page.under["Make it again"]
    (folder / "metrics.jsonl").write_text("{")
    code, text, _ = typed("one")
    assert code == 0 and "warning: one: metrics.jsonl: damaged lines that are left out here: 1." in text


def test_several_are_compared_in_a_file_of_their_own(
    typed: Run,
    copied: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pages = [(copied(name) / "report.html", name) for name in ("one", "two")]
    before = [path.read_bytes() for path, _ in pages]
    assert typed("one", "two") == (0, "report: comparison.html\n", "")
    assert typed("one", "two", "--out", "both.html")[0] == 0
    for name in ("comparison.html", "both.html"):
        assert "2 runs side by side" in Page((tmp_path / name).read_text()).words
    assert [path.read_bytes() for path, _ in pages] == before
    assert typed("one", "two")[0] == 0, "its own comparison is replaced"


def test_bad_input_is_one_message_and_writes_nothing(
    typed: Run,
    copied: Callable[..., Path],
    tmp_path: Path,
) -> None:
    copied("one", without=("report.html",))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "comparison.html").write_text("mine")
    copied("two")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("nowhere",), "nowhere is no folder; name the folder of a run"),
        (("x" * 300,), "x is no folder"),
        (("empty",), "empty holds no run"),
        (("mine.html",), "mine.html is no folder"),
        (("one", "nowhere"), "nowhere is no folder"),
        (("one", "one/../one"), "a run is named twice"),
        (("one", "two"), "comparison.html exists, was not made by lora_booth and is not replaced"),
        (("one", "--out", "mine.html"), "--out mine.html exists and is not replaced"),
        (("one", "--out", "page.txt"), "--out page.txt is no name of a page"),
        (tuple(f"run{number}" for number in range(7)), "7 runs are too many"),
    ]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for words, message in cases:
        code, _, told = typed(*words)
        assert code == 2 and message in told, (words, told)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "comparison.html").read_text() == "mine"
    code, _, told = typed("one", "--out", "gone/deep/page.html")
    assert code == 0 and (tmp_path / "gone/deep/page.html").exists(), told
