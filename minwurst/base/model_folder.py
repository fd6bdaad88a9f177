"""What a model folder has and says besides its prior and text encoder.

    own_parts("my_base")
    # {"image_encoder": "my_base/image_encoder", "decoder": "my_base/decoder", "resolution": 192}

A Hub repository that has not been downloaded is no folder and gives {}.
"""

import json
import os
from pathlib import Path

from minwurst.base.errors import UserError

INDEX = "model_index.json"  # the Hub's; "resolution" in it is this project's addition


def own_parts(folder):
    """The parts that are there, as paths, and the resolution the folder says it was trained at."""
    folder, found = Path(folder), {}
    for part, file in (("image_encoder", "config.json"), ("decoder", "decoder/config.json")):
        if os.path.isfile(folder / part / file):
            found[part] = str(folder / part)
    if os.path.isfile(folder / INDEX):
        try:
            resolution = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("resolution")
            assert resolution is None or isinstance(resolution, int)
            assert resolution is None or resolution >= 32 and not resolution % 32
        except (OSError, ValueError, AttributeError, AssertionError, RecursionError):
            raise UserError(
                f"{folder / INDEX} can't be read, or its resolution is not a multiple of 32."
            ) from None
        if resolution:
            found["resolution"] = resolution
    return found
