"""Named means, reported in one line wherever a number arises, and logged when an entry is due.

    metrics.report("text_norm", text.norm(dim=-1))     # a number, or a tensor of any shape
    metrics.by_time("loss", error, t)                  # per sample (B,), for each quarter of t

Any file may report any name at any step, on one rank or on all. Sums and counts stay on the device,
so reporting costs no synchronisation. What is reported inside a block of the prior is counted twice
with gradient checkpointing, which does not change a mean.
"""

import contextlib

import torch

from minwurst.step import distributed

totals = {}  # {name: (2,) fp32, sum and count since the last `means`}
QUARTERS = ("t_0.00_0.25", "t_0.25_0.50", "t_0.50_0.75", "t_0.75_1.00")
SHORT = ("0–¼", "¼–½", "½–¾", "¾–1")  # for the console


@torch.no_grad()
def report(name, values):
    """Add values to the mean of this name."""
    values = torch.as_tensor(values).detach().float()
    add(name, torch.stack([values.sum(), values.new_full((), values.numel())]))


@torch.no_grad()
def by_time(name, values, t):
    """Add values (B,) at times t (B,) to four means, called name/t_0.00_0.25 and so on."""
    is_in = quarter_of(t)[:, None] == torch.arange(4, device=t.device)                    # (B, 4)
    sums = torch.where(is_in, values.detach().float()[:, None], 0.0).sum(dim=0)
    for quarter, one in zip(QUARTERS, torch.stack([sums, is_in.sum(dim=0)], dim=1), strict=True):
        add(f"{name}/{quarter}", one)


def quarter_of(t):
    """The quarter of [0, 1] that each time lies in, 0 to 3."""
    return (4 * t).long().clamp(max=3)


def add(name, total):
    totals[name] = totals[name] + total if name in totals else total


@contextlib.contextmanager
def ignored():
    """Use as a context manager: what is reported inside is not counted."""
    before = dict(totals)
    try:
        yield
    finally:
        totals.clear()
        totals.update(before)


def means():
    """{name: mean over ranks and all values since the last call}. All ranks must call it."""
    mine = {}
    if totals:  # one copy from the device
        device = next(iter(totals.values())).device
        values = torch.stack([total.to(device) for total in totals.values()]).tolist()
        mine = dict(zip(totals, values, strict=True))
    totals.clear()
    joined = {}
    for part in distributed.gather_objects(mine):
        for name, (total, count) in part.items():
            before = joined.get(name, (0.0, 0.0))
            joined[name] = before[0] + total, before[1] + count
    return {name: total / count for name, (total, count) in joined.items() if count}
