"""One image: from a row of the data set to the image encoder's input.

    pixels = preprocess(open_image(row), 768)                                  # (3, 768, 768)

Pillow and NumPy compute the same numbers as torchvision's Resize, CenterCrop, ToTensor and
Normalize.
"""

import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from minwurst.base.errors import UserError

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def open_image(row):
    """A row's image as 8-bit RGB, upright, with transparent parts white.

    Reads any mode that Pillow reads: palette, gray, 16 bits, CMYK, floating point. A UserError
    names the row.
    """
    stored = row["image"] or {}
    try:
        source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored.get("path")
        if not isinstance(source, io.BytesIO) and not os.path.isfile(source or ""):
            raise OSError("there is no such file" if source else "the row has none")
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        where = f" ({stored['path']})" if stored.get("path") else ""
        raise UserError(f"Row {row['number']}{where}: can't read the image: {error}") from None
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which convert() would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"Row {row['number']}: its image has pixels that are not finite.")
        largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(image.mode, 65535.0)
        image = Image.fromarray((values / largest * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def preprocess(image, side):
    """Resize the shorter side to `side` (bilinear, antialiased), crop the center, normalise.

    image: RGB. Returns (3, side, side) fp32 with ImageNet's mean and standard deviation. A single
    call to Pillow resizes and crops: it computes only the pixels inside the crop, which are those
    of the whole image resized, up to rounding to 8 bits.
    """
    width, height = image.size
    short = min(width, height)
    new_width, new_height = int(side * width / short), int(side * height / short)
    left, top = round((new_width - side) / 2), round((new_height - side) / 2)
    x, y = width / new_width, height / new_height  # original pixels per resized pixel
    box = (left * x, top * y, (left + side) * x, (top + side) * y)
    square = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    # Channels first, then arithmetic: along a last axis of three NumPy takes eight times as long.
    values = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")   # (3, side, side)
    values = (values / 255 - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]
    return torch.from_numpy(values)


def unnormalise(pixels):
    """The inverse of preprocess's normalisation: (B, 3, H, W) → RGB in [0, 1], fp32."""
    values = pixels.permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
    return torch.from_numpy(values).permute(0, 3, 1, 2)
