"""How much memory and disk a run will need, estimated before it starts.

Weights, gradients and optimizer state are counted from the parameters. Activations are counted by
a forward pass on tensors without memory, which records what autograd keeps. Not included are the
CUDA context, fragmentation, and what the encoders need while they run.
"""

import contextlib
import functools
import math
import shutil

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from minwurst.base.console import gib, say
from minwurst.base.errors import UserError
from minwurst.base.settings import LoRASettings
from minwurst.edge.decoders import size_of
from minwurst.step import metrics
from minwurst.step.adapter import add_adapters
from minwurst.step.buckets import STRIDE
from minwurst.step.distributed import on_main
from minwurst.step.prior import WuerstchenPrior


def activations(
    config, *, batch, shape, compute_type, gradient_checkpointing, tokens=77, adapt=None,
    kind=WuerstchenPrior,
):  # fmt: skip
    """Bytes that one forward pass of the prior keeps for the backward pass.

    config: the prior's. shape: (h, w) of the latents. adapt: a function that adds adapters to a
    prior, whose other weights are then frozen in the compute type. kind: the prior's class. Under
    autocast, this includes the weights' copies in the compute type; with gradient checkpointing,
    the three blocks that the backward pass recomputes at a time.
    """

    def kept(depth, recompute):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        trained_type = compute_type if adapt else torch.float32
        with metrics.ignored(), FakeTensorMode(), default_type(trained_type):
            prior = kind.from_config({**config, "depth": depth})
            if adapt:
                adapt(prior)
            prior.gradient_checkpointing = recompute
            x, t, condition = WuerstchenPrior.example_inputs(prior, batch, shape, tokens)
            inputs = x.float(), t.float(), *(c.to(compute_type) for c in condition.values())
            autocast = torch.autocast("cpu", compute_type, enabled=compute_type != torch.float32)
            with autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
                prior(*inputs)
            for weight in prior.parameters():  # counted as weights
                storages.pop(weight.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in storages.values())

    depth = config["depth"]
    if adapt:  # targets may name single blocks
        recomputed = kept(depth, False) // depth if gradient_checkpointing else 0
        return kept(depth, gradient_checkpointing) + recomputed
    # Every three blocks keep the same, so two shallow networks determine any depth.
    one, two = kept(1, gradient_checkpointing), kept(2, gradient_checkpointing)
    recomputed = kept(2, False) - kept(1, False) if gradient_checkpointing else 0
    return one + (depth - 1) * (two - one) + recomputed


@contextlib.contextmanager
def default_type(dtype):
    """Use as a context manager: inside, this is torch's default data type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def memory(total, trained, *, compute_type, use_8bit_adam, use_ema, gradient_checkpointing, **more):
    """Bytes on a device by purpose. total, trained: the prior's parameters. more: known bytes."""
    half = compute_type != torch.float32
    needs = {
        "weights": 4 * trained + (2 if half else 4) * (total - trained),
        "gradients": 4 * trained,
        "Adam": (2 if use_8bit_adam else 8) * trained,
        "EMA": 4 * trained * use_ema,
        # Autocast keeps them through the forward pass. Without recomputation, they are already
        # among the activations.
        "half-precision copies of weights": 2 * trained * half * gradient_checkpointing,
        **more,
    }
    return {purpose: count for purpose, count in needs.items() if count}


def announce(run, prior, source):
    """Report what a Run will do and need; UserError if the disk is too small.

    prior: with its adapters, if any. source: where latents come from.
    """
    settings, layout, steps = run.settings, run.layout, run.steps
    total = sum(weight.numel() for weight in prior.parameters())
    trained = sum(weight.numel() for weight in prior.parameters() if weight.requires_grad)
    to_come = f"steps {run.step + 1} to {run.last_step}" if steps else "no step left"
    say(
        f"{run.rows} rows, {layout.global_batch} images per step, {to_come} ({run.epochs:.1f} "
        "epochs in total)"
    )
    common = {
        "compute_type": source.compute_type,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    largest, adapt = max(run.shapes, key=math.prod), None
    if isinstance(settings, LoRASettings):
        adapt = functools.partial(add_adapters, **settings.adapter_options())
    kept = activations(
        dict(prior.config), batch=layout.batch, shape=largest, adapt=adapt, **common
    )
    needs = memory(
        total, trained, **common, use_8bit_adam=settings.use_8bit_adam, use_ema=settings.use_ema,
        encoders=sum(map(size_of, source.frozen())), activations=kept,
    )  # fmt: skip
    listed = ", ".join(f"{purpose} {gib(count)}" for purpose, count in needs.items())
    say(f"trains {trained:,} of {total:,} parameters")
    say(f"memory per device, about {gib(sum(needs.values()))}: {listed}")
    on_main(check_disk, settings, trained, len(steps))
    if len(run.shapes) > 1:
        try_shape(prior, layout.batch, largest, source.compute_type)


def try_shape(prior, batch, shape, compute_type):
    """One forward and backward pass of the largest shape, so that memory runs out now or never."""
    x, t, condition = prior.example_inputs(batch, shape, tokens=77)
    kind, half = prior.device.type, compute_type != torch.float32
    trained = [weight for weight in prior.parameters() if weight.requires_grad]
    try:
        with metrics.ignored(), torch.autocast(kind, compute_type, enabled=half):
            output = prior(x, t, **condition)
        torch.autograd.grad(output.float().sum(), trained)  # leaves DDP's gradients alone
    except torch.OutOfMemoryError:
        height, width = (side * STRIDE for side in shape)
        raise UserError(
            f"--aspect_buckets: {batch} images of {width}×{height} pixels need more memory than "
            "there is. Lower --train_batch_size, or add --gradient_checkpointing.",
            one_rank=True,
        ) from None


def check_disk(settings, trained, steps):
    """Report the size of checkpoints and result; UserError if not even two checkpoints fit."""
    checkpoint = (4 + (2 if settings.use_8bit_adam else 8) + 4 * settings.use_ema) * trained
    saves = steps // settings.checkpointing_steps + 1
    limit, best = settings.kept_checkpoints()
    # One is deleted after the next is written.
    at_once = min(saves, limit + 1 + best) if limit else saves
    needed = at_once * checkpoint + 4 * trained  # the result, without its copy of the text encoder
    free = shutil.disk_usage(settings.output_dir).free
    say(f"disk: {gib(checkpoint)} per checkpoint, {gib(needed)} in total, {gib(free)} free")
    if free < min(needed, 2 * checkpoint):
        raise UserError(
            f"--output_dir {settings.output_dir}: {gib(free)} free, too little for a checkpoint of "
            f"{gib(checkpoint)} and the next one. Free some space, or use a folder on another disk."
        )
    if free < needed:
        say("The disk is too small for all checkpoints: set --checkpoints_total_limit.")
