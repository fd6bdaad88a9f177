"""The data as the trainer sees it, in one picture, before the first step.

    write_sheet(samples, source, decode, file)

The first samples of each shape: each image with its crop drawn in and, where there is a decoder,
what the image encoder and the decoder make of it without the prior. Better than that, no
fine-tuning can get.
"""

import time

import torch
from PIL import Image, ImageDraw

from minwurst.edge.grids import grid
from minwurst.step import randomness
from minwurst.step.buckets import STRIDE
from minwurst.step.images import crop_box, open_image
from minwurst.step.samples import collate

SHOWN, COLUMNS, SIDE = 8, 4, 384  # samples, per line of the sheet, pixels of the longer side
PATIENCE = 20  # seconds after which no further image is decoded


def write_sheet(samples, source, decode, file):
    """Write the sheet, and return it. samples: Samples. source: of latents. decode: or None."""
    shown, start, cells = first_of_each_shape(samples), time.perf_counter(), []
    for first in range(0, len(shown), COLUMNS):
        positions = shown[first : first + COLUMNS]
        cells += [with_crop(samples, position) for position in positions]
        if decode and time.perf_counter() - start < PATIENCE:
            with decode.on_device():
                cells += [reconstructed(samples, source, decode, p) for p in positions]
    sheet = grid(*zip(*[cell for cell in cells if cell], strict=True), columns=COLUMNS)
    sheet.save(file)
    return sheet


def first_of_each_shape(samples):
    """Positions of SHOWN samples, as many of each shape: from the first step that takes it."""
    buckets, first, step = samples.buckets, {}, 0
    while len(first) < len(buckets.shapes):
        first.setdefault(buckets.schedule.at(step)[0], step * buckets.batch)
        step += 1
    each = -(-SHOWN // len(first))
    positions = [start + number for number in range(each) for start in first.values()]
    return positions[: min(SHOWN, len(samples.rows))]


def with_crop(samples, position):
    """(image with everything outside its crop pale, its captions)."""
    (height, width), _ = samples.buckets.at(position)
    row = samples.row(position)
    image = open_image(row)
    box = crop_box(*image.size, height * STRIDE, width * STRIDE, samples.where(position))
    scale = SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size])
    left, top, right, bottom = (round(edge * scale) for edge in box)
    shown = Image.blend(small, Image.new("RGB", small.size, "white"), 0.7)
    shown.paste(small.crop((left, top, right, bottom)), (left, top))
    frame = left, top, min(right, small.width) - 1, min(bottom, small.height) - 1
    is_cut = frame != (0, 0, small.width - 1, small.height - 1)
    if is_cut:
        ImageDraw.Draw(shown).rectangle(frame, outline="red", width=2)
    caption = row["text"] if isinstance(row["text"], str) else " / ".join(row["text"])
    what = ["cropped to the frame"] * is_cut + ["mirrored"] * samples.is_flipped(position)
    return shown, caption + f" ({', '.join(what)})" * bool(what)


def reconstructed(samples, source, decode, position):
    """(the sample encoded and decoded, a label); of a shape that can't be decoded, its middle.

    None if that is too small.
    """
    latents, _ = source.encode(collate([samples[position]]))                   # (1, 16, h, w)
    sides = latents.shape[-2:]
    used = [side if decode.latent_size(side) == side else side // 3 * 3 for side in sides]
    if 0 in used:
        return None
    top, left = ((side - shown) // 2 for side, shown in zip(sides, used, strict=True))
    middle = latents[:, :, top : top + used[0], left : left + used[1]]
    generator = randomness.decoding_generator(samples.seed, (position, 0))
    with torch.no_grad():
        image = decode(middle.cpu(), "", generator)
    cut = ": the middle that the decoder can take" * (middle.shape != latents.shape)
    return image, f"encoded and decoded{cut}"
