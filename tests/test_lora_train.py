"""lora.py end to end: resuming, multiple ranks and batch splits, for adapters."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file

from minwurst.base.errors import UserError
from minwurst.edge import lora_file, models
from minwurst.run import checkpoint
from minwurst.step import adapter, diffusion, randomness
from minwurst.step.encoders import encode_text
from minwurst.step.images import open_image, preprocess
from tests import plain, reference, tiny
from tests.conftest import (
    assert_bitwise_equal,
    difference,
    flags,
    relative,
    saved,
    torchrun,
    train_here,
)

LORA = {"script": "lora.py", "rank": 4, "lora_alpha": 8, "learning_rate": 5e-3}
EVERYTHING = {
    **LORA, "use_ema": True, "lora_dropout": 0.2, "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3, "gradient_accumulation_steps": 2, "train_batch_size": 1,
    "dataloader_num_workers": 2, "caption_dropout": 0.3, "checkpointing_steps": 2,
    "gradient_checkpointing": True,
}  # fmt: skip


def weights(folder):
    return load_file(folder / "weights.safetensors")


@torch.no_grad()
def error(prior, wuerstchen):
    """Mean squared error on all images, at timesteps and noise not used in training."""
    rows = tiny.rows()
    encoder = models.load_image_encoder(wuerstchen / "image_encoder")
    tokenizer, text_encoder = models.load_text(wuerstchen, torch.float32)
    pixels = torch.stack([preprocess(open_image(row), 64) for row in rows])
    latents = diffusion.scale_latents(encoder(pixels))
    text = encode_text(tokenizer, text_encoder, list(rows["text"]))
    t, noise = torch.linspace(0.05, 1, 56), randomness.noise(99, range(56), latents.shape[1:])
    return (prior(diffusion.add_noise(latents, noise, t), t, text) - noise).square().mean().item()


@pytest.mark.slow
def test_a_run_and_its_file(wuerstchen, tmp_path, capsys):
    """Only adapters are trained and saved; the file contains their EMA and lowers the error."""
    out = train_here(
        wuerstchen, tmp_path, **LORA, use_ema=True, ema_decay=0.9, lora_targets="all-linear",
        max_train_steps=120, train_batch_size=8, mixed_precision="bf16",
    )  # fmt: skip
    assert "trains 12,288 of " in capsys.readouterr().out
    held = weights(out / "checkpoint-120")
    assert {name.rsplit(".", 1)[-1] for name in held} == {"lora_A", "lora_B"}
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    average = load_file(out / "checkpoint-120" / "ema.safetensors")
    a, b = lora_file.read(out)["blocks.2.attention.to_q"]
    assert torch.equal(a, average["blocks.2.attention.to_q.lora_A"])
    assert relative(b, 2 * average["blocks.2.attention.to_q.lora_B"]) < 1e-6
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "checkpoint-120", "curves.png", "data.png", "good_rows.json", "logs",
        lora_file.FILE, "run.json",
    ]  # fmt: skip
    prior = lora_file.load(models.load_prior(wuerstchen), out)
    trained = error(prior, wuerstchen)
    adapter.set_scale(prior, 0)
    assert trained < 0.95 * error(prior, wuerstchen)


@pytest.mark.parametrize(
    ("objective", "dora"), [({}, False), (plain.AUTHORS, False), ({}, True)],
    ids=["default", "authors", "dora"],
)  # fmt: skip
def test_equals_a_plain_loop_with_peft(still_wuerstchen, tmp_path, objective, dora):
    """Adapters and their average after 4 steps, from the same initial weights."""
    settings = {**plain.FLAGS, **objective, "lora_alpha": 8, "use_dora": dora}
    out = train_here(still_wuerstchen, tmp_path, "lora.py", **settings)
    torch.manual_seed(7)
    start = models.load_prior(still_wuerstchen)
    start = adapter.add_adapters(start, 4, 8.0, ["attention"], dora=dora)
    prior = reference.load_prior(still_wuerstchen / "prior")
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, use_dora=dora)
    prior.train().add_adapter(options)
    trained = {
        name.replace(".default.weight", ""): weight
        for name, weight in prior.named_parameters()
        if weight.requires_grad
    }
    for name, weight in trained.items():
        weight.data.copy_(start[name].data)
    average = plain.train(prior, list(trained.values()), still_wuerstchen, objective)
    average = dict(zip(trained, average, strict=True))
    assert difference(weights(out / "checkpoint-4"), trained) < 1e-6
    assert difference(load_file(out / "checkpoint-4" / "ema.safetensors"), average) < 1e-6


@pytest.mark.parametrize(
    ("precision", "dora"), [("no", False), ("bf16", False), ("fp16", False), ("bf16", True)]
)
def test_resumed_run_is_the_same_run(wuerstchen, tmp_path, precision, dora):
    settings = {**EVERYTHING, "mixed_precision": precision, "use_dora": dora}
    whole = train_here(wuerstchen, tmp_path / "whole", **settings)
    parts = train_here(wuerstchen, tmp_path / "parts", **{**settings, "max_train_steps": 2})
    train_here(wuerstchen, parts, **settings, resume_from_checkpoint="latest")
    assert_bitwise_equal(whole / "checkpoint-4", parts / "checkpoint-4")
    assert (whole / lora_file.FILE).read_bytes() == (parts / lora_file.FILE).read_bytes()
    ends = saved(whole / "checkpoint-2"), saved(whole / "checkpoint-4")
    for part in ("lora_B", "lora_magnitude_vector")[: 1 + dora]:
        name = f"weights/blocks.2.attention.to_q.{part}"
        assert not torch.equal(ends[0][name], ends[1][name])


@pytest.mark.slow
def test_any_cut_of_the_batch_is_the_same_run(still_wuerstchen, tmp_path):
    """1 rank × 4 = 4 micro-steps × 1 = 2 ranks × 2, up to float error."""
    schedule = {**LORA, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "adam_epsilon": 1e-6}
    one = train_here(still_wuerstchen, tmp_path / "one", **schedule)
    pieces = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    four = train_here(still_wuerstchen, tmp_path / "four", **schedule, **pieces)
    cut = {"train_batch_size": 2, "checkpointing_steps": 2}
    two = torchrun(2, still_wuerstchen, tmp_path / "two", **schedule, **cut)
    # One process resumes from the two-rank checkpoint-2 with the same sample stream.
    back = shutil.copytree(two, tmp_path / "back")
    checkpoint.delete(back / "checkpoint-4")
    train_here(still_wuerstchen, back, **schedule, resume_from_checkpoint="latest")
    expected = weights(one / "checkpoint-4")
    for folder in (four, two, back):
        for name, tensor in weights(folder / "checkpoint-4").items():
            assert relative(tensor, expected[name]) < 1e-4, name


def test_a_single_block_can_be_adapted(wuerstchen, tmp_path):
    out = train_here(wuerstchen, tmp_path, **LORA, lora_targets="blocks.5.attention.to_q")
    assert list(lora_file.read(out)) == ["blocks.5.attention.to_q"]


def test_a_resumed_run_needs_its_start_no_more(wuerstchen, tmp_path):
    first = train_here(wuerstchen, tmp_path / "first", **LORA, max_train_steps=1)
    second = tmp_path / "second"
    train_here(wuerstchen, second, **LORA, lora_weights=first, max_train_steps=1)
    train_here(wuerstchen, second, **LORA, max_train_steps=2, resume_from_checkpoint="latest")


def test_starting_from_a_file(wuerstchen, tmp_path):
    """A run started from another run's file begins with that run's final adapters."""
    first = train_here(wuerstchen, tmp_path / "first", **LORA)
    second = train_here(
        wuerstchen, tmp_path / "second", **{**LORA, "lora_alpha": 2, "learning_rate": 0.0},
        lora_weights=first, max_train_steps=1,
    )  # fmt: skip
    for name, (a, b) in lora_file.read(second).items():
        before = lora_file.read(first)[name]
        assert torch.equal(a, before[0]) and relative(b, before[1]) < 1e-6


def test_another_base_rank_or_kind_is_not_resumed(wuerstchen, tmp_path):
    other = shutil.copytree(wuerstchen, tmp_path / "other")
    tiny.make_prior(dropout=0.1).save_pretrained(other / "prior")
    out = train_here(wuerstchen, tmp_path / "out", **LORA, max_train_steps=1)
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(UserError, match="--rank was 4 and is now 2, which would be another run"):
        train_here(wuerstchen, out, **{**LORA, "rank": 2}, **again)
    with pytest.raises(UserError, match="--use_dora was False and is now True, which would be an"):
        train_here(wuerstchen, out, **LORA, use_dora=True, **again)
    with pytest.raises(UserError, match="the prior .* which would be another run"):
        train_here(other, out, **LORA, **again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 1000}, "--rank is 1000; blocks.2.attention.to_q allows 1 to 64"),
        ({"lora_targets": "to_w"}, "--lora_targets to_w: matches no layer"),
        ({"lora_weights": "nothing"}, "--lora_weights nothing: no such file"),
    ],
    ids=["rank", "target", "file"],
)
def test_mistakes_are_one_line(warm, wuerstchen, tmp_path, changed, said):
    code, printed = warm.run("lora.py", flags(wuerstchen, tmp_path / "out", **changed))
    assert code == 2 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"lora.py: {said}")
