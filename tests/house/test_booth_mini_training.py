"""The tools that train the miniature: going on from narrower weights, drawing ahead, ending early, pools, export."""

import io
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.booth_mini.ahead import drawn_ahead  # noqa: E402
from tools.booth_mini.compose import KINDS, Composer  # noqa: E402
from tools.booth_mini.contexts import CONTEXT_NOUNS, alternatives  # noqa: E402
from tools.booth_mini.export import export_model, load_parts  # noqa: E402
from tools.booth_mini.measure import edges  # noqa: E402
from tools.booth_mini.models import make_clip, make_vae  # noqa: E402
from tools.booth_mini.names import IconName  # noqa: E402
from tools.booth_mini.nouns import COMMON, WIDER  # noqa: E402
from tools.booth_mini.perceptual import BLOCKS, Perceptual  # noqa: E402
from tools.booth_mini.pool import STAGES, Coders, make_pool  # noqa: E402
from tools.booth_mini.state import Schedule, Training, load_ema  # noqa: E402
from tools.booth_mini.widen import widen  # noqa: E402

MODEL = ROOT / "lora_booth" / "assets" / "booth_mini"
NARROW, WIDE = (8, 16, 32), (12, 24, 48)


def vae(widths: tuple[int, int, int], seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    made = make_vae(widths)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def made_up_composer() -> Composer:
    """Discs of several colours, each called by common labels of every kind of composition."""
    labels = ["dog face", "cat face", "desert", "top hat", "balloon", "rocket", "key"]
    y, x = np.mgrid[:128, :128]
    masters = np.zeros((len(labels), 128, 128, 4), np.uint8)
    masters[:, (x - 64) ** 2 + (y - 64) ** 2 < 50**2, 3] = 255
    masters[..., :3] = np.random.default_rng(0).integers(30, 250, (len(labels), 1, 1, 3))
    return Composer([IconName("noto", label, label, (), "g", "s", None) for label in labels], masters)


def test_a_widened_autoencoder_draws_exactly_what_the_narrower_one_drew():
    narrow, wide = vae(NARROW, 0), vae(WIDE, 1)
    widen(narrow, wide, trainable="decoder.")
    pictures = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, same = (model.encode(pictures).latent_dist.mean for model in (narrow, wide))
    assert torch.allclose(latents, same, atol=1e-5)
    assert float(latents.detach().std()) > 0.01
    assert torch.allclose(narrow.decode(latents).sample, wide.decode(latents).sample, atol=1e-5)


def test_only_the_part_that_will_train_reads_with_its_new_channels():
    wide = vae(WIDE, 1)
    widen(vae(NARROW, 0), wide, trainable="decoder.")
    weights = wide.state_dict()
    assert float(weights["encoder.conv_in.weight"][NARROW[0] :].abs().max()) == 0
    assert float(weights["decoder.conv_in.weight"][NARROW[-1] :].abs().max()) > 0
    wide.decode(torch.ones(1, 4, 4, 4)).sample.square().sum().backward()
    assert float(wide.decoder.conv_out.weight.grad[:, NARROW[0] :].abs().max()) > 0


def test_a_model_of_the_same_size_becomes_the_other_one_scalars_too():
    one, other = make_clip(), make_clip()
    with torch.no_grad():
        one.logit_scale.fill_(3.25)
    widen(one, other)
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_model_of_other_modules_is_not_widened():
    with pytest.raises(ValueError, match="not the same modules"):
        widen(vae((8, 16, 16), 0), vae(WIDE, 1))  # equal widths have no shortcut between them


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_drawn_ahead_come_in_order_and_are_those_drawn_in_line(workers):
    def draw(step: int) -> tuple[int, np.ndarray]:
        return step, np.random.default_rng(step).random(3)

    drawn = list(drawn_ahead(draw, range(5, 11), workers))
    assert [step for step, _ in drawn] == list(range(5, 11))
    assert all(np.array_equal(values, draw(step)[1]) for step, values in drawn)
    assert isinstance(drawn[0][1], np.ndarray)


def network() -> bytes:
    """A checkpoint of EfficientNet-Lite0's shapes with random weights."""
    generator = torch.Generator().manual_seed(0)
    saved: dict[str, torch.Tensor] = {}

    def conv(name: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        saved[f"{name}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * shape[2] ** 2) ** 0.5
        for key, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.0), ("running_var", 1.0)):
            saved[f"{norm}.{key}"] = torch.full((shape[0],), value)

    conv("_conv_stem", "_bn0", (32, 3, 3, 3))
    widths = (32, 16, 24, 24, 40, 40)
    for index, (side, _) in enumerate(BLOCKS):
        before, after = widths[index : index + 2]
        middle = before * (6 if index else 1)
        if index:
            conv(f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0", (middle, before, 1, 1))
        conv(f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1", (middle, 1, side, side))
        conv(f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2", (after, middle, 1, 1))
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def test_the_perceptual_difference_is_zero_for_equal_pictures_and_grows_with_blur():
    perceptual = Perceptual(network())
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:44, 20:44] = 1.0
    blurred = [torch.nn.functional.avg_pool2d(x, side, 1, side // 2) for side in (3, 7)]
    assert [tuple(seen.shape[1:]) for seen in perceptual.features(x)] == [(16, 32, 32), (24, 16, 16), (40, 8, 8)]
    same, little, much = (float(perceptual(other, x)) for other in (x, *blurred))
    assert same == 0 < little < much
    target = x.clone().requires_grad_()
    drawing = blurred[0].clone().requires_grad_()
    perceptual(drawing, target).backward()
    assert drawing.grad is not None and float(drawing.grad.abs().max()) > 0
    assert target.grad is None


def test_a_training_asked_to_end_is_saved_at_the_step_it_stands_at(tmp_path):
    training = Training(torch.nn.Linear(3, 2), tmp_path / "a.pt", Schedule(6, 0.1))

    def loss_at(step: int) -> torch.Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return training.model(torch.ones(1, 3)).square().sum()

    with pytest.raises(SystemExit, match=r"a\.pt saved at step 3"):
        training.run(loss_at, lambda ema, step: None)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3


def test_a_stage_ends_where_it_should_and_the_next_goes_on(tmp_path):
    training = Training(torch.nn.Linear(3, 2), tmp_path / "a.pt", Schedule(6, 0.1))
    seen: list[int] = []

    def loss_at(step: int) -> torch.Tensor:
        seen.append(step)
        return training.model(torch.ones(1, 3)).square().sum()

    for until in (2, 2, 6):
        training.run(loss_at, lambda ema, step: None, until=until)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_the_denoisers_stages_end_at_the_end_and_widen_to_150_nouns():
    ends = [stage.until for stage in STAGES]
    assert ends == sorted(ends)
    assert ends[-1] == 1.0
    assert all(a.nouns.keys() <= b.nouns.keys() for a, b in pairwise(STAGES))
    assert len(WIDER) >= 150
    assert set(COMMON) <= set(WIDER)


def test_every_stages_pool_shares_the_first_ones_scale_and_draws_its_own_nouns():
    coders = Coders(vae(NARROW, 0), make_clip().eval(), CLIPTokenizer.from_pretrained(MODEL / "tokenizer"))
    first = make_pool(made_up_composer(), coders, 0, size=70, seed=0)
    last = make_pool(made_up_composer(), coders, 2, size=70, seed=0, scaling_factor=first.scaling_factor)
    assert first.latents.shape == last.latents.shape == (70, 4, 16, 16)
    assert float(first.latents.float().std()) == pytest.approx(1, abs=0.02)
    assert last.scaling_factor == first.scaling_factor
    drawn = [{pool.captions[row] for row in pool.caption_of} for pool in (first, last)]
    assert not any("key" in caption or "wearing" in caption for caption in drawn[0])
    assert any("key" in caption for caption in drawn[1])
    assert any("wearing" in caption for caption in drawn[1])


def test_an_export_of_the_autoencoder_alone_leaves_every_other_file_as_it_is(tmp_path):
    out, train, data = tmp_path / "model", tmp_path / "train", tmp_path / "data"
    shutil.copytree(MODEL, out)
    shutil.copytree(MODEL / "tokenizer", data / "tokenizer")
    model = load_parts(MODEL)[0]
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(0.25)
    wider = make_vae()
    widen(model, wider) if model.config.block_out_channels != wider.config.block_out_channels else (
        wider.load_state_dict(model.state_dict())
    )
    training = Training(wider, train / "vae.pt", Schedule(1, 0.1))
    training.save()
    export_model(data, train, out, ["vae"])
    for path in sorted(path for path in MODEL.rglob("*") if path.is_file() and path.parent.name != "vae"):
        before, after = (
            re.sub(rb'"_diffusers_version": "[^"]*"', b"", p.read_bytes())
            for p in (path, out / path.relative_to(MODEL))
        )
        assert before == after, path
    exported = load_parts(out)[0]
    assert exported.config.scaling_factor == model.config.scaling_factor
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(exported.decode(latents).sample, model.decode(latents).sample, atol=0.02)
    assert set(load_ema(train / "vae.pt")) == set(wider.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_context_competes_with_the_bare_noun_and_is_drawn_as_it_is_called(kind):
    composer, rng = made_up_composer(), np.random.default_rng(0)
    for noun in CONTEXT_NOUNS:
        bare, *composed = alternatives(kind, noun)
        assert bare == f"a {noun}"
        assert len({bare, *composed}) == 1 + len(composed) >= 2
    captions = {composer.draw(0, rng, kind=kind).caption for _ in range(60)}
    assert any(caption.endswith(words) for caption in captions for words in alternatives(kind, "dog face")[1:])


def test_blur_lowers_the_energy_of_edges_and_noise_raises_it():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 20:44, 20:44] = 1.0
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert edges(blurred) < 0.6 * edges(x) < edges(x) < edges(noisy)
