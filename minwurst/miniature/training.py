"""How the parts of the miniature are trained: one resumable loop for all of them."""

import torch
from torch import nn

from minwurst.base.console import progress
from minwurst.run import checkpoint
from minwurst.run.state import State
from minwurst.step import diffusion
from minwurst.step.optimizer import EMA, choose_adamw, learning_rates

SEED = 0


def train(work, part, model, loss_of, *, steps, learning_rate, decay=0.998, every=500):
    """Train a part on loss_of(step) in bf16, resumably, and leave the averaged weights in it."""
    folder = work / "training" / part
    folder.mkdir(parents=True, exist_ok=True)
    trainable = dict(model.named_parameters())
    ema = EMA(trainable, decay)
    optimizer = choose_adamw()(
        trainable.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, eps=1e-8
    )
    # The buffers of batch norms are saved with the weights.
    state = State(weights=model.state_dict(keep_vars=True), optimizer=optimizer, ema=ema.average)
    done = 0
    if latest := checkpoint.find("latest", folder):
        tensors, numbers = checkpoint.load(latest)
        state.restore(tensors, numbers)
        done = numbers["step"]
    schedule = learning_rates(optimizer, "cosine", 200, steps, done)
    model.train()
    for step in progress(range(done + 1, steps + 1), part):
        torch.manual_seed(SEED * 10**9 + step)  # the same step after a restart
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(step)
        if step % every == 0 or step == steps:
            print(f"{part}: step {step}/{steps}, loss {loss.item():.5f}", flush=True)
            tensors, numbers = state.collect()
            checkpoint.save(folder, step, tensors, {"step": step, **numbers}, keep=1)
    ema.swap()
    return model.eval()


@torch.no_grad()
def refresh_batch_norms(model, call):
    """The statistics that belong to the averaged weights, from one pass over some images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean
    model.train()
    call()
    model.eval()


@torch.no_grad()
def in_parts(model, inputs):
    """model(inputs), a few rows at a time."""
    return torch.cat([model(part) for part in inputs.split(32)]).contiguous()


def denoising_loss(model, clean, condition):
    """Noise prediction at uniform t, weighted by p2. condition: keyword arguments of the model."""
    t = torch.rand(len(clean)).clamp(min=0.001)
    noise = torch.randn_like(clean)
    predicted = model(diffusion.add_noise(clean, noise, t), t, **condition).float()
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    return (error * diffusion.Objective("p2").loss_weight(t)).mean()
