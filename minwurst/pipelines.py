"""diffusers' own Würstchen pipelines, put together from their parts.

    prior, decoder = load("runs/demo/prior_pipeline", "warp-ai/wuerstchen", torch.float16)
    latents = prior.to("cuda")("a bear").image_embeddings                        # (1, 16, 24, 24)
    picture = decoder.to("cuda")(latents, "a bear").images[0]

`from_pretrained` of a whole pipeline fails since diffusers 0.38, for the published repositories
too: their index names a library, "wuerstchen", that is no longer found. The parts still load one by
one, and the module of a pipeline's class names the classes of its parts in every version.
"""

import contextlib
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers

from minwurst import lora as adapters
from minwurst import models
from minwurst.config import UserError

DECODER_PARTS = ("decoder", "vqgan", "text_encoder", "tokenizer")


def load(prior, decoder="warp-ai/wuerstchen", dtype=torch.float32, lora=None, lora_scale=1.0):
    """(WuerstchenPriorPipeline, WuerstchenDecoderPipeline), on the CPU, ready to be called.

    prior, decoder: folders or Hub repositories. lora: a LoRA's file, folder or repository, whose
    change is added to the prior's weights lora_scale times; PEFT is not needed. UserError names
    what is missing or broken.
    """
    prior_folder = models.locate("prior", prior)
    decoder_folder = models.locate("decoder", decoder)
    return (
        prior_pipeline(prior_folder, models.text_folder(prior_folder), dtype, lora, lora_scale),
        decoder_pipeline(decoder_folder, dtype),
    )


@contextlib.contextmanager
def quietly():
    """Within the context nobody is told that these pipelines are old, or a prompt is long."""
    logs = [library.utils.logging for library in (diffusers, transformers)]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def class_beside(pipeline, name):
    """A class that is defined beside a pipeline's; its path differs from version to version."""
    return getattr(sys.modules[pipeline.__module__], name)


def load_model(kind, folder, part, dtype):
    """A model of diffusers from `folder/part`, for inference."""

    def load(place):
        return models.load_weights(kind, place, torch_dtype=dtype)

    return models.load_part(load, folder, part).requires_grad_(False).eval()


def prior_pipeline(prior_folder, text_folder, dtype, lora=None, lora_scale=1.0):
    """diffusers' pipeline of the prior, which turns a prompt into latents."""
    kind = diffusers.WuerstchenPriorPipeline
    reference = class_beside(kind, "WuerstchenPrior")
    prior = load_model(reference, models.prior_part(prior_folder), ".", dtype)
    if lora:
        adapters.load(prior, models.locate_lora(lora))
        adapters.set_scale(prior, lora_scale)
        adapters.merge(prior)
    tokenizer, text_encoder = models.load_text(text_folder, dtype)
    with quietly():
        return kind(
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
        )


def find_decoder(name, cache_dir=None):
    """The local folder of the decoder; UserError where there is none, or a part is missing."""
    folder = models.locate(
        "pretrained_decoder_model_name_or_path", name, cache_dir,
        advice=" Training can do without: --validation_decoder=preview.",
    )  # fmt: skip
    check_decoder(folder)
    return folder


def check_decoder(folder):
    """UserError names the first part of the decoder that is missing."""
    for part in DECODER_PARTS:
        file = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        if not (Path(folder) / part / file).is_file():
            raise UserError(f"{folder} is no whole Würstchen decoder: {part}/{file} is missing.")


def decoder_pipeline(folder, dtype):
    """diffusers' pipeline of Stages B and A, which turns latents into pictures."""
    check_decoder(folder)
    kind = diffusers.WuerstchenDecoderPipeline
    tokenizer, text_encoder = models.load_text(folder, dtype)
    index = Path(folder) / "model_index.json"
    known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    with quietly():
        return kind(
            decoder=load_model(class_beside(kind, "WuerstchenDiffNeXt"), folder, "decoder", dtype),
            vqgan=load_model(class_beside(kind, "PaellaVQModel"), folder, "vqgan", dtype),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
            latent_dim_scale=known.get("latent_dim_scale", 10.67),
        )
