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
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from minwurst.base.console import gib
from minwurst.base.settings import Settings, parse
from minwurst.edge import cache, models
from minwurst.run import checkpoint, estimate, roofline, state
from minwurst.run.saver import Saver
from minwurst.step import images
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import collate
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt
from tests import tiny
from tests.benchmark_gpu import gpu
from tests.benchmark_script import script
from tests.benchmark_step import (
    PIECE,
    SIZE,
    Reference,
    agree,
    default_optimizer,
    make_batch,
    make_pair,
    memory,
    our_optimizer,
    our_pass,
    reference_pass,
    step,
    update,
)
from tests.timing import DEVICE, WORK, duration, note, row, seconds, take_turns

MODEL = WORK / "wuerstchen"


# ---- Images and captions.


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
    pictures = tiny.make_pictures(WORK / "pictures-48", 48)
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
    medians = {name: statistics.median(times) for name, times in found.items()}
    what = f"{count} files to latents and text, here from the cache"
    seconds(what, medians["pairs encoded"], medians["pairs read"])
    for what in ("images", "captions"):
        note(f"encode {count} {what}", duration(medians[what]))


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
    pictures, folder = tiny.make_pictures(WORK / f"pictures-{count}", count), make_wuerstchen(MODEL)
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
    "script": script, "decode": decode, "roofline": roofline_of_reference, "gpu": gpu,
}  # fmt: skip


def main(words):
    if words[:1] == ["reference"]:
        return reference_run(parse(Settings, words[1:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--reference_script", metavar="PATH", type=Path,
        help="for `script`: the reference implementation's train_text_to_image_prior.py or "
        "train_text_to_image_lora_prior.py, beside its other files",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true", help="for `gpu`: tiny sizes, on a CPU too"
    )
    given = parser.parse_args(words)
    os.environ["HF_HUB_OFFLINE"] = "1"
    WORK.mkdir(parents=True, exist_ok=True)
    print("| measured | reference | here | ratio | lowest – highest |")
    print("|---|---|---|---|---|")
    for name in given.parts or PARTS:
        if name == "script":
            script(min(given.rounds, 3), given.reference_script)
        elif name == "gpu":
            gpu(given.rounds, given.rehearse)
        else:
            # Complete runs are long enough that three rounds suffice.
            PARTS[name](min(given.rounds, 3) if name in ("run", "decode") else given.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
