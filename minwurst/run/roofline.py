"""What bounds a training step on a card: arithmetic and memory traffic, counted without either.

    parts = count(batch=16)                    # {part of a step: [(FLOPs, bytes), …] per operation}
    seconds = bound(parts["forward"], CARDS["H100"])

Every operation of a step at the published size is counted on tensors without memory, as PyTorch
runs it one by one: its matrix products, and the bytes that it reads and writes. An operation takes
at least the longer of FLOPs / peak and bytes / bandwidth. That is arithmetic, not a measurement:
launches are not in it, nor what stays in a cache or what a compiler fuses.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from minwurst.step import metrics
from minwurst.step.prior import PUBLISHED, WuerstchenPrior

# Stated peak of dense bf16 products in FLOP/s, and bandwidth in bytes/s.
CARDS = {"H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12), "RTX 4090": (165e12, 1.01e12)}
TRIPLES = 2  # blocks counted; every three blocks of the prior do the same work


class Counter(TorchDispatchMode):
    """Use as a context manager: `seen` gets (FLOPs, bytes) of every operation inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        packet, bytes_moved = function._overloadpacket, 0
        # Views, allocations and questions (prim: which device?) move nothing.
        silent = function.is_view or function.namespace == "prim" or "empty" in packet.__name__
        if not silent:
            tensors = torch.utils._pytree.tree_leaves([arguments, options or {}, result])
            tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            bytes_moved = sum(tensor.nbytes for tensor in tensors)
        self.seen.append((flops_of(packet, arguments, options or {}, result), bytes_moved))
        return result


def flops_of(packet, arguments, options, result):
    """The FLOPs of matrix products and attention; convolutions are 1 % of a step, and left out."""
    name = packet.__name__
    if "scaled_dot_product" in name:  # torch's registry lacks the CPU's kernels
        shapes = [tensor.shape for tensor in arguments[:4] if isinstance(tensor, torch.Tensor)]
        return sdpa_backward_flop_count(*shapes) if "backward" in name else sdpa_flop_count(*shapes)
    if packet not in flop_registry or "convolution" in name:
        return 0
    return flop_registry[packet](*arguments, **options, out_val=result)


def count(batch, kind=WuerstchenPrior, side=24, tokens=77):
    """(FLOPs, bytes) per operation of a step in bf16 at 768 pixels, {part: [(FLOPs, bytes), …]}.

    kind: the prior's class, called as kind(…)(x, t, text).
    """
    whole, parts = PUBLISHED, {}
    config = {**whole, "depth": TRIPLES}
    with metrics.ignored(), FakeTensorMode():
        prior = kind(**config).train()
        x = torch.randn(batch, whole["c_in"], side, side)
        t, text = torch.rand(batch), torch.randn(batch, tokens, whole["c_cond"]).bfloat16()
        with Counter() as forward, torch.autocast("cpu", torch.bfloat16):
            loss = (prior(x, t, text).float() - x).square().mean()
        with Counter() as backward:
            loss.backward()
    times = whole["depth"] / TRIPLES
    for name, counter in (("forward", forward), ("backward", backward)):
        parts[name] = [(flops * times, moved * times) for flops, moved in counter.seen]
    weights = 4 * 993_636_896
    parts["clip"] = [(0, weights), (0, 2 * weights)]  # the norm reads, the scaling reads and writes
    parts["AdamW"] = [(0, 7 * weights)]  # reads w, g, m, v; writes w, m, v
    parts["EMA"] = [(0, 3 * weights)]  # with --use_ema: reads both, writes the average
    return parts


def bound(operations, card):
    """(seconds at least, the fraction of them that memory traffic takes)."""
    peak, bandwidth = card
    seconds = [(flops / peak, moved / bandwidth) for flops, moved in operations]
    total = sum(map(max, seconds))
    return total, sum(moved for flops, moved in seconds if moved > flops) / total


def table(name, kind=WuerstchenPrior, batches=(1, 4, 16, 32)):
    """The lines of a table for a card: milliseconds at least, and how much of them is memory."""
    card = CARDS[name]
    yield f"| {name}, batch | forward | backward | clip | AdamW | EMA | images/s at most |"
    yield "|---" * 7 + "|"
    for batch in batches:
        found = [bound(operations, card) for operations in count(batch, kind).values()]
        cells = " | ".join(f"{1e3 * s:.1f} ms, memory {share:.0%}" for s, share in found)
        yield f"| {batch} | {cells} | {batch / sum(seconds for seconds, _ in found):.0f} |"
