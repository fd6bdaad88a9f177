"""One's own images: captions in text files, the sheet before training, notes on odd settings."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minwurst.base.errors import UserError
from minwurst.base.settings import Settings
from minwurst.run import advice
from minwurst.run.sheet import first_of_each_shape
from minwurst.step.buckets import Buckets
from tests import tiny
from tests.conftest import train_here


@pytest.fixture
def folder(tmp_path):
    """Nine images of several shapes without captions."""
    images = tmp_path / "images"
    images.mkdir()
    for number, file in enumerate(sorted(tiny.IMAGES.glob("*.webp"))[:9]):
        image = Image.open(file).convert("RGB").resize([(90, 90), (120, 60), (60, 150)][number % 3])
        image.save(images / f"{number}.png")
    return images


def test_captions_in_text_files(folder, wuerstchen, tmp_path):
    """Each line is a caption. A run on them equals that on the same metadata.jsonl."""
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"thing {number}\n\n  tag, {number} \n", "utf-8-sig")
    rows = tiny.rows(train_data_dir=folder)
    assert rows["text"][4] == ["thing 4", "tag, 4"]
    assert rows[4]["image"]["path"].endswith("4.png")
    out = train_here(wuerstchen, tmp_path / "out", train_data_dir=folder, max_train_steps=1)
    assert (out / "prior_pipeline").is_dir()


def test_an_image_without_its_text_is_named(folder, wuerstchen, tmp_path):
    (folder / "0.txt").write_text("thing")
    with pytest.raises(UserError, match=r"Row 1 \(.*1\.png\): bad caption \[\]"):
        train_here(wuerstchen, tmp_path / "out", train_data_dir=folder)
    (folder / "3.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--train_data_dir .*3\.txt can't be read"):
        train_here(wuerstchen, tmp_path / "out", train_data_dir=folder)


def test_bare_images_get_the_line_to_write(folder, wuerstchen, tmp_path):
    with pytest.raises(UserError) as raised:
        train_here(wuerstchen, tmp_path / "out", train_data_dir=folder)
    message = str(raised.value)
    assert "9 images, no captions" in message and "0.txt" in message
    line = message.split("one line per image: ")[1].split(". Or")[0]
    lines = [line.replace("0.png", f"{number}.png") for number in range(9)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert tiny.rows(train_data_dir=folder)["text"][:] == ["a bear"] * 9


def test_the_sheet(folder, wuerstchen, tmp_path, capsys):
    """Crops are drawn in; with a decoder, samples are shown encoded and decoded too."""
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"thing {number}")
    options = {"train_data_dir": folder, "max_train_steps": 1, "resolution": 96}
    out = train_here(wuerstchen, tmp_path / "plain", **options)
    printed = capsys.readouterr().out
    assert "6 of 9 images lose more than a fifth to the square crop" in printed
    plain = np.asarray(Image.open(out / "data.png").convert("RGB")).astype(int)
    red = (plain == [255, 0, 0]).all(axis=-1)
    assert red.sum() > 8 * 4 * 100  # eight frames
    decoder = {"pretrained_decoder_model_name_or_path": wuerstchen / "decoder",
               "validation_prompts": "a bear"}  # fmt: skip
    decoded = train_here(wuerstchen, tmp_path / "decoded", **options, **decoder, cache_latents=True)
    reasons = [line for line in capsys.readouterr().out.splitlines() if "data.png" in line]
    assert reasons[-1].endswith("data.png")
    assert f"{out / 'data.png'} (not decoded, without --validation_prompts)" in printed
    taller = Image.open(decoded / "data.png")
    assert taller.height > 1.8 * len(plain) and taller.width == plain.shape[1]
    # It is not written again by a resumed run.
    shutil.copyfile(out / "data.png", decoded / "data.png")
    train_here(wuerstchen, decoded, **{**options, "max_train_steps": 2}, **decoder,
               cache_latents=True, resume_from_checkpoint="latest")  # fmt: skip
    assert (decoded / "data.png").read_bytes() == (out / "data.png").read_bytes()


def test_the_sheet_has_every_shape(folder, wuerstchen, tmp_path, capsys):
    """One image of each shape at least; shapes that can't be decoded show their middle."""
    buckets = Buckets([(6, 6), (5, 7), (7, 5)], [0] * 90 + [1] * 6 + [2] * 6, batch=6, seed=7)
    shown = first_of_each_shape(SimpleNamespace(buckets=buckets, rows=range(102)))
    assert len(shown) == 8 and len({buckets.at(position)[0] for position in shown}) == 3
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"thing {number}")
    train_here(wuerstchen, tmp_path / "out", train_data_dir=folder, resolution=160,
               aspect_buckets=3, train_batch_size=3, max_train_steps=1,
               pretrained_decoder_model_name_or_path=wuerstchen / "decoder",
               validation_prompts="a bear --width 300 --height 128")  # fmt: skip
    printed = capsys.readouterr().out
    assert "“a bear --width 300 --height 128” is generated at 256×128 pixels" in printed
    with Image.open(tmp_path / "out" / "data.png") as sheet:
        assert sheet.height > 1.8 * sheet.width / 2  # four lines: two of them decoded


