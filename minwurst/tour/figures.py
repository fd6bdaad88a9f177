"""Small images of tensors."""

import numpy as np
import torch
from PIL import Image

SIDE = 256  # pixels of an image on the page


def picture(pixels):
    """(1, 3, H, W) in [0, 1] → an RGB image."""
    values = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def gray(grid, bound):
    """(h, w) from −bound to bound → an image in gray, whose cells are squares."""
    values = ((grid / bound + 1) / 2).clamp(0, 1) * 255
    image = Image.fromarray(values.round().to(torch.uint8).numpy()).convert("RGB")
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def maps(latents, columns):
    """All channels of (1, C, h, w) in one image, with the same scale of gray."""
    bound, gap = latents.abs().max().item(), 8
    tiles = [np.pad(gray(channel, bound), ((0, gap), (0, gap), (0, 0)), constant_values=255)
             for channel in latents[0]]  # fmt: skip
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return Image.fromarray(np.vstack(rows)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def pair(left, right):
    """Two images side by side."""
    return Image.fromarray(np.hstack([np.asarray(image.resize((SIDE, SIDE)))
                                      for image in (left, right)]))  # fmt: skip
