"""The recipe of the miniature: from two packages of emoji to a whole small Würstchen.

    python -m minwurst.miniature.pretrain WORK                # all parts, one after the other
    python -m minwurst.miniature.pretrain WORK --part prior   # from the world that is shipped

Nobody needs this file to use the miniature. It wants npm for the pictures and cairosvg to draw
them (the prior needs neither), and takes hours on two CPU cores; stopped, it goes on where it was.
In this order:

    a        Stage A: pictures ↔ 4×64×64, learned on crops of both styles
    encoder  pictures → 16×6×6, with a decoder to train it that is then thrown away; and the world,
             which is what it makes of all pictures
    b        Stage B: 16×6×6 → 4×64×64, both styles
    prior    names → 16×6×6, with its text encoder: of the world in 3D alone

The other style, black and white, the prior meets first when it is fine-tuned.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import time
from pathlib import Path

import diffusers
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minwurst import checkpoint, data, diffusion, optim, pipelines
from minwurst.effnet import EfficientNetEncoder
from minwurst.miniature import PICTURES, SHIPPED, WEIGHTS, WORLD, read_world
from minwurst.prior import WuerstchenPrior

SEED = 0
SIDE, INPUT = 256, 192  # of a picture, and of what the image encoder sees of it: 6×6 cells
PACKAGES = {  # both MIT: the drawings are Microsoft's Fluent Emoji
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "unicode-emoji-json": "0.9.0",
}
GROUPS = (
    "Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects",
)  # fmt: skip
STAGES = [
    ["fused", 1, 3, 1, 16, 1], ["fused", 4, 3, 2, 32, 1], ["fused", 4, 3, 2, 48, 2],
    ["mbconv", 4, 3, 2, 96, 2], ["mbconv", 4, 3, 1, 112, 2], ["mbconv", 6, 3, 2, 160, 2],
]  # fmt: skip
Decoder = diffusers.WuerstchenDecoderPipeline


def unpack(package, work):
    """The folder of an npm package."""
    folder = work / package.split("/")[-1]
    if not folder.is_dir():
        named = f"{package}@{PACKAGES[package]}"
        packed = subprocess.check_output(["npm", "pack", "-s", named], cwd=work, text=True)
        with tarfile.open(work / packed.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def on_white(picture):
    picture = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def load_pictures(work):
    """(names, pictures in 3D, pictures in black and white): the latter two (N, 3, 256, 256) bytes.

    Only emoji that both styles have, and one skin tone of each.
    """
    file = work / "pictures.npz"
    if not file.is_file():
        import cairosvg  # pip install cairosvg, which wants the system's cairo

        rendered = unpack("@lobehub/fluent-emoji-3d", work) / "assets"
        drawn = unpack("@iconify-json/fluent-emoji-high-contrast", work)
        icons = json.loads((drawn / "icons.json").read_text(encoding="utf-8"))["icons"]
        icon_of = json.loads((drawn / "chars.json").read_text(encoding="utf-8"))
        listed = unpack("unicode-emoji-json", work) / "data-by-emoji.json"
        names, solid, outlined = [], [], []
        for emoji, facts in json.loads(listed.read_text(encoding="utf-8")).items():
            code = "-".join(f"{ord(letter):x}" for letter in emoji)
            codes = [c for c in (code, code.replace("-fe0f", "")) if c in icon_of]
            files = [f for c in (code, *codes) if (f := rendered / f"{c}.webp").is_file()]
            if not codes or not files or facts["group"] not in GROUPS:
                continue
            icon = icons[icon_of[codes[0]]]["body"].replace("currentColor", "#000")
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{icon}</svg>'
            png = cairosvg.svg2png(svg.encode(), output_width=SIDE)
            names.append(facts["name"])
            solid.append(on_white(Image.open(files[0])))
            outlined.append(on_white(Image.open(io.BytesIO(png))))
        np.savez(file, names=names, solid=np.stack(solid), outlined=np.stack(outlined))
    stored = np.load(file)
    solid, outlined = (
        torch.from_numpy(stored[style]).permute(0, 3, 1, 2) for style in ("solid", "outlined")
    )
    return [str(name) for name in stored["names"]], solid, outlined


def shrink(pictures, side):
    """(N, 3, 256, 256) → (N, 3, side, side), bytes both."""
    parts = [
        F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True).round().byte()
        for part in pictures.split(100)
    ]
    return torch.cat(parts)


def normalised(pictures):
    """Bytes (N, 3, R, R) → what the image encoder takes."""
    mean, std = (
        torch.from_numpy(numbers)[:, None, None]
        for numbers in (data.IMAGENET_MEAN, data.IMAGENET_STD)
    )
    return (pictures.float() / 255 - mean) / std


def train(work, part, model, loss_of, *, steps, learning_rate, decay=0.998, every=500):
    """Train a part on loss_of(step) under bf16, resumably; leave the averaged weights in it."""
    folder = work / "training" / part
    folder.mkdir(parents=True, exist_ok=True)
    trainable = dict(model.named_parameters())
    ema = optim.EMA(trainable, decay)
    optimizer = optim.adamw(
        trainable.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, eps=1e-8
    )
    found, done = checkpoint.find("latest", folder), 0
    if found:
        saved, state = checkpoint.load(found)
        model.load_state_dict(saved["weights"])
        optim.copy_into(ema.average, saved["ema"])
        optim.restore_state(optimizer, trainable, saved["optimizer"], state["optimizer"])
        done = state["step"]
    schedule = optim.learning_rates(optimizer, "cosine", warmup=200, total=steps, updates=done)
    device = torch.get_default_device().type
    model.train()
    mean, start = 0.0, time.perf_counter()
    for step in range(done + 1, steps + 1):
        torch.manual_seed(SEED * 10**9 + step)  # so that a step is the same after a stop
        # Plain attention: the flash kernel's backward pass is slow for 36 cells on a CPU.
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(step)
        mean += (loss.item() - mean) / min(step - done, 100)
        if step % 100 == 0:
            pace = (time.perf_counter() - start) / (step - done)
            print(f"{part}: step {step}/{steps}, loss {mean:.5f}, {pace:.2f} s a step", flush=True)
        if step % every == 0 or step == steps:
            tensors, numbers = optim.state_by_name(optimizer, trainable)
            groups = {"weights": model.state_dict(), "optimizer": tensors, "ema": ema.average}
            checkpoint.save(folder, step, groups, {"step": step, "optimizer": numbers}, keep=1)
    ema.swap()
    return model.eval()


def make_stage_a(work, pictures, steps, every=500):
    """Stage A, on crops: it is a convolution throughout and needs no whole pictures."""
    torch.manual_seed(SEED)
    vqgan = pipelines.class_beside(Decoder, "PaellaVQModel")(
        embed_dim=96, bottleneck_blocks=2, latent_channels=4, num_vq_embeddings=8, scale_factor=1.0
    )

    def loss_of(step):
        some = pictures[torch.randint(len(pictures), (12,))]
        x, y = torch.randint(SIDE - 127, (2,)).tolist()
        crop = some[:, :, y : y + 128, x : x + 128].float() / 255
        crop = crop.flip(3) if step % 2 else crop
        again = vqgan(crop).sample.float()
        return F.l1_loss(again, crop) + 2 * F.mse_loss(again, crop)

    train(work, "stage_a", vqgan, loss_of, steps=steps, learning_rate=2e-3, every=every)
    refresh(vqgan, lambda: vqgan.encode(pictures[:: -(-len(pictures) // 64)].float() / 255))
    return vqgan


@torch.no_grad()
def refresh(model, call):
    """Batch norms' statistics of the averaged weights, from one pass over some pictures."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean
    model.train()
    call()
    model.eval()


