"""Prompts with sizes and seeds of their own, from the command line or a file."""

import json

import numpy as np
import pytest
from PIL import Image

from minwurst import pipelines, sample
from minwurst.base import prompts
from minwurst.base.errors import UserError
from minwurst.base.prompts import Prompt
from minwurst.base.settings import parse
from tests.conftest import train_here


def test_options_come_off_the_end():
    line = "a bear, 50 --width=1536 --height 1024   --seed 3"
    assert Prompt.of(line) == Prompt(line, "a bear, 50", 1536, 1024, 3)
    assert Prompt.of("a -- b --") == Prompt("a -- b --", "a -- b --")
    assert Prompt.of("") == Prompt("", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --width 512", "--width needs a --height beside it"),
        ("a --height 512", "--height needs a --width beside it"),
        ("a --width 96 --height 512", "--width is 96; it must be between 128 and 8192"),
        ("a --width 512 --height 9999", "--height is 9999; it must be between 128 and 8192"),
        ("a --widht 512", "--widht is not --width, --height or --seed"),
        ("a --seed", "--seed needs a whole number"),
        ("a --seed -3", "--seed needs a whole number"),
        ("a --seed 1 bear", "options come after the text"),
    ],
)
def test_mistakes_name_the_line(line, message):
    with pytest.raises(UserError, match=f"prompt “{line}”: {message}"):
        Prompt.of(line)


def test_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\n a bear \n\tété --seed 1\n", encoding="utf-8")
    assert prompts.read(file, "prompt_file") == ["a bear", "été --seed 1"]
    for content in (b"", b"# only this\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="--prompt_file .*(contains no prompt|can't be read)"):
            prompts.read(file, "prompt_file")
    with pytest.raises(UserError, match="--prompt_file .*none.txt can't be read"):
        prompts.read(tmp_path / "none.txt", "prompt_file")


@pytest.fixture(scope="module")
def run(wuerstchen, tmp_path_factory):
    """A run with prompts of several sizes and seeds, one of them twice."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("a bear --width 256 --height 128\na bear --seed 9\n")
    return train_here(
        wuerstchen, folder / "run", resolution=96, max_train_steps=1,
        pretrained_decoder_model_name_or_path=wuerstchen / "decoder",
        validation_prompts="a bear", validation_prompt_file=folder / "prompts.txt",
    )  # fmt: skip


def test_validation_and_sampling_give_the_same_images(run, wuerstchen, tmp_path):
    lines = ["a bear", "a bear --width 256 --height 128", "a bear --seed 9"]
    with Image.open(run / "validation" / "step-000001.png") as sheet:
        assert json.loads(sheet.text["prompts"]) == lines
        sheet = np.asarray(sheet)
    words = ["--prompt", *lines, f"--prior={run}", f"--output={tmp_path}/all.png"]
    sample.main(parse(sample.SampleSettings, words))
    images = [Image.open(tmp_path / f"all-{number}.png") for number in (1, 2, 3)]
    assert [image.size for image in images] == [(128, 128), (256, 128), (128, 128)]
    again = np.asarray(Image.open(tmp_path / "all.png"))
    assert again.shape[1] == sheet.shape[1]
    # Below the title, validation's grid is that of minwurst.sample.
    assert np.array_equal(sheet[len(sheet) - len(again) :][-len(again) + 30 :], again[30:])
    assert not np.array_equal(np.asarray(images[0]), np.asarray(images[2]))

    generate = pipelines.load(run)  # its result, with its decoder
    assert np.array_equal(generate("a bear", seed=7, size=(3, 6)), images[1])
    assert np.array_equal(generate("a bear", seed=9, size=3), images[2])
    with pytest.raises(UserError, match=r"size is \(3, 4\); it must be a multiple of 3"):
        generate("a bear", size=(3, 4))


def test_flags_give_the_size_of_prompts_without_one(run, tmp_path, capsys):
    words = ["--prompt", "a bear", "a bear --width 128 --height 128", f"--prior={run}",
             "--width=200", "--height=380", f"--output={tmp_path}/all.png"]  # fmt: skip
    sample.main(parse(sample.SampleSettings, words))
    sizes = [Image.open(tmp_path / f"all-{number}.png").size for number in (1, 2)]
    assert sizes == [(256, 384), (128, 128)]
    printed = capsys.readouterr().out
    assert "“a bear” is generated at 256×384 pixels: sides are multiples of 128." in printed
    with pytest.raises(UserError, match="--width needs a --height"):
        parse(sample.SampleSettings, ["--prompt=a", "--width=512"])
