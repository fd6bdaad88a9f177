"""The recipe of the miniature: from packages of emoji to a complete small Würstchen.

    python -m minwurst.miniature.pretrain WORK                # all parts, one after the other
    python -m minwurst.miniature.pretrain WORK --part prior   # with the parts that are shipped

Nobody needs this file to use the miniature. It uses npm for the images and cairosvg to render them,
takes hours on two CPU cores, and resumes when it is started again. The parts, in order:

    a        Stage A: images ↔ 4×64×64, trained on crops
    encoder  images → 16×6×6, with a decoder that is then discarded; and the world, the latents of
             all images
    b        Stage B: 16×6×6 → 4×64×64
    text     captions → 21 states each, by what a linear map makes of them: the image's latents
    prior    states → 16×6×6, by train.py --from_scratch, on the styles of world.BASE
"""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minwurst.base.parser import Parser
from minwurst.edge import export, models, networks
from minwurst.miniature import WEIGHTS, WORLD, data_of, world
from minwurst.miniature.emoji import SIDE, load_images, save_images
from minwurst.miniature.text import make_text_encoder, make_tokenizer
from minwurst.miniature.training import SEED, denoising_loss, in_parts, refresh_batch_norms, train
from minwurst.step import diffusion, distributed
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.images import IMAGENET_MEAN, IMAGENET_STD
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt

INPUT, LENGTH, WIDTH = 192, 21, 192  # side of the encoder's input; number and width of text states
PRIOR = {
    "c_in": 16, "c": 256, "c_cond": WIDTH, "c_r": 64, "depth": 4, "nhead": 8, "dropout": 0.0,
}  # fmt: skip
# Names are the hard part, and only very noisy latents leave anything for them to decide: so times
# are drawn near 1, and errors count there more than in the authors' objective.
PRIOR_FLAGS = """
    --resolution=192 --cache_latents --train_batch_size=32 --seed=0 --mixed_precision=bf16
    --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=300 --adam_beta2=0.99
    --adam_weight_decay=1e-3 --loss_weighting=soft_min_snr --snr_gamma=0.02
    --timestep_sampling=logit_normal --logit_mean=1.5 --logit_std=1.3 --caption_dropout=0.05
    --use_ema --ema_decay=0.999 --checkpointing_steps=1000 --checkpoints_total_limit=1
    --report_to=none --resume_from_checkpoint=latest
""".split()
STAGES = [
    ["fused", 1, 3, 1, 16, 1], ["fused", 4, 3, 2, 32, 1], ["fused", 4, 3, 2, 48, 2],
    ["mbconv", 4, 3, 2, 96, 2], ["mbconv", 4, 3, 1, 112, 2], ["mbconv", 6, 3, 2, 160, 2],
]  # fmt: skip


def shrink(images, side):
    """(N, 3, 256, 256) → (N, 3, side, side), both bytes."""

    def half(part):
        small = F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        return small.round().byte()

    return in_parts(half, images)


def normalised(images):
    """Bytes (N, 3, R, R) → the image encoder's input."""
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def encode(encoder, images):
    """All images' latents as the encoder gives them, (N, 16, 6, 6)."""
    return in_parts(lambda part: encoder(normalised(shrink(part, INPUT))), images)


def stage_a_latents(vqgan, images):
    """Stage A's latents of all images, (N, 4, 64, 64)."""
    return in_parts(lambda part: vqgan.encode(part.float() / 255), images)


def save(model, part):
    """Write a trained part in half precision, as it is shipped."""
    model.half().save_pretrained(WEIGHTS / part)


# ---- The parts. Each reads what it needs of the earlier ones from WEIGHTS.


