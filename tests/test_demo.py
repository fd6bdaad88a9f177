"""The demo: the miniature is complete and small, and fine-tuning generalises to unseen names."""

import shlex

import pytest
import torch
from PIL import Image

import lora
import train
from minwurst import miniature, sample
from minwurst.base.settings import LoRASettings, Settings, parse
from minwurst.edge import models
from minwurst.miniature import measure, world
from minwurst.step import diffusion
from minwurst.step.images import open_image, preprocess
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known():
    return measure.World()


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small_and_its_pictures_are_free():
    assert size_of(miniature.WEIGHTS) < 25e6 and miniature.WORLD.stat().st_size < 11e6
    assert size_of(miniature.DATA) < 6e6
    licence = (miniature.DATA / "README.md").read_text(encoding="utf-8")
    assert "Permission is hereby granted" in licence


def test_a_given_flag_goes_before_the_preset():
    preset = parse(Settings, ["--demo"], miniature.TRAIN)
    assert {n: getattr(preset, n) for n in miniature.TRAIN} == miniature.TRAIN
    assert preset.resolution == 192  # which the folder of its weights says
    assert preset.image_encoder_name_or_path == str(miniature.WEIGHTS / "image_encoder")
    assert preset.pretrained_decoder_model_name_or_path == str(miniature.WEIGHTS / "decoder")
    changed = parse(
        LoRASettings, ["--rank=2", "--demo", "--validation_prompts"], miniature.LORA
    )
    assert (changed.rank, changed.validation_prompts) == (2, [])
    assert changed.output_dir == miniature.LORA["output_dir"]
    assert parse(Settings, ["--train_data_dir=x"]).resolution == 768  # other runs keep the defaults


def test_names_that_are_drawn_are_in_no_other_set(known):
    assert not set(known.shipped) & set(known.generated)
    assert len(known.generated) == measure.GENERATED
    captions = (miniature.IMAGES / "metadata.jsonl").read_text(encoding="utf-8")
    for prompt in miniature.TRAIN["validation_prompts"]:
        assert prompt.removesuffix(f", {world.DEMO}") in known.names
        assert f'"{prompt}"' not in captions


@pytest.mark.parametrize("style", [world.DEMO, world.HARD])
def test_the_world_is_what_the_encoder_makes_of_the_pictures(known, style):
    """The shipped latents equal the shipped images encoded with the shipped weights."""
    rows = tiny.rows(train_data_dir=str(miniature.data_of(style)))
    some = [rows[place] for place in range(0, len(rows), 40)]
    encoder = models.load_image_encoder(miniature.WEIGHTS / "image_encoder")
    with torch.no_grad():
        pixels = torch.stack([preprocess(open_image(row), 192) for row in some])
        found = diffusion.scale_latents(encoder(pixels))
    names = [row["text"].removesuffix(f", {style}") for row in some]
    stored = known.latents[style][[known.names.index(name) for name in names]]
    assert (found - stored).abs().max() < 0.1 and (found - stored).square().mean() < 1e-3
    assert 0.5 < known.latents["fluent"].std() < 2


def test_the_measures_know_right_from_wrong(known):
    """The real latents, the mean of the style, and another style's."""
    for style in world.STYLES:
        real = known.latents[style]
        assert known.measure(real[known.generated], style) == (1.0, 1.0, 1.0)
        mean = real[known.shipped].nanmean(dim=0).expand(len(known.generated), -1, -1, -1)
        assert abs(known.measure(mean, style)[0]) < 1e-5
        shuffled = real[known.generated].roll(1, dims=0)
        assert known.measure(shuffled, style)[0] < 0 and known.measure(shuffled, style)[1] < 0.2
    solid = known.latents["fluent"][known.generated]
    assert known.measure(solid, world.HARD)[2] == 0 and known.measure(solid, world.HARD)[0] < 0


@pytest.fixture(scope="module")
def fewer():
    """The world with a quarter of the names that `measure` generates, to save time."""
    known = measure.World()
    known.generated = known.generated[::4]
    return known


def generated(prior, known, style):
    return known.measure(measure.generate(prior, known.captions(style), seed=3), style)


@pytest.mark.parametrize("style", world.BASE)
def test_the_base_draws_what_it_is_asked_for(fewer, style):
    r2, own, _ = generated(measure.load_prior(), fewer, style)
    assert r2 > 0.8 and own > 0.9


def test_the_lora_demo_brings_its_style_to_names_it_did_not_see(fewer, tmp_path, capsys):
    """Run the demo, then the command it prints at the end."""
    before = generated(measure.load_prior(), fewer, world.DEMO)
    lora.main(parse(LoRASettings, ["--demo", f"--output_dir={tmp_path / 'run'}"], miniature.LORA))
    after = generated(measure.load_prior(tmp_path / "run"), fewer, world.DEMO)
    assert after[0] > max(0.6, before[0] + 0.2) and after[1] > 0.9 and after[2] > 0.9
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("more images: "))
    words = shlex.split(command.split("minwurst.sample ")[1])
    assert words[:2] == ["--prompt", miniature.TRAIN["validation_prompts"][0]]
    words += [f"--output={tmp_path / 'x.png'}"]
    sample.main(parse(sample.SampleSettings, words))
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size == (256, 256)
    assert (tmp_path / "run" / "validation" / "before_after.png").is_file()


def test_the_full_demo_starts_and_exports(tmp_path):
    words = ["--demo", "--max_train_steps=1", "--validation_prompts", "--train_batch_size=2"]
    train.main(parse(Settings, [*words, f"--output_dir={tmp_path}"], miniature.TRAIN))
    assert measure.load_prior(tmp_path).config.c == measure.load_prior().config.c
