"""What turns gradients into weights: optimizer, learning-rate schedule, moving average.

    optimizer = adamw(trainable.values(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    schedule = learning_rates(optimizer, "cosine", warmup=500, total=15000, updates=0)
    ema = EMA(trainable, decay=0.9999)

`trainable` maps names to parameters; optimizer state is saved and restored by these names, so that
a file says whose state it holds.
"""

import contextlib

import torch
from diffusers.optimization import get_scheduler

from minwurst import dist, report, signals
from minwurst.config import UserError


def adamw(parameters, *, eight_bit=False, **options):
    """torch's AdamW, in its fused form: one kernel for all weights instead of a dozen for each."""
    if not eight_bit:
        return torch.optim.AdamW(list(parameters), fused=True, **options)
    import bitsandbytes  # optional: Settings.check has seen that it is there

    return bitsandbytes.optim.AdamW8bit(list(parameters), **options)


def state_by_name(optimizer, trainable):
    """The optimizer's state as ({"weight.exp_avg": tensor, …}, {"weight.key": number, …})."""
    tensors, numbers = {}, {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if torch.is_tensor(value) else numbers)[f"{name}.{key}"] = value
    return tensors, numbers


def restore_state(optimizer, trainable, tensors, numbers):
    """The inverse. Learning rate and the other options stay as the optimizer was made with."""
    places = {name: place for place, name in enumerate(trainable)}
    state = {}
    for path, value in {**tensors, **numbers}.items():
        name, key = path.rsplit(".", 1)
        if torch.is_tensor(value):  # a copy: loaded tensors are windows into the checkpoint's file
            value = value.to(trainable[name].device, copy=True)
        state.setdefault(places[name], {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def restore_scaler(scaler, saved):
    """Go on with the saved loss scale; a run that had none, or has none now, starts without."""
    if saved and scaler.is_enabled():
        scaler.load_state_dict(saved)


def learning_rates(optimizer, name, *, warmup, total, updates):
    """The schedule as it stands after `updates` optimizer steps, the only thing it counts."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, last_epoch=updates - 1
    )


class FiniteGuard:
    """Stops a run before a number that is not finite reaches the weights.

    A loss that is not finite stops all ranks. So does a gradient, but in fp16: there it says that
    the loss scale was too large, the step is skipped and the scale halved, up to `patience` times
    in a row.
    """

    def __init__(self, fp16, rows_of=lambda step, rank: "unknown", patience=25):
        """rows_of(step, rank): the numbers of the rows that a rank took in a step."""
        self.fp16, self.rows_of, self.patience, self.skipped = fp16, rows_of, patience, 0

    def check(self, step, loss, norm, heard=signals.NOTHING):
        """(whether the update may be made, the strongest signal heard), the same on all ranks.

        heard: this rank's signal; it travels along, so that ranks agree once a step and not twice.
        Raises UserError to stop.
        """
        flags = torch.stack([loss.isfinite(), norm.isfinite()]).float()
        ranks = dist.share(torch.cat([flags, flags.new_tensor([heard])]))
        advice = "It changed no weight. Lower --learning_rate, or take bf16 instead of fp16."
        bad = [rank for rank, (loss_is_finite, *_) in enumerate(ranks) if not loss_is_finite]
        if bad:
            rows = self.rows_of(step, bad[0])
            raise UserError(
                f"Step {step}: the loss is not finite on rank {bad[0]}, rows {rows}. {advice}"
            )
        finite = all(norm_is_finite for _, norm_is_finite, _ in ranks)
        self.skipped = 0 if finite else self.skipped + 1
        if not finite and (not self.fp16 or self.skipped > self.patience):
            raise UserError(f"Step {step}: the gradient is not finite. {advice}")
        if not finite:
            report.say(f"step {step} skipped: gradient overflow in fp16, {self.skipped} in a row")
        return finite, signals.strongest(int(heard) for *_, heard in ranks)


class EMA:
    """The weights' exponential moving average, fp32: average += (1 − decay)·(weight − average).

    Early on the decay is (1 + n)/(10 + n) after n updates, so that the average forgets the start.
    """

    def __init__(self, trainable, decay):
        self.trainable, self.decay = trainable, decay
        self.average = {name: weight.detach().clone().float() for name, weight in trainable.items()}

    @torch.no_grad()
    def update(self, updates):
        """Take in the weights after optimizer step number `updates` (from 1)."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.average.values()), list(self.trainable.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """Within the context the model holds the average: the two change places, uncopied."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for name, weight in self.trainable.items():
            weight.data, self.average[name] = self.average[name], weight.data


class NoEMA:
    """Stands in for EMA where there is none, so that the loop needs no branch."""

    average = {}

    def update(self, updates):
        pass

    def in_place(self):
        return contextlib.nullcontext()


@torch.no_grad()
def copy_into(tensors, source):
    """Copy source's tensors into those of the same name; both must have the same names."""
    assert tensors.keys() == source.keys(), sorted(tensors.keys() ^ source.keys())[:3]
    for name, tensor in tensors.items():
        tensor.copy_(source[name])
