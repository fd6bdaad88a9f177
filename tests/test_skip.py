"""A way past a bad step or row: everything else stays where it was."""

import json
import re
import shlex
import shutil

import pytest

import train
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.run import checkpoint
from minwurst.step import diffusion, randomness
from minwurst.step.samples import Samples
from tests import tiny
from tests.conftest import assert_bitwise_equal, flags, train_here

SIX = {"max_train_steps": 6, "checkpointing_steps": 1, "lr_scheduler": "cosine", "use_ema": True,
       "lr_warmup_steps": 2}  # fmt: skip


@pytest.fixture
def samples(monkeypatch):
    """{position: row} of all samples that are read."""
    seen, caption = {}, Samples.caption

    def keep(self, row, position):
        seen[position] = row["number"]
        return caption(self, row, position)

    monkeypatch.setattr(Samples, "caption", keep)
    return seen


def run_printed(error, monkeypatch):
    """Run the command that an error prints."""
    script, *words = shlex.split(re.search(r": python (.*)$", str(error))[1])
    assert script == "train.py"
    monkeypatch.setattr("sys.argv", [script, *words])
    train.main(parse(Settings, words))


def start(monkeypatch, wuerstchen, folder, **settings):
    """Run as `python train.py …` does, for errors that print the command."""
    words = flags(wuerstchen, folder, **settings)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    train.main(parse(Settings, words))


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.list_all(folder)]


def test_a_step_that_is_poisoned(wuerstchen, tmp_path, monkeypatch, samples):
    """Stopped there, and resumed past it by the printed command."""
    train_here(wuerstchen, tmp_path / "whole", **SIX)
    expected = dict(samples)
    samples.clear()
    add_noise, poison = diffusion.add_noise, []

    def poisoned(latents, noise, t):
        poison.append(12 in samples and 16 not in samples)  # step 4 has the positions 12 to 15
        return add_noise(latents, noise, t) * (float("nan") if poison[-1] else 1)

    monkeypatch.setattr(diffusion, "add_noise", poisoned)
    with pytest.raises(UserError, match="Step 4: the loss is not finite.*--skip_steps=4") as error:
        start(monkeypatch, wuerstchen, tmp_path / "run", **SIX)
    samples.clear()
    run_printed(error.value, monkeypatch)
    assert samples == {p: row for p, row in expected.items() if p >= 16}
    assert steps(tmp_path / "run") == [1, 2, 3, 5, 6]
    state = json.loads((tmp_path / "run/checkpoint-6/state.json").read_text())
    assert state["updates"] == 5 and state["settings"]["skip_steps"] == [4]
    # The same as a run that skips it from the start, and once skipped, it stays skipped.
    train_here(wuerstchen, tmp_path / "knew", **SIX, skip_steps=4)
    assert_bitwise_equal(tmp_path / "run/checkpoint-6", tmp_path / "knew/checkpoint-6")
    more = {"resume_from_checkpoint": "latest", "max_train_steps": 8, "skip_steps": 7}
    train_here(wuerstchen, tmp_path / "run", **{**SIX, **more})
    state = json.loads((tmp_path / "run/checkpoint-8/state.json").read_text())
    assert state["updates"] == 6 and state["settings"]["skip_steps"] == [4, 7]


def test_what_is_due_at_a_skipped_step_comes_before_it(wuerstchen, tmp_path, capsys):
    settings = {**SIX, "checkpointing_steps": 3, "logging_steps": 3, "validation_split": 0.1}
    settings |= {"validation_steps": 3}
    words = [*flags(wuerstchen, tmp_path, **settings), "--skip_steps", "3", "5", "6"]
    train.main(parse(Settings, words))
    printed = capsys.readouterr().out
    assert steps(tmp_path) == [2, 4]
    assert re.findall(r"^step (\d)/6", printed, re.M) == ["2", "4"]
    assert re.findall(r"held out at step (\d)", printed) == ["0", "2", "4"]


def test_steps_that_were_run_can_not_be_skipped(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=3)
    with pytest.raises(UserError, match="--skip_steps 2: the checkpoint is at step 3"):
        train_here(wuerstchen, tmp_path, skip_steps=2, resume_from_checkpoint="latest")


