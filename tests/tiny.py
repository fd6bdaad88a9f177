"""A small random model folder in the Hub's layout, for the trainer and its tests.

    python -m tests.tiny runs/tiny

The folder has prior/, text_encoder/, tokenizer/, scheduler/, image_encoder/ and decoder/ (Stages B
and A with their own text encoder): the published model's classes and files with 1/10,000 of its
parameters, untrained. It generates no recognisable images, but its latents are scaled like the
published image encoder's, so the loss shows whether the prior learns from images and captions.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from PIL import Image

from minwurst.base.settings import Settings
from minwurst.edge import dataset, models
from minwurst.miniature.text import make_text_encoder, make_tokenizer
from minwurst.step import diffusion
from minwurst.step.buckets import Buckets
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.images import open_image, preprocess
from minwurst.step.prior import WuerstchenPrior
from minwurst.step.samples import Samples
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt

IMAGES = Path(__file__).parent / "pictures"
STAGES = [
    ["fused", 1, 3, 1, 8, 1], ["fused", 4, 3, 2, 12, 1], ["fused", 4, 3, 2, 16, 1],
    ["mbconv", 4, 3, 2, 24, 1], ["mbconv", 6, 3, 1, 32, 2], ["mbconv", 6, 3, 2, 48, 1],
]  # fmt: skip


def rows(**settings):
    """The rows of a data set; by default the test images.

    settings: train_data_dir or dataset_name, and other fields of Settings.
    """
    given = settings or {"train_data_dir": IMAGES}
    return dataset.find(Settings(**{name: str(value) for name, value in given.items()}))


def samples(rows, side, seed, **options):
    """The stream of these rows' samples, of side × side pixels."""
    return Samples(rows, Buckets.one(len(rows), side // 32, seed), seed, **options)


def data(rows, side=64):
    """Rows as `dataset.check_and_split` gives them, all to be trained on, as squares."""
    shape_of = dict.fromkeys(rows["number"], 0)
    return dataset.CaptionedImages(
        rows, rows.select([]), rows, frozenset(), "", [(side // 32, side // 32)], shape_of
    )


def make_pictures(folder, count, side=1024):
    """Captioned JPEG images: the test images, enlarged."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        chosen = rows().select(range(count))
        lines = []
        for number, found in enumerate(chosen):
            large = open_image(found).resize((side, side), Image.Resampling.LANCZOS)
            large.save(folder / f"{number:03}.jpg", quality=92)
            lines.append({"file_name": f"{number:03}.jpg", "text": found["text"]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def parts(folder):
    """The parts of a folder written by `make`."""
    folder = Path(folder)
    image_encoder, decoder = folder / "image_encoder", folder / "decoder"
    return models.Parts(folder / "prior", folder, image_encoder, decoder, prior_alone=False)


def make_prior(**config):
    """A small prior whose head is initialised to predict roughly its input, so that it trains."""
    small = {"c_in": 16, "c": 64, "c_cond": 32, "c_r": 16, "depth": 2, "nhead": 4}
    prior = WuerstchenPrior(**{**small, **config})
    with torch.no_grad():
        prior.out[1].weight.mul_(0.1), prior.out[1].bias.mul_(0.1)
    return prior


def make_image_encoder(rows, encoder=None):
    """A small encoder, or the given one, whose batch norms are calibrated on the images.

    Its scaled latents have unit variance, like the published encoder's. With a smaller variance,
    noise would dominate and a model could not learn anything about the images.
    """
    encoder = encoder or EfficientNetEncoder(c_latent=16, c_cond=64, stages=STAGES)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
    pixels = torch.stack([preprocess(open_image(row), 96) for row in rows])
    with torch.no_grad():
        encoder.train()(pixels)
        norm = encoder.mapper[1]
        norm.weight.mul_(diffusion.LATENT_SCALE)
        norm.bias.mul_(diffusion.LATENT_SCALE).sub_(diffusion.LATENT_SHIFT)
    return encoder.eval()


def make_decoder(folder, tokenizer):
    """Write Stages B and A, which decode 3×3 latents to 128×128 pixels, in the Hub's layout."""
    decoder = WuerstchenDiffNeXt(
        c_in=4, c_out=4, c_r=16, patch_size=2, c_cond=32, c_hidden=[16, 16, 16, 16],
        nhead=[-1, 2, 2, 2], blocks=[1, 1, 1, 1], effnet_embd=16, clip_embd=16,
    )  # fmt: skip
    # The default initialisation ignores the latents. These weights do not, and their divisor b is
    # near 1, so that sampling does not diverge to black and white.
    for name, weight in decoder.named_parameters():
        if name.endswith("channelwise.4.weight") or name.startswith(("effnet_mappers", "clf")):
            torch.nn.init.normal_(weight, std=0.3)
    with torch.no_grad():
        decoder.clf[1].weight[16:].zero_(), decoder.clf[1].bias[16:].fill_(6.0)
    vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)
    torch.nn.init.normal_(vqgan.out_block[0].weight, std=0.2)
    torch.nn.init.constant_(vqgan.out_block[0].bias, 0.5)
    decoder.save_pretrained(folder / "decoder")
    vqgan.save_pretrained(folder / "vqgan")
    make_text_encoder(tokenizer, 16, layers=2, heads=4).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    return folder


def make(folder, seed=0, **prior_config):
    """Write all parts and return the folder."""
    torch.manual_seed(seed)
    folder = Path(folder)
    images = rows()
    tokenizer = make_tokenizer(images["text"], size=700, length=77)
    text_encoder = make_text_encoder(tokenizer, 32, layers=2, heads=4)
    make_prior(**prior_config).save_pretrained(folder / "prior")
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    make_image_encoder(images).save_pretrained(folder / "image_encoder")
    make_decoder(folder / "decoder", tokenizer)
    return folder


if __name__ == "__main__":
    print(f"a small random Würstchen: {make(sys.argv[1])}")
