"""train.py end to end: equal to a plain loop, to a resumed run, and to a run on several ranks."""

import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import train
from minwurst.base.errors import UserError
from minwurst.base.settings import Settings, parse
from minwurst.edge import models
from minwurst.run import checkpoint
from minwurst.step import diffusion, metrics, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import Samples
from tests import plain, reference, tiny
from tests.conftest import (
    assert_bitwise_equal,
    command,
    difference,
    flags,
    free_port,
    relative,
    saved,
    start,
    torchrun,
    train_here,
)  # fmt: skip


def losses(printed):
    """The losses in a run's printed log."""
    return [
        float(line.split("loss ")[1].split()[0])
        for line in printed.splitlines()
        if line.startswith("step ")
    ]


def assert_close_weights(found, expected, tolerance, steps=4, learning_rate=1e-3):
    """Same weights up to float error, per tensor; to_k.bias changes only by rounding."""
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("to_k.bias"):
            assert (found[name] - expected[name]).abs().max() <= 2 * steps * learning_rate
        else:
            assert relative(found[name], expected[name]) < tolerance, name


def weights(folder):
    return load_file(Path(folder) / "weights.safetensors")


def test_the_loss_falls_and_captions_matter(wuerstchen, tmp_path, capsys):
    """On eight images the loss nearly halves, and swapped captions increase the error."""
    tiny.rows().select(range(8)).save_to_disk(tmp_path / "eight")
    out = train_here(
        wuerstchen, tmp_path / "out", train_data_dir=None, dataset_name=tmp_path / "eight",
        max_train_steps=200, train_batch_size=16, learning_rate=4e-3, lr_scheduler="cosine",
        lr_warmup_steps=10, timestep_sampling="wuerstchen", cache_latents=True, logging_steps=50,
    )  # fmt: skip
    falling = losses(capsys.readouterr().out)
    assert len(falling) == 4 and falling[-1] < 0.6 * falling[0] < 0.6

    rows = tiny.rows(dataset_name=tmp_path / "eight")
    prior = models.load_prior(out / "prior_pipeline").eval()
    encoder = models.load_image_encoder(wuerstchen / "image_encoder")
    text = encode_text(*models.load_text(wuerstchen, torch.float32), list(rows["text"]))
    with torch.no_grad():
        pixels = torch.stack([preprocess(open_image(row), 64) for row in rows])
        latents = diffusion.scale_latents(encoder(pixels)).repeat(8, 1, 1, 1)
        t, noise = torch.full((64,), 0.6), randomness.noise(99, range(64), latents.shape[1:])
        noisy = diffusion.add_noise(latents, noise, t)
        own, others = (
            (prior(noisy, t, states.repeat(8, 1, 1)) - noise).square().mean()
            for states in (text, text.roll(1, dims=0))
        )
    assert others > 1.3 * own


@pytest.mark.parametrize("objective", [{}, plain.AUTHORS], ids=["default", "authors"])
def test_equals_a_plain_loop(still_wuerstchen, tmp_path, objective):
    """Weights and their average after 4 steps."""
    out = train_here(still_wuerstchen, tmp_path, **plain.FLAGS, **objective)
    prior = reference.load_prior(still_wuerstchen / "prior")
    trained = dict(prior.train().named_parameters())
    average = plain.train(prior, list(trained.values()), still_wuerstchen, objective)
    assert_close_weights(weights(out / "checkpoint-4"), trained, 1e-5)
    found = load_file(out / "checkpoint-4" / "ema.safetensors")
    average = dict(zip(trained, average, strict=True))
    assert_close_weights(found, average, 1e-5)
    assert difference(found, average) < 1e-6
    assert difference(weights(out / "checkpoint-4"), trained) < 1e-6


