"""From latents to pictures to look at: the decoder, a cheap preview of it, and grids with captions.

    decode = FullDecoder(decoder_folder, device, half=True)
    with decode.ready():
        picture = decode(latents, "a bear", generator)
    grid([picture], ["a bear"], title="step 500").save("grid.png")
"""

import contextlib
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from minwurst import cost, data, diffusion, pipelines, report


class FullDecoder:
    """Würstchen's Stages B and A as diffusers has them: 12 steps, no guidance."""

    def __init__(self, folder, device, half=False):
        """folder: where `decoder/`, `vqgan/`, `text_encoder/` and `tokenizer/` lie.

        half: in fp16, but not on a CPU, which is slow at it. Never in bf16: diffusers counts the
        decoder's time in the type of its weights, and bf16 can't tell its steps apart.
        """
        self.device = device
        dtype = torch.float16 if half and device.type != "cpu" else torch.float32
        self.pipeline = pipelines.decoder_pipeline(folder, dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        parts = (self.pipeline.decoder, self.pipeline.vqgan, self.pipeline.text_encoder)
        self.size = sum(cost.size_of(part) for part in parts)

    @staticmethod
    def cells(wanted):
        """The side of the latent that is nearest to `wanted` cells among those it can decode.

        Stage B works at 10.67 times the latent's side and halves that four times, which comes out
        even for multiples of three cells.
        """
        return max(1, round(wanted / 3)) * 3

    @contextlib.contextmanager
    def ready(self):
        """Within the context the decoder is on the device; else it waits in the CPU's memory."""
        self.pipeline.to(self.device)
        try:
            yield
        finally:
            self.pipeline.to("cpu", silence_dtype_warnings=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __call__(self, latents, prompt, generator):
        """One picture, RGB. latents: (1, 16, h, w) as the prior has them. generator: for noise."""
        embedded = diffusion.unscale_latents(latents)
        embedded = embedded.to(self.device, self.pipeline.decoder.dtype)
        with pipelines.quietly():  # that a long prompt is cut has been said once
            return self.pipeline(embedded, prompt, generator=generator).images[0]


class PreviewDecoder:
    """A linear map from each cell and its eight neighbours to 8×8 pixels: colours and rough shapes.

    It is fitted by least squares to pictures and their latents, and needs no decoder at all.
    """

    SIDE = 8  # pixels of a cell
    PICTURES = 128  # more than enough: each has (R/32)² cells, and the map 145 × 192 numbers
    size = 0

    def __init__(self, pairs, encode):
        """pairs: a data.Pairs to fit to. encode: as in the training scripts, samples → latents."""
        count = min(len(pairs.rows), self.PICTURES)
        places = [range(place, min(place + 8, count)) for place in range(0, count, 8)]
        squares, products = 0.0, 0.0
        for samples in report.progress(data.batches(pairs, places), "preview", total=len(places)):
            latents = encode(samples)[0].cpu()
            cells = self.neighbourhoods(latents)                                 # (B·h·w, 145)
            pixels = samples.get("pixels")
            if pixels is None:  # the samples come from a cache
                rows = [pairs.row(position) for position in samples["positions"]]
                pixels = torch.stack([pairs.pixels(row) for row in rows])
            pixels = pixels.permute(0, 2, 3, 1).numpy()                             # (B, R, R, 3)
            pixels = torch.from_numpy(pixels * data.IMAGENET_STD + data.IMAGENET_MEAN)
            side = self.SIDE * latents.shape[-1]
            small = F.interpolate(pixels.permute(0, 3, 1, 2), (side, side), mode="area")
            patches = F.pixel_unshuffle(small, self.SIDE)                         # (B, 192, h, w)
            patches = patches.permute(0, 2, 3, 1).flatten(0, 2).double()         # (B·h·w, 192)
            squares, products = squares + cells.T @ cells, products + cells.T @ patches
        # A little ridge: with few pictures there are fewer cells than numbers to fit.
        ridge = 1e-3 * squares.trace() / len(squares) * torch.eye(len(squares))
        self.weights = torch.linalg.solve(squares + ridge, products)                # (145, 192)

    @staticmethod
    def neighbourhoods(latents):
        """(B, 16, h, w) → each cell's 3×3 neighbourhood and a 1, (B·h·w, 145) in fp64."""
        plain = F.pad(diffusion.unscale_latents(latents), (1, 1, 1, 1), mode="replicate")
        around = F.unfold(plain, 3).transpose(1, 2).flatten(0, 1).double()
        return F.pad(around, (0, 1), value=1.0)

    @staticmethod
    def cells(wanted):
        """Any number of cells will do."""
        return wanted

    def ready(self):
        return contextlib.nullcontext()

    def __call__(self, latents, prompt, generator):
        """As FullDecoder's; prompt and generator change nothing here."""
        patches = (self.neighbourhoods(latents.cpu()) @ self.weights).float()        # (h·w, 192)
        patches = patches.unflatten(0, latents.shape[-2:]).permute(2, 0, 1)          # (192, h, w)
        pixels = F.pixel_shuffle(patches, self.SIDE).clamp(0, 1).permute(1, 2, 0)    # (·, ·, 3)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def grid(pictures, captions, title=None, columns=4):
    """One picture of many, each with its caption beneath, row by row under the title."""
    side = min(512, max(192, max(max(picture.size) for picture in pictures)))
    columns = -(-len(pictures) // -(-len(pictures) // columns))  # rows of equal length
    font = font_for("".join(captions), side // 20 + 4)
    line, gap = font.size * 5 // 4, side // 24
    texts = [wrap(caption, font, side) for caption in captions]
    beneath = gap // 2 + line * max(len(text) for text in texts)
    above = gap + line if title else 0
    rows = -(-len(pictures) // columns)
    width = gap + columns * (side + gap)
    sheet = Image.new("RGB", (width, above + gap + rows * (side + beneath + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap, gap), title, "black", font)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + gap), above + gap + row * (side + beneath + gap)
        scale = side / max(picture.size)
        size = [round(length * scale) for length in picture.size]
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + side + gap // 2), "\n".join(text), "black", font)
    return sheet


def font_for(text, size):
    """Pillow's own font; for letters it lacks, one of the system's where there is one."""
    others = [] if text.isascii() else ["NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial.ttf"]
    for name in others:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrap(text, font, width, lines=3):
    """The text in at most so many lines of at most `width` pixels, cut where it has more."""
    letters = max(1, int(width / font.getlength("n")))
    while True:
        found = textwrap.wrap(text, letters, max_lines=lines, placeholder=" …"[-letters:])
        if letters == 1 or all(font.getlength(line) <= width for line in found):
            return found
        letters -= 1


def stack(sheets):
    """Sheets of the same kind, one beneath the other."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole = Image.new("RGB", (width, height), "white")
    for sheet, y in zip(sheets, np.cumsum([0, *(s.height for s in sheets)]), strict=False):
        whole.paste(sheet, (0, int(y)))
    return whole
