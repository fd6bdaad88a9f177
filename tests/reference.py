"""diffusers' own Würstchen, to compare with: the classes of all stages, and its pipelines.

diffusers moved them to its deprecated pipelines in April 2026. Where they are gone, the tests that
use them are skipped.
"""

import importlib
import json
from pathlib import Path

import diffusers
import pytest
import transformers


def __getattr__(name):
    """`reference.WuerstchenPrior` and so on: from the modules of the two pipelines."""
    if not name[0].isupper():  # Python and pytest ask for other names
        raise AttributeError(name)
    try:
        pipelines = diffusers.WuerstchenPriorPipeline, diffusers.WuerstchenDecoderPipeline
        modules = [importlib.import_module(pipeline.__module__) for pipeline in pipelines]
        return next(vars(module)[name] for module in modules if name in vars(module))
    except (AttributeError, ImportError, RuntimeError, StopIteration) as error:
        pytest.skip(f"diffusers has no {name} any more: {error}")


def load(name, folder):
    """A model of one of diffusers' classes."""
    return __getattr__(name).from_pretrained(folder, low_cpu_mem_usage=False)


def load_prior(folder):
    return load("WuerstchenPrior", folder)


def text_parts(folder):
    folder = Path(folder)
    return {
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


def prior_pipeline(folder):
    """The pipeline of the prior, from a prompt to latents. folder: with text encoder."""
    pipeline = __getattr__("WuerstchenPriorPipeline")(
        prior=load_prior(Path(folder) / "prior").eval(), **text_parts(folder)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decoder_pipeline(folder):
    """The pipeline of Stages B and A, from latents to images."""
    folder = Path(folder)
    index = folder / "model_index.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    pipeline = __getattr__("WuerstchenDecoderPipeline")(
        decoder=load("WuerstchenDiffNeXt", folder / "decoder").eval(),
        vqgan=load("PaellaVQModel", folder / "vqgan").eval(),
        latent_dim_scale=known.get("latent_dim_scale", 10.67),
        **text_parts(folder),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
