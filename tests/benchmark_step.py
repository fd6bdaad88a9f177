"""One step of each side, and the memory that its activations take; see benchmark.py."""

import statistics

import diffusers
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minwurst.base.console import gib
from minwurst.run import estimate
from minwurst.step import diffusion, randomness
from minwurst.step.distributed import to_device
from minwurst.step.optimizer import choose_adamw
from minwurst.step.prior import PUBLISHED, WuerstchenPrior
from tests import reference as reference_classes
from tests import tiny
from tests.timing import DEVICE, note, row, take_turns

Reference = reference_classes.WuerstchenPrior
PIECE = {**PUBLISHED, "depth": 2}  # the published width, 1/16 of the depth
SIZE = 24  # latent size at 768 pixels
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def relative(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def agree(found, expected, bound, what):
    assert relative(found, expected) < bound, f"{what} differs: {relative(found, expected):.1e}"


def make_pair(config):
    """(ours, the reference's) with the same random weights."""
    torch.manual_seed(0)
    ours = tiny.make_prior(**config)
    reference = Reference(**config)
    reference.load_state_dict(ours.state_dict())
    return ours.to(DEVICE), reference.to(DEVICE)


def make_batch(batch, size, compute_type):
    """(latents, text), random, shaped like the encoders' output."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, size, size, generator=generator)
    text = torch.randn(batch, 77, 1280, generator=generator)
    return diffusion.scale_latents(latents).to(DEVICE), text.to(DEVICE, compute_type)


def autocast(compute_type):
    return torch.autocast(DEVICE.type, compute_type, enabled=compute_type != torch.float32)


def our_pass(prior, latents, text, compute_type, position=0, scale=lambda loss: loss):
    """Forward and backward pass as in the training loop. scale: of the loss, for fp16."""
    positions = range(position, position + len(latents))
    objective = diffusion.Objective()
    t = to_device(objective.timesteps(randomness.uniform(1, positions)), DEVICE)
    noise = to_device(randomness.noise(1, positions, latents.shape[1:]), DEVICE)
    noisy = diffusion.add_noise(latents, noise, t)
    with autocast(compute_type):
        predicted = prior(noisy, t, text)
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    loss = (objective.loss_weight(t) * error).mean()
    scale(loss).backward()
    return loss.detach()


def reference_pass(prior, latents, text, compute_type):
    """Forward and backward pass as in the reference, with its two host–device synchronisations."""
    noise = torch.randn_like(latents)
    t = torch.rand(len(latents), device=DEVICE, dtype=compute_type)
    noisy = diffusers.DDPMWuerstchenScheduler().add_noise(latents, noise, t)
    with autocast(compute_type):
        predicted = prior(noisy, t, text)
    loss = F.mse_loss(predicted.float(), noise.float())
    loss.repeat(len(latents)).mean().item()
    loss.backward()
    return loss.detach().item()


def update(optimizer, trainable):
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def our_optimizer(trainable):
    return choose_adamw()(trainable, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)


def default_optimizer(trainable):
    return torch.optim.AdamW(trainable, lr=1e-5, weight_decay=0.0)


def assert_same(ours, reference, latents, text, bounds):
    """Outputs and gradients agree without dropout; an update of equal weights agrees too."""
    t = torch.rand(len(latents), device=DEVICE)
    for compute_type, bound in bounds.items():
        outputs = []
        for prior in (ours, reference):
            prior.eval().zero_grad()
            with autocast(compute_type):
                outputs.append(prior(latents, t, text.to(compute_type)).float())
            outputs[-1].square().mean().backward()
        agree(*outputs, bound, f"the output in {NAMES[compute_type]}")
        for (name, one), two in zip(ours.named_parameters(), reference.parameters(), strict=True):
            if not name.endswith("to_k.bias"):  # zero up to rounding
                agree(one.grad, two.grad, 5 * bound, f"{name}'s gradient in {NAMES[compute_type]}")
    weights = [torch.randn(1000, device=DEVICE) for _ in range(2)]
    weights[1].copy_(weights[0])
    for weight, make in zip(weights, (our_optimizer, default_optimizer), strict=True):
        weight.grad = weights[0].sin()
        make([weight]).step()
    agree(*weights, 1e-6, "AdamW")
    ours.train().zero_grad(), reference.train().zero_grad()


def flops(config, batch, size):
    """FLOPs of a forward and backward pass: three times those of the forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        noisy, text = torch.empty(batch, 16, size, size), torch.empty(batch, 77, 1280)
        WuerstchenPrior(**config)(noisy, torch.empty(batch), text)
    return 3 * counter.get_total_flops()


def matmul_peak(compute_type, rounds, sides=(2048, 4096)):
    """FLOP/s of the fastest square matrix product measured."""
    best = 0
    for side in sides:
        a = torch.randn(side, side, device=DEVICE, dtype=compute_type)
        times = take_turns({"product": lambda a=a: a @ a}, rounds)["product"]
        best = max(best, 2 * side**3 / min(times))
    return best


def step(rounds):
    """One step at the published width, depth 2, 24×24 latents, two images."""
    ours, reference = make_pair(PIECE)
    latents, text = make_batch(2, SIZE, torch.float32)
    assert_same(ours, reference, latents, text, {torch.float32: 1e-4, torch.bfloat16: 5e-2})
    both = {"theirs": reference, "ours": ours}
    makers = {"theirs": default_optimizer, "ours": our_optimizer}
    weights = {name: list(prior.parameters()) for name, prior in both.items()}
    optimizers = {name: makers[name](weights[name]) for name in both}
    passes, updates = {}, {}
    for compute_type in NAMES:
        half = text.to(compute_type)
        sides = {
            "theirs": lambda c=compute_type, x=half: reference_pass(reference, latents.to(c), x, c),
            "ours": lambda c=compute_type, x=half: our_pass(ours, latents, x, c),
        }
        passes[compute_type] = take_turns(sides, rounds)
    for name in both:
        (reference_pass if name == "theirs" else our_pass)(both[name], latents, text, torch.float32)
        torch.nn.utils.clip_grad_norm_(weights[name], 1.0)
        updates[name] = optimizers[name].step
    updates = take_turns(updates, rounds)
    for compute_type, name in NAMES.items():
        found = passes[compute_type]
        row(f"step, {name}: forward and backward", found["theirs"], found["ours"])
    row("step: AdamW", updates["theirs"], updates["ours"])
    whole = {
        c: {n: [a + b for a, b in zip(found[n], updates[n], strict=True)] for n in found}
        for c, found in passes.items()
    }
    for compute_type, name in NAMES.items():
        row(f"step, {name}: both", whole[compute_type]["theirs"], whole[compute_type]["ours"])
    row(
        "step, bf16 here, fp32 there: both",
        whole[torch.float32]["theirs"], whole[torch.bfloat16]["ours"],
    )  # fmt: skip
    count = flops(PIECE, 2, SIZE)
    for compute_type, name in NAMES.items():
        peak = matmul_peak(compute_type, rounds)
        reached = count / statistics.median(passes[compute_type]["ours"])
        note(
            f"{name}: FLOP/s of forward and backward",
            f"{reached / 1e9:.0f} G, {reached / peak:.0%} of a matrix product's {peak / 1e9:.0f} G",
        )


def memory(rounds=0):
    """Bytes autograd keeps for the backward pass per image at 768 pixels, at the published size.

    Computed as two images minus one, which excludes the bf16 copies of the weights that autocast
    keeps once on both sides.
    """
    torch.backends.cuda.enable_flash_sdp(True)  # as on a GPU; training on a CPU turns it off

    def a_picture(compute_type, kind, recompute=False):
        common = {"shape": (SIZE, SIZE), "compute_type": compute_type, "kind": kind}
        one, two = (
            estimate.activations(PUBLISHED, batch=batch, gradient_checkpointing=recompute, **common)
            for batch in (1, 2)
        )
        return two - one

    for compute_type, name in NAMES.items():
        theirs = a_picture(compute_type, Reference)
        for recompute in (False, True):
            ours = a_picture(compute_type, WuerstchenPrior, recompute)
            what = f"activations per image, {name}" + ", gradient checkpointing here" * recompute
            kept = f"{gib(theirs)} | {gib(ours)} | {ours / theirs:.2f}"
            print(f"| {what} | {kept} of it | counted |")
