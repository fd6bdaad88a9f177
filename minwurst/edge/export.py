"""The result of a full fine-tuning, in the Hub's layout.

`prior_pipeline/` contains the fine-tuned prior and the base's text encoder and tokenizer, byte for
byte. Its model_index.json names the parts as the Hub's own repositories do, under the library name
"wuerstchen"; what diffusers' save_pretrained writes there does not load again.
"""

import json
import shutil
from pathlib import Path

import diffusers
from safetensors import SafetensorError

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.base.model_folder import INDEX, RESULT
from minwurst.edge.files import not_finite, reason, replacing
from minwurst.edge.models import PATTERNS

FOLDER = RESULT
PARTS = ("prior", "text_encoder", "tokenizer", "scheduler")


def save_pipeline(prior, folder, text_folder, said):
    """Write the result, replacing an earlier one, and return its path; UserError if that fails.

    prior: fine-tuned. text_folder: has the base's text encoder and tokenizer. said: its
    resolution and guidance_scale, the defaults for whoever uses the result.
    """
    if name := not_finite(dict(prior.named_parameters())):
        raise UserError(f"{name} is not finite, so training has failed; no result was written.")
    try:
        with replacing(folder) as draft:
            write_parts(draft, prior, text_folder, said)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} was not written: {reason(error)} The last checkpoint is intact, and "
            "--resume_from_checkpoint=latest writes the result from it."
        ) from None
    if (prediction := prior.config.get("prediction_type", "epsilon")) != "epsilon":
        say(f"It predicts {prediction}, which diffusers' scheduler can't sample; minwurst can.")
    return Path(folder)


def write_parts(folder, prior, text_folder, said):
    """The parts and their index, in a folder that does not exist yet."""
    prior.save_pretrained(folder / "prior")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
        for pattern in PATTERNS:
            for file in (Path(text_folder) / part).glob(pattern):
                shutil.copyfile(file, folder / part / file.name)
    diffusers.DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    write_index(folder, **said)


def write_index(folder, **said):
    """model_index.json. said: resolution and guidance_scale, where there is something to say."""
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
        **said,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
