"""Optimizer state by name, the learning rate schedule, the moving average."""

import math
import shutil

import pytest
import torch
from diffusers.training_utils import EMAModel

import train
from minwurst.base.errors import UserError
from minwurst.run import state
from minwurst.step.optimizer import EMA, choose_adamw, learning_rates
from tests.conftest import assert_bitwise_equal, saved, train_here


def toy(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    trainable = dict(model.named_parameters())
    return model, trainable


def step(model, optimizer, number):
    torch.manual_seed(number)
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_adamw(trainable, lr=1e-2):
    return choose_adamw()(trainable.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8)


def test_adamw_is_torchs():
    """The fused implementation takes the same steps as the plain one."""
    model, trainable = toy()
    plain, weights = toy()
    ours = make_adamw(trainable)
    theirs = torch.optim.AdamW(
        weights.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, foreach=False, fused=False
    )
    for number in range(5):
        step(model, ours, number), step(plain, theirs, number)
    for name, weight in trainable.items():
        torch.testing.assert_close(weight, weights[name])


def test_state_goes_round_by_name():
    model, trainable = toy()
    optimizer = make_adamw(trainable)
    for number in range(3):
        step(model, optimizer, number)
    tensors, numbers = state.optimizer_state(optimizer, trainable)
    assert "0.weight.exp_avg_sq" in tensors and tensors["1.bias.step"].item() == 3
    copy, weights = toy(1)
    state.copy_into(weights, {name: weight.detach().clone() for name, weight in trainable.items()})
    # The saved order does not matter, and the new run's learning rate is used.
    restored = make_adamw(weights, lr=5e-3)
    shuffled = {name: tensors[name].clone() for name in reversed(tensors)}
    state.restore_optimizer(restored, weights, shuffled, numbers)
    assert restored.param_groups[0]["lr"] == 5e-3
    restored.param_groups[0]["lr"] = 1e-2
    step(model, optimizer, 9), step(copy, restored, 9)
    assert all(torch.equal(trainable[name], weights[name]) for name in trainable)


def rates(name, updates, count, total=20):
    _, trainable = toy()
    optimizer = make_adamw(trainable)
    schedule = learning_rates(optimizer, name, warmup=4, total=total, updates=updates)
    found = []
    for _ in range(count):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedule_counts_optimizer_steps():
    found = rates("cosine", 0, 20)
    expected = [0.25e-2 * step for step in range(4)]
    expected += [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name",
    ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
)
def test_schedule_goes_on_where_it_was(name):
    whole = rates(name, 0, 12)
    assert rates(name, 7, 5) == whole[7:]


@pytest.mark.parametrize("decay", [0.9999, 0.3, 0.0])
def test_ema_equals_diffusers(decay):
    """diffusers' EMAModel with its defaults, whose first update copies the weights."""
    _, trainable = toy()
    ema, theirs = EMA(trainable, decay), EMAModel(trainable.values(), decay=decay)
    for update in range(1, 13):
        for weight in trainable.values():
            weight.data.add_(torch.randn_like(weight))
        ema.update(update)
        theirs.step(trainable.values())
        for average, expected in zip(ema.average.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)


def test_ema_changes_places_and_back():
    model, trainable = toy()
    ema = EMA(trainable, decay=0.5)
    for weight in trainable.values():
        weight.data.add_(1)
    ema.update(1)
    own = {name: weight.detach().clone() for name, weight in trainable.items()}
    average = {name: tensor.clone() for name, tensor in ema.average.items()}
    with pytest.raises(RuntimeError), ema.in_place():
        assert all(torch.equal(model.state_dict()[name], average[name]) for name in average)
        raise RuntimeError("leaves in the middle")
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in own)
    assert all(torch.equal(ema.average[name], average[name]) for name in average)


def changed(tensors, **replaced):
    return {**{name: tensor.clone() for name, tensor in tensors.items()}, **replaced}


@pytest.mark.parametrize(
    ("group", "change", "said"),
    [
        ("weights", {"0.bias": torch.zeros(7)}, r"weights.safetensors .* 0.bias \[7\], for \[8\]"),
        ("weights", {"2.bias": torch.zeros(7)}, "weights.safetensors .* 2.bias"),
        ("optimizer", {"0.weight.exp_avg": torch.zeros(2, 8)}, "optimizer.safetensors .*exp_avg"),
        ("optimizer", {"9.weight.exp_avg": torch.zeros(8, 4)}, "optimizer.safetensors .* 9.weight"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(group, change, said):
    model, trainable = toy()
    optimizer = make_adamw(trainable)
    step(model, optimizer, 1)
    held = state.State(weights=trainable, optimizer=optimizer)
    tensors, numbers = held.collect()
    tensors = {name: changed(part) for name, part in tensors.items()}
    tensors[group].update(change)
    step(model, optimizer, 2)
    before = changed(held.collect()[0]["weights"]), changed(held.collect()[0]["optimizer"])
    with pytest.raises(UserError, match=said):
        held.restore(tensors, numbers)
    after = held.collect()[0]["weights"], held.collect()[0]["optimizer"]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    del tensors["weights"]["1.bias"], tensors[group]
    with pytest.raises(UserError, match="weights.safetensors does not fit this model"):
        held.restore(tensors, numbers)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two parameter groups: Muon for matrices, AdamW for the rest."""

    def __init__(self, weights, lr):
        weights = list(weights)
        groups = [
            {"params": [w for w in weights if w.dim() == 2], "matrices": True},
            {"params": [w for w in weights if w.dim() != 2], "matrices": False},
        ]
        super().__init__(groups, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            kind = torch.optim.Muon if group["matrices"] else torch.optim.AdamW
            inner = kind(group["params"], lr=group["lr"])
            inner.state = self.state  # shared, so that it is saved with this optimizer
            for weight in group["params"]:
                self.state.setdefault(weight, {})
            inner.step()


def test_two_groups_resume_bit_for_bit(wuerstchen, tmp_path, monkeypatch):
    """A fork's optimizer in train.py: the order of groups is not the order of parameters."""
    monkeypatch.setattr(
        train, "choose_adamw", lambda _: lambda weights, lr, **_: MuonAndAdamW(weights, lr)
    )
    settings = {"checkpointing_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    whole = train_here(wuerstchen, tmp_path / "whole", **settings)
    parts = {"max_train_steps": 4, "resume_from_checkpoint": "latest", "lr_warmup_steps": 1}
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    train_here(wuerstchen, tmp_path / "parts", **{**settings, **parts})
    assert_bitwise_equal(whole / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    keys = {name.rsplit(".", 1)[1] for name in saved(whole / "checkpoint-4") if "optimizer" in name}
    assert keys == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
