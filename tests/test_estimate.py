"""Estimates printed before a run, compared with actual use."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from minwurst.base.errors import UserError
from minwurst.run import estimate, roofline
from minwurst.step import adapter
from tests import tiny
from tests.conftest import train_here

CONFIG = {"c_in": 16, "c": 64, "c_cond": 32, "c_r": 16, "depth": 5, "nhead": 4, "dropout": 0.1}


def kept_for_real(recompute, compute_type, adapt=None):
    """Bytes of the distinct tensors that autograd keeps of a forward pass, except the weights."""
    prior = tiny.make_prior(**CONFIG).train()
    if adapt:
        adapt(prior.to(compute_type))
    prior.gradient_checkpointing = recompute
    weights = {weight.untyped_storage().data_ptr() for weight in prior.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept alive, so that addresses stay unique
        return tensor

    inputs = torch.randn(3, 16, 6, 6), torch.rand(3), torch.randn(3, 77, 32, dtype=compute_type)
    autocast = torch.autocast("cpu", compute_type, enabled=compute_type != torch.float32)
    with autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
        prior(*inputs)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("compute_type", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(compute_type):
    counted = estimate.activations(
        CONFIG, batch=3, shape=(6, 6), compute_type=compute_type, gradient_checkpointing=False
    )
    assert counted == pytest.approx(kept_for_real(False, compute_type), rel=0.02)


@pytest.mark.parametrize("dora", [False, True])
def test_activations_of_adapters_are_those_of_a_real_pass(dora):
    """Frozen bf16 weights are not copied, and frozen layers keep fewer activations."""

    def adapt(prior):
        return adapter.add_adapters(prior, 4, 4, ["attention"], dora=dora)

    adapted, full = (
        estimate.activations(
            CONFIG,
            batch=3,
            shape=(6, 6),
            compute_type=torch.bfloat16,
            gradient_checkpointing=False,
            adapt=a,
        )
        for a in (adapt, None)
    )
    assert adapted == pytest.approx(kept_for_real(False, torch.bfloat16, adapt), rel=0.02)
    assert adapted < full


def test_recomputing_counts_what_it_keeps_and_one_triple_of_blocks():
    counted, plain = (
        estimate.activations(
            CONFIG, batch=3, shape=(6, 6), compute_type=torch.float32,
            gradient_checkpointing=recompute,
        )
        for recompute in (True, False)
    )
    kept = kept_for_real(True, torch.float32)
    assert kept < counted < kept + plain / 4  # one of 5 triples is less than a quarter


def test_memory_sums():
    half = {"compute_type": torch.bfloat16, "gradient_checkpointing": True}
    full = estimate.memory(1000, 1000, **half, use_8bit_adam=False, use_ema=True)
    assert full == {
        "weights": 4000, "gradients": 4000, "Adam": 8000, "EMA": 4000,
        "half-precision copies of weights": 2000,
    }  # fmt: skip
    some = estimate.memory(1000, 10, **half, use_8bit_adam=True, use_ema=False, encoders=7)
    assert some == {
        "weights": 2020, "gradients": 40, "Adam": 20, "half-precision copies of weights": 20,
        "encoders": 7,
    }  # fmt: skip


def test_the_announced_checkpoint_is_the_written_one(wuerstchen, tmp_path, capsys):
    out = train_here(wuerstchen, tmp_path, use_ema=True)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk: "))
    announced = float(said.split()[1])
    written = sum(file.stat().st_size for file in (out / "checkpoint-4").iterdir()) / 2**20
    assert announced == pytest.approx(written, rel=0.1)


def test_a_disk_too_small_is_refused_before_training(wuerstchen, tmp_path, monkeypatch):
    usage = estimate.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage._replace(free=10000))
    with pytest.raises(UserError, match="0.0 MiB free, too little for a checkpoint of 1.4 MiB"):
        train_here(wuerstchen, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_roofline_counts_a_steps_work():
    """FLOPs as derived by hand for the blocks' matrix products; a card's bounds add up."""
    c, pixels, text, batch = 1536, 24 * 24, 77, 2
    products = 8 * c * c * pixels                                  # the ResBlock's two layers
    products += 4 * c * c * pixels + 3 * c * c * text              # q, k, v, out; kv_mapper, k, v
    products += 2 * c * (pixels + text) * pixels                   # attention
    products += 2 * 64 * c                                         # the TimestepBlock
    once = (1280 * c + c * c) * text * 32 / 2                      # cond_mapper, times / TRIPLES
    expected = 2 * batch * (32 * products + once)
    parts = roofline.count(batch)
    forward, backward = (sum(f for f, _ in parts[name]) for name in ("forward", "backward"))
    assert forward == pytest.approx(expected, rel=0.01)
    assert backward == pytest.approx(2 * forward, rel=0.05)  # attention's recomputes its scores
    seconds, share = roofline.bound([(10e12, 1e9), (0, 1e12)], (1e12, 1e12))
    assert seconds == pytest.approx(11) and share == pytest.approx(1 / 11)
    (*_, line) = roofline.table("H100", batches=[4])
    assert line.startswith("| 4 | ") and line.count("|") == 8
