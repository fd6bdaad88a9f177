"""What a run will cost, reckoned before it starts. As a program: what fits on which card.

    python -m minwurst.cost

Weights, gradients and optimizer state are counted from the parameters. Activations are counted by
running the forward pass on tensors without memory and adding up what autograd keeps. Left out is
what the CUDA context, gaps in the allocator and the encoders' passing needs take; so the table
leaves a tenth of each card free.
"""

import contextlib
import shutil

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from minwurst import dist, lora, report
from minwurst.config import UserError
from minwurst.effnet import EfficientNetEncoder
from minwurst.prior import WuerstchenPrior

PUBLISHED = {
    "c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24, "dropout": 0.1,
}  # fmt: skip


def activations(
    config, *, batch, cells, compute_type, gradient_checkpointing, tokens=77, adapt=None,
    kind=WuerstchenPrior,
):  # fmt: skip
    """Bytes that one forward pass of the prior keeps for the backward pass.

    config: the prior's. cells: side of the latent. adapt: puts adapters into a prior, whose other
    weights are then frozen in the compute type. kind: the prior's class. Under autocast the
    weights' copies in the compute type are among them; with gradient checkpointing the blocks that
    are computed again together in the backward pass come on top.
    """

    def kept(depth, recompute):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with FakeTensorMode(), default_type(compute_type if adapt else torch.float32):
            prior = kind(**{**config, "depth": depth})
            if adapt:
                adapt(prior)
            prior.gradient_checkpointing = recompute
            noisy = torch.empty(batch, config["c_in"], cells, cells, dtype=torch.float32)
            t = torch.empty(batch, dtype=torch.float32)
            text = torch.empty(batch, tokens, config["c_cond"], dtype=compute_type)
            autocast = torch.autocast("cpu", compute_type, enabled=compute_type != torch.float32)
            with autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
                prior(noisy, t, text)
            for weight in prior.parameters():  # they are counted as weights
                storages.pop(weight.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in storages.values())

    depth = config["depth"]
    if adapt:  # targets may name single blocks
        recomputed = kept(depth, False) // depth if gradient_checkpointing else 0
        return kept(depth, gradient_checkpointing) + recomputed
    # Each three blocks keep the same, so two shallow networks tell what any depth keeps.
    one, two = kept(1, gradient_checkpointing), kept(2, gradient_checkpointing)
    recomputed = kept(2, False) - kept(1, False) if gradient_checkpointing else 0
    return one + (depth - 1) * (two - one) + recomputed


@contextlib.contextmanager
def default_type(dtype):
    """Within the context torch makes tensors of this type where none is named."""
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
        # Autocast keeps them through the forward pass. Without recomputing, activations have them.
        "half copies of weights": 2 * trained * half * gradient_checkpointing,
        **more,
    }
    return {purpose: count for purpose, count in needs.items() if count}


def size_of(module):
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def announce(
    settings, prior, trainable, frozen, compute_type, *, rows, world, steps, adapt=None
):
    """Say what the run will do and take; UserError where the disk can't hold it.

    trainable: parameters by name. frozen: the encoders. steps: the range of steps to come. adapt:
    as in `activations`.
    """
    total = sum(weight.numel() for weight in prior.parameters())
    trained = sum(weight.numel() for weight in trainable.values())
    encoders = sum(size_of(encoder) for encoder in frozen)
    global_batch = settings.train_batch_size * settings.gradient_accumulation_steps * world
    epochs = (steps.stop - 1) * global_batch / rows
    report.say(
        f"{rows} rows, {global_batch} pictures a step, steps {steps.start} to {steps.stop - 1} "
        f"({epochs:.1f} epochs in all)"
    )
    common = {
        "compute_type": compute_type,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    adam = {"use_8bit_adam": settings.use_8bit_adam, "use_ema": settings.use_ema}
    cells = settings.resolution // 32
    batch = settings.train_batch_size
    kept = activations(dict(prior.config), batch=batch, cells=cells, adapt=adapt, **common)
    needs = memory(total, trained, **common, **adam, encoders=encoders, activations=kept)
    listed = ", ".join(f"{purpose} {gib(count)}" for purpose, count in needs.items())
    report.say(f"trains {trained:,} of {total:,} parameters")
    report.say(f"memory on each device, about {gib(sum(needs.values()))}: {listed}")

    dist.on_main(check_disk, settings, trained, len(steps))


def check_disk(settings, trained, steps):
    """The disk's part of `announce`: what checkpoints and result take, and what is free."""
    checkpoint = (4 + (2 if settings.use_8bit_adam else 8) + 4 * settings.use_ema) * trained
    saves = steps // settings.checkpointing_steps + 1
    limit = settings.checkpoints_total_limit
    at_once = min(saves, limit + 1) if limit else saves  # the new comes before the old goes
    needed = at_once * checkpoint + 4 * trained  # the result; the text encoder's copy not counted
    free = shutil.disk_usage(settings.output_dir).free
    report.say(f"disk: {gib(checkpoint)} a checkpoint, {gib(needed)} in all, {gib(free)} free")
    if free < min(needed, 2 * checkpoint):
        raise UserError(
            f"--output_dir {settings.output_dir}: {gib(free)} free, too little for a checkpoint of "
            f"{gib(checkpoint)} and its successor. Free some space or name a folder elsewhere."
        )
    if free < needed:
        report.say("The disk will not hold all checkpoints: set --checkpoints_total_limit.")


def gib(count):
    """12345678 → "11.8 MiB", 12345678901 → "11.50 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def main():
    """Print, for cards of 16 to 80 GB, the largest batch at 768 pixels with each set of flags."""
    with torch.device("meta"):
        total = sum(weight.numel() for weight in WuerstchenPrior(**PUBLISHED).parameters())
        image_encoder = size_of(EfficientNetEncoder())
    text_encoder = 2 * 694_659_840  # CLIP ViT-bigG's text tower in half precision
    cards = (16, 24, 48, 80)
    print("| with --mixed_precision=bf16 | batch 1 |", *(f"{card} GB |" for card in cards))
    print("|---|---|" + "---|" * len(cards))

    def adapt(prior):
        return lora.inject(prior, 4, 4, ["attention"])

    with torch.device("meta"):
        adapters = sum(weight.numel() for weight in adapt(WuerstchenPrior(**PUBLISHED)).values())
    for command in (
        "train.py",
        "train.py --gradient_checkpointing",
        "train.py --gradient_checkpointing --use_ema",
        "train.py --gradient_checkpointing --use_8bit_adam",
        "lora.py --rank=4",
        "lora.py --rank=4 --gradient_checkpointing",
    ):
        full = command.startswith("train.py")
        common = {
            "compute_type": torch.bfloat16,
            "gradient_checkpointing": "--gradient_checkpointing" in command,
        }
        one, two = (
            activations(PUBLISHED, batch=b, cells=24, adapt=None if full else adapt, **common)
            for b in (1, 2)
        )
        needs = memory(
            total if full else total + adapters, total if full else adapters, **common,
            use_8bit_adam="8bit" in command, use_ema="ema" in command,
            encoders=text_encoder + image_encoder, activations=one,
        )  # fmt: skip
        first = sum(needs.values())
        room = [int((0.9 * card * 1e9 - first) // (two - one)) + 1 for card in cards]
        fits = [f"batch {batch} |" if batch > 0 else "– |" for batch in room]
        print(f"| `{command}` | {gib(first)} |", *fits)


if __name__ == "__main__":
    main()
