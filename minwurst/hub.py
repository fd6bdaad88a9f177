"""The result in the Hub's layout: a folder that every diffusers can load, part by part.

    export_prior(output_dir / "prior_pipeline", prior, text_folder)

`prior_pipeline/` holds the fine-tuned prior and the base's text encoder and tokenizer, byte for
byte. Its model_index.json names the parts as the Hub's own repositories do, under the library name
"wuerstchen"; what diffusers' save_pretrained would write there does not load again.
"""

import json
import shutil
from pathlib import Path

import diffusers

from minwurst import models
from minwurst.checkpoint import put_in_place


def export_prior(folder, prior, text_folder):
    """Write the pipeline's folder whole or not at all; an earlier one is replaced.

    prior: the fine-tuned network. text_folder: where the base's text encoder and tokenizer lie.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    prior.save_pretrained(draft / "prior")
    for part in ("text_encoder", "tokenizer"):
        (draft / part).mkdir()
        for pattern in models.PATTERNS:
            for file in (Path(text_folder) / part).glob(pattern):
                shutil.copyfile(file, draft / part / file.name)
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
    put_in_place(draft, folder)
