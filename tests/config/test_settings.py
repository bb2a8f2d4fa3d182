"""Config: every fault at once, with key, value and remedy; nothing coerced; what is written reads back equal."""

from __future__ import annotations

import contextlib
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_booth.config import toml
from lora_booth.config.config import Config
from lora_booth.config.inputs import MAX_BYTES
from lora_booth.config.settings import BASE_ALIASES
from lora_booth.errors import ConfigError

GOOD = ["model.base=sd15", "subject.images=./my_dog", "subject.class_noun=dog"]


def faults_of(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        toml.load(None, overrides)
    return str(caught.value)


def test_three_settings_are_enough() -> None:
    config = toml.load(None, GOOD)
    assert (config.model.base, config.subject.images, config.adapter.rank) == ("sd15", Path("my_dog"), 16)


def test_all_faults_are_listed_at_once_with_key_value_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[model]\nbase = "sd15"\n[subject]\nimges = "x"\nclass_noun = 3\n[prior]\nmode = "images"\nnum_images = 0\n'
        '[optimizer]\nname = "adamw8"\nlearning_rate = "fast"\n[trian]\nsteps = 3\n'
    )
    with pytest.raises(ConfigError) as caught:
        toml.load(path, ["train.steps=-3", "nonsense", "adapter.targets=attn"])
    message = str(caught.value)
    for expected in (
        '"nonsense" is not an override',
        "subject.images is missing",
        'subject.imges is not a setting; did you mean "subject.images"?',
        "subject.class_noun is 3, but it should be a valid string",
        'optimizer.name is "adamw8"; use "auto"',
        'Did you mean "adamw"?',
        'optimizer.learning_rate is "fast"',
        "train.steps is -3, but it should be greater than or equal to 1",
        'trian is not a setting; did you mean "train"?',
        "prior.num_images is 0 but prior.loss_weight is 1",
        'adapter.targets is "attn"; use one of attention,',
    ):
        assert expected in message
    assert message.startswith(f"{path} has 10 faults:")


def test_a_missing_section_names_its_required_keys() -> None:
    message = faults_of([])
    assert all(f"{key} is missing" in message for key in ("model.base", "subject.images", "subject.class_noun"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("subject.prompt=a photo of {tokn} {class}", "has the slot {tokn}; the slots are {class}, {token}"),
        ("subject.prompt=a photo of {token}", "lacks the slot {class}"),
        ("subject.prompt=a {class} {", "has a broken slot"),
        ("prior.mode=class", 'prior.mode is "class"; use "images", "model", "weights" or "none".'),
        ("prior.mode=weights", 'prior.norm_weight is 0 but prior.mode is "weights"'),
        ("objective.huber_delta=0.5", 'objective.loss is "mse"'),
        ("train.steps=1.5", "train.steps is 1.5"),
        ("evaluate.strengths=[]", "evaluate.strengths is [], but it should have at least 1 items."),
        ("evaluate.strengths=[0]", "evaluate.strengths.0 is 0, but it should be greater than 0."),
        ("prior.captions=a cat", 'prior.captions is "a cat", but it should be a list.'),
        ("train.gradient_checkpointing=1.5", "train.gradient_checkpointing is 1.5"),
        ("train.compile=maybe", 'train.compile is "maybe"; use true, false, "trial" or "graph".'),
        ("adapter.dropout=1", "adapter.dropout is 1"),
        ("export.name=../../etc", "export.name"),
        ("export.formats=[kohya]", "export.formats"),
    ],
)
def test_a_contradiction_or_wrong_value_is_one_clear_line(override: str, expected: str) -> None:
    message = faults_of([*GOOD, override])
    assert expected in message
    assert " has a fault:" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prior.mode=images", 'prior.prompts=[""]'], "prior.prompts has an empty prompt"),
        (["prior.mode=model", "prior.folder=dogs"], 'prior.folder is set but prior.mode is "model"'),
        (["prior.mode=none", "prior.folder=dogs"], 'prior.folder is set but prior.mode is "none"'),
        (["objective.timestep_range=[0.5, 0.5]"], "objective.timestep_range is [0.5, 0.5], which holds no level"),
        (["objective.debiased=true", "objective.min_snr_gamma=5"], "which are two weights of one loss"),
        (["prior.mode=none", "prior.norm_weight=1e-3"], 'set prior.mode = "weights".'),
        (["prior.norm_weight=1e-3", "adapter.dora=true"], "prior.norm_weight is 0.001 but adapter.dora is true"),
        (["prior.mode=model", 'prior.captions=["a cat", " "]'], "prior.captions has an empty caption"),
        (["prior.mode=model", 'prior.captions=["a YQL cat"]'], 'prior.captions "a YQL cat" names the subject'),
        (["prior.mode=model", 'prior.captions=["a {token}"]'], "has the slot {token}; the slots are {class}."),
    ],
)
def test_a_contradiction_within_the_prior_is_one_clear_line(overrides: list[str], expected: str) -> None:
    message = faults_of([*GOOD, *overrides])
    assert expected in message and " has a fault:" in message


