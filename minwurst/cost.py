"""What a run will cost, reckoned before it starts. As a program: what fits on which card.

    python -m minwurst.cost

Weights, gradients and optimizer state are counted from the parameters. Activations are counted by
running the forward pass on tensors without memory and adding up what autograd keeps. The sums leave
out what the CUDA context, the allocator's gaps and the encoders' passing needs take, so the table
asks for a tenth of a card to be left free.
"""

import shutil

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from minwurst import report
from minwurst.config import UserError
from minwurst.prior import WuerstchenPrior

GIB = 2**30
PUBLISHED = dict(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24, dropout=0.1)
TEXT_PARAMETERS, ENCODER_PARAMETERS = 694_659_840, 20_198_000  # CLIP ViT-bigG's text tower, EfficientNetV2-S


def activations(prior_config, *, batch, cells, compute_type, gradient_checkpointing, tokens=77):
    """Bytes that one forward pass of the prior in training keeps for the backward pass.

    Under autocast this includes the weights' copies in the compute type; with gradient checkpointing
    the largest triple of blocks, computed again in the backward pass, is added.
    """

    def kept(depth, checkpointing):
        with FakeTensorMode():
            prior = WuerstchenPrior(**{**prior_config, "depth": depth})
            prior.gradient_checkpointing = checkpointing
            weights = {p.untyped_storage()._cdata for p in prior.parameters()}
            storages = {}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    storages[storage._cdata] = storage
                return tensor

            noisy = torch.empty(batch, prior_config["c_in"], cells, cells)
            t, text = torch.empty(batch), torch.empty(batch, tokens, prior_config["c_cond"])
            autocast = torch.autocast("cpu", compute_type, enabled=compute_type != torch.float32)
            with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                prior(noisy, t, text)
            return sum(storage.nbytes() for storage in storages.values())

    depth = prior_config["depth"]
    # Each triple of blocks keeps the same, so two shallow networks tell what any depth keeps.
    one, two = kept(1, gradient_checkpointing), kept(2, gradient_checkpointing)
    largest = kept(2, False) - kept(1, False) if gradient_checkpointing else 0
    return one + (depth - 1) * (two - one) + largest


def memory(parts, *, parameters, trained, compute_type, use_8bit_adam, use_ema):
    """Bytes on each device by purpose. parts: {"purpose": bytes} of what the caller knows already."""
    half = compute_type != torch.float32
    return {
        "weights": 4 * trained + (2 if half else 4) * (parameters - trained),
        "gradients": 4 * trained,
        "Adam": (2 if use_8bit_adam else 8) * trained,
        "EMA": 4 * trained if use_ema else 0,
        **parts,
    }


def size_of(module):
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def disk(trained, *, use_8bit_adam, use_ema, saves, limit, export):
    """(bytes of a checkpoint, bytes all of them and the exported folder will take at once)."""
    checkpoint = (4 + (2 if use_8bit_adam else 8) + (4 if use_ema else 0)) * trained
    kept = min(saves, limit + 1) if limit else saves  # a new one is written before the oldest goes
    return checkpoint, kept * checkpoint + export


def announce(settings, prior, trainable, text_encoder, image_encoder, rows, first_step, last_step, world):
    """Say what the run is going to do and take; UserError where the disk can't hold it."""
    trained = sum(p.numel() for p in trainable.values())
    compute_type = text_encoder.dtype
    batch, parameters = settings.train_batch_size, sum(p.numel() for p in prior.parameters())
    global_batch = batch * settings.gradient_accumulation_steps * world
    report.say(
        f"{rows} rows, {global_batch} pictures a step, steps {first_step} to {last_step} "
        f"({last_step * global_batch / rows:.1f} epochs in all)"
    )
    parts = {
        "encoders": size_of(text_encoder) + size_of(image_encoder),
        "activations": activations(
            dict(prior.config), batch=batch, cells=settings.resolution // 32, compute_type=compute_type,
            gradient_checkpointing=settings.gradient_checkpointing,
        ),
    }  # fmt: skip
    needs = memory(
        parts, parameters=parameters, trained=trained, compute_type=compute_type,
        use_8bit_adam=settings.use_8bit_adam, use_ema=settings.use_ema,
    )  # fmt: skip
    listed = ", ".join(f"{name} {gib(count)}" for name, count in needs.items() if count)
    report.say(f"trains {trained:,} of {parameters:,} parameters")
    report.say(f"memory on each device, about {gib(sum(needs.values()))}: {listed}")
    saves = last_step // settings.checkpointing_steps - (first_step - 1) // settings.checkpointing_steps
    saves += last_step % settings.checkpointing_steps > 0
    checkpoint, needed = disk(
        trained, use_8bit_adam=settings.use_8bit_adam, use_ema=settings.use_ema, saves=saves,
        limit=settings.checkpoints_total_limit, export=4 * parameters + size_of(text_encoder),
    )  # fmt: skip
    free = shutil.disk_usage(settings.output_dir).free
    report.say(f"disk: {gib(checkpoint)} a checkpoint, {gib(needed)} in all, {gib(free)} free")
    if free < min(needed, 2 * checkpoint):
        raise UserError(
            f"--output_dir {settings.output_dir}: {gib(free)} free, too little for a checkpoint of "
            f"{gib(checkpoint)} and its successor. Free some space or name a folder on another disk."
        )
    if free < needed:
        report.say("The disk will not hold all checkpoints: give --checkpoints_total_limit.")


def gib(count):
    """12345678 → "0.01"; under a hundredth of a GiB in MiB, with the unit."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def main():
    """Print, for cards of 16 to 80 GB, the largest batch at 768 pixels with each set of flags."""
    parameters = 993_636_896
    choices = [
        ("--mixed_precision bf16", False, False, False),
        ("… --gradient_checkpointing", True, False, False),
        ("… --gradient_checkpointing --use_ema", True, False, True),
        ("… --gradient_checkpointing --use_8bit_adam", True, True, False),
    ]
    cards = (16, 24, 48, 80)
    print("| full fine-tuning, 768 px | GiB at batch 1 | " + " | ".join(f"{c} GB" for c in cards) + " |")
    print("|---|---|" + "---|" * len(cards))
    for flags, checkpointing, eight_bit, ema in choices:
        kept = [
            activations(PUBLISHED, batch=b, cells=24, compute_type=torch.bfloat16, gradient_checkpointing=checkpointing)
            for b in (1, 2)
        ]
        per_picture = kept[1] - kept[0]
        frozen = {"encoders": 2 * TEXT_PARAMETERS + 4 * ENCODER_PARAMETERS, "activations": kept[0]}
        if checkpointing:  # without it they are among what autograd keeps
            frozen["bf16 copies of the weights"] = 2 * parameters
        total = sum(
            memory(
                frozen, parameters=parameters, trained=parameters, compute_type=torch.bfloat16,
                use_8bit_adam=eight_bit, use_ema=ema,
            ).values()
        )  # fmt: skip
        fits = [int((0.9 * card * 1e9 - total) // per_picture) + 1 for card in cards]
        cells = " | ".join(f"batch {n}" if n > 0 else "–" for n in fits)
        print(f"| `{flags}` | {total / GIB:.1f} | {cells} |")


if __name__ == "__main__":
    main()
