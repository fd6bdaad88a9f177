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


def preprocess(image, height, width=None, where=(0.5, 0.5)):
    """Resize to cover height × width (bilinear, antialiased), crop, normalise.

    image: RGB. width: the height if not given. where: of the crop in what is left over, from 0
    (left, top) to 1; the default is the center. Returns (3, height, width) fp32 with ImageNet's
    mean and standard deviation. A single call to Pillow resizes and crops: it computes only the
    pixels inside the crop, which are those of the whole image resized, up to rounding to 8 bits.
    """
    width = width or height
    box = crop_box(*image.size, height, width, where)
    inside = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    # Channels first, then arithmetic: along a last axis of three NumPy takes eight times as long.
    values = np.asarray(inside).transpose(2, 0, 1).astype(np.float32, order="C")       # (3, H, W)
    values = (values / 255 - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]
    return torch.from_numpy(values)


def crop_box(old_width, old_height, height, width, where=(0.5, 0.5)):
    """What `preprocess` keeps of an image: left, top, right, bottom in its own pixels."""
    if width * old_height >= height * old_width:  # the image is at least as tall as the crop
        new_width, new_height = width, max(height, int(width * old_height / old_width))
    else:
        new_width, new_height = max(width, int(height * old_width / old_height)), height
    left, top = (
        round((new - kept) * fraction)
        for new, kept, fraction in zip((new_width, new_height), (width, height), where, strict=True)
    )
    x, y = old_width / new_width, old_height / new_height  # original pixels per resized pixel
    return left * x, top * y, (left + width) * x, (top + height) * y


def unnormalise(pixels):
    """The inverse of preprocess's normalisation: (B, 3, H, W) → RGB in [0, 1], fp32."""
    values = pixels.permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
    return torch.from_numpy(values).permute(0, 3, 1, 2)
