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


def resolve(folder):
    """The model folder itself, or the one in the output folder of a run."""
    result = Path(folder) / RESULT
    return result if os.path.isdir(result) else Path(folder)


def own_parts(folder):
    """The parts that are there, as paths, and what the folder says of its use."""
    folder, found = resolve(folder), {}
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
