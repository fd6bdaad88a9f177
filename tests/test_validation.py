"""Validation samples with the exported prior and does not affect training."""

import contextlib
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from minwurst import sample
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import dataset, grids, models
from minwurst.run import checkpoint, validation
from minwurst.run.validation import HeldOutLoss
from minwurst.step import diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.optimizer import NoEMA
from minwurst.step.samples import Samples, collate
from tests import reference, tiny
from tests.conftest import assert_bitwise_equal, flags, relative, train_here

PROMPTS = ["a bear", "honey pot"]


@pytest.fixture
def shown(monkeypatch):
    """The arguments of GenerateImages.show: a list of (step, [latents of each prompt])."""
    seen, show = [], validation.GenerateImages.show

    def keep(self, step, parts):
        seen.append((step, [parts[0][n] for n in range(len(parts[0]))]))
        show(self, step, parts)

    monkeypatch.setattr(validation.GenerateImages, "show", keep)
    return seen


def held_out_losses(printed):
    found = re.findall(r"held out at step (\d+): loss (\S+) \((.*)\)", printed)
    return {
        int(step): [float(loss), *map(float, re.findall(r": ([\d.]+)", quarters))]
        for step, loss, quarters in found
    }


def looking(wuerstchen, **changed):
    settings = {
        "pretrained_decoder_model_name_or_path": wuerstchen / "decoder",
        "validation_prompts": "a bear", "validation_steps": 1, "validation_split": 0.1,
        "use_ema": True, "caption_dropout": 0.3,
    }  # fmt: skip
    return {**settings, **changed}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "lora.py"])
@pytest.mark.parametrize("decoder", ["full", "preview"])
def test_it_changes_no_number_of_training(wuerstchen, tmp_path, script, decoder):
    looks = looking(wuerstchen, validation_decoder=decoder, dataloader_num_workers=2)
    plain = {**looks, "validation_prompts": None, "validation_steps": 100}
    one = train_here(wuerstchen, tmp_path / "looked at", script, **looks)
    two = train_here(wuerstchen, tmp_path / "left alone", script, **plain)
    assert_bitwise_equal(one / "checkpoint-4", two / "checkpoint-4")


@pytest.mark.slow
def test_ranks_share_it_and_train_on_as_before(warm, wuerstchen, tmp_path):
    looks = looking(wuerstchen, train_batch_size=2)
    plain = {**looks, "validation_prompts": None, "validation_steps": 100}
    for name, settings in (("looked at", looks), ("left alone", plain)):
        words = flags(wuerstchen, tmp_path / name, **settings)
        results = [run.wait() for run in warm.start_ranks(2, "train.py", words)]
        assert [code for code, _ in results] == [0, 0], results
    one, two = tmp_path / "looked at", tmp_path / "left alone"
    assert_bitwise_equal(one / "checkpoint-4", two / "checkpoint-4")
    words = flags(wuerstchen, tmp_path / "alone", **looking(wuerstchen))
    assert warm.run("train.py", words)[0] == 0
    file = "validation/step-000000.png"
    found, expected = (Image.open(tmp_path / run / file) for run in ("looked at", "alone"))
    assert found.tobytes() == expected.tobytes()


def test_it_draws_with_the_exported_weights(wuerstchen, tmp_path, shown):
    """The last images match the exported result: EMA weights, no dropout, in diffusers' class."""
    looks = looking(wuerstchen, ema_decay=0.5, validation_steps=3, resolution=128)
    train_here(wuerstchen, tmp_path, **looks)
    assert [step for step, _ in shown] == [0, 3, 4]
    pipeline = reference.prior_pipeline(tmp_path / "prior_pipeline")
    text = encode_text(pipeline.tokenizer, pipeline.text_encoder, ["a bear", ""])
    # Training uses 4×4 latents; 3×3 is the nearest size that can be decoded.
    noise = randomness.sampling_noise(7, randomness.image_key("a bear", 0), (16, 3, 3))
    predict_noise = diffusion.guided(lambda x, t, c: pipeline.prior(x, t, c), {"c": text})
    expected = diffusion.sample(predict_noise, noise, diffusion.prior_times())
    assert relative(shown[-1][1][0], expected) < 1e-5
    assert relative(shown[0][1][0], expected) > 1e-3