ALONE = ["adapter.embedding=only", "prior.mode=none"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.embedding_vectors=2"], 'adapter.embedding_vectors is 2 but adapter.embedding is "none"'),
        (["adapter.embedding=only"], 'prior.mode is "model" but adapter.embedding is "only"'),
        ([*ALONE, "adapter.rank=8"], 'adapter.rank is set but adapter.embedding is "only", which trains no layers'),
        ([*ALONE, "adapter.text_encoder=true"], "adapter.text_encoder is set but"),
        ([*ALONE, "adapter.continue_from=a.safetensors"], "adapter.continue_from is set but"),
        ([*ALONE, "optimizer.lora_plus_ratio=16"], "optimizer.lora_plus_ratio is set but"),
        (["adapter.embedding=too", "adapter.continue_from=a.safetensors"], "whose word would begin anew"),
        (["adapter.embedding=too", "subject.token=a/b"], 'subject.token is "a/b" but adapter.embedding is "too"'),
        (["adapter.embedding=too", "subject.token=con"], "programs call a learnt word by the name of its file"),
        (["adapter.embedding=too", "export.name=YQL"], 'the adapter would be called "YQL", as the learnt word is'),
        (["adapter.embedding=too", "optimizer.name=prodigy"], "optimizer.embedding_learning_rate is 0.001 but"),
    ],
)
def test_a_contradiction_about_a_learnt_word_is_one_clear_line(overrides: list[str], expected: str) -> None:
    message = faults_of([*GOOD, *overrides])
    assert expected in message and " has a fault:" in message


def test_a_word_alone_needs_no_other_setting() -> None:
    assert toml.load(None, [*GOOD, *ALONE, "adapter.embedding_vectors=4"]).adapter.is_text_trained


def test_captions_of_another_mode_do_no_harm() -> None:
    toml.load(None, [*GOOD, "prior.mode=images", 'prior.captions=["a yql cat"]'])


def test_offloading_the_inputs_of_blocks_that_recompute_nothing_is_refused() -> None:
    message = faults_of([*GOOD, "memory.offload_activations=true", "train.gradient_checkpointing=false"])
    assert "memory.offload_activations is true but train.gradient_checkpointing is 0" in message
    assert "set train.gradient_checkpointing = 1, or memory.offload_activations = false." in message


def test_dora_on_a_quantised_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    words = ["model.base=sd15", "subject.images=x", "subject.class_noun=dog", "model.quantize=nf4", "adapter.dora=true"]
    with pytest.raises(ConfigError, match=r'adapter\.dora is true but model\.quantize is "nf4"; DoRA needs the base'):
        toml.load(None, words)


def test_templates_need_their_slots_as_the_prompt_does() -> None:
    told = faults_of([*GOOD, 'subject.templates=["a {token}", "a {noun} {class}"]'])
    assert 'subject.templates "a {token}" lacks the slot {class}; add it.' in told and "{noun}" in told


def test_prodigy_with_two_rates_for_a_and_b_is_refused() -> None:
    words = ["optimizer.name=prodigy", "optimizer.lora_plus_ratio=16"]
    assert "prodigy finds one rate for all, so set the ratio to 1." in faults_of([*GOOD, *words])


def test_prodigy_with_two_learning_rates_is_refused() -> None:
    words = ["model.base=sd15", "subject.images=x", "subject.class_noun=dog", "optimizer.name=prodigy"]
    toml.load(None, words)
    words.append("adapter.text_encoder=true")
    with pytest.raises(ConfigError, match="prodigy finds one rate for all, so set both to the same number"):
        toml.load(None, words)
    toml.load(None, [*words, "optimizer.learning_rate=1", "optimizer.text_encoder_learning_rate=1"])


def test_a_folder_whose_name_no_config_file_can_hold_is_refused_by_its_key() -> None:
    message = faults_of([*GOOD, f"run.folder={os.fsdecode(b'runs/caf' + bytes([0xE9]))}"])
    assert r'run.folder "runs/caf\udce9" is not UTF-8' in message


