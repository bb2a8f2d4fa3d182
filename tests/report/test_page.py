"""The page of one run: all that it says, that it loads nothing, and what it makes of runs that are not whole."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from lora_booth.adapter.programs.table import LOADERS
from lora_booth.cli import app
from lora_booth.config import toml
from lora_booth.errors import ConfigError
from lora_booth.evaluation.intervals import Interval
from lora_booth.evaluation.scores import ByEncoder, Scored
from lora_booth.report import page, pictures, record, usage, verdict
from lora_booth.run.folder import Run
from tests.report.conftest import STEPS, STRANGE
from tests.report.reading import Page

Copied = Callable[..., Path]
MAX_BYTES = 5_000_000


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found(text: str) -> Page:
    return Page(text)


def read(folder: Path) -> Page:
    return Page(page.page(record.read(folder)))


class TestWhatItSays:
    def test_all_its_parts_are_there_and_closed(self, found: Page) -> None:
        assert list(found.under)[1:] == [
            "Before and after",
            "Step by step",
            "Curves",
            "What was compared",
            "What the model saw",
            "How to use it",
            "Warnings",
            "Choices, and why",
            "Time and memory",
            "Make it again",
        ]
        assert found.open == [] and len(found.all("h1")) == 1
        assert all(words.strip() for words in found.under.values())

    def test_the_verdict_has_the_scores_of_what_was_exported(self, found: Page, run: Path) -> None:
        scores = json.loads((run / "scores.json").read_text())["encoders"][0]
        likeness = scores["candidates"][scores["best"]]["metrics"]["subject_fidelity"]["mean"]
        assert f"likeness {likeness:.2f}".replace("-", "−") in found.under[""].lower()
        told = [f"{scores[key]['mean']:.2f}".replace("-", "−") for key in ("ceiling",)]
        assert all(value in found.under[""] for value in told)
        assert "Measured by miniature against 5 pictures it was trained on" in found.under[""]

    def test_before_and_after_are_pairs_of_one_prompt_and_seed(self, found: Page) -> None:
        told = [re.fullmatch("“(.*)” (without|with) the adapter, seed ([0-9]+)", i["alt"]) for i in found.all("img")]
        pairs = [match.groups() for match in told if match]
        shown = [pair for pair in pairs if pair[0] == "a yql dog"][-4:]  # the first one also stands on top
        assert [(kind, seed) for _, kind, seed in shown] == [
            ("without", "1"),
            ("with", "1"),
            ("without", "2"),
            ("with", "2"),
        ]
        assert len(pairs) == 2 + 2 * 4

    def test_steps_go_from_the_base_to_what_was_exported(self, found: Page) -> None:
        alts = [image["alt"] for image in found.all("img")]
        steps = [alt.rpartition("”, ")[2] for alt in alts if alt.startswith("“a yql dog”, ")]
        assert steps[:2] == ["the base", "step 2"] and len(steps) == 3
        assert re.fullmatch(r"exported: step [1-4]( at strength 0\.[68])?", steps[2])

    def test_curves_begin_at_the_first_step_and_end_at_the_last(self, found: Page) -> None:
        told = [svg["aria-label"] for svg in found.all("svg")]
        assert len(told) == 4 and all(svg["role"] == "img" and "viewbox" in svg for svg in found.all("svg"))
        assert re.search(r"instance images: [\d.]+ at step 1, [\d.]+ at step 4; validation: .* at step 1, ", told[0])
        assert re.search(r"class images: [\d.]+ at step 1", told[1])
        assert re.search(r"drift of predictions: .* at step 1, .* at step 4", told[2])
        assert re.search(r"strength 1: .* at step [1-4]", told[3])

    def test_two_curves_of_a_page_share_no_name(self, text: str) -> None:
        svgs = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
        names = [set(re.findall(r'id="([mp][0-9a-f]{10})"', svg)) for svg in svgs]
        assert len(svgs) == 4 and all(names)
        assert sum(map(len, names)) == len(set().union(*names))

    def test_skipped_files_are_named_with_their_reason(self, found: Page, run: Path) -> None:
        assert STRANGE in found.under["What the model saw"]
        assert list(json.loads((run / "notes.json").read_text())["left_out"]) == [STRANGE]

    def test_choices_have_the_reason_that_the_setting_states(self, found: Page, run: Path) -> None:
        chosen = json.loads((run / "notes.json").read_text())["chosen"]
        assert {"optimizer.warmup_steps", "model.precision"} <= set(chosen)
        assert "train.steps" not in chosen, "it was set"
        field = type(toml.load(run / "config.toml").optimizer).model_fields["warmup_steps"]
        assert all(part in found.under["Choices, and why"] for part in (*chosen, field.description or "?"))

    def test_time_and_memory_are_those_of_the_summary(self, found: Page, run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        assert set(summary["peak_gib_of"]) == set(summary["seconds_of"]) - {"class images"}
        shown = [part for part, seconds in summary["seconds_of"].items() if seconds >= 0.05]
        assert len(shown) >= 3 and all(part in found.under["Time and memory"] for part in shown)
        assert f"{summary['peak_gib']:.1f} GiB" in found.under["Time and memory"]

    def test_every_program_has_its_words_and_strength(self, found: Page) -> None:
        words = found.under["How to use it"]
        assert {loader.name for loader in LOADERS} == set(usage.HOW)
        assert all(loader.name in words and loader.folder in words for loader in LOADERS)
        assert words.count("<lora:yql_dog:1> yql dog") == 4
        assert "lora-booth generate --base" in words and "--adapter yql_dog.safetensors" in words

    def test_its_command_trains_the_same_settings_into_a_new_folder(self, found: Page, run: Path) -> None:
        (line,) = re.findall(r"lora-booth train .*?-again", found.under["Make it again"])
        config = app._config(shlex.split(line)[2:])
        assert config.folder == Path(f"{run}-again")
        assert toml.differing_keys(toml.load(run / "config.toml"), config) == [f'run.folder: "{run}" -> "{run}-again"']
        assert "torch 2" in found.under["Make it again"] and "train.seed = 0" in found.under["Make it again"]


class TestWhatItHolds:
    def test_it_loads_nothing_and_runs_nothing(self, text: str, found: Page) -> None:
        tags = {tag for tag, _ in found.elements}
        assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "a"}
        for _, attributes in found.elements:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in ("src", "srcset", "href", "xlink:href", "data") or value.startswith(("data:", "#"))
        assert "@import" not in text and not re.findall(r"url\((?!#)", text)
        names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert set(re.findall(r"https?://[^\"'\s<]*", text)) <= names
        policy = next(meta for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
        assert policy["content"].startswith("default-src 'none'")

    def test_words_of_strangers_are_words(self, text: str, found: Page) -> None:
        assert "<script" not in text and "<img src=x" not in text
        assert '<script>alert("x")</script> & dog' in found.words and STRANGE in found.words

    def test_pictures_are_inside_named_and_small(self, text: str, found: Page) -> None:
        images = found.all("img")
        assert len(images) > 15 and len(text) < MAX_BYTES
        for image in images:
            assert image["src"].startswith("data:image/webp;base64,") and image["alt"]
            assert int(image["width"]) <= pictures.WIDE_PX

    def test_it_names_no_folder_but_the_runs_own(self, text: str, run: Path) -> None:
        config = toml.load(run / "config.toml")
        strangers = [config.subject.images, config.run.cache, Path(config.model.base)]
        assert str(run) in text
        assert not [str(path) for path in strangers if str(path) in text]


class TestRunsThatAreNotWhole:
    def test_a_run_on_its_way_says_how_far_it_is(self, copied: Copied) -> None:
        folder = copied(without=("summary.json", "scores.*", "before_after.png", "yql_dog*"))
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:3]))
        found = read(folder)
        assert f"Not finished: step 3 of {STEPS}." in found.under[""]
        assert "Continue it" in found.under and "How to use it" not in found.under
        command = re.search(r"lora-booth train \S+", found.under["Continue it"])
        assert command is not None and app._config(command[0].split()[2:]).folder == folder

    def test_a_run_before_its_first_step_is_no_fault(self, copied: Copied) -> None:
        folder = copied(
            without=(
                "summary.json",
                "scores.*",
                "*.png",
                "yql_dog*",
                "*.jsonl",
                "notes.json",
                "warnings.txt",
                "checkpoints",
            )
        )
        found = read(folder)
        assert "Not a step is done yet." in found.under[""]
        assert list(found.under)[1:] == ["What the model saw", "Continue it"]

    def test_one_step_draws_its_points(self, copied: Copied) -> None:
        folder = copied(without=("scores.*",))
        for name in ("metrics.jsonl", "saves.jsonl"):
            (folder / name).write_text((folder / name).read_text().splitlines(keepends=True)[0])
        found = read(folder)
        assert [svg["aria-label"].count("at step 1") for svg in found.all("svg")] == [4, 2, 2]

    def test_damaged_lines_are_left_out_and_counted(self, copied: Copied) -> None:
        folder = copied()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        damaged = [
            '{"step": 2, "instance_lo',
            "[1]",
            '{"step": 3, "instance_loss": NaN}',
            '{"step": 4, "seconds": "x"}',
        ]
        (folder / "metrics.jsonl").write_bytes("\n".join([lines[0], *damaged]).encode() + b"\n\xff\xfe\n")
        found = read(folder)
        assert "metrics.jsonl: damaged lines that are left out here: 3." in found.under["Not all files could be read"]
        assert re.search("instance images: .* at step 1, .* at step 1", found.all("svg")[0]["aria-label"])

    @pytest.mark.parametrize("name", ["scores.json", "summary.json", "notes.json", "saves.jsonl", "inputs.json"])
    def test_a_damaged_file_is_named_and_the_rest_is_shown(self, name: str, copied: Copied) -> None:
        folder = copied()
        (folder / name).write_text("{")
        found = read(folder)
        assert name in found.under["Not all files could be read"] and "Before and after" in found.under
        assert str(folder) not in found.under["Not all files could be read"]

    def test_warnings_of_the_run_are_shown_each_once_without_the_name_of_its_folder(self, copied: Copied) -> None:
        folder = copied()
        kept = Run(folder)
        (folder / "warnings.txt").unlink(missing_ok=True)
        with patch.object(Run, "require_taken"):
            for text in ("it is <b>odd</b>", f"{folder}/cache/x was\ndamaged", "it is <b>odd</b>"):
                kept.append_warning(text)
        assert kept.warnings() == ["it is <b>odd</b>", "cache/x was damaged"]
        found = read(folder)
        assert found.under["Warnings"].split() == ["it", "is", "<b>odd</b>", "cache/x", "was", "damaged"]
        (folder / "warnings.txt").write_bytes(b"\xff\xfe")
        assert "warnings.txt" in read(folder).under["Not all files could be read"]

    def test_pictures_that_are_damaged_or_gone_are_left_out(self, copied: Copied) -> None:
        folder = copied()
        for name in ("before_after.png", "contact_sheet.png", "scores.png"):
            (folder / name).write_bytes((folder / name).read_bytes()[:200])
        (folder / "previews" / "step-000000.png").unlink()
        found = read(folder)
        assert "Before and after" not in found.under and len(found.all("img")) == 2, "of step 2, a prompt each"

    def test_another_grid_under_the_name_is_not_cut(self, copied: Copied) -> None:
        folder = copied()
        (folder / "before_after.png").write_bytes((folder / "contact_sheet.png").read_bytes())
        assert "Before and after" not in read(folder).under

    def test_what_is_no_run_is_refused_by_name(self, copied: Copied, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "empty").mkdir()
        for name, why in (("nowhere", "is no folder"), ("file", "is no folder"), ("empty", "holds no run")):
            with pytest.raises(ConfigError, match=f"{name} {why}.*name the folder of a run"):
                record.read(tmp_path / name)
        folder = copied()
        (folder / "config.toml").write_text("[model")
        with pytest.raises(ConfigError, match=r"config\.toml"):
            record.read(folder)


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "is_feasible", "expected"),
        [
            (0.31, True, "It learnt its subject: likeness 0.40, without it 0.20."),
            (0.31, False, "It learnt its subject, but forgot more than it should: likeness 0.40, without it 0.20."),
            (0.29, True, "Not surely more like its subject than the base: likeness 0.40, without it 0.20."),
        ],
    )
    def test_it_learnt_where_the_intervals_are_apart(self, low: float, is_feasible: bool, expected: str) -> None:
        base = Interval(0.2, 0.1, 0.3, 0.9)
        assert verdict._headline(Interval(0.4, low, 0.5, 0.9), base, is_feasible) == expected

    def test_bars_lie_on_one_scale_with_zero_in_it(self) -> None:
        best = Scored(1, 1.0, {"subject_fidelity": Interval(0.3, 0.2, 0.3, 0.9)})
        base = {"subject_fidelity": Interval(-0.1, -0.1, 0.0, 0.9)}
        by = ByEncoder(None, None, base, (best,), 0, "", True)  # type: ignore[arg-type]
        before, after = verdict.bars(by, best)
        assert (before.start, before.width, before.told) == (0, pytest.approx(25), "−0.10")
        assert (after.start, after.width) == (pytest.approx(25), pytest.approx(75))
        assert (after.low, after.span) == (pytest.approx(75), pytest.approx(25))

    def test_times_are_told_as_clocks(self) -> None:
        assert [verdict.clock(seconds) for seconds in (0.4, 59.6, 185, 3723)] == ["0:00", "1:00", "3:05", "1:02:03"]