def twice_as_large(c_in, c_out):
    """A stage of the decoder that only trains the encoder: twice the side."""
    return nn.Sequential(nn.Conv2d(c_in, 4 * c_out, 3, padding=1), nn.PixelShuffle(2), nn.SiLU())


def make_image_encoder(work, pictures, steps):
    """The image encoder, by what a small decoder can see in its latents through some noise."""
    torch.manual_seed(SEED)
    seen, wanted = shrink(pictures, INPUT), shrink(pictures, 96)
    encoder = EfficientNetEncoder(c_latent=16, c_cond=384, stages=STAGES)
    widths = (256, 128, 64, 32)
    growing = [twice_as_large(*pair) for pair in zip(widths, widths[1:], strict=False)]
    decoder = nn.Sequential(
        nn.Conv2d(16, 256, 3, padding=1), nn.SiLU(), *growing,
        nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    both.to(memory_format=torch.channels_last)

    def loss_of(step):
        some = torch.randint(len(pictures), (32,))
        x, y = normalised(seen[some]), wanted[some].float() / 255
        if step % 2:
            x, y = x.flip(3), y.flip(3)
        latents = encoder(x.to(memory_format=torch.channels_last))              # (32, 16, 6, 6)
        again = decoder(latents + 0.2 * torch.randn_like(latents)).float()
        return F.mse_loss(again, y) + 0.3 * F.l1_loss(again, y)

    train(work, "image_encoder", both, loss_of, steps=steps, learning_rate=1e-3)
    refresh(encoder, lambda: encoder(normalised(seen[:: -(-len(seen) // 256)])))
    with torch.no_grad():  # of unit spread once it is scaled as the published encoder's latents are
        norm = encoder.mapper[1]
        norm.weight.mul_(diffusion.LATENT_SCALE)
        norm.bias.mul_(diffusion.LATENT_SCALE).sub_(diffusion.LATENT_SHIFT)
    return encoder


@torch.no_grad()
def in_parts(model, inputs, size=32):
    """model(inputs), a part at a time, in fp32."""
    return torch.cat([model(part) for part in inputs.split(size)]).contiguous()


def encode(encoder, pictures):
    """All pictures' latents as the encoder gives them, (N, 16, 6, 6)."""
    return in_parts(lambda part: encoder(normalised(shrink(part, INPUT))), pictures)


def latents_of(vqgan, pictures):
    """What Stage A makes of all pictures, (N, 4, 64, 64)."""
    return in_parts(lambda part: vqgan.encode(part.float() / 255).latents, pictures)


def denoising_loss(model, clean, condition, *, shift=1.0, power=1.0, k=1.0):
    """Noise prediction at t = shift·U^power, weighted by p2's 1/(k + SNR).

    The authors' objective has power 1 and k = 1.
    """
    t = (shift * torch.rand(len(clean)) ** power).clamp(0.001, 1)
    noise = torch.randn_like(clean)
    predicted = model(diffusion.add_noise(clean, noise, t), t, condition).float()
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    signal = diffusion.alpha_bar(t)
    return (error / (k + signal / (1 - signal))).mean()


def make_stage_b(work, vqgan, encoder, pictures, steps):
    """Stage B: Stage A's latents from the image encoder's, which get a little noise to bear.

    Convolutions alone, and patches of 4: attention to a text would cost much and tell nothing that
    6×6 cells do not.
    """
    torch.manual_seed(SEED)
    wanted = latents_of(vqgan, pictures) / vqgan.config.scale_factor
    given = encode(encoder, pictures)
    decoder = pipelines.class_beside(Decoder, "WuerstchenDiffNeXt")(
        c_in=4, c_out=4, c_r=64, patch_size=4, c_cond=64, c_hidden=[128, 192], nhead=[-1, -1],
        blocks=[3, 3], level_config=["CT", "CT"], inject_effnet=[True, True], effnet_embd=16,
        clip_embd=64, dropout=0.0,
    )  # fmt: skip
    for name, weight in decoder.named_parameters():
        if name.endswith("channelwise.4.weight"):  # its own start is next to nothing
            nn.init.normal_(weight, std=0.02)

    def loss_of(step):
        some = torch.randint(len(pictures), (16,))
        noise = 0.15 * diffusion.LATENT_SCALE * torch.randn(16, *given.shape[1:])
        return denoising_loss(decoder, wanted[some], given[some] + noise)

    return train(work, "stage_b", decoder, loss_of, steps=steps, learning_rate=1.5e-3)


def make_tokenizer(captions, size=2048, length=24):
    """CLIP's kind of tokenizer with pairs learned from the captions, for texts of `length`."""
    base = transformers.CLIPTokenizerFast()._tokenizer  # how CLIP cuts text
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=letters, end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )  # fmt: skip
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in [*(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=length)


def tokenizer_for(names):
    """The tokenizer beside the weights; one is learned only where there is none.

    Learned again, its numbers may change places, and the text encoder would read other words.
    """
    if not (WEIGHTS / "tokenizer").is_dir():
        save_rest(make_tokenizer(names), WEIGHTS)
    return transformers.CLIPTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")


def make_text_encoder(tokenizer, width, layers, heads):
    """A fresh CLIP text tower for a tokenizer."""
    end = tokenizer.eos_token_id
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, hidden_act="gelu",
        projection_dim=width, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def make_prior(work, names, clean, tokenizer, steps):
    """(text encoder, prior), trained together on names and their scaled latents of one style.

    What is hard is to learn the names, and only noisy latents leave a question for them to answer:
    so times are drawn near 1, and weighted there, more than in the authors' objective.
    """
    torch.manual_seed(SEED)
    text_encoder = make_text_encoder(tokenizer, width=128, layers=3, heads=4)
    prior = WuerstchenPrior(c_in=16, c=128, c_cond=128, c_r=64, depth=6, nhead=4, dropout=0.0)
    with torch.no_grad():  # a fresh head divides by numbers near zero
        prior.out[1].weight.zero_(), prior.out[1].bias.zero_()
    both = nn.ModuleDict({"text_encoder": text_encoder, "prior": prior})
    tokens = tokenizer(names, padding="max_length", truncation=True, return_tensors="pt")
    empty = tokenizer([""], padding="max_length", return_tensors="pt")

    def loss_of(step):
        some = torch.randint(len(names), (32,))
        dropped = (torch.rand(32) < 0.1)[:, None]
        words, mask = (
            torch.where(dropped, empty[kind], tokens[kind][some])
            for kind in ("input_ids", "attention_mask")
        )
        text = text_encoder(words, attention_mask=mask).last_hidden_state
        return denoising_loss(prior, clean[some], text, shift=1.08, power=0.5, k=0.02)

    train(work, "prior", both, loss_of, steps=steps, learning_rate=2e-3, decay=0.999)
    return text_encoder, prior


def keep(model, place):
    """Write a trained part in half precision, as it is shipped, and read it again."""
    model.half().save_pretrained(place)
    return model.float()


def main():
    """`python -m minwurst.miniature.pretrain`: see the top of this page."""
    parser = argparse.ArgumentParser(prog="python -m minwurst.miniature.pretrain")
    parser.add_argument("work", type=Path, help="folder for pictures and half-trained parts")
    parts = {"a": 2000, "encoder": 2200, "b": 7500, "prior": 22000}
    parser.add_argument(
        "--part", choices=[*parts, "all"], default="all",
        help="only this part: b stands on a and encoder, prior on the encoder's world",
    )  # fmt: skip
    for part, steps in parts.items():
        parser.add_argument(f"--{part}_steps", type=int, default=steps, help="default %(default)s")
    parser.add_argument(
        "--compile", action="store_true",
        help="compile B and the prior first, which takes minutes (needs g++)",
    )  # fmt: skip
    given = parser.parse_args()
    if given.compile:
        for kind in (WuerstchenPrior, pipelines.class_beside(Decoder, "WuerstchenDiffNeXt")):
            kind.forward = torch.compile(kind.forward)
    given.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    wanted = [*parts] if given.part == "all" else [given.part]

    if wanted != ["prior"]:
        names, solid, outlined = load_pictures(given.work)
        solid, outlined = solid.to(device), outlined.to(device)
        pictures = torch.cat([solid, outlined])
        print(f"{len(names)} emoji in two styles", flush=True)
    if {"a", "b"} & {*wanted}:
        vqgan = make_stage_a(given.work, pictures, given.a_steps)
        vqgan.register_to_config(scale_factor=latents_of(vqgan, pictures).std().item())
        keep(vqgan, WEIGHTS / "decoder" / "vqgan")
    if {"encoder", "b"} & {*wanted}:
        encoder = make_image_encoder(given.work, pictures, given.encoder_steps)
        keep(encoder, WEIGHTS / "image_encoder")
        write_world(names, encode(encoder, solid), encode(encoder, outlined))
        write_pictures(names[SHIPPED], outlined[SHIPPED])
    if "b" in wanted:
        decoder = make_stage_b(given.work, vqgan, encoder, pictures, given.b_steps)
        keep(decoder, WEIGHTS / "decoder" / "decoder")
        tokenizer = tokenizer_for(names)
        unread = make_text_encoder(tokenizer, width=64, layers=1, heads=2)  # B has no attention
        keep(unread, WEIGHTS / "decoder" / "text_encoder")
        save_rest(tokenizer, WEIGHTS / "decoder")
    if "prior" in wanted:
        names, latents = read_world(WORLD)
        clean, tokenizer = latents["solid"].to(device), tokenizer_for(names)
        text_encoder, prior = make_prior(given.work, names, clean, tokenizer, given.prior_steps)
        keep(text_encoder, WEIGHTS / "text_encoder")
        keep(prior, WEIGHTS / "prior")


def write_world(names, solid, outlined):
    """The scaled latents of all names in both styles, (N, 16, 6, 6) in half precision."""
    world = {"solid": solid, "outlined": outlined}
    world = {style: diffusion.scale_latents(latents).half() for style, latents in world.items()}
    save_file(world, WORLD, metadata={"names": json.dumps(names)})


def write_pictures(names, pictures):
    """What is fine-tuned on, as the trainer's --train_data_dir wants it."""
    PICTURES.mkdir(exist_ok=True)
    lines = []
    for name, picture in zip(names, pictures, strict=True):
        file = f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.webp"
        pixels = picture.permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).convert("L").save(PICTURES / file, lossless=True)
        lines.append(json.dumps({"file_name": file, "text": name}, ensure_ascii=False) + "\n")
    (PICTURES / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def save_rest(tokenizer, folder):
    """What of a pipeline has no weights."""
    tokenizer.save_pretrained(folder / "tokenizer")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    main()