def make_stage_a(work, names, images, exists, steps):
    """On crops, because Stage A is purely convolutional."""
    torch.manual_seed(SEED)
    images = torch.cat(list(images.values()))
    vqgan = PaellaVQModel(
        embed_dim=96, bottleneck_blocks=2, latent_channels=4, num_vq_embeddings=8, scale_factor=1.0
    )

    def loss_of(step):
        some = images[torch.randint(len(images), (12,))]
        x, y = torch.randint(SIDE - 127, (2,)).tolist()
        crop = some[:, :, y : y + 128, x : x + 128].float() / 255
        crop = crop.flip(3) if step % 2 else crop
        again = vqgan(crop).float()
        return F.l1_loss(again, crop) + 2 * F.mse_loss(again, crop)

    train(work, "stage_a", vqgan, loss_of, steps=steps, learning_rate=2e-3)
    some = images[:: -(-len(images) // 512)]
    refresh_batch_norms(vqgan, lambda: vqgan.encode(some[::8].float() / 255))
    vqgan.register_to_config(scale_factor=stage_a_latents(vqgan, some).std().item())
    save(vqgan, "decoder/vqgan")


def upsample(c_in, c_out):
    """A stage of the decoder that only trains the encoder: twice the side."""
    return nn.Sequential(nn.Conv2d(c_in, 4 * c_out, 3, padding=1), nn.PixelShuffle(2), nn.SiLU())


def make_image_encoder(work, names, images, exists, steps):
    """By what a small decoder reconstructs from its noisy latents. Then the world is encoded."""
    torch.manual_seed(SEED)
    every = torch.cat(list(images.values()))
    inputs, wanted = shrink(every, INPUT), shrink(every, 96)
    encoder = EfficientNetEncoder(c_latent=16, c_cond=384, stages=STAGES)
    decoder = nn.Sequential(
        nn.Conv2d(16, 256, 3, padding=1), nn.SiLU(), upsample(256, 128), upsample(128, 64),
        upsample(64, 32), nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    both.to(memory_format=torch.channels_last)

    def loss_of(step):
        some = torch.randint(len(inputs), (32,))
        x, y = normalised(inputs[some]), wanted[some].float() / 255
        if step % 2:
            x, y = x.flip(3), y.flip(3)
        latents = encoder(x.to(memory_format=torch.channels_last))              # (32, 16, 6, 6)
        again = decoder(latents + 0.2 * torch.randn_like(latents)).float()
        return F.mse_loss(again, y) + 0.3 * F.l1_loss(again, y)

    train(work, "image_encoder", both, loss_of, steps=steps, learning_rate=1e-3)
    some = inputs[:: -(-len(inputs) // 256)]
    refresh_batch_norms(encoder, lambda: encoder(normalised(some)))
    with torch.no_grad():  # so that its scaled latents have unit variance, as the published ones
        norm = encoder.mapper[1]
        norm.weight.mul_(diffusion.LATENT_SCALE)
        norm.bias.mul_(diffusion.LATENT_SCALE).sub_(diffusion.LATENT_SHIFT)
    save(encoder, "image_encoder")

    encoded = {style: encode(encoder.float(), some) for style, some in images.items()}
    for style, latents in encoded.items():
        latents[~exists[style]] = float("nan")
    world.save_world(WORLD, names, encoded)
    for style in (world.DEMO, world.HARD):
        save_images(data_of(style), names[world.SHIPPED], images[style][world.SHIPPED], style)


def make_stage_b(work, names, images, exists, steps):
    """Stage A's latents from the image encoder's, with a little noise on the latter.

    Convolutions only, and patches of 4: attention to a text would be expensive and add nothing to
    6×6 latents. So its text encoder is never used, but a complete folder has one.
    """
    torch.manual_seed(SEED)
    every = torch.cat(list(images.values()))
    vqgan = networks.load(PaellaVQModel, WEIGHTS / "decoder" / "vqgan", torch.float32)
    wanted = stage_a_latents(vqgan, every) / vqgan.config.scale_factor
    given = encode(models.load_image_encoder(WEIGHTS / "image_encoder"), every)
    decoder = WuerstchenDiffNeXt(
        c_in=4, c_out=4, c_r=64, patch_size=4, c_cond=64, c_hidden=[128, 192], nhead=[-1, -1],
        blocks=[3, 3], level_config=["CT", "CT"], inject_effnet=[True, True], effnet_embd=16,
        clip_embd=64, dropout=0.0,
    )  # fmt: skip
    for name, weight in decoder.named_parameters():
        if name.endswith("channelwise.4.weight"):  # the default is close to zero
            nn.init.normal_(weight, std=0.02)

    def loss_of(step):
        some = torch.randint(len(given), (16,))
        noise = 0.15 * diffusion.LATENT_SCALE * torch.randn(16, *given.shape[1:])
        return denoising_loss(decoder, wanted[some], {"effnet": given[some] + noise})

    train(work, "stage_b", decoder, loss_of, steps=steps, learning_rate=1.5e-3)
    save(decoder, "decoder/decoder")
    tokenizer = tokenizer_for(names)
    tokenizer.save_pretrained(WEIGHTS / "decoder" / "tokenizer")
    save(make_text_encoder(tokenizer, width=64, layers=1, heads=2), "decoder/text_encoder")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(WEIGHTS / "decoder" / "scheduler")


def tokenizer_for(names):
    """The tokenizer beside the weights. A new one is learned only if there is none.

    A newly learned one may number its tokens differently, and the text encoder would misread them.
    """
    folder = WEIGHTS / "tokenizer"
    if not folder.is_dir():
        captions = [world.caption(name, style) for name in names for style in world.STYLES]
        make_tokenizer(captions, length=LENGTH).save_pretrained(folder)
    return transformers.CLIPTokenizerFast.from_pretrained(folder)


def make_text(work, names, images, exists, steps):
    """The text encoder, frozen from then on, as CLIP is in the published model.

    It learns to bring an image's latents into a form that the prior can read: each of the last nine
    states, which are padding after every caption, is mapped to 2×2 of them. In a third of the
    captions the last token is another, so that it does not learn captions as wholes.
    """
    torch.manual_seed(SEED)
    names, latents = world.read_world(WORLD)
    tokenizer = tokenizer_for(names)
    wanted = torch.cat([latents[style] for style in world.BASE])
    captions = [world.caption(name, style) for style in world.BASE for name in names]
    known = (~wanted.flatten(1).isnan().any(dim=1)).nonzero()[:, 0]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    text_encoder = make_text_encoder(tokenizer, width=WIDTH, layers=3, heads=4)
    maps = nn.Conv1d(9 * WIDTH, 9 * 64, 1, groups=9)  # one for each state
    both = nn.ModuleDict({"text_encoder": text_encoder, "maps": maps})

    def loss_of(step):
        some = known[torch.randint(len(known), (64,))]
        ids, mask = tokens.input_ids[some].clone(), tokens.attention_mask[some]
        end = mask.sum(dim=1) - 1
        swapped = torch.rand(64) < 0.3
        ids[swapped, end[swapped] - 1] = torch.randint(len(tokenizer) - 2, (int(swapped.sum()),))
        states = text_encoder(ids, attention_mask=mask).last_hidden_state       # (64, 21, 192)
        found = maps(states[:, -9:].flatten(1)[..., None]).view(64, 3, 3, 16, 2, 2)
        found = found.permute(0, 3, 1, 4, 2, 5).reshape(64, 16, 6, 6).float()
        return F.mse_loss(found, wanted[some])

    train(work, "text", both, loss_of, steps=steps, learning_rate=1.5e-3)
    save(text_encoder, "text_encoder")


def make_prior(work, names, images, exists, steps):
    """By train.py, in WORK/prior."""
    folder, config = work / "styles", work / "prior.json"
    config.write_text(json.dumps(PRIOR), encoding="utf-8")
    if not (folder / "metadata.jsonl").is_file():
        for style in world.BASE:
            some = exists[style].nonzero()[:, 0].tolist()
            save_images(folder, [names[n] for n in some], images[style][some], style)
    words = [sys.executable, Path(__file__).parents[2] / "train.py",
             f"--from_scratch={config}", f"--train_data_dir={folder}",
             f"--pretrained_prior_model_name_or_path={WEIGHTS}",
             f"--image_encoder_name_or_path={WEIGHTS / 'image_encoder'}",
             f"--output_dir={work / 'prior'}", f"--max_train_steps={steps}"]  # fmt: skip
    subprocess.run([*words, *PRIOR_FLAGS], check=True)
    save(models.load_prior(models.locate("prior", work / "prior")), "prior")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(WEIGHTS / "scheduler")
    export.write_index(WEIGHTS, resolution=INPUT, guidance_scale=1.0)


PARTS = {
    "a": (make_stage_a, 3000), "encoder": (make_image_encoder, 2200), "b": (make_stage_b, 7500),
    "text": (make_text, 5000), "prior": (make_prior, 40000),
}  # fmt: skip


def main():
    parser = Parser(prog="python -m minwurst.miniature.pretrain")
    parser.add_argument("work", type=Path, help="folder for images and half-trained parts")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these, with the others' "
                        "weights as they are (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of each part, instead of its own number")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    distributed.start()
    loaded = load_images(given.work)
    for part in given.part or PARTS:
        make, steps = PARTS[part]
        make(given.work, *loaded, given.steps or steps)


if __name__ == "__main__":
    main()
