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
from minwurst.miniature import measure
from minwurst.step import diffusion
from minwurst.step.images import open_image, preprocess
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world():
    return measure.World()


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small_and_its_pictures_are_free():
    assert size_of(miniature.WEIGHTS) + miniature.WORLD.stat().st_size < 25e6
    assert size_of(miniature.IMAGES) < 6e6
    licence = (miniature.IMAGES / "README.md").read_text(encoding="utf-8")
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


def test_names_that_are_drawn_are_in_no_other_set(world):
    shipped = set(range(len(world.names))[measure.SHIPPED])
    captions = (miniature.IMAGES / "metadata.jsonl").read_text(encoding="utf-8")
    assert not shipped & set(world.generated) and len(world.generated) == measure.GENERATED
    for prompt in miniature.TRAIN["validation_prompts"]:
        assert prompt in world.names and f'"{prompt}"' not in captions


def test_the_world_is_what_the_encoder_makes_of_the_pictures(world):
    """The shipped latents equal the shipped images encoded with the shipped weights."""
    rows = tiny.rows(train_data_dir=str(miniature.IMAGES))
    some = [rows[place] for place in range(0, len(rows), 40)]
    encoder = models.load_image_encoder(miniature.WEIGHTS / "image_encoder")
    with torch.no_grad():
        pixels = torch.stack([preprocess(open_image(row), 192) for row in some])
        found = diffusion.scale_latents(encoder(pixels))
    stored = world.latents["outlined"][[world.names.index(row["text"]) for row in some]]
    assert (found - stored).abs().max() < 0.1 and (found - stored).square().mean() < 1e-3
    assert 0.5 < world.latents["solid"].std() < 2


@pytest.fixture(scope="module")
def fewer():
    """The world with a quarter of the names that `measure` generates, to save time."""
    world = measure.World()
    world.generated = world.generated[::4]
    return world


def test_the_base_draws_what_it_is_asked_for(fewer):
    style, own, own_of_16, _ = measure.evaluate(measure.load_prior(), fewer, "solid", seed=3)
    assert style < 0.2
    assert own > 10 * fewer.chances()[0] and own_of_16 > 2 * fewer.chances()[1]


def test_the_lora_demo_brings_its_style_to_names_it_did_not_see(fewer, tmp_path, capsys):
    """Run the demo, then the command it prints at the end."""
    words = ["--demo", f"--output_dir={tmp_path / 'run'}"]
    before = measure.evaluate(measure.load_prior(), fewer, "outlined", seed=3)
    lora.main(parse(LoRASettings, words, miniature.LORA))
    after = measure.evaluate(measure.load_prior(tmp_path / "run"), fewer, "outlined", seed=3)
    assert before[0] < 0.2 and after[0] > 0.6
    assert after[2] > 1.5 * fewer.chances()[1]  # the subject is still recognisable
    assert after[3] < before[3]
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
