"""The images that the miniature is trained on: emoji from two npm packages, in two styles."""

import io
import json
import re
import subprocess
import tarfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minwurst.step.images import IMAGENET_MEAN, IMAGENET_STD

SIDE, INPUT = 256, 192  # of an image, and of the image encoder's input: 6×6 latents
PACKAGES = {  # both MIT: Microsoft's Fluent Emoji
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "unicode-emoji-json": "0.9.0",
}
GROUPS = (
    "Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects",
)  # fmt: skip


def unpack(package, work):
    """The folder of an npm package."""
    folder = work / package.split("/")[-1]
    if not folder.is_dir():
        version = f"{package}@{PACKAGES[package]}"
        packed = subprocess.check_output(["npm", "pack", "-s", version], cwd=work, text=True)
        with tarfile.open(work / packed.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def on_white(image):
    image = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def load_images(work):
    """(names, images in 3D, images in black and white), the latter two (N, 3, 256, 256) bytes.

    Only emoji that exist in both styles, with one skin tone each.
    """
    file = work / "pictures.npz"
    if not file.is_file():
        import cairosvg  # pip install cairosvg, which needs the system's cairo

        rendered = unpack("@lobehub/fluent-emoji-3d", work) / "assets"
        drawn = unpack("@iconify-json/fluent-emoji-high-contrast", work)
        icons = json.loads((drawn / "icons.json").read_text(encoding="utf-8"))["icons"]
        icon_of = json.loads((drawn / "chars.json").read_text(encoding="utf-8"))
        listed = unpack("unicode-emoji-json", work) / "data-by-emoji.json"
        names, solid, outlined = [], [], []
        for emoji, facts in json.loads(listed.read_text(encoding="utf-8")).items():
            code = "-".join(f"{ord(letter):x}" for letter in emoji)
            codes = [c for c in (code, code.replace("-fe0f", "")) if c in icon_of]
            files = [f for c in (code, *codes) if (f := rendered / f"{c}.webp").is_file()]
            if not codes or not files or facts["group"] not in GROUPS:
                continue
            icon = icons[icon_of[codes[0]]]["body"].replace("currentColor", "#000")
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{icon}</svg>'
            png = cairosvg.svg2png(svg.encode(), output_width=SIDE)
            names.append(facts["name"])
            solid.append(on_white(Image.open(files[0])))
            outlined.append(on_white(Image.open(io.BytesIO(png))))
        np.savez(file, names=names, solid=np.stack(solid), outlined=np.stack(outlined))
    stored = np.load(file)
    solid, outlined = (
        torch.from_numpy(stored[style]).permute(0, 3, 1, 2) for style in ("solid", "outlined")
    )
    return [str(name) for name in stored["names"]], solid, outlined


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


def save_images(folder, names, images):
    """Write images and captions as --train_data_dir expects them."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name, image in zip(names, images, strict=True):
        file = f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.webp"
        pixels = image.permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).convert("L").save(folder / file, lossless=True)
        lines.append(json.dumps({"file_name": file, "text": name}, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
