"""A folder of captioned images: captions in metadata.jsonl (or .csv), or in .txt files.

    table = read_folder(Path("my_images"), "image", "text", cache_dir=None)
"""

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from minwurst.base.errors import UserError


def read_folder(folder, image_column, caption_column, cache_dir):
    """The folder's images and captions as a `datasets.Dataset`, or a dict of them by split.

    Without metadata, an image's captions are the lines of the .txt file beside it, as kohya's and
    OneTrainer's data sets have them.
    """
    inside = folder / "train" if (folder / "train").is_dir() else folder
    if any(inside.rglob("metadata.*")):
        # Without data_files the library takes an image called "test tube.webp" for a split.
        return datasets.load_dataset(
            "imagefolder", data_dir=str(inside), data_files={"train": "**"}, cache_dir=cache_dir
        )
    images = sorted(
        file for file in inside.rglob("*")
        if file.suffix.lower() in ImageFolder.EXTENSIONS and not file.name.startswith(".")
    )  # fmt: skip
    captions = [captions_beside(image) for image in images]
    if images and not any(captions):
        name = images[0].relative_to(inside)
        raise UserError(
            f"{len(images)} images, no captions. Write them into {inside / 'metadata.jsonl'}, one "
            f'line per image: {{"file_name": "{name}", "{caption_column}": "a bear"}}. Or write '
            f"each into a text file beside its image, such as {name.with_suffix('.txt')}."
        )
    table = {image_column: [str(image) for image in images], caption_column: captions}
    features = {
        image_column: datasets.Image(decode=False),
        caption_column: datasets.List(datasets.Value("string")),
    }
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def captions_beside(image):
    """The lines of the .txt file beside an image that are not empty; [] if there is none."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        return []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
