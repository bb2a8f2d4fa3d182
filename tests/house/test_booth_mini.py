"""The shipped miniature and the tools that made it: what loads, what it knows, and how captions meet pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.booth_mini.compose import COLOURS, HUES, PLAIN, Composer, Variety, article, mean_hue, plural, turn_hue  # noqa: E402
from tools.booth_mini.names import IconName, NameTable, clean_label, name_icon  # noqa: E402
from tools.booth_mini.nouns import is_training  # noqa: E402
from tools.booth_mini.state import Schedule, Training  # noqa: E402
from tools.booth_mini.train_clip import draw_batch, pair_masks  # noqa: E402
from tools.booth_mini.train_unet import timestep_sampler  # noqa: E402

MODEL = ROOT / "lora_booth" / "assets" / "booth_mini"
MASCOT = ROOT / "lora_booth" / "assets" / "mascot"


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: the model is small, and more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def evaluator():
    from tools.booth_mini.export import load_evaluator

    return load_evaluator(MODEL)


def icon(label: str, *, rgb: tuple[int, int, int] = (240, 180, 40), subject: str | None = None, **fields: str):
    """A made-up icon: a disc of one colour on nothing."""
    name = IconName(fields.get("set_name", "noto"), label.replace(" ", "-"), label, (), "g", "s", subject)
    y, x = np.mgrid[:128, :128]
    inside = (x - 64) ** 2 + (y - 64) ** 2 < 50**2
    master = np.zeros((128, 128, 4), np.uint8)
    master[inside] = (*rgb, 255)
    return name, master


def made_up_composer() -> Composer:
    labels = ["dog face", "desert", "top hat", "balloon", "rocket", "red apple"]
    icons = [icon(label) for label in labels]
    return Composer([name for name, _ in icons], np.stack([master for _, master in icons]))


# The shipped model


def test_the_model_folder_loads_as_the_standard_pipeline_in_float32(pipeline):
    classes = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
    assert classes == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
    }
    assert {pipeline.vae.dtype, pipeline.text_encoder.dtype, pipeline.unet.dtype} == {torch.float32}


def test_the_whole_model_weighs_between_15_and_45_megabytes():
    sizes = {path.relative_to(MODEL): path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert len([path for path in sizes if path.suffix == ".safetensors"]) == 4
    assert 15e6 < sum(sizes.values()) < 45e6


def test_the_tokenizer_pads_with_the_end_token_to_the_text_encoders_length(pipeline):
    tokenizer, config = pipeline.tokenizer, pipeline.text_encoder.config
    ids = tokenizer("a sks dog", padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == config.max_position_embeddings == 32
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == [
        "<|startoftext|>",
        "a</w>",
        "s",
        "ks</w>",
        "dog</w>",
        "<|endoftext|>",
    ]
    assert set(ids[5:]) == {tokenizer.eos_token_id} == {config.eos_token_id}


def test_the_scheduler_is_v_prediction_with_zero_terminal_snr(pipeline):
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr and not config.clip_sample
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0.0


def test_the_evaluators_text_half_is_the_pipelines_text_encoder(pipeline, evaluator):
    ids = pipeline.tokenizer("a dog on a green background", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        from_evaluator = evaluator.text_model(input_ids=ids).last_hidden_state
        from_pipeline = pipeline.text_encoder(ids).last_hidden_state
    assert torch.equal(from_evaluator, from_pipeline)


def draw(pipeline, prompt: str) -> Image.Image:
    generator = torch.Generator("cpu").manual_seed(3)
    return pipeline(prompt, num_inference_steps=15, guidance_scale=3.0, generator=generator).images[0]


def test_a_picture_of_a_rocket_is_nearest_to_its_own_caption(pipeline, evaluator):
    from tools.booth_mini.train_clip import embed_captions
    from tools.booth_mini.train_vae import to_tensor

    captions = ["a rocket", "a dog face", "an apple", "a cat", "a pizza", "a sunflower"]
    picture = to_tensor(np.asarray(draw(pipeline, "a rocket"))[None])
    with torch.no_grad():
        pooled = evaluator.vision_model(pixel_values=picture).pooler_output
        texts = embed_captions(evaluator, pipeline.tokenizer, captions, torch.device("cpu"))
        scores = (evaluator.visual_projection(pooled) @ texts.T)[0]
    assert captions[int(scores.argmax())] == "a rocket"


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_the_background_takes_the_colour_the_prompt_names(pipeline, colour, channel):
    pixels = np.asarray(draw(pipeline, f"a dog face on a {colour} background")).astype(float)
    corners = np.concatenate([pixels[:4, :4].reshape(-1, 3), pixels[:4, -4:].reshape(-1, 3)]).mean(0)
    assert int(corners.argmax()) == channel


# The mascot


def test_the_mascot_has_5_instance_pictures_and_at_least_10_to_judge_by():
    instance, held_out = (sorted((MASCOT / name).glob("*.png")) for name in ("instance", "held_out"))
    assert len(instance) == 5
    assert len(held_out) >= 10
    for path in [*instance, *held_out]:
        with Image.open(path) as image:
            assert image.size == (256, 256)
        assert path.stat().st_size < 20_000


def test_no_instance_picture_of_the_mascot_stands_on_red_or_green():
    names = [path.stem for path in (MASCOT / "instance").glob("*.png")]
    assert len(names) == 5
    assert not [name for name in names if "red" in name or "green" in name]


# Names, captions, pictures


def test_flags_and_skin_tones_are_dropped_and_a_dog_is_kept():
    table = NameTable(
        {
            "en/data.json": b'[{"label": "dog face", "hexcode": "1F436", "tags": ["pet"], "group": 0, "subgroup": 0},'
            b'{"label": "flag: France", "hexcode": "1F1EB-1F1F7", "group": 1, "subgroup": 0}]',
            "en/messages.json": b'{"groups": [{"order": 0, "key": "animals-nature"}, {"order": 1, "key": "flags"}],'
            b'"subgroups": [{"order": 0, "key": "animal-mammal"}]}',
            "en/shortcodes/emojibase.json": b'{"1F436": ["dog"]}',
        }
    )
    kept = name_icon(table, "noto", "dog-face", "1f436")
    assert kept is not None
    assert (kept.label, kept.tags, kept.subgroup, kept.subject) == ("dog face", ("pet",), "animal-mammal", None)
    assert name_icon(table, "noto", "flag-france", "1f1eb-1f1f7") is None
    assert name_icon(table, "noto", "man-dark-skin-tone", "1f468-1f3ff") is None
    assert name_icon(table, "firefox", "dog", None) == IconName(
        "firefox", "dog", "dog face", ("pet",), "animals-nature", "animal-mammal", None
    )


def test_labels_become_plain_words():
    assert clean_label("woman: red hair") == "woman red hair"
    assert clean_label("smiling-face-with-heart-eyes") == "smiling face with heart eyes"


def test_articles_and_plurals():
    assert [article(w) for w in ("dog", "apple", "grapes", "bus")] == ["a dog", "an apple", "grapes", "a bus"]
    assert [plural(w) for w in ("dog", "fox", "cherry", "monkey")] == ["dogs", "foxes", "cherries", "monkeys"]


def test_a_held_out_icon_is_never_trained_on_nor_pasted_into_others():
    (held, pixels), (plain, _) = icon("monkey", subject="noto_monkey"), icon("dog face")
    assert not is_training(held)
    assert is_training(plain)
    assert Composer([held], pixels[None]).by_label == {}


def test_a_picture_depends_on_its_generator_only():
    composer = made_up_composer()
    first, second = (composer.draw(0, np.random.default_rng(5)) for _ in range(2))
    assert first.caption == second.caption
    assert np.array_equal(first.pixels, second.pixels)
    assert first.pixels.shape == (64, 64, 3)


def test_a_named_background_has_its_colour_in_the_corner():
    composer, seen = made_up_composer(), set()
    for seed in range(200):
        picture = composer.draw(0, np.random.default_rng(seed), PLAIN)
        named = [colour for colour in COLOURS if picture.caption.endswith(f" {colour} background")]
        if named:
            seen.add(named[0])
            distance = np.abs(picture.pixels[0, 0].astype(int) - np.array(COLOURS[named[0]]))
            assert distance.max() < 40, picture.caption
    assert seen == set(COLOURS)


def test_every_kind_of_composition_says_so_in_its_caption():
    composer = made_up_composer()
    captions = [
        composer.draw(0, np.random.default_rng(seed), Variety(composite_share=1.0)).caption for seed in range(150)
    ]
    for words in (
        "wearing a top hat",
        "next to a balloon",
        "on top of a rocket",
        "two dog",
        "a small dog",
        "in a desert",
    ):
        assert any(words in caption for caption in captions), words


def test_turning_the_hue_gives_the_hue_and_leaves_gray_alone():
    _, orange = icon("dog", rgb=(240, 150, 40))
    _, gray = icon("dog", rgb=(120, 120, 120))
    turned = turn_hue(orange, HUES["blue"])
    assert turned is not None
    assert mean_hue(tuple(int(v) for v in turned[64, 64, :3])) == pytest.approx(HUES["blue"], abs=0.01)
    assert np.array_equal(turned[..., 3], orange[..., 3])
    assert turn_hue(gray, HUES["blue"]) is None


# Training


def test_two_drawings_of_one_label_are_no_negatives_but_two_contexts_of_one_icon_are():
    composer = made_up_composer()
    dog = composer.draw(0, np.random.default_rng(1))
    same_icon = type(dog)(dog.pixels, "a dog face on a red background", dog.label, dog.icon)
    other_icon = type(dog)(dog.pixels, "a twemoji icon of a dog face", dog.label, 99)
    is_positive, is_ignored = pair_masks([dog, same_icon, other_icon])
    assert is_positive.tolist() == np.eye(3, dtype=bool).tolist()
    assert is_ignored.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_timesteps_cover_the_terminal_one_and_fall_off_where_noise_is_low():
    from tools.booth_mini.models import make_scheduler

    draw_timesteps = timestep_sampler(make_scheduler().alphas_cumprod)
    t = draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert (int(t.min()) < 60, int(t.max())) == (True, 999)
    low, high = int((t < 100).sum()), int((t >= 900).sum())
    assert low < high / 3


def test_a_resumed_training_equals_a_straight_one(tmp_path):
    def run(path: Path, *stops: int) -> dict[str, torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 2)
            training = Training(model, path, Schedule(6, 0.1, warmup_steps=2))
            training.schedule = Schedule(6, 0.1, warmup_steps=2)

            def loss_at(step: int, model: torch.nn.Module = model, stop: int = stop) -> torch.Tensor:
                if step == stop:
                    raise InterruptedError
                return model(torch.full((1, 3), float(step + 1))).square().sum()

            try:
                training.run(loss_at, lambda ema, step: None)
            except InterruptedError:
                training.save()
        return torch.load(path, weights_only=True)

    straight, resumed = run(tmp_path / "a.pt", 99), run(tmp_path / "b.pt", 3, 99)
    assert straight["step"] == resumed["step"] == 6
    assert all(torch.equal(straight["ema"][key], resumed["ema"][key]) for key in straight["ema"])


@pytest.mark.parametrize("shape", [(24, 80), (80, 24)])
def test_orthogonalising_brings_every_singular_value_near_one(shape):
    from tools.booth_mini.muon import orthogonalise

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert len(values) == 24
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3


def test_the_denoisers_optimizer_resumes_and_moves_every_parameter():
    from tools.booth_mini.muon import MuonAdamW

    def two_steps(is_resumed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
        optimizer = MuonAdamW(model, 0.01)
        for step in range(2):
            if step == 1 and is_resumed:
                state = optimizer.state_dict()
                optimizer = MuonAdamW(model, 0.01)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.full((2, 3, 5, 5), 1.0 + step)).pow(3).sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(0)
    fresh = list(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)).parameters())
    straight, resumed = two_steps(False), two_steps(True)
    assert len(straight) == len(resumed) == len(fresh) == 4
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(straight, fresh, strict=True))


def test_the_captions_of_the_mascot_are_those_of_its_script():
    from tools.booth_mini.mascot import INSTANCE, caption

    written = {path.stem: path.read_text() for path in (MASCOT / "instance").glob("*.txt")}
    assert written == {pose.name: caption(pose) + "\n" for pose in INSTANCE}
    assert written["sitting_on_orange"] == "a {token} {class} on an orange background\n"


def test_a_noun_batch_differs_in_nouns_alone():
    composer = made_up_composer()
    weights = np.full(len(composer.names), 1 / len(composer.names))
    for seed in range(3):
        pictures = draw_batch(composer, np.random.default_rng(seed), weights, 12, is_noun_batch=True)
        corners = np.stack([picture.pixels[0, 0].astype(int) for picture in pictures])
        assert np.ptp(corners, axis=0).max() <= 90  # one colour word, of which every picture has its own shade
        places = {picture.caption.partition(" on a")[2] for picture in pictures} - {""}
        assert len(places) <= 1
        assert len({picture.label for picture in pictures}) > 2
    mixed = draw_batch(composer, np.random.default_rng(0), weights, 12, is_noun_batch=False)
    assert len(mixed) == 12
    assert np.ptp(np.stack([picture.pixels[0, 0].astype(int) for picture in mixed]), axis=0).max() > 90
