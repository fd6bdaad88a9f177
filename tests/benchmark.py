"""Speed and memory compared with the reference implementation.

    python -m tests.benchmark                        # everything: half an hour on two cores
    python -m tests.benchmark step memory --rounds=9

The reference follows diffusers' training script: diffusers' prior with its default attention,
torch's default AdamW, timesteps sampled in the compute type, two host–device synchronisations per
micro-step, and images decoded and encoded again in every epoch. Both sides alternate in one process
(complete runs: one process each, alternating), so that other load on the machine affects both.
Times are medians over rounds; ratios are medians of the per-round ratios, with the lowest and the
highest. Before timing, both sides are checked to compute the same results. tests/README.md has the
output.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minwurst.base.console import gib
from minwurst.base.settings import Settings, parse
from minwurst.edge import cache, models
from minwurst.run import checkpoint, estimate, roofline, state
from minwurst.run.saver import Saver
from minwurst.step import adapter, diffusion, images, randomness
from minwurst.step.distributed import to_device
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.images import open_image, preprocess
from minwurst.step.optimizer import choose_adamw
from minwurst.step.prior import PUBLISHED, WuerstchenPrior
from minwurst.step.samples import collate
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt
from tests import reference as reference_classes
from tests import tiny

Reference = reference_classes.WuerstchenPrior
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIECE = {**PUBLISHED, "depth": 2}  # the published width, 1/16 of the depth
WORK = Path("runs/benchmark")
MODEL = WORK / "wuerstchen"
SIZE = 24  # latent size at 768 pixels
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


# ---- Alternating timing.


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(sides, rounds):
    """Seconds per round of each function in `sides`, by name. A first warm-up round is dropped."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(sides):
            wait()
            start = time.perf_counter()
            sides[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def duration(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def row(what, theirs, ours):
    """Print a table row from the seconds per round of both sides."""
    ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
    medians = [duration(statistics.median(found)) for found in (theirs, ours)]
    spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
    print(f"| {what} | {medians[0]} | {medians[1]} | {statistics.median(ratios):.2f} | {spread} |")
    sys.stdout.flush()


def note(what, text):
    print(f"| {what} | | {text} | | |", flush=True)


def relative(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def agree(found, expected, bound, what):
    assert relative(found, expected) < bound, f"{what} differs: {relative(found, expected):.1e}"


# ---- One step of each side.


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


def our_pass(prior, latents, text, compute_type, position=0):
    """Forward and backward pass as in the training loop."""
    positions = range(position, position + len(latents))
    objective = diffusion.Objective()
    t = to_device(objective.timesteps(randomness.uniform(1, positions)), DEVICE)
    noise = to_device(randomness.noise(1, positions, latents.shape[1:]), DEVICE)
    noisy = diffusion.add_noise(latents, noise, t)
    with autocast(compute_type):
        predicted = prior(noisy, t, text)
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    loss = (objective.loss_weight(t) * error).mean()
    loss.backward()
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


def matmul_peak(compute_type, rounds):
    """FLOP/s of the fastest square matrix product measured."""
    best = 0
    for side in (2048, 4096) if DEVICE.type == "cpu" else (4096, 8192, 16384):
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


# ---- Memory, counted on meta tensors.


def memory(rounds=0):
    """Bytes autograd keeps for the backward pass per image at 768 pixels, at the published size.

    Computed as two images minus one, which excludes the bf16 copies of the weights that autocast
    keeps once on both sides.
    """

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


# ---- Images and captions.


def make_pictures(folder, count, side=1024):
    """Captioned JPEG images: the test images, enlarged."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = tiny.rows().select(range(count))
        lines = []
        for number, found in enumerate(rows):
            large = open_image(found).resize((side, side), Image.Resampling.LANCZOS)
            large.save(folder / f"{number:03}.jpg", quality=92)
            lines.append({"file_name": f"{number:03}.jpg", "text": found["text"]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def make_wuerstchen(folder):
    """Random encoders of the published sizes, in the dtypes used in training, and a small prior."""
    if not (folder / "prior").is_dir():
        rows = tiny.rows()
        tokenizer = tiny.make_tokenizer(rows["text"], size=700, length=77)
        tokenizer.save_pretrained(folder / "tokenizer")
        end = tokenizer.eos_token_id
        bigg = transformers.CLIPTextConfig(  # the text tower of CLIP ViT-bigG
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
            num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        with estimate.default_type(torch.bfloat16):
            transformers.CLIPTextModel(bigg).save_pretrained(folder / "text_encoder")
        encoder = EfficientNetEncoder().train()
        with torch.no_grad():  # calibrated batch norms give latents of unit variance
            for module in encoder.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None
            pixels = [preprocess(open_image(rows[n]), 256) for n in range(8)]
            encoder(torch.stack(pixels))
        encoder.save_pretrained(folder / "image_encoder")
        tiny.make_prior(c=128, c_cond=1280, nhead=2).save_pretrained(folder / "prior")
    return folder


def reference_pixels(picture, side):
    """Preprocess as torchvision does: resize the whole image, crop, normalise."""
    picture = picture.convert("RGB")
    width, height = picture.size
    size = [int(side * length / min(width, height)) for length in (width, height)]
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((length - side) / 2) for length in size)
    picture = picture.crop((left, top, left + side, top + side))
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
    numbers = images.IMAGENET_MEAN, images.IMAGENET_STD
    mean, std = (torch.tensor(x)[:, None, None] for x in numbers)
    return values.sub(mean).div(std)


def reference_image_encoder(folder):
    """The encoder in the default memory format; the caller casts it to the compute type."""
    encoder = EfficientNetEncoder.from_pretrained(folder, low_cpu_mem_usage=False)
    return encoder.requires_grad_(False).eval().to(DEVICE)


def open_pictures():
    pictures = make_pictures(WORK / "pictures-48", 48)
    return tiny.rows(train_data_dir=str(pictures))


def read_data(rounds):
    """Decode and preprocess eight JPEG images of 1024 pixels for the image encoder."""
    rows = open_pictures().select(range(8))
    files = [found["image"]["path"] for found in rows]

    def theirs():
        return [reference_pixels(Image.open(file), 768) for file in files]

    def ours():
        return [preprocess(open_image(rows[n]), 768) for n in range(8)]

    for one, two in zip(theirs(), ours(), strict=True):
        agree(two, one, 2e-2, "a picture")
    row("data: 8 JPEG images to pixels", *take_turns({"t": theirs, "o": ours}, rounds).values())


@torch.no_grad()
def encoded_both_ways(folder, rows):
    """Functions (encode as the reference, read from a cache), checked to return the same."""
    encoders = models.make_encoders(tiny.parts(folder), torch.bfloat16, DEVICE)
    image_encoder = reference_image_encoder(folder / "image_encoder")

    @torch.no_grad()
    def theirs():
        pixels = torch.stack([reference_pixels(open_image(row), 768) for row in rows])
        latents = image_encoder(pixels.to(DEVICE, image_encoder.dtype)).add(1.0).div(42.0)
        return latents, encoders.condition(list(rows["text"]))["text"]

    with tempfile.TemporaryDirectory(dir=WORK) as place:
        with contextlib.redirect_stdout(sys.stderr):  # keeps its output out of the table
            data = tiny.data(rows, 768)
            encoded = cache.encode_all(Path(place), data, encoders)
        buckets = tiny.samples(rows, 768, 1).buckets
        samples = cache.EncodedSamples(rows, buckets, 1, encoded=encoded)
        found = [samples[n] for n in range(len(rows))]  # maps the files, so they can be deleted

    def ours():
        return encoded.encode(collate([samples[position] for position in range(len(rows))]))

    order = [encoded.rows[samples.row(n)["number"]][1] for n in range(len(found))]
    latents, condition = ours()
    for one, two in zip((latents, condition["text"]), theirs(), strict=True):
        agree(one, two[order], 2e-2, "a pair from the cache")
    image_encoder.to(torch.bfloat16)  # the reference's type, too coarse to compare in
    return theirs, ours


@torch.no_grad()
def encode(rounds, count=8):
    """Images and captions to latents and text states: encoded, or read from the cache."""
    rows = open_pictures().select(range(count))
    folder, half = make_wuerstchen(MODEL), torch.bfloat16
    their_pairs, our_pairs = encoded_both_ways(folder, rows)
    encoders = models.make_encoders(tiny.parts(folder), half, DEVICE)
    pixels = torch.stack([preprocess(open_image(found), 768) for found in rows])
    captions = list(rows["text"])
    sides = {
        "pairs encoded": their_pairs, "pairs read": our_pairs,
        "images": lambda: encoders.latents(pixels),
        "captions": lambda: encoders.condition(captions),
    }  # fmt: skip
    found = take_turns(sides, rounds)
    what = f"{count} files to latents and text, here from the cache"
    row(what, found["pairs encoded"], found["pairs read"])
    for what in ("images", "captions"):
        note(f"encode {count} {what}", duration(statistics.median(found[what])))


def save(rounds):
    """Save weights and optimizer of PIECE; ours adds checksums, flushing and an atomic rename."""
    prior, _ = make_pair(PIECE)
    trainable = dict(prior.named_parameters())
    optimizer = our_optimizer(trainable.values())
    our_pass(prior, *make_batch(1, 3, torch.float32), torch.float32)
    optimizer.step()
    size = 3 * sum(weight.nbytes for weight in trainable.values())
    with tempfile.TemporaryDirectory(dir=WORK) as place:
        place = Path(place)

        def theirs():
            save_file(prior.state_dict(), place / "model.safetensors")
            torch.save(optimizer.state_dict(), place / "optimizer.bin")

        def ours():
            tensors, _ = state.optimizer_state(optimizer, trainable)
            checkpoint.save(place, 1, {"weights": trainable, "optimizer": tensors}, {})

        found, background, blocked = take_turns({"t": theirs, "o": ours}, rounds), Saver(), []
        for _ in range(rounds):
            tensors, _ = state.optimizer_state(optimizer, trainable)
            start = time.perf_counter()
            groups = {"weights": trainable, "optimizer": tensors}
            background.save(place, 1, groups, {}, None)
            blocked.append(time.perf_counter() - start)
            background.wait()
    row(f"save: {gib(size)}; here with SHA-256 and flushed to disk", *found.values())
    row("… how long --async_checkpointing blocks", found["t"], blocked)


# ---- Complete runs, one process each.


def reference_run(settings):
    """A complete uncached run of the reference: training loop, then weights and optimizer saved."""
    half = {"no": torch.float32, "bf16": torch.bfloat16}[settings.mixed_precision]
    torch.manual_seed(settings.seed)
    folder = Path(settings.pretrained_prior_model_name_or_path)
    tokenizer, text_encoder = models.load_text(folder, half)
    text_encoder.to(DEVICE)
    image_encoder = reference_image_encoder(settings.image_encoder_name_or_path).to(half)
    prior = Reference.from_pretrained(folder / "prior", low_cpu_mem_usage=False)
    prior.to(DEVICE).train()
    optimizer = default_optimizer(prior.parameters())
    rows = datasets.load_dataset("imagefolder", data_dir=settings.train_data_dir, split="train")

    def transform(found):
        words = tokenizer(found["text"], padding="max_length", truncation=True)
        pixels = [reference_pixels(picture, settings.resolution) for picture in found["image"]]
        return {"pixels": pixels, "words": words.input_ids, "mask": words.attention_mask}

    def collate(found):
        pixels = torch.stack([one["pixels"] for one in found])
        return pixels, *(torch.tensor([one[name] for one in found]) for name in ("words", "mask"))

    loader = torch.utils.data.DataLoader(
        rows.with_transform(transform), batch_size=settings.train_batch_size, shuffle=True,
        collate_fn=collate, num_workers=settings.dataloader_num_workers,
    )  # fmt: skip
    for _ in range(settings.num_train_epochs):
        for pixels, words, mask in loader:
            with torch.no_grad():
                text = text_encoder(words.to(DEVICE), attention_mask=mask.bool().to(DEVICE))
                latents = image_encoder(pixels.to(DEVICE, half)).add(1.0).div(42.0)
            reference_pass(prior, latents, text.last_hidden_state, half)
            update(optimizer, prior.parameters())
    out = Path(settings.output_dir)
    prior.save_pretrained(out)
    torch.save(optimizer.state_dict(), out / "optimizer.bin")


def run(rounds, epochs=10, count=48):
    """Start to result: 48 JPEG images, real-size encoders, a small prior, bf16, ten epochs."""
    pictures, folder = make_pictures(WORK / f"pictures-{count}", count), make_wuerstchen(MODEL)
    encoded_both_ways(folder, open_pictures().select(range(2)))
    common = [
        f"--pretrained_prior_model_name_or_path={folder}",
        f"--image_encoder_name_or_path={folder / 'image_encoder'}",
        f"--train_data_dir={pictures}", "--resolution=768", "--train_batch_size=4",
        f"--num_train_epochs={epochs}", "--mixed_precision=bf16", "--seed=1", "--report_to=none",
    ]  # fmt: skip
    out = WORK / "out"
    commands = {
        "theirs": ["-m", "tests.benchmark", "reference", *common, f"--output_dir={out}"],
        "ours": ["train.py", *common, f"--output_dir={out}", "--cache_latents"],
        "again": [
            "train.py", *common, f"--output_dir={out}", "--cache_latents", f"--cache_dir={WORK}",
        ],
    }  # fmt: skip

    def start(words):
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    sides = {name: functools.partial(start, words) for name, words in commands.items()}
    found = {name: [] for name in sides}
    sides["again"]()  # fills its cache
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            found[name].append(time.perf_counter() - begin)
    what = f"run of {epochs} epochs, {count} images, start to result"
    row(f"{what}; here with --cache_latents", found["theirs"], found["ours"])
    row(f"{what}; here with an earlier run's cache", found["theirs"], found["again"])


# ---- On a GPU, at the published size.


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


def kernels(function):
    """Number of GPU kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        wait()
    kinds = (event.device_type for event in profile.events())
    return sum(kind == torch.autograd.DeviceType.CUDA for kind in kinds)


def gpu_sides(priors, trained, batch):
    """{name: one optimizer step} of the reference, ours, and ours without one optimisation."""
    ours, reference = priors
    latents, text = make_batch(batch, SIZE, torch.bfloat16)
    fused, plain = our_optimizer(trained[0]), default_optimizer(trained[0])
    theirs = default_optimizer(trained[1])

    def their_step():
        reference_pass(reference, latents.bfloat16(), text, torch.bfloat16)
        update(theirs, trained[1])

    def our_step(optimizer=fused, attention=None, reads=0):
        with sdpa_kernel(attention) if attention else contextlib.nullcontext():
            loss = our_pass(ours, latents, text, torch.bfloat16)
        for _ in range(reads):
            loss.item()
        update(optimizer, trained[0])

    return {
        "theirs": their_step,
        "ours": our_step,
        "default AdamW": functools.partial(our_step, optimizer=plain),
        "plain attention": functools.partial(our_step, attention=SDPBackend.MATH),
        "two reads": functools.partial(our_step, reads=2),
    }


def gpu(rounds):
    """768 pixels, bf16: batch sizes, LoRA, gradient checkpointing, an ablation of each choice."""
    if DEVICE.type != "cuda":
        note("on a GPU: batches of 4, 16, 32, full and LoRA, ablation", "not measured")
        return
    peak = matmul_peak(torch.bfloat16, rounds)
    for kind, recompute in itertools.product(("full", "LoRA"), (False, True)):
        priors = make_pair(PUBLISHED)
        if kind == "full":
            trained = [list(prior.parameters()) for prior in priors]
        else:
            trained = [adapters(priors[0], ours=True), adapters(priors[1], ours=False)]
        for prior in priors:
            prior.train()
            if recompute:
                prior.enable_gradient_checkpointing()
        for batch in (4, 16, 32):
            what = f"GPU, {kind}, batch {batch}" + ", gradient checkpointing" * recompute
            try:
                sides = gpu_sides(priors, trained, batch)
                found = take_turns(sides, rounds)
                counts = {name: kernels(sides[name]) for name in ("ours", "theirs")}
                peaks = {name: gpu_memory(sides[name]) for name in ("ours", "theirs")}
            except torch.OutOfMemoryError:
                note(what, "both sides together do not fit")
                continue
            row(what, found["theirs"], found["ours"])
            print(f"| kernels | {counts['theirs']} | {counts['ours']} | | |")
            print(f"| peak memory of it | {peaks['theirs']} | {peaks['ours']} | | |")
            seconds = statistics.median(found["ours"])
            share = flops(PUBLISHED, batch, SIZE) / seconds / peak
            speed = f"{batch / seconds:.1f} images/s"
            note("", speed + f", {share:.0%} of a matrix product's FLOP/s" * (kind == "full"))
            for name in list(sides)[2:]:
                row(f"here with {name} (first), and without", found[name], found["ours"])
        del priors, trained, sides, prior
        torch.cuda.empty_cache()


def gpu_memory(function):
    """Peak GPU memory of tensors during a call, beyond what was already allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return gib(torch.cuda.max_memory_allocated() - before)


def make_decoder(folder, **smaller):
    """Stages B and A with the published widths and random weights, in the Hub's layout."""
    if (folder / "decoder" / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    names = tiny.rows()["text"]
    tokenizer = tiny.make_tokenizer(names, size=700, length=77)
    stage_b = WuerstchenDiffNeXt(**smaller.get("b", {}))
    with torch.no_grad():  # the divisor is near 1, so that sampling does not diverge
        stage_b.clf[1].weight.normal_(std=0.01)
        stage_b.clf[1].bias[len(stage_b.clf[1].bias) // 2 :].fill_(6.0)
    stage_b.save_pretrained(folder / "decoder")
    PaellaVQModel(**smaller.get("a", {})).save_pretrained(folder / "vqgan")
    width = stage_b.config.clip_embd
    text_encoder = tiny.make_text_encoder(tokenizer, width, layers=2, heads=width // 64 or 1)
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def decode(rounds, cells=SIZE, **smaller):
    """From the prior's latents to 1024 pixels: one process per side and round, alternating."""
    folder, found = make_decoder(WORK / f"decoder{len(smaller)}", **smaller), {}
    steps = 12 if DEVICE.type == "cuda" else 1  # a step takes half a minute on two cores
    for _ in range(rounds):
        for side in ("theirs", "ours"):
            words = [sys.executable, "-m", "tests.benchmark_decode", side, folder, cells, steps]
            printed = subprocess.check_output([str(word) for word in words], text=True)
            found.setdefault(side, []).append(json.loads(printed.splitlines()[-1]))
    theirs, ours = found["theirs"], found["ours"]
    apart = (
        np.frombuffer(bytes.fromhex(side[0]["pixels"]), np.uint8).astype(int)
        for side in (theirs, ours)
    )
    assert np.abs(np.subtract(*apart)).max() <= 1, "the images differ"
    what = f"decode {cells}×{cells} latents, {steps} steps of Stage B" if steps > 1 else (
        f"decode {cells}×{cells} latents, 1 step of Stage B instead of 12"
    )
    row(what, *([one["seconds"] for one in side] for side in (theirs, ours)))
    peaks = [statistics.median(one["memory"] for one in side) for side in (theirs, ours)]
    sizes = " | ".join(gib(peak) for peak in peaks)
    print(f"| {what}: peak memory | {sizes} | {peaks[1] / peaks[0]:.2f} of it | |", flush=True)


def roofline_of_reference(rounds=0):
    """What `python -m minwurst.cost --roofline` prints, for diffusers' prior."""
    for line in roofline.table("H100", Reference):
        print(line)


PARTS = {
    "step": step, "memory": memory, "encode": encode, "data": read_data, "save": save, "run": run,
    "decode": decode, "roofline": roofline_of_reference, "gpu": gpu,
}  # fmt: skip


def main(words):
    if words[:1] == ["reference"]:
        return reference_run(parse(Settings, words[1:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(words)
    os.environ["HF_HUB_OFFLINE"] = "1"
    WORK.mkdir(parents=True, exist_ok=True)
    print("| measured | reference | here | ratio | lowest – highest |")
    print("|---|---|---|---|---|")
    for name in given.parts or PARTS:
        # Complete runs are long enough that three rounds suffice.
        PARTS[name](min(given.rounds, 3) if name in ("run", "decode") else given.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