@pytest.mark.slow
def test_a_picture_does_not_depend_on_the_others(wuerstchen, tmp_path, shown):
    alone = looking(wuerstchen, max_train_steps=1, validation_prompts="honey pot")
    train_here(wuerstchen, tmp_path / "one", **alone)
    words = flags(wuerstchen, tmp_path / "two", **{**alone, "validation_prompts": None})
    train.main(parse(Settings, [*words, "--validation_prompts", *PROMPTS]))
    assert torch.equal(shown[0][1][0], shown[2][1][1])
    assert not torch.equal(shown[2][1][0], shown[2][1][1])


def test_sampling_draws_the_same_picture(wuerstchen, tmp_path, monkeypatch):
    """`minwurst.sample` takes the run's seed, and generates the same image as its last validation.
    """
    drawn, grid = [], grids.grid

    def keep(found, *words, **more):
        drawn.append(found)
        return grid(found, *words, **more)

    for module in (validation, sample):
        monkeypatch.setattr(module, "grid", keep)
    train_here(wuerstchen, tmp_path / "run", **looking(wuerstchen, max_train_steps=2))
    words = ["--prompt=a bear", f"--prior={tmp_path / 'run'}"]
    sample.main(parse(sample.SampleSettings, [*words, f"--output={tmp_path / 'x.png'}"]))
    with Image.open(tmp_path / "x.png") as found:
        assert found.tobytes() == drawn[-1][0].tobytes()
        assert '"prompt": "a bear"' in found.text["minwurst"]


@pytest.mark.slow
def test_before_and_after_survive_a_resumed_run(wuerstchen, tmp_path, capsys):
    looks = looking(wuerstchen, max_train_steps=2)
    train_here(wuerstchen, tmp_path, **looks)
    first = (tmp_path / "validation/step-000000.png").read_bytes()
    more = {**looks, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train_here(wuerstchen, tmp_path, **more)
    assert [int(step) for step in held_out_losses(capsys.readouterr().out)] == [0, 1, 2, 3, 4]
    assert (tmp_path / "validation/step-000000.png").read_bytes() == first
    with (
        Image.open(tmp_path / "validation/before_after.png") as both,
        Image.open(tmp_path / "validation/step-000000.png") as before,
        Image.open(tmp_path / "validation/step-000004.png") as after,
    ):
        middle = before.height
        assert both.crop((0, 0, both.width, middle)).tobytes() == before.tobytes()
        assert both.crop((0, middle, both.width, both.height)).tobytes() == after.tobytes()


@pytest.mark.slow
def test_other_prompts_have_no_before(wuerstchen, tmp_path):
    looks = looking(wuerstchen, max_train_steps=1)
    train_here(wuerstchen, tmp_path, **looks)
    more = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    train_here(wuerstchen, tmp_path, **{**looks, "validation_prompts": "a car", **more})
    after, both = (tmp_path / f"validation/{name}.png" for name in ("step-000002", "before_after"))
    assert Image.open(both).tobytes() == Image.open(after).tobytes()


@pytest.mark.slow
def test_epochs_set_when_it_is_due(wuerstchen, tmp_path, capsys):
    """56 rows, 6 of them held out: with 10 images per step, two epochs are 10 steps."""
    looks = {"validation_split": 0.1, "validation_epochs": 2, "train_batch_size": 10}
    train_here(wuerstchen, tmp_path, max_train_steps=25, **looks)
    assert list(held_out_losses(capsys.readouterr().out)) == [0, 10, 20, 25]


def test_held_out_loss_is_the_plain_error_at_fixed_times(still_wuerstchen, tmp_path, capsys):
    """Independent of the training objective; compared with a direct computation."""
    looks = {"validation_split": 0.2, "loss_weighting": "p2", "max_train_steps": 1}
    train_here(still_wuerstchen, tmp_path / "one", **looks)
    (before, after) = held_out_losses(capsys.readouterr().out).values()
    assert before != after

    rows = tiny.rows(train_data_dir="tests/pictures")
    held_out = dataset.hold_out(rows, 0.2, seed=7)[1]
    prior = models.load_prior(still_wuerstchen)
    tokenizer, text_encoder = models.load_text(still_wuerstchen, torch.float32)
    encoder = models.load_image_encoder(still_wuerstchen / "image_encoder")
    seed = randomness.held_out_seed(7)
    pairs = tiny.samples(held_out, 64, seed)
    found = torch.zeros(4)
    with torch.no_grad():
        for position in range(len(held_out)):
            sample_ = collate([pairs[position]])
            latents = diffusion.scale_latents(encoder(sample_["pixels"]))
            text = encode_text(tokenizer, text_encoder, sample_["captions"])
            noise = randomness.noise(seed, [position], latents.shape[1:])
            for quarter in range(4):
                t = (quarter + randomness.uniform(seed, [position])) / 4
                noisy = diffusion.add_noise(latents, noise, t)
                found[quarter] += (prior(noisy, t, text) - noise).square().mean()
    found = (found / len(held_out)).tolist()
    assert before == pytest.approx([sum(found) / 4, *found], abs=2e-5)


def test_a_loss_that_keeps_rising_is_noted(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "record_held_out", lambda *_: None)
    loss = object.__new__(HeldOutLoss)
    loss.samples, loss.log = SimpleNamespace(rows=[1]), SimpleNamespace(scalars=lambda *_: None)
    loss.folder, loss.losses = None, []
    for step, value in enumerate([0.5, 0.3, 0.4, 0.5, 0.45, 0.46, 0.47]):
        loss.show(step, [[value] * 4])
    assert "note: " not in capsys.readouterr().out
    loss.show(7, [[0.48] * 4])
    assert "the prior overfits. Its lowest was 0.30000 at step 1." in capsys.readouterr().out


@pytest.mark.slow
def test_held_out_loss_is_the_same_on_two_ranks(warm, still_wuerstchen, tmp_path, capsys):
    looks = {"validation_split": 0.2, "max_train_steps": 1, "train_batch_size": 4}
    train_here(still_wuerstchen, tmp_path / "one", **looks)
    expected = held_out_losses(capsys.readouterr().out)[0]
    words = flags(still_wuerstchen, tmp_path / "two", **{**looks, "train_batch_size": 2})
    (code, printed), (other, _) = (run.wait() for run in warm.start_ranks(2, "train.py", words))
    assert code == other == 0
    assert held_out_losses(printed)[0] == pytest.approx(expected, abs=2e-5)


def test_held_out_rows_are_not_trained_on(wuerstchen, tmp_path, monkeypatch):
    taken, item = [], Samples.__getitem__

    def keep(self, position):
        row = self.rows[randomness.row_at(self.seed, position, len(self.rows))]
        taken.append((self.seed == 7, row["number"]))
        return item(self, position)

    monkeypatch.setattr(Samples, "__getitem__", keep)
    train_here(wuerstchen, tmp_path, validation_split=0.25, train_batch_size=6, max_train_steps=7)
    trained = {number for training, number in taken if training}
    measured = {number for training, number in taken if not training}
    assert len(measured) == 14 and len(trained) == 42 and not trained & measured


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.5, 28), (0.98, 55)])
def test_hold_out(share, count):
    rows = tiny.rows(train_data_dir="tests/pictures")
    kept, held_out = dataset.hold_out(rows, share, seed=3)
    assert len(held_out) == count
    assert sorted([*kept["number"], *held_out["number"]]) == list(range(56))
    if count == 28:
        assert held_out["number"] != dataset.hold_out(rows, share, seed=4)[1]["number"]


