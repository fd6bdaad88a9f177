"""Optimizer state by name, the learning rate schedule, the moving average."""

import math

import pytest
import torch

from minwurst.run import state
from minwurst.step.optimizer import EMA, choose_adamw, learning_rates


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


def test_ema_follows_its_equation():
    _, trainable = toy()
    ema = EMA(trainable, decay=0.5)
    average = {name: weight.detach().clone() for name, weight in trainable.items()}
    for update, decay in ((1, 2 / 11), (2, 3 / 12), (40, 0.5)):
        for weight in trainable.values():
            weight.data.add_(torch.randn_like(weight))
        ema.update(update)
        for name, weight in trainable.items():
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
            torch.testing.assert_close(ema.average[name], average[name])


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


def test_copy_into_wants_the_same_names():
    _, trainable = toy()
    with pytest.raises(AssertionError, match="1.bias"):
        state.copy_into(trainable, {n: w for n, w in trainable.items() if n != "1.bias"})
