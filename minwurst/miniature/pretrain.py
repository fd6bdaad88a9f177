"""The recipe of the miniature: from two packages of emoji to a complete small Würstchen.

    python -m minwurst.miniature.pretrain WORK                # all parts, one after the other
    python -m minwurst.miniature.pretrain WORK --part prior   # from the world that is shipped

Nobody needs this file to use the miniature. It uses npm for the images and cairosvg to render them
(the prior needs neither), takes hours on two CPU cores, and resumes when it is started again. The
parts, in order:

    a        Stage A: images ↔ 4×64×64, trained on crops of both styles
    encoder  images → 16×6×6, with a decoder that is then discarded; and the world, the latents of
             all images
    b        Stage B: 16×6×6 → 4×64×64, both styles
    prior    names → 16×6×6, with its text encoder, on the world in 3D only

The prior first sees the other style, black and white, when it is fine-tuned.
"""

from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minwurst.base.parser import Parser
from minwurst.edge import export
from minwurst.miniature import IMAGES, WEIGHTS, WORLD
from minwurst.miniature.emoji import INPUT, SIDE, load_images, normalised, save_images, shrink
from minwurst.miniature.text import make_text_encoder, make_tokenizer
from minwurst.miniature.training import SEED, denoising_loss, in_parts, refresh_batch_norms, train
from minwurst.miniature.world import SHIPPED, read_world, save_world
from minwurst.step import diffusion
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.prior import WuerstchenPrior
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt

STAGES = [
    ["fused", 1, 3, 1, 16, 1], ["fused", 4, 3, 2, 32, 1], ["fused", 4, 3, 2, 48, 2],
    ["mbconv", 4, 3, 2, 96, 2], ["mbconv", 4, 3, 1, 112, 2], ["mbconv", 6, 3, 2, 160, 2],
]  # fmt: skip