def test_values_are_not_coerced() -> None:
    with pytest.raises(ConfigError):
        toml.load(None, [*GOOD, 'train.steps="400"'])


def test_a_config_does_not_change() -> None:
    config = toml.load(None, GOOD)
    with pytest.raises(ValidationError):
        config.train.steps = 5  # type: ignore[misc]


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_what_is_written_reads_back_equal(noun: str, folder: str) -> None:
    values = {"model": {"base": "sd15"}, "subject": {"images": folder, "class_noun": noun}}
    try:
        config = Config.model_validate(values)
    except ValidationError:
        return
    assert Config.model_validate(tomllib.loads(toml.to_toml(config))) == config


@given(st.lists(st.text(max_size=30), max_size=4))
def test_no_override_makes_a_traceback(overrides: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        toml.load(None, [*GOOD, *overrides])


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "sd15_subject.toml").write_text("")
    with pytest.raises(ConfigError, match=r"it is missing; the nearest name is .*sd15_subject"):
        toml.load(tmp_path / "sd15_subjekt.toml")


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nbase = \n")
    with pytest.raises(ConfigError, match="line 2"):
        toml.load(tmp_path / "x.toml")


def test_every_setting_has_a_sentence() -> None:
    seen = 0
    for section in Config.model_fields.values():
        for key, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description is not None, key
            assert field.description.endswith((".", "?", ":")) or "," in field.description, key
            seen += 1
    assert seen > 50


def test_the_schema_describes_every_section() -> None:
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)


def test_differing_keys_name_old_and_new() -> None:
    one, other = toml.load(None, GOOD), toml.load(None, [*GOOD, "train.seed=3", "train.keep_last=9"])
    assert toml.differing_keys(one, other, ignore=["train.keep_last"]) == ["train.seed: 0 -> 3"]


def test_aliases_are_hub_ids_or_the_miniature() -> None:
    assert set(BASE_ALIASES) == {"booth-mini", "sd15", "sd21", "sdxl"}


def test_a_named_pipe_a_device_a_loop_and_a_folder_as_a_config_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    (tmp_path / "circle.toml").symlink_to("circle.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "gone.toml").symlink_to("nowhere")
    (tmp_path / "digits.toml").write_text("[train]\nsteps = " + "9" * 5000)
    (tmp_path / "long.toml").write_bytes(b"#" * (MAX_BYTES + 1))
    whys = {
        "pipe": "it is a named pipe",
        "endless": "it is a device",
        "circle": "Too many levels of symbolic links",
        "folder": "it is a folder",
        "gone": "it is a link to nowhere, which is missing",
        "digits": "is not valid TOML",
        "long": "it has more than 16 MiB",
    }
    for name, why in whys.items():
        with pytest.raises(ConfigError, match=why) as told:
            toml.load(tmp_path / f"{name}.toml")
        assert str(tmp_path / f"{name}.toml") in str(told.value)
        assert "\n" not in str(told.value)


def test_a_config_file_whose_name_holds_a_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="null"):
        toml.load(tmp_path / "do\0g.toml")


def test_patterns_are_checked_with_all_other_settings_and_their_number_is_bounded() -> None:
    faults = faults_of(
        [*GOOD, "adapter.targets=regex:(", 'adapter.rank_pattern={"(?!to_q).+"=4}', 'adapter.alpha_pattern={"["=1.0}']
    )
    assert 'adapter.targets has "(", which is not a regular expression that is known here: missing )' in faults
    assert "adapter.rank_pattern has" in faults and 'what looks around, as "(?!…)"' in faults
    assert 'adapter.alpha_pattern has "["' in faults
    faults = faults_of([*GOOD, 'adapter.rank_pattern={"to_q"=0}', 'adapter.alpha_pattern={"to_q"=inf}'])
    assert "adapter.rank_pattern.to_q is 0, but it should be greater" in faults
    assert "adapter.alpha_pattern.to_q is inf, but it should be a finite number" in faults
    many = ", ".join(f'"x{i}" = 2' for i in range(100_000))
    told = faults_of([*GOOD, f"adapter.rank_pattern={{{many}}}"])
    assert "at most 2000 items" in told and len(told) < 1000
    assert "has a pattern of 20,000 characters" in faults_of([*GOOD, f"adapter.targets=regex:{'x' * 20_000}"])