def few_images(folder):
    """Ten rows, so that each occurs in every third step of four."""
    folder.mkdir()
    lines = (tiny.IMAGES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for line in lines:
        name = json.loads(line)["file_name"]
        shutil.copy2(tiny.IMAGES / name, folder / name)
    return folder


@pytest.mark.parametrize("when", ["while it runs", "before a resumed start"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_row_that_is_lost(wuerstchen, tmp_path, monkeypatch, samples, when, cached):
    if cached and when == "while it runs":
        pytest.skip("with a cache, images are not read any more")
    images = few_images(tmp_path / "images")
    settings = {**SIX, "train_data_dir": images, "cache_latents": cached}
    train_here(wuerstchen, tmp_path / "whole", **settings)
    expected, bad = dict(samples), samples[14]  # position 14 is in step 4
    (path,) = {row["image"]["path"] for row in tiny.rows(train_data_dir=str(images))
               if row["number"] == bad}  # fmt: skip
    samples.clear()
    stopped, dropout_seed = [], randomness.dropout_seed

    def lose(seed, step, rank):
        if step == 4 and not stopped:
            stopped.append(open(path, "wb").close())
            if when != "while it runs":
                raise KeyboardInterrupt
        return dropout_seed(seed, step, rank)

    monkeypatch.setattr(randomness, "dropout_seed", lose)
    with pytest.raises((UserError, KeyboardInterrupt)) as error:
        start(monkeypatch, wuerstchen, tmp_path / "run", **settings)
    if when != "while it runs":
        with pytest.raises(UserError, match=rf"Row {bad} .*It was good before") as error:
            start(monkeypatch, wuerstchen, tmp_path / "run", **settings,
                  resume_from_checkpoint="latest")  # fmt: skip
    assert f"Row {bad} " in str(error.value) and f"--skip_rows={bad}" in str(error.value)
    samples.clear()
    run_printed(error.value, monkeypatch)
    assert sorted(samples) == list(range(12, 24))
    assert all(row == expected[p] for p, row in samples.items() if expected[p] != bad)
    replaced = [row for p, row in samples.items() if expected[p] == bad]
    assert replaced and bad not in samples.values()
    assert replaced == [randomness.row_at(7, p, 10, {bad}) for p in expected
                        if expected[p] == bad and p >= 12]  # fmt: skip
    # No flag is needed to keep skipping it.
    start(monkeypatch, wuerstchen, tmp_path / "run", **{**settings, "max_train_steps": 8},
          resume_from_checkpoint="latest")  # fmt: skip
    assert bad not in samples.values() and sorted(samples) == list(range(12, 32))


def test_rows_take_each_others_places_at_random():
    """Replacements depend on (seed, position) alone and are spread over the other rows."""
    plain = [randomness.row_at(3, p, 10) for p in range(2000)]
    found = [randomness.row_at(3, p, 10, {2, 7}) for p in range(2000)]
    assert all(one == other for one, other in zip(plain, found, strict=True) if one not in (2, 7))
    replaced = [other for one, other in zip(plain, found, strict=True) if one in (2, 7)]
    counts = [replaced.count(row) for row in range(10)]
    assert sum(counts) == 400 and counts[2] == counts[7] == 0 and min(counts[:2]) > 25


def test_no_row_is_left(wuerstchen, tmp_path):
    images = few_images(tmp_path / "images")
    words = flags(wuerstchen, tmp_path / "run", train_data_dir=images)
    with pytest.raises(UserError, match="--skip_rows leaves none of the 10 rows"):
        train.main(parse(Settings, [*words, "--skip_rows", *map(str, range(10))]))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_skipped_row_is_not_previewed_either(wuerstchen, tmp_path, cached, capsys):
    images = few_images(tmp_path / "images")
    settings = {
        "train_data_dir": images, "cache_latents": cached, "validation_decoder": "preview",
        "validation_prompt": "a bear", "validation_steps": 1,
    }  # fmt: skip
    train_here(wuerstchen, tmp_path / "run", **settings, max_train_steps=1)
    row = tiny.rows(train_data_dir=str(images))[3]
    open(row["image"]["path"], "wb").close()
    more = {"max_train_steps": 2, "skip_rows": 3, "resume_from_checkpoint": "latest"}
    train_here(wuerstchen, tmp_path / "run", **settings, **more)
    assert "failed" not in capsys.readouterr().out
