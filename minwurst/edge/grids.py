"""Grids of images with captions, and strips of what validation generated step by step.

    grid([image], ["a bear"], title="step 500").save("grid.png")
    update_strips(folder, 500, [image], ["a bear"])
"""

import contextlib
import dataclasses
import json
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from minwurst.edge.files import replacing

BEFORE_AFTER, STRIPS = "before_after.png", "strips.png"  # in a run's folder `validation`
COLUMNS, CELL = 8, 256  # of the strips: how many at most, and how wide in pixels


@dataclasses.dataclass
class Layout:
    """Of a grid, in pixels. size: of the sheet. boxes: (x, y, right, bottom) of each image."""

    size: tuple
    side: int
    gap: int
    font: object
    texts: list
    boxes: list


def layout(sizes, captions, title=None, columns=4):
    """sizes: of the images. columns: at most."""
    side = min(512, max(192, max(map(max, sizes))))
    columns = -(-len(sizes) // -(-len(sizes) // columns))  # rows of equal length
    font = font_for("".join(captions), side // 20 + 4)
    line, gap = font.size * 5 // 4, side // 24
    texts = [wrap_text(caption, font, side) for caption in captions]
    below = gap // 2 + line * max(len(text) for text in texts)
    above = gap + line if title else 0
    height = above + gap + -(-len(sizes) // columns) * (side + below + gap)
    boxes = []
    for number, size in enumerate(sizes):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + gap), above + gap + row * (side + below + gap)
        width, high = (round(length * side / max(size)) for length in size)
        boxes.append((x, y, x + width, y + high))
    return Layout((gap + columns * (side + gap), height), side, gap, font, texts, boxes)


def grid(images, captions, title=None, columns=4):
    """One image of many, each with its caption below it."""
    plan = layout([image.size for image in images], captions, title, columns)
    sheet = Image.new("RGB", plan.size, "white")
    canvas = ImageDraw.Draw(sheet)
    if title:
        canvas.text((plan.gap, plan.gap), title, "black", plan.font)
    for image, text, (x, y, right, bottom) in zip(images, plan.texts, plan.boxes, strict=True):
        sheet.paste(image.resize((right - x, bottom - y), Image.Resampling.LANCZOS), (x, y))
        below = y + plan.side + plan.gap // 2
        canvas.multiline_text((x, below), "\n".join(text), "black", plan.font)
    return sheet


def update_strips(folder, step, images, captions):
    """Write strips.png: a row per prompt, with the images of at most COLUMNS steps up to this one.

    They are cut from the grids step-*.png of the same prompts and sizes. The file records its
    steps, so that a resumed run continues it, and a new run in the folder does not.
    """
    file, steps = folder / STRIPS, [step]
    if step and file.is_file():
        with Image.open(file) as before:
            steps = [n for n in json.loads(before.info["steps"]) if n < step] + [step]
    plan, prompts = layout([image.size for image in images], captions, "step"), json.dumps(captions)

    def fits(n):
        with contextlib.suppress(OSError), Image.open(folder / f"step-{n:06}.png") as sheet:
            return sheet.size == plan.size and sheet.info.get("prompts") == prompts
        return False

    columns = {}
    for n in evenly([n for n in steps if fits(n)], COLUMNS):
        with Image.open(folder / f"step-{n:06}.png") as sheet:
            columns[n] = [sheet.crop(box) for box in plan.boxes]
            for cell in columns[n]:
                cell.thumbnail((CELL, CELL))
    info = PngInfo()
    info.add_itxt("steps", json.dumps(steps))
    with replacing(file, flushed=False) as draft:
        strips(columns, captions).save(draft, "PNG", pnginfo=info)


def evenly(items, most):
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def strips(columns, captions):
    """columns: {step: its images, one per caption}. A row per caption, which is above it."""
    rows = list(zip(*columns.values(), strict=True))
    font, gap = font_for("".join(captions), 18), 8
    line, titles = font.size * 5 // 4, [f"step {n}" if n else "before training" for n in columns]
    width = max(*(row[0].width for row in rows), *(int(font.getlength(title)) for title in titles))
    whole = gap + len(columns) * (width + gap)
    heights = [row[0].height + line + 2 * gap for row in rows]
    sheet = Image.new("RGB", (whole, 2 * gap + line + sum(heights)), "white")
    canvas, y = ImageDraw.Draw(sheet), 2 * gap + line
    for number, title in enumerate(titles):
        canvas.text((gap + number * (width + gap), gap), title, "black", font)
    for row, caption, height in zip(rows, captions, heights, strict=True):
        text = wrap_text(caption, font, whole - 2 * gap, lines=1)
        canvas.text((gap, y), "".join(text), "black", font)
        for number, image in enumerate(row):
            sheet.paste(image, (gap + number * (width + gap), y + line))
        y += height
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
