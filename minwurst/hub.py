"""The result in the Hub's layout: a folder that every diffusers can load, part by part.

    export_prior(output_dir / "prior_pipeline", prior, source, cache_dir)

`prior_pipeline/` holds the fine-tuned prior and the unchanged text encoder, tokenizer and scheduler.
Its model_index.json names the parts as the Hub's own repositories do, under the library name
"wuerstchen"; what diffusers' save_pretrained would write there does not load again.
"""

import json
import shutil
from pathlib import Path

import diffusers

from minwurst import models
from minwurst.checkpoint import flush


def export_prior(folder, prior, source, cache_dir=None):
    """Write the pipeline's folder whole or not at all; an earlier one is replaced.

    prior: the fine-tuned network. source: the folder that `models.locate` gave for the base; its text
    encoder is read again, because training held it in the compute type.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer, text_encoder = models.load_text(source, "auto", cache_dir)
    prior.save_pretrained(draft / "prior")
    text_encoder.save_pretrained(draft / "text_encoder")
    tokenizer.save_pretrained(draft / "tokenizer")
    diffusers.DDPMWuerstchenScheduler().save_pretrained(draft / "scheduler")
    index = {
        "_class_name": "WuerstchenPriorPipeline",
        "_diffusers_version": diffusers.__version__,
        "latent_mean": 42.0,
        "latent_std": 1.0,
        "resolution_multiple": 42.67,
        "prior": ["wuerstchen", "WuerstchenPrior"],
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in sorted(draft.rglob("*")):
        flush(file)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
