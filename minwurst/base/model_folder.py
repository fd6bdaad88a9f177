"""What a model folder has and says besides its prior and text encoder.

    own_parts("my_base")
    # {"image_encoder": "my_base/image_encoder", "decoder": "my_base/decoder", "resolution": 192,
    #  "guidance_scale": 1.0}

A Hub repository that has not been downloaded is no folder and gives {}.
"""

import json
import os
from pathlib import Path

from minwurst.base.errors import UserError

RESULT = "prior_pipeline"  # the model folder that a run writes, in its output folder
INDEX = "model_index.json"  # the Hub's; SAID in it are this project's additions
SAID = ("resolution", "guidance_scale")  # how the model is meant to be sampled
FLAGS = {  # for the other parts
    "image_encoder": "image_encoder_name_or_path",
    "decoder": "pretrained_decoder_model_name_or_path",
}


def resolve(folder):
    """The model folder itself, or the one in the output folder of a run."""
    result = Path(folder) / RESULT
    return result if os.path.isdir(result) else Path(folder)


def of_run(folder):
    """The image encoder and decoder of the run that wrote this folder, where they are folders."""
    try:
        known = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))["settings"]
        paths = {part: str(known[name]) for part, name in FLAGS.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # there need not be a run
    return {part: path for part, path in paths.items() if os.path.isdir(path)}


def own_parts(folder):
    """The parts that are there, as paths, and what the folder says of its use."""
    folder = resolve(folder)
    found = of_run(folder) if folder.name == RESULT else {}
    for part, file in (("image_encoder", "config.json"), ("decoder", "decoder/config.json")):
        if os.path.isfile(folder / part / file):
            found[part] = str(folder / part)
    if os.path.isfile(folder / INDEX):
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            said = {name: index[name] for name in SAID if index.get(name) is not None}
        except (OSError, ValueError, AttributeError, RecursionError):
            raise UserError(f"{folder / INDEX} can't be read.") from None
        side, guidance = said.get("resolution", 32), said.get("guidance_scale", 1.0)
        if type(side) is not int or side < 32 or side % 32:
            raise UserError(f"{folder / INDEX}: its resolution is not a multiple of 32.")
        if type(guidance) not in (int, float) or not 0 <= guidance < 1000:
            raise UserError(f"{folder / INDEX}: its guidance_scale is not a number from 0.")
        found.update(said)
    return found
