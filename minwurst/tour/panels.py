"""Panels: functions that print lines and yield images, and whose source is part of the page.

A panel's docstring is its title and its text. It takes a Bench and yields (image, caption); an
image is PIL's, or an SVG as a string.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minwurst.tour.bench import fingerprint

RESULTS = Path(__file__).parent / "results"
TILE = 160  # pixels of a side, of images that are kept


@dataclasses.dataclass
class Result:
    """What a panel gave. figures: [(image, caption)]. weights: fingerprint of the miniature."""

    code: str
    printed: str
    figures: list
    weights: str


def describe(panel):
    """(title, text) from the docstring."""
    title, _, text = inspect.cleandoc(panel.__doc__).partition("\n\n")
    return title, text


def code_of(panel):
    """The lines of a panel's body, without its docstring."""
    source = inspect.getsource(panel)
    _, _, body = source.split('"""', 2)
    return textwrap.dedent(body.strip("\n")).rstrip()


def perform(panel, bench):
    """Run a panel. It prints into the result instead of onto the console."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        figures = list(panel(bench) or ())
    return Result(code_of(panel), printed.getvalue().rstrip(), figures, fingerprint())


# ---- Results that are kept: a .json with an entry per figure and one .webp of all its images.


def save(result, name, folder=RESULTS):
    folder.mkdir(parents=True, exist_ok=True)
    tiles = [image.resize((TILE, TILE)) for image, _ in result.figures if not is_drawing(image)]
    strip = folder / f"{name}.webp"
    if tiles:
        row = np.concatenate([np.asarray(tile) for tile in tiles], axis=1)
        Image.fromarray(row).save(strip, quality=80, method=6)
    figures = [{"caption": caption, "svg": image if is_drawing(image) else None}
               for image, caption in result.figures]  # fmt: skip
    kept = {**dataclasses.asdict(dataclasses.replace(result, figures=[])), "figures": figures}
    text = json.dumps(kept, ensure_ascii=False, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load(name, folder=RESULTS):
    kept = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tiles, figures = iter(()), []
    if (folder / f"{name}.webp").is_file():
        with Image.open(folder / f"{name}.webp") as strip:
            row = strip.convert("RGB")
        tiles = (row.crop((x, 0, x + TILE, TILE)) for x in range(0, row.width, TILE))
    for figure in kept["figures"]:
        figures.append((figure["svg"] or next(tiles), figure["caption"]))
    return Result(**{**kept, "figures": figures})


def is_drawing(image):
    """Whether a figure is an SVG."""
    return isinstance(image, str)
