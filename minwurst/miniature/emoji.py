"""The images that the miniature is trained on: emoji of the same names in several styles, from npm.

A style is a package, or a filter of the 3D images.
"""

import io
import json
import re
import subprocess
import tarfile

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from minwurst.miniature.world import STYLES, caption

SIDE = 256  # of an image
PACKAGES = {  # with versions
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",  # MIT, Microsoft's Fluent Emoji, and so is the next
    "fluent drawn": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",  # Apache 2.0, Google
    "twemoji": "@iconify-json/twemoji@1.2.5",  # CC BY 4.0, Twitter
    "noto ink": "@expo-google-fonts/noto-emoji@0.4.7",  # OFL 1.1, Google
}
NAMES = "unicode-emoji-json@0.9.0"  # MIT
GROUPS = (
    "Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects",
)  # fmt: skip


def in_colors(dark, light, **how):
    """A filter: brightness becomes a color from dark to light."""
    return lambda image: ImageOps.colorize(image.convert("L"), dark, light, **how)


def pencil(image):
    """A filter: darker than its surroundings becomes a line."""
    gray = image.convert("L")
    blurred = ImageOps.invert(gray).filter(ImageFilter.GaussianBlur(7))
    gray, blurred = np.asarray(gray, np.float32), np.asarray(blurred, np.float32)
    lines = 255 - np.minimum(255, gray * 255 / (256 - blurred))
    return Image.fromarray((255 - 1.6 * lines).clip(0, 255).astype(np.uint8))


FILTERS = {
    "fluent sunset": in_colors(
        (40, 25, 110), (255, 246, 220), mid=(235, 95, 60), blackpoint=30, midpoint=165
    ),
    "fluent duotone": in_colors((20, 30, 110), (255, 250, 235)),
    "fluent swapped": lambda image: Image.merge("RGB", [image.split()[n] for n in (2, 0, 1)]),
    "fluent pencil": pencil,
}


def unpack(package, work):
    """The folder of an npm package."""
    folder = work / package.replace("/", "-")
    if not folder.is_dir():
        packed = subprocess.check_output(["npm", "pack", "-s", package], cwd=work, text=True)
        with tarfile.open(work / packed.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def codes(emoji):
    """The ways in which packages spell an emoji's code points."""
    code = "-".join(f"{ord(letter):x}" for letter in emoji)
    return code, code.replace("-fe0f", "")


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def painter(folder):
    """A function from an emoji to its image in a package, or None."""
    if (folder / "assets").is_dir():  # rendered
        found = {file.stem: file for file in (folder / "assets").glob("*.webp")}
        return lambda emoji: next((Image.open(found[c]) for c in codes(emoji) if c in found), None)
    if (folder / "icons.json").is_file():  # SVG
        icons, names = read_json(folder / "icons.json"), read_json(folder / "chars.json")

        def draw(emoji):
            import cairosvg  # pip install cairosvg, which needs the system's cairo

            name = next((names[c] for c in codes(emoji) if c in names), None)
            alias = icons.get("aliases", {}).get(name, {})
            icon = icons["icons"].get(alias.get("parent", name))
            if icon is None:
                return None
            side = icon.get("width") or icons.get("width", 16)
            head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {0}" '
            head += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
            svg = head.format(side) + icon["body"].replace("currentColor", "#000") + "</svg>"
            return Image.open(io.BytesIO(cairosvg.svg2png(svg.encode(), output_width=SIDE)))

        return draw
    font = ImageFont.truetype(next(folder.glob("400Regular/*.ttf")), 220)
    unknown = bytes(font.getmask("\uffff"))

    def write(emoji):
        letters = emoji.replace("\ufe0f", "")
        if len(letters) > 1 or bytes(font.getmask(letters)) == unknown:
            return None
        sheet = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(sheet).text((256, 256), letters, "black", font, anchor="mm")
        drawn = sheet.crop(ImageChops.invert(sheet.convert("L")).getbbox())
        square = Image.new("RGB", [round(1.06 * max(drawn.size))] * 2, "white")
        place = [(side - part) // 2 for side, part in zip(square.size, drawn.size, strict=True)]
        square.paste(drawn, place)
        return square

    return write


def on_white(image):
    """(256, 256) RGB; white where there is no image."""
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    if image:
        size = (SIDE, SIDE)
        white.alpha_composite(image.convert("RGBA").resize(size, Image.Resampling.LANCZOS))
    return white.convert("RGB")


def load_images(work):
    """(names, {style: images (N, 3, 256, 256) bytes}, {style: (N,) whether there is one}).

    Only emoji that exist in all styles but the font's, with one skin tone each.
    """
    file = work / "images.npz"
    if not file.is_file():
        draws = {style: painter(unpack(package, work)) for style, package in PACKAGES.items()}
        listed = read_json(unpack(NAMES, work) / "data-by-emoji.json")
        names, drawn = [], {style: [] for style in STYLES}
        for emoji, facts in listed.items():
            if facts["group"] in GROUPS:
                images = {style: draw(emoji) for style, draw in draws.items()}
                if all(image for style, image in images.items() if style != "noto ink"):
                    names.append(facts["name"])
                    images = {style: on_white(image) for style, image in images.items()}
                    filtered = {style: f(images["fluent"]) for style, f in FILTERS.items()}
                    for style, image in {**images, **filtered}.items():
                        drawn[style].append(np.asarray(image.convert("RGB")))
        np.savez(file, names=names, **{style: np.stack(drawn[style]) for style in STYLES})
    stored = np.load(file)
    images = {style: torch.from_numpy(stored[style]).permute(0, 3, 1, 2) for style in STYLES}
    exists = {style: (some != 255).flatten(1).any(dim=1) for style, some in images.items()}
    return [str(name) for name in stored["names"]], images, exists


def save_images(folder, names, images, style):
    """Add images and captions of a style to a folder, as --train_data_dir expects them."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as metadata:
        for name, image in zip(names, images, strict=True):
            file = re.sub(r"[^a-z0-9]+", "_", caption(name, style).lower()) + ".webp"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / file, lossless=True)
            line = {"file_name": file, "text": caption(name, style)}
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
