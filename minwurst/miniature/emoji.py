"""The images that the miniature is trained on: emoji of the same names in six styles, from npm."""

import io
import json
import re
import subprocess
import tarfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from minwurst.miniature.world import STYLES, caption
from minwurst.step.images import IMAGENET_MEAN, IMAGENET_STD

SIDE, INPUT = 256, 192  # of an image, and of the image encoder's input: 6×6 latents
VERSIONS = {
    "unicode-emoji-json": "0.9.0",  # names; MIT
    "@lobehub/fluent-emoji-3d": "1.1.0",  # MIT, Microsoft's Fluent Emoji, and so is the next
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto": "1.2.9",  # Apache 2.0, Google
    "@iconify-json/twemoji": "1.2.5",  # CC BY 4.0, Twitter
    "@fontsource/noto-emoji": "5.3.2",  # OFL 1.1, Google
}
GROUPS = (
    "Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects",
)  # fmt: skip


def unpack(package, work):
    """The folder of an npm package."""
    folder = work / package.replace("/", "-")
    if not folder.is_dir():
        version = f"{package}@{VERSIONS[package]}"
        packed = subprocess.check_output(["npm", "pack", "-s", version], cwd=work, text=True)
        with tarfile.open(work / packed.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def codes(emoji):
    """The ways in which packages spell an emoji's code points."""
    code = "-".join(f"{ord(letter):x}" for letter in emoji)
    return code, code.replace("-fe0f", "")


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


class Rendered:
    """A package of images."""

    def __init__(self, folder):
        self.folder = folder / "assets"

    def draw(self, emoji):
        files = [file for c in codes(emoji) if (file := self.folder / f"{c}.webp").is_file()]
        return Image.open(files[0]) if files else None


class Duotone(Rendered):
    """The same in two colors, from dark blue to cream."""

    def draw(self, emoji):
        image = super().draw(emoji)
        gray = Image.fromarray(on_white(image)).convert("L") if image else None
        return gray and ImageOps.colorize(gray, (20, 30, 110), (255, 250, 235))


class Vectors:
    """A package of SVG drawings in one JSON file."""

    def __init__(self, folder):
        self.icons, self.names = read_json(folder / "icons.json"), read_json(folder / "chars.json")

    def draw(self, emoji):
        import cairosvg  # pip install cairosvg, which needs the system's cairo

        name = next((self.names[c] for c in codes(emoji) if c in self.names), None)
        alias = self.icons.get("aliases", {}).get(name, {})
        icon = self.icons["icons"].get(alias.get("parent", name))
        if icon is None:
            return None
        side = icon.get("width") or self.icons.get("width", 16)
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        body = icon["body"].replace("currentColor", "#000")
        svg = f'{head}viewBox="0 0 {side} {side}">{body}</svg>'
        return Image.open(io.BytesIO(cairosvg.svg2png(svg.encode(), output_width=SIDE)))


class Font:
    """A package of font files, each for some letters."""

    def __init__(self, folder):
        from fontTools.ttLib import TTFont  # pip install fonttools brotli

        self.fonts = []
        for file in sorted((folder / "files").glob("*-400-normal.woff2")):
            font, plain = TTFont(file), io.BytesIO()
            font.flavor = None
            font.save(plain)
            plain.seek(0)
            self.fonts.append((set(font.getBestCmap()), ImageFont.truetype(plain, 220)))

    def draw(self, emoji):
        letters = emoji.replace("\ufe0f", "")
        fonts = [font for known, font in self.fonts if {ord(letter) for letter in letters} <= known]
        if len(letters) > 1 or not fonts:
            return None
        sheet = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(sheet).text((256, 256), letters, "black", fonts[0], anchor="mm")
        drawn = sheet.crop(ImageChops.invert(sheet.convert("L")).getbbox())
        side = round(max(drawn.size) * 1.06)
        square = Image.new("RGB", (side, side), "white")
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        return square


SOURCES = {
    "fluent": (Rendered, "@lobehub/fluent-emoji-3d"),
    "fluent duotone": (Duotone, "@lobehub/fluent-emoji-3d"),
    "fluent drawn": (Vectors, "@iconify-json/fluent-emoji-high-contrast"),
    "noto": (Vectors, "@iconify-json/noto"),
    "twemoji": (Vectors, "@iconify-json/twemoji"),
    "noto ink": (Font, "@fontsource/noto-emoji"),
}


def on_white(image):
    """An RGB array (256, 256, 3); white where there is no image."""
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    if image:
        size = (SIDE, SIDE)
        white.alpha_composite(image.convert("RGBA").resize(size, Image.Resampling.LANCZOS))
    return np.asarray(white.convert("RGB"))


def load_images(work):
    """(names, {style: images (N, 3, 256, 256) bytes}, {style: (N,) whether there is one}).

    Only emoji that exist in all styles but the font's, with one skin tone each.
    """
    file = work / "images.npz"
    if not file.is_file():
        draws = {style: kind(unpack(name, work)).draw for style, (kind, name) in SOURCES.items()}
        listed = read_json(unpack("unicode-emoji-json", work) / "data-by-emoji.json")
        names, drawn = [], {style: [] for style in STYLES}
        for emoji, facts in listed.items():
            if facts["group"] in GROUPS:
                images = {style: draw(emoji) for style, draw in draws.items()}
                if all(images[style] for style in STYLES if style != "noto ink"):
                    names.append(facts["name"])
                    for style, image in images.items():
                        drawn[style].append(on_white(image))
        np.savez(file, names=names, **{style: np.stack(drawn[style]) for style in STYLES})
    stored = np.load(file)
    images = {style: torch.from_numpy(stored[style]).permute(0, 3, 1, 2) for style in STYLES}
    exists = {style: (some != 255).flatten(1).any(dim=1) for style, some in images.items()}
    return [str(name) for name in stored["names"]], images, exists


def shrink(images, side):
    """(N, 3, 256, 256) → (N, 3, side, side), both bytes."""
    parts = [
        F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True).round().byte()
        for part in images.split(100)
    ]
    return torch.cat(parts)


def normalised(images):
    """Bytes (N, 3, R, R) → the image encoder's input."""
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def save_images(folder, names, images, style):
    """Add images and captions of a style to a folder, as --train_data_dir expects them."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as metadata:
        for name, image in zip(names, images, strict=True):
            file = re.sub(r"[^a-z0-9]+", "_", caption(name, style).lower()) + ".webp"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file, lossless=True)
            line = {"file_name": file, "text": caption(name, style)}
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
