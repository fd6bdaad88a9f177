"""What only a GPU shows, in at most nine minutes.

    python -m tests.benchmark gpu
    python -m tests.benchmark gpu --rehearse        # every line of it with tiny sizes, on a CPU too

In this order: NCCL with one rank; runs that stop and resume, bit for bit, under deterministic
algorithms; bf16 and fp16 compared with fp32; then for full fine-tuning and LoRA, with and without
gradient checkpointing, the seconds, images per second, model FLOP utilisation (MFU) and memory of a
step, beside the reference implementation and the estimate of minwurst.cost; last an ablation.
A part that fails or does not fit is reported, and the rest goes on.
"""

import contextlib
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minwurst.base.console import gib
from minwurst.run import estimate, roofline
from minwurst.step import adapter
from minwurst.step.prior import PUBLISHED, WuerstchenPrior
from tests import benchmark_decode
from tests.benchmark_step import (
    Reference,
    autocast,
    default_optimizer,
    flops,
    make_batch,
    matmul_peak,
    our_optimizer,
    our_pass,
    reference_pass,
    relative,
    update,
)
from tests.timing import DEVICE, duration, note, row, take_turns, wait

MINUTES = 9
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
ON_GPU = DEVICE.type == "cuda"
TINY = {"c_in": 16, "c": 64, "c_cond": 1280, "c_r": 16, "depth": 2, "nhead": 4, "dropout": 0.1}


@dataclass
class Sizes:
    """What is measured; by default the published prior at 768 pixels."""

    config: dict = field(default_factory=lambda: PUBLISHED)
    latent_size: int = 24
    batches: tuple = (4, 16, 32)
    rounds: int = 5
    runs: tuple = ("train.py bf16", "train.py fp16", "lora.py bf16", "lora.py fp16")  # resumed


# ---- Steps.


def make_prior(kind, config):
    """A prior with random weights, made on the device."""
    torch.manual_seed(0)
    with DEVICE:
        prior = kind(**config)
    with torch.no_grad():
        prior.out[1].weight.mul_(0.1), prior.out[1].bias.mul_(0.1)
    return prior.to(DEVICE).train()


def adapters(prior, ours):
    """Add rank-4 LoRA adapters, ours or PEFT's, and return the trainable parameters."""
    prior.requires_grad_(False).to(torch.bfloat16)
    if ours:
        return list(adapter.add_adapters(prior, 4, 4, ["attention"]).values())
    import peft

    prior.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    return [weight for weight in prior.parameters() if weight.requires_grad]


def trained_of(prior, kind, ours):
    return list(prior.parameters()) if kind == "full" else adapters(prior, ours)


def their_step(prior, trained, latents, text):
    """One optimizer step of the reference, as a function."""
    optimizer = default_optimizer(trained)

    def step():
        reference_pass(prior, latents.bfloat16(), text, torch.bfloat16)
        update(optimizer, trained)

    return step


def our_step(prior, trained, latents, text, half=torch.bfloat16, make=our_optimizer, attention=None,
             reads=0):  # fmt: skip
    """One optimizer step as in the training loop, as a function.

    make: the optimizer. attention: restrict it to one implementation. reads: additional host–device
    synchronisations.
    """
    optimizer = make(trained)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=half == torch.float16)

    def step():
        with sdpa_kernel(attention) if attention else contextlib.nullcontext():
            loss = our_pass(prior, latents, text.to(half), half, scale=scaler.scale)
        for _ in range(reads):
            loss.item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


VARIANTS = {
    "fp16 and its loss scale": {"half": torch.float16},
    "torch's default AdamW": {"make": default_optimizer},
    "plain attention": {"attention": SDPBackend.MATH},
    "two more synchronisations": {"reads": 2},
}


# ---- What is measured of them.