EVERYTHING = {
    "use_ema": True, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3,
    "gradient_accumulation_steps": 2, "train_batch_size": 3, "dataloader_num_workers": 2,
    "caption_dropout": 0.3, "checkpointing_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_resumed_run_is_the_same_run(wuerstchen, tmp_path, precision):
    """4 steps = 2 + resume + 2, bit for bit, with every stateful option enabled."""
    settings = {**EVERYTHING, "mixed_precision": precision}
    whole = train_here(wuerstchen, tmp_path / "whole", **settings)
    parts = train_here(wuerstchen, tmp_path / "parts", **{**settings, "max_train_steps": 2})
    train_here(wuerstchen, parts, **settings, resume_from_checkpoint="latest")
    assert_bitwise_equal(whole / "checkpoint-4", parts / "checkpoint-4")
    start_and_end = saved(whole / "checkpoint-2"), saved(whole / "checkpoint-4")
    assert not torch.equal(*(tensors["weights/out.1.weight"] for tensors in start_and_end))
    assert not torch.equal(*(tensors["ema/out.1.weight"] for tensors in start_and_end))


def test_eight_bit_adam_resumes_too(wuerstchen, tmp_path):
    settings = {"use_8bit_adam": True, "checkpointing_steps": 2}
    whole = train_here(wuerstchen, tmp_path / "whole", **settings)
    parts = train_here(wuerstchen, tmp_path / "parts", **settings, max_train_steps=2)
    train_here(wuerstchen, parts, **settings, resume_from_checkpoint="latest")
    assert_bitwise_equal(whole / "checkpoint-4", parts / "checkpoint-4")
    assert torch.uint8 in {tensor.dtype for tensor in saved(whole / "checkpoint-4").values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ranks", "precision"),
    [("train.py", 2, "bf16"), ("train.py", 3, "no"), ("lora.py", 3, "no"), ("lora.py", 2, "fp16")],
)
def test_resumed_run_is_the_same_run_on_ranks(
    warm, wuerstchen, few, tmp_path, script, ranks, precision
):
    """The same on several ranks, with lists of captions to choose from."""
    rows = tiny.rows(dataset_name=str(few))
    captions = [[text, f"another {text}"] for text in rows["text"]]
    rows.remove_columns("text").add_column("text", captions).save_to_disk(tmp_path / "lists")
    settings = {
        **EVERYTHING, "train_batch_size": 1, "mixed_precision": precision, "train_data_dir": None,
        "dataset_name": tmp_path / "lists", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    for folder, last_step in (("whole", 4), ("parts", 2), ("parts", 4)):
        words = flags(wuerstchen, tmp_path / folder, **{**settings, "max_train_steps": last_step})
        found = [run.wait() for run in warm.start_ranks(ranks, script, words)]
        assert [code for code, _ in found] == [0] * ranks, found
    assert_bitwise_equal(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")


@pytest.mark.parametrize("script", ["train.py", "lora.py"])
def test_a_finished_run_is_extended(wuerstchen, tmp_path, script):
    longer = train_here(wuerstchen, tmp_path / "longer", script, max_train_steps=5)
    extended = train_here(wuerstchen, tmp_path / "extended", script, max_train_steps=3)
    train_here(wuerstchen, extended, script, max_train_steps=5, resume_from_checkpoint="latest")
    assert_bitwise_equal(longer / "checkpoint-5", extended / "checkpoint-5")


def test_resuming_a_finished_run_changes_nothing(wuerstchen, tmp_path, capsys):
    out = train_here(wuerstchen, tmp_path)
    before = saved(out / "checkpoint-4")
    train_here(wuerstchen, out, resume_from_checkpoint="latest")
    assert "Step 4 is already done" in capsys.readouterr().out
    assert all(
        torch.equal(before[name], tensor) for name, tensor in saved(out / "checkpoint-4").items()
    )


def test_a_resumed_run_takes_the_saved_seed(wuerstchen, tmp_path):
    out = train_here(wuerstchen, tmp_path, seed=None, max_train_steps=2)
    first = json.loads((out / "checkpoint-2" / "state.json").read_text())["seed"]
    train_here(wuerstchen, out, seed=None, max_train_steps=3, resume_from_checkpoint="latest")
    assert json.loads((out / "checkpoint-3" / "state.json").read_text())["seed"] == first


@pytest.fixture(scope="module")
def one_process(still_wuerstchen, tmp_path_factory):
    """The run that every split of its batch of 4 must equal, in weights and schedule."""
    folder = tmp_path_factory.mktemp("one")
    return train_here(still_wuerstchen, folder, lr_scheduler="cosine", lr_warmup_steps=2)


def assert_same_run(folder, one_process):
    states = [
        json.loads((out / "checkpoint-4" / "state.json").read_text())
        for out in (folder, one_process)
    ]
    assert states[0]["updates"] == states[1]["updates"] == 4
    assert_close_weights(
        weights(folder / "checkpoint-4"), weights(one_process / "checkpoint-4"), 2e-5
    )


CUT = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}


def test_accumulation_equals_one_batch(still_wuerstchen, tmp_path, one_process):
    cut = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_run(train_here(still_wuerstchen, tmp_path, **CUT, **cut), one_process)


@pytest.mark.slow
def test_two_ranks_equal_one_and_a_resumed_run_may_change_ranks(
    still_wuerstchen, tmp_path, one_process
):
    two = torchrun(
        2, still_wuerstchen, tmp_path / "two", **CUT, train_batch_size=2, checkpointing_steps=2
    )
    assert_same_run(two, one_process)
    # From checkpoint-2, one process with the same global batch resumes the same sample stream.
    checkpoint.delete(two / "checkpoint-4")
    train_here(still_wuerstchen, two, **CUT, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert_same_run(two, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora.py"])  # its loop is train.py's, byte for byte
def test_two_machines_equal_one(still_wuerstchen, tmp_path, script):
    """Two torchrun agents with one process each, against one agent with two."""
    one = torchrun(2, still_wuerstchen, tmp_path / "one", script, train_batch_size=2)
    port = free_port()
    agents = [
        start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
            "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", script,
            *flags(still_wuerstchen, tmp_path / "two", train_batch_size=2),
        )
        for node in (0, 1)
    ]  # fmt: skip
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert_bitwise_equal(one / "checkpoint-4", tmp_path / "two" / "checkpoint-4")


def test_recomputing_is_the_same_run(wuerstchen, tmp_path):
    plain = train_here(wuerstchen, tmp_path / "plain")
    recomputed = train_here(wuerstchen, tmp_path / "recomputed", gradient_checkpointing=True)
    assert_bitwise_equal(plain / "checkpoint-4", recomputed / "checkpoint-4")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(wuerstchen, tmp_path, precision, monkeypatch):
    """Trained weights are fp32 and close to those of the fp32 run, if no step is skipped."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**10, **k)
    )
    plain = weights(train_here(wuerstchen, tmp_path / "plain") / "checkpoint-4")
    half = weights(
        train_here(wuerstchen, tmp_path / "half", mixed_precision=precision) / "checkpoint-4"
    )
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    begin = models.load_prior(wuerstchen).state_dict()
    moved, differs = [], []
    for name, weight in plain.items():
        (
            moved.append((weight - begin[name]).flatten()),
            differs.append((half[name] - weight).flatten()),
        )
    share = torch.cat(differs).norm() / torch.cat(moved).norm()
    assert 0 < share < 0.2


def test_fp16_overflow_is_skipped_and_counted(wuerstchen, tmp_path, monkeypatch, capsys):
    """Steps skip the update until the excessive loss scale has been halved often enough."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**30, **k)
    )
    settings = {"mixed_precision": "fp16", "checkpointing_steps": 3, "max_train_steps": 30}
    out = train_here(wuerstchen, tmp_path, **settings)
    said = capsys.readouterr().out.splitlines()
    skipped = [line for line in said if "gradient overflow" in line]
    state = json.loads((out / "checkpoint-30" / "state.json").read_text())
    assert len(skipped) > 3 and state["updates"] == 30 - len(skipped)
    assert all(tensor.isfinite().all() for tensor in weights(out / "checkpoint-30").values())
    begin = models.load_prior(wuerstchen).state_dict()
    first = weights(out / "checkpoint-3")
    assert all(torch.equal(begin[name], first[name]) for name in first)  # no update yet


def test_a_bad_loss_stops_before_it_is_saved(wuerstchen, tmp_path, monkeypatch):
    """NaN in one batch of latents: the run stops, reports the step, and keeps its checkpoints."""
    add_noise, calls = diffusion.add_noise, []

    def poisoned(latents, noise, t):
        calls.append(1)
        return add_noise(latents, noise, t) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(diffusion, "add_noise", poisoned)
    rows = [randomness.row_at(7, position, 56) for position in range(12, 16)]
    said = f"Step 4: the loss is not finite on rank 0, rows {rows}. No weight was changed."
    with pytest.raises(UserError, match=re.escape(said)):
        train_here(wuerstchen, tmp_path, max_train_steps=6, checkpointing_steps=1)
    assert [path.name for path in checkpoint.list_all(tmp_path)] == [
        f"checkpoint-{n}" for n in (1, 2, 3)
    ]


def test_going_back_leaves_the_later_branch_aside(wuerstchen, tmp_path, capsys):
    """Resuming at checkpoint-1 renames later checkpoints; they are not counted, used or deleted."""
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 3}
    out = train_here(wuerstchen, tmp_path, **settings, max_train_steps=3)
    left = saved(out / "checkpoint-3")
    back = {"resume_from_checkpoint": "checkpoint-1", "learning_rate": 1e-4}
    train_here(wuerstchen, out, **settings, **back, max_train_steps=2)
    assert [path.name for path in checkpoint.list_all(out)] == ["checkpoint-1", "checkpoint-2"]
    (aside,) = out.glob("checkpoint-3.left-*")
    assert all(torch.equal(left[name], tensor) for name, tensor in saved(aside).items())
    assert "checkpoint-3 is after step 1" in capsys.readouterr().out


def test_checkpoints_rotate(wuerstchen, tmp_path):
    out = train_here(
        wuerstchen, tmp_path, max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2
    )
    assert [path.name for path in checkpoint.list_all(out)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.slow
def test_epochs_set_the_number_of_steps(wuerstchen, tmp_path):
    """56 rows, 3 epochs, 32 per step: 6 steps, the last of which extends into the fourth epoch."""
    out = train_here(
        wuerstchen, tmp_path, max_train_steps=None, num_train_epochs=3, train_batch_size=32
    )
    assert [path.name for path in checkpoint.list_all(out)] == ["checkpoint-6"]


def test_tensorboard_holds_the_numbers(wuerstchen, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "logging_steps": 2, "checkpointing_steps": 2}
    train_here(wuerstchen, tmp_path, **settings, max_train_steps=6)
    checkpoint.delete(tmp_path / "checkpoint-6")
    train_here(wuerstchen, tmp_path, **settings, max_train_steps=8, resume_from_checkpoint="latest")
    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    assert set(log.Tags()["scalars"]) == {
        "loss",
        "training/learning_rate",
        "training/gradient_norm",
        "training/pictures_per_second",
        "training/memory_gib",
        *(f"loss/{quarter}" for quarter in metrics.QUARTERS),
    }
    assert [event.step for event in log.Scalars("loss")] == [2, 4, 6, 8]  # step 6 only once
    rates = [event.value for event in log.Scalars("training/learning_rate")]
    assert rates == pytest.approx([1e-3] * 4)


def test_result_is_the_average_in_the_hubs_layout(wuerstchen, tmp_path):
    """prior_pipeline/ contains the EMA weights and loads in diffusers as the README describes."""
    out = train_here(wuerstchen, tmp_path, use_ema=True, max_train_steps=6) / "prior_pipeline"
    prior = reference.load_prior(out / "prior")
    average = load_file(tmp_path / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(prior.state_dict()[name], average[name]) for name in average)
    last = weights(tmp_path / "checkpoint-6")
    assert not torch.equal(last["out.1.weight"], average["out.1.weight"])
    for part in ("text_encoder", "tokenizer"):  # byte-identical to the base model
        for file in (wuerstchen / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes()
    index = json.loads((out / "model_index.json").read_text())
    assert index["prior"] == ["wuerstchen", "WuerstchenPrior"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]


def test_result_makes_pictures_latents_in_diffusers(wuerstchen, tmp_path):
    """A pipeline built from the parts samples; before diffusers 0.38 from_pretrained works too."""
    from transformers import CLIPTextModel, CLIPTokenizerFast

    out = train_here(wuerstchen, tmp_path) / "prior_pipeline"
    pipeline = reference.WuerstchenPriorPipeline(
        tokenizer=CLIPTokenizerFast.from_pretrained(out / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        prior=reference.load_prior(out / "prior"),
        scheduler=diffusers.DDPMWuerstchenScheduler.from_pretrained(out / "scheduler"),
    )
    old = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 38)
    pipelines = [pipeline]
    if old:
        pipelines.append(diffusers.DiffusionPipeline.from_pretrained(out, low_cpu_mem_usage=False))
    found = []
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(1)
        made = pipe("a bear", height=128, width=128, num_inference_steps=3, generator=seeded)
        found.append(made.image_embeddings)
    assert found[0].shape == (1, 16, 3, 3) and found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found)


# ---- User errors: one line, exit code 2, before any long work.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resolution": 500}, "--resolution is 500; it must be a multiple of 32"),
        ({"train_data_dir": None}, "No data: give --dataset_name"),
        ({"caption_column": "words"}, "--caption_column words: not found in --train_data_dir"),
        (
            {"resume_from_checkpoint": "checkpoint-8"},
            "--resume_from_checkpoint checkpoint-8: no such",
        ),
        ({"output_dir": "/dev/null/out"}, "--output_dir /dev/null/out is not writable"),
        (
            {"pretrained_prior_model_name_or_path": tiny.IMAGES},
            "is not a complete model folder: prior/config.json",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(warm, wuerstchen, tmp_path, changed, said):
    words = flags(wuerstchen, **{"output_dir": tmp_path / "out", **changed})
    code, printed = warm.run("train.py", words)
    assert code == 2, printed
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("train.py: ") and said in printed.splitlines()[-1]


@pytest.mark.slow
def test_mistakes_under_torchrun_are_said_once(wuerstchen, tmp_path):
    words = flags(wuerstchen, tmp_path / "out", caption_column="words")
    code, printed = command(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={free_port()}", "train.py", *words, check=False,
    )  # fmt: skip
    assert code != 0 and printed.count("train.py: --caption_column words") == 1


@pytest.mark.slow
def test_the_seeds_command_says_what_is_missing(tmp_path):
    """Without the Hub, the only error is one line that names the flag."""
    code, printed = command(
        sys.executable, "train.py", "--mixed_precision=fp16", "--resolution=768",
        "--dataset_name=lambdalabs/naruto-blip-captions", "--train_batch_size=4",
        "--gradient_accumulation_steps=4", "--gradient_checkpointing", "--dataloader_num_workers=4",
        "--max_train_steps=15000", "--learning_rate=1e-05", "--max_grad_norm=1",
        "--checkpoints_total_limit=3", "--lr_scheduler=constant", "--lr_warmup_steps=0",
        "--validation_prompts=A robot naruto, 4k photo", f"--output_dir={tmp_path / 'out'}",
        check=False,
    )  # fmt: skip
    assert code == 2 and "Traceback" not in printed
    assert "No GPU found" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("train.py: --dataset_name lambdalabs/naruto-blip-captions can't be read")


def test_a_folder_with_checkpoints_is_refused(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    with pytest.raises(UserError, match="already contains checkpoint-1"):
        train_here(wuerstchen, tmp_path, max_train_steps=1)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 8},
        {"resolution": 96},
        {"train_batch_size": 3},
        {"loss_weighting": "p2"},
        {"use_ema": True},
    ],
    ids=str,
)
def test_another_run_is_not_resumed(wuerstchen, tmp_path, changed):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    with pytest.raises(UserError, match="which would be another run"):
        train_here(wuerstchen, tmp_path, resume_from_checkpoint="latest", **changed)


def test_moved_models_are_the_same_run_and_other_encoders_are_not(wuerstchen, tmp_path):
    out = train_here(wuerstchen, tmp_path / "out", max_train_steps=1)
    moved = shutil.copytree(wuerstchen, tmp_path / "moved")
    train_here(moved, out, max_train_steps=2, resume_from_checkpoint="latest")
    config_file = moved / "image_encoder" / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    with pytest.raises(UserError, match="the encoders' files .* which would be another run"):
        train_here(moved, out, resume_from_checkpoint="latest")


def test_other_data_is_not_resumed(wuerstchen, tmp_path):
    train_here(wuerstchen, tmp_path / "out", max_train_steps=1)
    rows = tiny.rows()
    rows.select(range(50)).save_to_disk(tmp_path / "fewer")
    other = {"train_data_dir": None, "dataset_name": tmp_path / "fewer"}
    with pytest.raises(UserError, match="content of the data set .* which would be another run"):
        train_here(wuerstchen, tmp_path / "out", resume_from_checkpoint="latest", **other)


def test_changed_learning_rate_is_said_and_taken(wuerstchen, tmp_path, capsys):
    train_here(wuerstchen, tmp_path, max_train_steps=1)
    train_here(
        wuerstchen, tmp_path, resume_from_checkpoint="latest", learning_rate=5e-4, logging_steps=1
    )
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: learning_rate 0.001 → 0.0005" in printed
    assert "lr 5.00e-04" in printed


def test_every_sample_once_an_epoch(wuerstchen, tmp_path, monkeypatch):
    """Counted where samples are read: 56 rows, 5 per step, just over 2 epochs."""
    seen = []
    take = Samples.__getitem__
    monkeypatch.setattr(
        Samples,
        "__getitem__",
        lambda self, p: seen.append(randomness.row_at(7, p, 56)) or take(self, p),
    )
    train_here(wuerstchen, tmp_path, train_batch_size=5, max_train_steps=23)
    assert len(seen) == 115
    assert sorted(seen[:56]) == sorted(seen[56:112]) == list(range(56))


def test_main_is_what_the_command_runs():
    assert Path(train.__file__).name == "train.py"
    assert parse(Settings, ["--train_data_dir=x"]).train_batch_size == 1
