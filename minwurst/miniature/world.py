"""The miniature's world: 1,015 names and the latents of their images in two styles."""

import json

from safetensors import safe_open
from safetensors.torch import save_file

from minwurst.miniature import WORLD
from minwurst.step.diffusion import scale_latents

SHIPPED = slice(0, None, 3)  # the names whose black-and-white images are fine-tuned on
STYLES = ("solid", "outlined")  # 3D, and black and white


def read_world(file=WORLD):
    """(N names, {style: their scaled latents, (N, 16, 6, 6) fp32})."""
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        return names, {style: opened.get_tensor(style).float() for style in STYLES}


def save_world(file, names, encoded):
    """Write the scaled latents in half precision. encoded: the image encoder's output, by style."""
    world = {style: scale_latents(encoded[style]).half() for style in STYLES}
    save_file(world, file, metadata={"names": json.dumps(names)})
