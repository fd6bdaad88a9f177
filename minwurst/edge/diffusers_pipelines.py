"""diffusers' own Würstchen pipelines, assembled from their parts.

`from_pretrained` of a whole pipeline has failed since diffusers 0.38, also for the published
repositories: their index names a library, "wuerstchen", that diffusers no longer finds. The parts
still load one by one, and the module of a pipeline's class has the classes of its parts in every
version.
"""

import contextlib
import importlib
import json
from pathlib import Path

import diffusers
import torch
import transformers

from minwurst.base.errors import UserError
from minwurst.edge import lora_file, models
from minwurst.step import adapter, diffusion
from minwurst.step.prior import WuerstchenPrior

PRIOR, DECODER = diffusers.WuerstchenPriorPipeline, diffusers.WuerstchenDecoderPipeline


@contextlib.contextmanager
def quiet():
    """Use as a context manager: inside, no warnings of deprecation or of long prompts."""
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
    """A class from the module of a pipeline's class, whose path differs between versions."""
    return getattr(importlib.import_module(pipeline.__module__), name)


def load_model(kind, folder, dtype):
    """A model of diffusers for inference."""

    def load(place):
        return models.load_weights(kind, place, torch_dtype=dtype)

    return models.load_part(load, folder).requires_grad_(False).eval()


def prior_pipeline(folder, text_folder, dtype=torch.float32, lora=None, lora_scale=1.0):
    """diffusers' pipeline of the prior, from a prompt to latents. lora: merged, if given.

    Its scheduler only samples priors that predict ε.
    """
    config = models.load_part(WuerstchenPrior.load_config, models.prior_folder(folder))
    predicts = diffusion.PREDICTION if lora else config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise UserError(f"{lora or folder} predicts {predicts}: use python -m minwurst.sample.")
    reference = class_beside(PRIOR, "WuerstchenPrior")
    prior = load_model(reference, models.prior_folder(folder), dtype)
    if lora:
        lora_file.load(prior, models.locate_lora(lora))
        adapter.set_scale(prior, lora_scale)
        adapter.merge(prior)
    tokenizer, text_encoder = models.load_text(text_folder, dtype)
    with quiet():
        return PRIOR(
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
        )


def decoder_pipeline(folder, dtype=torch.float32):
    """diffusers' pipeline of Stages B and A, from latents to images."""
    models.check_decoder(folder)
    folder = Path(folder)
    tokenizer, text_encoder = models.load_text(folder, dtype)
    index = folder / "model_index.json"
    known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    stage_b, stage_a = (class_beside(DECODER, n) for n in ("WuerstchenDiffNeXt", "PaellaVQModel"))
    with quiet():
        return DECODER(
            decoder=load_model(stage_b, folder / "decoder", dtype),
            vqgan=load_model(stage_a, folder / "vqgan", dtype),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
            latent_dim_scale=known.get("latent_dim_scale", 10.67),
        )
