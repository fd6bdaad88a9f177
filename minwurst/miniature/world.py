"""The miniature's world: 1,015 names, and the latents of their images in nine styles.

A style is called what captions say about it: "rocket, noto". The base is trained on BASE. It has
never seen the other two: DEMO, the 3D images in the colors of a sunset, which --demo fine-tunes on,
and HARD, black-and-white drawings.
"""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minwurst.miniature import WORLD
from minwurst.step.diffusion import scale_latents

BASE = (
    "fluent", "noto", "twemoji", "noto ink", "fluent duotone", "fluent swapped", "fluent pencil",
)  # fmt: skip
DEMO, HARD = "fluent sunset", "fluent drawn"
STYLES = (*BASE, DEMO, HARD)
SHIPPED = slice(0, None, 3)  # the names that are fine-tuned on


def caption(name, style):
    return f"{name}, {style}"


def read_world(file=WORLD):
    """(N names, {style: scaled latents (N, 16, 6, 6) fp32}); NaN where a style lacks a name."""
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        return names, {style: opened.get_tensor(style).float() for style in STYLES}


def save_world(file, names, encoded):
    """Write the scaled latents in half precision. encoded: the image encoder's output, by style."""
    world = {style: scale_latents(latents).to(torch.half) for style, latents in encoded.items()}
    save_file(world, file, metadata={"names": json.dumps(names)})