def count_from_here():
    """Start counting the peak of memory; returns what is in use, in bytes."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    benchmark_decode.reset()
    return benchmark_decode.resident("VmRSS")


def peak_memory():
    return torch.cuda.max_memory_allocated() if ON_GPU else benchmark_decode.resident("VmHWM")


def kernels(function):
    """Number of GPU kernels that a call launches; in a rehearsal, operators on the CPU."""
    kind = "CUDA" if ON_GPU else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as log:
        function()
        wait()
    wanted = getattr(torch.autograd.DeviceType, kind)
    return sum(event.device_type == wanted for event in log.events())


def estimated(sizes, kind, batch, recompute, prior, trained):
    """Bytes that minwurst.cost would state for a step without encoders."""
    common = {"compute_type": torch.bfloat16, "gradient_checkpointing": recompute}
    adapt = functools.partial(adapter.add_adapters, rank=4, alpha=4, targets=["attention"])
    kept = estimate.activations(
        sizes.config, batch=batch, shape=(sizes.latent_size, sizes.latent_size),
        adapt=None if kind == "full" else adapt, **common,
    )  # fmt: skip
    total, moved = (sum(w.numel() for w in weights) for weights in (prior.parameters(), trained))
    needs = estimate.memory(
        total, moved, **common, use_8bit_adam=False, use_ema=False, activations=kept
    )
    return sum(needs.values())


def throughput(sizes, kind, recompute, batch):
    """A step of both sides, one after the other, because both together may not fit."""
    what = f"{kind}, batch {batch}" + ", gradient checkpointing" * recompute
    latents, text = make_batch(batch, sizes.latent_size, torch.bfloat16)
    found, peaks, counts = {}, {}, {}
    for side in ("reference", "ours"):
        ours, before = side == "ours", count_from_here()
        try:
            prior = make_prior(WuerstchenPrior if ours else Reference, sizes.config)
            trained = trained_of(prior, kind, ours)
            if recompute:
                prior.enable_gradient_checkpointing()
            make = our_step if ours else their_step
            step = make(prior, trained, latents, text)
            found[side] = take_turns({side: step}, sizes.rounds)[side]
            peaks[side] = peak_memory() - before
            counts[side] = kernels(step)
            if ours:
                expected = estimated(sizes, kind, batch, recompute, prior, trained)
        except torch.OutOfMemoryError:
            pass
        prior = trained = step = None
    if "ours" not in found:
        return note(what, "does not fit")
    if "reference" in found:
        row(what, found["reference"], found["ours"])
    else:
        note(f"{what}; the reference does not fit", duration(statistics.median(found["ours"])))
    cells = [gib(peaks[side]) if side in peaks else "" for side in ("reference", "ours")]
    print(f"| … peak memory; estimated {gib(expected)} | {' | '.join(cells)} | | |")
    print(f"| … kernels | {counts.get('reference', '')} | {counts['ours']} | | |")
    # A frozen weight needs no gradient: two products instead of three.
    work = flops(sizes.config, batch, sizes.latent_size) * (1 if kind == "full" else 2 / 3)
    for side, seconds in found.items():
        speed = statistics.median(seconds)
        used = ", ".join(f"{work / speed / p:.0%} of {name}" for name, p in peaks_of_card().items())
        note(f"… {side}", f"{batch / speed:.1f} images/s, MFU {used}")
    return None


@functools.cache
def peaks_of_card():
    """FLOP/s in bf16 to compare with, by name: of a product measured here, and stated."""
    measured = matmul_peak(torch.bfloat16, 3, (4096, 8192, 16384) if ON_GPU else (256, 512))
    peaks = {f"the {measured / 1e12:.3g} TFLOP/s of a product here": measured}
    name = torch.cuda.get_device_name() if ON_GPU else ""
    for card, (peak, _) in roofline.CARDS.items():
        if card in name.replace("H200", "H100"):  # the same chip
            peaks[f"the {peak / 1e12:.0f} stated"] = peak
    return peaks


def ablation(sizes):
    """Our step, full, at the middle batch, with and without one choice."""
    batch = sizes.batches[len(sizes.batches) // 2]
    prior = make_prior(WuerstchenPrior, sizes.config)
    trained = list(prior.parameters())
    prior.enable_gradient_checkpointing()
    batch_of = make_batch(batch, sizes.latent_size, torch.bfloat16)
    for name, options in VARIANTS.items():
        steps = {
            "with": our_step(prior, trained, *batch_of, **options),
            "without": our_step(prior, trained, *batch_of),
        }
        times = take_turns(steps, sizes.rounds)
        row(f"batch {batch}, gradient checkpointing: {name} (first), and as it is", *times.values())
        steps = None  # and with it Adam's memory


# ---- Exactness.


def precision(sizes):
    """Output and gradients of the same weights in half precision, compared with fp32."""
    config = {**sizes.config, "dropout": 0.0}
    prior = make_prior(WuerstchenPrior, config)
    latents, text = make_batch(sizes.batches[0], sizes.latent_size, torch.float32)
    t = torch.rand(len(latents), device=DEVICE)
    found = {}
    for name, half in {"fp32": torch.float32, **HALF}.items():
        prior.zero_grad()
        with autocast(half):
            output = prior(latents, t, text.to(half))
        output.float().square().mean().backward()
        gradients = torch.cat([weight.grad.flatten() for weight in prior.parameters()])
        found[name] = output.detach(), gradients.cpu()
    for name in HALF:
        apart = [relative(one, two) for one, two in zip(found[name], found["fp32"], strict=True)]
        note(
            f"{name} compared with fp32",
            f"output {apart[0]:.1e} apart, gradient {apart[1]:.1e}, "
            f"finite: {bool(found[name][1].isfinite().all())}",
        )


def one_rank(sizes):
    """NCCL (on a CPU gloo) with one rank: a pass under DDP, and its gradients with and without."""
    backend = "nccl" if ON_GPU else "gloo"
    prior = make_prior(WuerstchenPrior, TINY).eval()
    latents, text = make_batch(2, 3, torch.bfloat16)
    our_pass(prior, latents, text, torch.bfloat16)
    expected = [weight.grad.clone() for weight in prior.parameters()]
    prior.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            model = torch.nn.parallel.DistributedDataParallel(prior, gradient_as_bucket_view=True)
            our_pass(model, latents, text, torch.bfloat16)
            flag = torch.ones(3, device=DEVICE)
            torch.distributed.all_reduce(flag)
        finally:
            model = None
            torch.distributed.destroy_process_group()
    found = torch.cat([weight.grad.flatten() for weight in prior.parameters()])
    apart = relative(found, torch.cat([gradient.flatten() for gradient in expected]))
    note(f"{backend}, one rank under DDP", f"gradients {apart:.1e} apart from those without")


def resume(sizes):
    """In a process of its own, because cuBLAS reads its setting at the start."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmark_gpu", *sizes.runs], stdout=subprocess.PIPE,
        text=True, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )  # fmt: skip
    print("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("|")), end="")
    if done.returncode:
        raise RuntimeError("the process for exactness failed")


def resumed_runs(runs):
    """Print rows: 4 steps compared with 2, resumed for 2 more, bit for bit."""
    from tests import tiny
    from tests.conftest import saved, train_here

    torch.use_deterministic_algorithms(True)
    options = {"use_ema": True, "gradient_accumulation_steps": 2, "checkpointing_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        models = tiny.make(Path(folder) / "models")
        for script, name in map(str.split, runs):
            given = {**options, "script": script, "mixed_precision": name}
            whole, parts = Path(folder) / f"{script}{name}", Path(folder) / f"{script}{name}-parts"
            train_here(models, whole, **given)
            train_here(models, parts, **given, max_train_steps=2)
            train_here(models, parts, **given, resume_from_checkpoint="latest")
            one, two = saved(whole / "checkpoint-4"), saved(parts / "checkpoint-4")
            same = one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
            note(f"{script}, {name}, stopped and resumed", f"bit for bit the same: {same}")


# ---- The command.


def plan(sizes):
    """(what, function) of every part, in the order of what is wanted most."""
    for part in (one_rank, resume, precision):
        yield part.__name__, functools.partial(part, sizes)
    for recompute, kind, batch in itertools.product((False, True), ("full", "LoRA"), sizes.batches):
        what = f"{kind}, batch {batch}" + ", gradient checkpointing" * recompute
        yield what, functools.partial(throughput, sizes, kind, recompute, batch)
    yield "ablation", functools.partial(ablation, sizes)


def gpu(rounds, rehearse=False):
    if not ON_GPU and not rehearse:
        return note("on a GPU: NCCL, exactness, speed, memory", "not measured")
    sizes = Sizes(rounds=min(rounds, 5))
    if rehearse:
        sizes = Sizes(TINY, 3, batches=(2,), rounds=1, runs=("lora.py fp16",))
    device = torch.cuda.get_device_name() if ON_GPU else "a CPU, to rehearse"
    note("device", f"{device}, torch {torch.__version__}")
    end = time.monotonic() + 60 * MINUTES
    for what, part in plan(sizes):
        if time.monotonic() > end:
            note(what, "no time left")
            continue
        try:
            part()
        except Exception as error:
            if rehearse:
                raise
            traceback.print_exc()
            note(what, f"failed: {type(error).__name__}")
        count_from_here()  # frees what the part used
    return None


if __name__ == "__main__":
    resumed_runs(sys.argv[1:])