def test_a_sheet_that_fails_costs_nothing(folder, wuerstchen, tmp_path, capsys):
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"thing {number}")
    (tmp_path / "out" / "data.png").mkdir(parents=True)
    train_here(wuerstchen, tmp_path / "out", train_data_dir=folder, max_train_steps=1)
    printed = capsys.readouterr().out
    assert "data.png was not written: IsADirectoryError" in printed and "done: " in printed


NOTES = [
    ({"lr_scheduler": "cosine"}, 500, "the warm-up of 500 steps is not shorter than the run's 500"),
    ({"lr_scheduler": "cosine"}, 501, None),
    ({"lr_warmup_steps": 100}, 1000, "--lr_warmup_steps 100 has no effect"),
    ({"lr_warmup_steps": 0}, 1000, None),
    ({}, 10, None),
    ({"use_ema": True}, 9000, "--ema_decay 0.9999 remembers 10,000 steps, more than"),
    ({"use_ema": True, "ema_decay": 0.99}, 9000, None),
    ({"use_ema": True, "ema_decay": 1.0}, 9000, "--ema_decay 1 remembers inf steps"),
]


@pytest.mark.parametrize(("changed", "steps", "expected"), NOTES)
def test_notes(changed, steps, expected):
    settings = dataclasses.replace(Settings(train_data_dir="x"), **changed)
    found = list(advice.lines(settings, steps, epochs=1))
    assert [expected is not None and expected in line for line in found] == [True] * bool(expected)


def test_a_note_on_forgetting_the_empty_caption():
    settings = Settings(train_data_dir="x")
    assert "20 epochs without --caption_dropout" in next(advice.lines(settings, 1, epochs=20))
    assert not list(advice.lines(settings, 1, epochs=19))
    settings.caption_dropout = 0.05
    assert not list(advice.lines(settings, 1, epochs=20))
    settings = Settings(train_data_dir="x", guidance_scale=1.0)  # off: nothing can be forgotten
    assert not list(advice.lines(settings, 1, epochs=20))


def test_a_note_on_a_schedule_that_is_nearly_over():
    settings = Settings(train_data_dir="x", lr_scheduler="cosine", lr_warmup_steps=0)
    note = "--lr_scheduler=cosine over 320 steps, of which 94% are done, leaves a low"
    assert next(advice.lines(settings, 320, epochs=1, done=300 / 320)).startswith(note)
    assert not list(advice.lines(settings, 320, epochs=1, done=0.5))
    settings.lr_scheduler = "constant"
    assert not list(advice.lines(settings, 320, epochs=1, done=300 / 320))


def test_a_note_on_few_checkpoints_to_choose_among():
    settings = Settings(
        train_data_dir="x", keep_best=True, validation_split=0.1, checkpointing_steps=50
    )
    note = "--keep_best will choose among 3 checkpoints: for more, lower --checkpointing_steps."
    assert list(advice.lines(settings, 150, epochs=1)) == [note]
    assert not list(advice.lines(settings, 151, epochs=1))