def make_stage_a(work, images, steps, every=500):
    """Stage A, on crops, because it is purely convolutional."""
    torch.manual_seed(SEED)
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

    train(work, "stage_a", vqgan, loss_of, steps=steps, learning_rate=2e-3, every=every)
    refresh_batch_norms(vqgan, lambda: vqgan.encode(images[:: -(-len(images) // 64)].float() / 255))
    return vqgan


def upsample(c_in, c_out):
    """A stage of the decoder that only trains the encoder: twice the side."""
    return nn.Sequential(nn.Conv2d(c_in, 4 * c_out, 3, padding=1), nn.PixelShuffle(2), nn.SiLU())


def make_image_encoder(work, images, steps):
    """The image encoder, trained by what a small decoder reconstructs from its noisy latents."""
    torch.manual_seed(SEED)
    inputs, wanted = shrink(images, INPUT), shrink(images, 96)
    encoder = EfficientNetEncoder(c_latent=16, c_cond=384, stages=STAGES)
    widths = (256, 128, 64, 32)
    decoder = nn.Sequential(
        nn.Conv2d(16, 256, 3, padding=1), nn.SiLU(),
        *(upsample(*pair) for pair in zip(widths, widths[1:], strict=False)),
        nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    both.to(memory_format=torch.channels_last)

    def loss_of(step):
        some = torch.randint(len(images), (32,))
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
    return encoder


def encode(encoder, images):
    """All images' latents as the encoder gives them, (N, 16, 6, 6)."""
    return in_parts(lambda part: encoder(normalised(shrink(part, INPUT))), images)


def stage_a_latents(vqgan, images):
    """Stage A's latents of all images, (N, 4, 64, 64)."""
    return in_parts(lambda part: vqgan.encode(part.float() / 255), images)


def make_stage_b(work, vqgan, encoder, images, steps):
    """Stage B: Stage A's latents from the image encoder's, with a little noise on the latter.

    Convolutions only, and patches of 4: attention to a text would be expensive and add nothing to
    6×6 latents.
    """
    torch.manual_seed(SEED)
    wanted = stage_a_latents(vqgan, images) / vqgan.config.scale_factor
    given = encode(encoder, images)
    decoder = WuerstchenDiffNeXt(
        c_in=4, c_out=4, c_r=64, patch_size=4, c_cond=64, c_hidden=[128, 192], nhead=[-1, -1],
        blocks=[3, 3], level_config=["CT", "CT"], inject_effnet=[True, True], effnet_embd=16,
        clip_embd=64, dropout=0.0,
    )  # fmt: skip
    for name, weight in decoder.named_parameters():
        if name.endswith("channelwise.4.weight"):  # the default is close to zero
            nn.init.normal_(weight, std=0.02)

    def loss_of(step):
        some = torch.randint(len(images), (16,))
        noise = 0.15 * diffusion.LATENT_SCALE * torch.randn(16, *given.shape[1:])
        return denoising_loss(decoder, wanted[some], {"effnet": given[some] + noise})

    return train(work, "stage_b", decoder, loss_of, steps=steps, learning_rate=1.5e-3)


def tokenizer_for(names):
    """The tokenizer beside the weights. A new one is learned only if there is none.

    A newly learned one may number its tokens differently, and the text encoder would misread them.
    """
    if not (WEIGHTS / "tokenizer").is_dir():
        save_tokenizer(make_tokenizer(names), WEIGHTS)
    return transformers.CLIPTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")


def make_prior(work, names, clean, tokenizer, steps):
    """(text encoder, prior), trained together on names and their scaled latents of one style.

    The names are the hard part, and only very noisy latents leave anything for them to decide: so
    times are drawn near 1, and weighted there, more than in the authors' objective.
    """
    torch.manual_seed(SEED)
    text_encoder = make_text_encoder(tokenizer, width=128, layers=3, heads=4)
    prior = WuerstchenPrior(c_in=16, c=128, c_cond=128, c_r=64, depth=6, nhead=4, dropout=0.0)
    with torch.no_grad():  # a randomly initialised head divides by numbers near zero
        prior.out[1].weight.zero_(), prior.out[1].bias.zero_()
    both = nn.ModuleDict({"text_encoder": text_encoder, "prior": prior})
    tokens = tokenizer(names, padding="max_length", truncation=True, return_tensors="pt")
    empty = tokenizer([""], padding="max_length", return_tensors="pt")

    def loss_of(step):
        some = torch.randint(len(names), (32,))
        dropped = (torch.rand(32) < 0.1)[:, None]
        ids, mask = (
            torch.where(dropped, empty[kind], tokens[kind][some])
            for kind in ("input_ids", "attention_mask")
        )
        condition = {"text": text_encoder(ids, attention_mask=mask).last_hidden_state}
        return denoising_loss(prior, clean[some], condition, shift=1.08, power=0.5, k=0.02)

    train(work, "prior", both, loss_of, steps=steps, learning_rate=2e-3, decay=0.999)
    return text_encoder, prior


def save_half(model, folder):
    """Write a trained part in half precision, as it is shipped, and return it in fp32."""
    model.half().save_pretrained(folder)
    return model.float()


def save_tokenizer(tokenizer, folder):
    """The parts of a pipeline without weights."""
    tokenizer.save_pretrained(folder / "tokenizer")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")


def main():
    parser = Parser(prog="python -m minwurst.miniature.pretrain")
    parser.add_argument("work", type=Path, help="folder for images and half-trained parts")
    parts = {"a": 2000, "encoder": 2200, "b": 7500, "prior": 22000}
    parser.add_argument(
        "--part", choices=[*parts, "all"], default="all",
        help="only this part: b needs a and encoder, prior needs the encoder's world",
    )  # fmt: skip
    for part, steps in parts.items():
        parser.add_argument(f"--{part}_steps", type=int, default=steps, help="default %(default)s")
    parser.add_argument(
        "--compile", action="store_true",
        help="compile Stage B and the prior first, which takes minutes (needs g++)",
    )  # fmt: skip
    given = parser.parse_args()
    if given.compile:
        for kind in (WuerstchenPrior, WuerstchenDiffNeXt):
            kind.forward = torch.compile(kind.forward)
    given.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    wanted = set(parts) if given.part == "all" else {given.part}
    if wanted & {"a", "encoder", "b"}:
        names, *images = load_images(given.work)
        solid, outlined = (style.to(device) for style in images)
        both = torch.cat([solid, outlined])
    if wanted & {"a", "b"}:
        vqgan = make_stage_a(given.work, both, given.a_steps)
        vqgan.register_to_config(scale_factor=stage_a_latents(vqgan, both).std().item())
        save_half(vqgan, WEIGHTS / "decoder" / "vqgan")
    if wanted & {"encoder", "b"}:
        encoder = make_image_encoder(given.work, both, given.encoder_steps)
        save_half(encoder, WEIGHTS / "image_encoder")
        encoded = {"solid": encode(encoder, solid), "outlined": encode(encoder, outlined)}
        save_world(WORLD, names, encoded)
        save_images(IMAGES, names[SHIPPED], outlined[SHIPPED])
    if "b" in wanted:
        decoder = make_stage_b(given.work, vqgan, encoder, both, given.b_steps)
        save_half(decoder, WEIGHTS / "decoder" / "decoder")
        tokenizer = tokenizer_for(names)
        unused = make_text_encoder(tokenizer, width=64, layers=1, heads=2)  # B has no attention
        save_half(unused, WEIGHTS / "decoder" / "text_encoder")
        save_tokenizer(tokenizer, WEIGHTS / "decoder")
    if "prior" in wanted:
        names, latents = read_world(WORLD)
        clean, tokenizer = latents["solid"].to(device), tokenizer_for(names)
        text_encoder, prior = make_prior(given.work, names, clean, tokenizer, given.prior_steps)
        save_half(text_encoder, WEIGHTS / "text_encoder")
        save_half(prior, WEIGHTS / "prior")
        export.write_index(WEIGHTS, resolution=INPUT)


if __name__ == "__main__":
    main()