def test_a_split_that_leaves_nothing():
    rows = tiny.rows(train_data_dir="tests/pictures")
    with pytest.raises(UserError, match="--validation_split 0.99 of 56 rows leaves none"):
        dataset.hold_out(rows, 0.99, seed=3)


def test_another_split_is_another_run(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1, validation_split=0.1)
    with pytest.raises(UserError, match="--validation_split was 0.1 and is now 0.2"):
        train_here(wuerstchen, tmp_path, validation_split=0.2, resume_from_checkpoint="latest")


def test_it_says_which_cells_and_which_prompts_are_cut(wuerstchen, tmp_path, capsys):
    looks = looking(wuerstchen, max_train_steps=1, validation_prompts="bear " * 100)
    train_here(wuerstchen, tmp_path, resolution=128, **looks)
    printed = capsys.readouterr().out
    assert "4×4 latents, which can't be decoded: images are generated at 3×3" in printed
    assert re.search(r"The prompt “bear bear.*…” has \d{3} tokens; only 77 are read", printed)


@pytest.mark.parametrize("part", ["decoder/config.json", "vqgan/config.json", "tokenizer"])
def test_a_decoder_that_lacks_a_part(wuerstchen, tmp_path, part):
    shutil.copytree(wuerstchen / "decoder", tmp_path / "decoder")
    gone = tmp_path / "decoder" / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    looks = looking(wuerstchen, pretrained_decoder_model_name_or_path=tmp_path / "decoder")
    with pytest.raises(UserError, match=f"not a complete decoder folder: {part}.* is missing"):
        train_here(wuerstchen, tmp_path / "out", **looks)


