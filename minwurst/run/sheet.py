"""The data as the trainer sees it, in one picture, before the first step.

    write_sheet(samples, source, decode, file)

The first samples of the stream: each image with its crop drawn in and, where there is a decoder,
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
    count, start = min(SHOWN, len(samples.rows)), time.perf_counter()
    cells = []
    for first in range(0, count, COLUMNS):
        positions = range(first, min(first + COLUMNS, count))
        cells += [with_crop(samples, position) for position in positions]
        if decode and time.perf_counter() - start < PATIENCE:
            with decode.on_device():
                cells += [reconstructed(samples, source, decode, p) for p in positions]
    sheet = grid(*zip(*[cell for cell in cells if cell], strict=True), columns=COLUMNS)
    sheet.save(file)
    return sheet


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
    ImageDraw.Draw(shown).rectangle(frame, outline="red", width=2)
    caption = row["text"] if isinstance(row["text"], str) else " / ".join(row["text"])
    return shown, caption + " (mirrored)" * samples.is_flipped(position)


def reconstructed(samples, source, decode, position):
    """(the sample encoded and decoded, a label); None if its shape can't be decoded."""
    latents, _ = source.encode(collate([samples[position]]))
    if any(side != decode.latent_size(side) for side in latents.shape[-2:]):
        return None
    generator = randomness.decoding_generator(samples.seed, (position, 0))
    with torch.no_grad():
        return decode(latents.cpu(), "", generator), "encoded and decoded"
