"""Grids of images with captions.

    grid([image], ["a bear"], title="step 500").save("grid.png")
"""

import contextlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BEFORE_AFTER = "before_after.png"  # in a run's folder `validation`

def grid(images, captions, title=None, columns=4):
    """One image of many, each with its caption below it."""
    side = min(512, max(192, max(max(image.size) for image in images)))
    columns = -(-len(images) // -(-len(images) // columns))  # rows of equal length
    font = font_for("".join(captions), side // 20 + 4)
    line, gap = font.size * 5 // 4, side // 24
    texts = [wrap_text(caption, font, side) for caption in captions]
    below = gap // 2 + line * max(len(text) for text in texts)
    above = gap + line if title else 0
    rows = -(-len(images) // columns)
    width = gap + columns * (side + gap)
    sheet = Image.new("RGB", (width, above + gap + rows * (side + below + gap)), "white")
    canvas = ImageDraw.Draw(sheet)
    if title:
        canvas.text((gap, gap), title, "black", font)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + gap), above + gap + row * (side + below + gap)
        scale = side / max(image.size)
        size = [round(length * scale) for length in image.size]
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x, y))
        canvas.multiline_text((x, y + side + gap // 2), "\n".join(text), "black", font)
    return sheet


def font_for(text, size):
    """Pillow's own font, or for letters that it lacks one of the system's, if there is one."""
    others = [] if text.isascii() else ["NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial.ttf"]
    for name in others:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrap_text(text, font, width, lines=3):
    """The text in at most so many lines of at most `width` pixels, shortened if it has more."""
    letters = max(1, int(width / font.getlength("n")))
    while True:
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder=" …"[-letters:])
        if letters == 1 or all(font.getlength(line) <= width for line in wrapped):
            return wrapped
        letters -= 1


def stack(sheets):
    """Several sheets, one below the other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (width, height), "white")
    for sheet, y in zip(sheets, np.cumsum([0, *(s.height for s in sheets)]), strict=False):
        whole.paste(sheet, (0, int(y)))
    return whole
