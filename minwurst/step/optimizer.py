"""What turns gradients into weights: AdamW, the learning-rate schedule, the moving average.

    optimizer = choose_adamw()(parameters, lr=1e-4, betas=(0.9, 0.999), …)
    schedule = learning_rates(optimizer, "cosine", warmup=500, total=15000, updates=0)
    ema = EMA(trainable, decay=0.9999)
"""

import contextlib
import functools

import torch
from diffusers.optimization import get_scheduler


def choose_adamw(eight_bit=False):
    """The optimizer's constructor: torch's fused AdamW, one kernel for all weights, or 8-bit."""
    if not eight_bit:
        return functools.partial(torch.optim.AdamW, fused=True)
    import bitsandbytes  # optional; Settings.check has made sure that it is installed

    return bitsandbytes.optim.AdamW8bit


def learning_rates(optimizer, name, warmup, total, updates):
    """The schedule after `updates` optimizer steps, which are all that it counts."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, last_epoch=updates - 1
    )


class EMA:
    """Exponential moving average of the weights, fp32: average += (1 − decay)·(weight − average).

    Single steps are noisy; their average usually makes better images than the last weights. It
    remembers about 1/(1 − decay) steps: 10,000 for 0.9999. At first it remembers less, so that the
    initial weights are forgotten: update n has at most the decay n/(9 + n), and the first update
    copies the weights. These are the numbers of diffusers' EMAModel.
    """

    def __init__(self, trainable, decay):
        """trainable: parameters by name."""
        self.trainable, self.decay = trainable, decay
        self.average = {name: weight.detach().clone().float() for name, weight in trainable.items()}

    @torch.no_grad()
    def update(self, updates):
        """Average in the weights after optimizer step number `updates` (from 1)."""
        decay = min(self.decay, updates / (9 + updates)) if updates > 1 else 0.0
        torch._foreach_lerp_(list(self.average.values()), list(self.trainable.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """Use as a context manager: inside, the model holds the average; nothing is copied."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for name, weight in self.trainable.items():
            weight.data, self.average[name] = self.average[name], weight.data


class NoEMA:
    """Stands in for EMA when it is off, so that the loop needs no branch."""

    average = {}

    def update(self, updates):
        pass

    def in_place(self):
        return contextlib.nullcontext()