def test_no_decoder_to_be_had(wuerstchen, tmp_path):
    looks = looking(wuerstchen, pretrained_decoder_model_name_or_path="nobody/nothing")
    with pytest.raises(UserError, match="--pretrained_decoder.*--validation_decoder=preview"):
        train_here(wuerstchen, tmp_path, **looks)


def test_the_model_is_put_back():
    model = torch.nn.Dropout()
    evaluated = validation.EvaluationModel(model, NoEMA(), contextlib.nullcontext())
    with pytest.raises(RuntimeError), evaluated.active():
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()


def test_pictures_that_can_not_be_written_stop_nothing(wuerstchen, tmp_path, capsys):
    (tmp_path / "validation").write_text("a file where the folder should be")
    train_here(wuerstchen, tmp_path, **looking(wuerstchen, max_train_steps=1))
    assert re.search(
        r"validation at step 1 failed, training continues: .*exists.*/validation'",
        capsys.readouterr().out,
    )
    assert (tmp_path / "prior_pipeline").is_dir()


# ---- What goes wrong in a validation costs no training.


@pytest.fixture(scope="module")
def unharmed(warm, wuerstchen, tmp_path_factory):
    """A run on two ranks that validates at steps 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("unharmed") / "run"
    words = flags(wuerstchen, folder, **every_second(wuerstchen))
    for run in warm.start_ranks(2, "train.py", words):
        code, printed = run.wait()
        assert code == 0, printed
    return folder


def every_second(wuerstchen):
    looks = looking(wuerstchen, validation_steps=2, train_batch_size=2)
    return {**looks, "validation_split": None}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "place"), [(1, "measure"), (0, "decode"), (0, "measure")])
def test_an_error_on_one_rank_skips_the_validation(
    warm, wuerstchen, unharmed, tmp_path, rank, place
):
    words = flags(wuerstchen, tmp_path, **every_second(wuerstchen))
    faults = [[place, 2, "raise"]]
    (code, printed), (other, _) = (
        run.wait() for run in warm.start_ranks(2, "train.py", words, faults, faulty=rank)
    )
    assert code == other == 0, printed
    said = "validation at step 2 failed, training continues: RuntimeError: injected"
    assert [line for line in printed.splitlines() if "failed" in line] == [said]
    images = sorted(path.name for path in (tmp_path / "validation").glob("step-*"))
    assert images == ["step-000000.png", "step-000004.png"]
    assert_bitwise_equal(unharmed / "checkpoint-4", tmp_path / "checkpoint-4")
    last = "validation/step-000004.png"
    assert (unharmed / last).read_bytes() == (tmp_path / last).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 3], ids=["in the middle", "at the last step"])
def test_a_kill_between_saving_and_validating(warm, wuerstchen, tmp_path, call):
    """What was due is caught up on by the next start, also where no steps are left."""
    looks = {"checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    looks = {**every_second(wuerstchen), **looks}
    step = 2 * (call - 1)
    assert warm.run("train.py", flags(wuerstchen, tmp_path / "whole", **looks))[0] == 0
    words = flags(wuerstchen, tmp_path / "run", **looks)
    code, printed = warm.run("train.py", words, faults=[["validate", call, signal.SIGKILL]])
    image = tmp_path / f"run/validation/step-{step:06}.png"
    assert code == -signal.SIGKILL and (tmp_path / f"run/checkpoint-{step}").is_dir(), printed
    assert not image.exists()
    code, printed = warm.run("train.py", words)
    assert code == 0, printed
    whole = tmp_path / "whole"
    assert image.read_bytes() == (whole / "validation" / image.name).read_bytes()
    assert_bitwise_equal(whole / "checkpoint-4", tmp_path / "run/checkpoint-4")
    validated = re.findall(r"images: .*step-(\d+)", printed)
    assert validated == [f"{n:06}" for n in range(step, 6, 2)]
    code, printed = warm.run("train.py", words)  # everything is done
    assert code == 0 and "step-" not in printed


def test_a_new_run_in_the_folder_forgets_what_was_validated(wuerstchen, tmp_path, capsys):
    looks = {"validation_split": 0.1, "max_train_steps": 2, "validation_steps": 1}
    train_here(wuerstchen, tmp_path, **looks)
    assert (tmp_path / "validation/last_step").read_text() == "2\n"
    shutil.rmtree(tmp_path / "checkpoint-2")
    capsys.readouterr()
    train_here(wuerstchen, tmp_path, **looks)
    assert list(held_out_losses(capsys.readouterr().out)) == [0, 1, 2]
