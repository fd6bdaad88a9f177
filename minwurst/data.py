"""Captioned pictures: where they come from, how they are checked, how they become numbers.

    rows = open_rows(None, None, "my_pictures", "image", "text")
    rows, fingerprint = check_rows(rows)                  # every row, before the first step
    stream = batches(Pairs(rows, 768, seed), positions)   # {"pixels", "captions", "positions"}

`datasets` reads the tables; Pillow and NumPy do the pictures, to the same numbers as torchvision's
Resize, CenterCrop, ToTensor and Normalize.
"""

import hashlib
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, ImageOps

from minwurst import dist, draws, report, signals
from minwurst.config import UserError

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def open_rows(
    dataset_name, config_name, train_data_dir, image_column, caption_column, cache_dir=None
):
    """The split `train` as rows {"image": {"bytes", "path"}, "text", "number"}, nothing decoded.

    dataset_name: a name on the Hub, a folder (pictures, parquet, or written by `save_to_disk`) or a
    .parquet file; it goes before train_data_dir, a folder of pictures with a metadata.jsonl. A text
    is a string or a list of strings; the number is the row's, also after rows were chosen.
    """
    flag = f"--train_data_dir {train_data_dir}"
    if dataset_name:
        flag = f"--dataset_name {dataset_name}"
    if not dataset_name and not Path(train_data_dir).is_dir():
        raise UserError(f"{flag}: there is no such folder.")
    datasets.disable_progress_bars()
    source = Path(dataset_name or train_data_dir)
    try:
        if not dataset_name:
            # By itself the library takes a picture called "test tube.webp" for a split of its own.
            inside = source / "train" if (source / "train").is_dir() else source
            found = datasets.load_dataset(
                "imagefolder", data_dir=str(inside), data_files={"train": "**"}, cache_dir=cache_dir
            )
        elif (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(dataset_name)
        elif source.is_file():
            found = datasets.load_dataset("parquet", data_files=dataset_name, cache_dir=cache_dir)
        else:
            found = datasets.load_dataset(dataset_name, config_name, cache_dir=cache_dir)
    except Exception as error:  # the library raises a score of types; its words say what is wrong
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        raise UserError(f"{flag} can't be read, or is empty: {reason}") from None
    if isinstance(found, dict):
        if "train" not in found:
            raise UserError(f"{flag} has no split `train`, only {', '.join(found)}.")
        found = found["train"]
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in found.column_names:
            raise UserError(
                f"--{option} {column}: {flag} has the columns {', '.join(found.column_names)}."
            )
    if len(found) == 0:
        raise UserError(f"{flag} is empty: its split `train` has no rows.")
    feature = found.features[image_column]
    stored_as = getattr(feature, "dtype", None)
    if not isinstance(feature, datasets.Image) and stored_as not in ("string", "binary"):
        raise UserError(f"--image_column {image_column} holds {feature}, not pictures.")
    found = found.select_columns([image_column, caption_column])
    found = found.rename_columns({image_column: "image", caption_column: "text"})
    found = found.add_column("number", range(len(found)))
    found = found.cast_column("image", datasets.Image(decode=False))
    caches = cache_dir or datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE
    refuse_outside(found, [source if source.is_dir() else source.parent, *caches])
    return found


def refuse_outside(rows, folders):
    """UserError where a row's picture is a file outside the data set's own folders.

    A table from somebody else could name any file of this machine, to be trained on.
    """
    places = {place(folder) for folder in folders for place in (os.path.abspath, os.path.realpath)}
    inside = tuple(os.path.join(place, "") for place in places)
    stored = rows.data.column("image")
    paths, content = (pc.struct_field(stored, field) for field in ("path", "bytes"))
    sizes = pc.fill_null(pc.binary_length(content), 0)
    for number, (path, size) in enumerate(zip(paths.to_pylist(), sizes.to_pylist(), strict=True)):
        if path and not size and not os.path.abspath(path).startswith(inside):
            raise UserError(
                f"Row {number}: its picture {path} lies outside the data set's folder {folders[0]}."
                " Put the pictures there, or into the table."
            )


def sample_rows(rows, limit, seed):
    """At most `limit` rows, drawn by the seed; None keeps all."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(draws.epoch_order(seed, 0, len(rows))[:limit])


def hold_out(rows, share, seed):
    """(rows to train on, rows to measure on): of the latter a share drawn by the seed, or none."""
    count = math.ceil(share * len(rows))
    if count == len(rows):
        raise UserError(f"--validation_split {share} of {len(rows)} rows leaves none to train on.")
    order = draws.epoch_order(draws.held_out_seed(seed), 0, len(rows))
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def captions_of(row):
    """A row's captions as a list of one or more; UserError names the row where there is none."""
    captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
    good = isinstance(captions, list) and captions
    if not good or not all(isinstance(text, str) and text.strip() for text in captions):
        raise UserError(
            f"Row {row['number']}: the caption is {row['text']!r}; it must be a text, or a list of "
            "texts, and none of them empty."
        )
    return captions


def open_picture(row):
    """A row's picture as 8-bit RGB, turned upright; transparency becomes white.

    Any mode Pillow reads: palette, grey, 16 bits, CMYK, floating point. UserError names the row.
    """
    stored = row["image"] or {}
    try:
        source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
        with Image.open(source) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        where = f" ({stored['path']})" if stored.get("path") else ""
        raise UserError(f"Row {row['number']}{where}: the picture can't be read: {error}") from None
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits, which convert() would cut, not scale
        values = np.asarray(picture, dtype=np.float64)
        largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(picture.mode, 65535.0)
        picture = Image.fromarray((values / largest * 255).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def preprocess(picture, side):
    """Resize the shorter side to `side` (bilinear, antialiased), crop the centre, normalise.

    picture: RGB. Returns (3, side, side) fp32 with ImageNet's mean and spread. One call to Pillow
    does both: it computes only the pixels the crop keeps, and they are those of the whole picture
    resized, but for rounding to 8 bits.
    """
    width, height = picture.size
    short = min(width, height)
    new_width, new_height = int(side * width / short), int(side * height / short)
    left, top = round((new_width - side) / 2), round((new_height - side) / 2)
    x, y = width / new_width, height / new_height  # picture pixels per resized pixel
    box = (left * x, top * y, (left + side) * x, (top + side) * y)
    square = picture.resize((side, side), Image.Resampling.BILINEAR, box=box)
    # Channels first, then arithmetic: over a last axis of three NumPy takes eight times as long.
    values = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")   # (3, side, side)
    values = (values / 255 - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]
    return torch.from_numpy(values)


def threads():
    """How many threads of this machine are this rank's share."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_rows(rows, skip_bad=False, found_good=None):
    """Read every caption and decode every picture once. Returns (good rows, their fingerprint).

    Ranks share the work, and threads within a rank. A bad row is a UserError on all ranks; with
    skip_bad it is named and left out. The fingerprint is 16 hex digits. found_good: a file that
    keeps which rows were good, by their content; those are read the next time, but not decoded
    again.
    """
    known = set(found_good.read_text().split()) if found_good and found_good.is_file() else set()

    def check(number):
        row = rows[number]
        try:
            captions = captions_of(row)
            stored = row["image"] or {}
            file = Path(stored.get("path") or "")
            read = stored.get("bytes") or (file.read_bytes() if file.is_file() else b"")
            content = hashlib.sha256(read)
            content.update("\0".join(captions).encode())
            if content.hexdigest() not in known:
                open_picture(row)
        except UserError as error:
            return str(error), ""
        return None, content.hexdigest()

    ranks = dist.world_size()
    mine = range(dist.rank(), len(rows), ranks)
    with ThreadPoolExecutor(threads()) as pool:
        found = report.progress(pool.map(check, mine), "checking the data", total=len(mine))
        checked = dict(zip(mine, found, strict=True))
    everyone = {number: found for part in dist.gather(checked) for number, found in part.items()}
    errors = [everyone[number][0] for number in range(len(rows)) if everyone[number][0]]
    if errors and (not skip_bad or len(errors) == len(rows)):
        more = f" ({len(errors) - 1} more rows are bad)" if len(errors) > 1 else ""
        advice = "" if skip_bad else " --skip_bad_samples leaves out what is bad."
        raise UserError(errors[0] + more + advice)
    if errors:
        good = [number for number in range(len(rows)) if not everyone[number][0]]
        for line in errors[:10]:
            report.say(f"left out: {line}")
        report.say(f"left out in all: {len(errors)} of {len(rows)} rows")
        rows = rows.select(good)
    digests = [everyone[number][1] for number in sorted(everyone) if everyone[number][1]]
    if found_good and dist.is_main() and not known.issuperset(digests):
        draft = found_good.with_name(f".{found_good.name}.part")
        draft.write_text("\n".join(known.union(digests)))
        draft.replace(found_good)
    return rows, hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


class Pairs(torch.utils.data.Dataset):
    """The stream of samples: item p is the sample at position p, in whatever order asked."""

    def __init__(self, rows, side, seed, caption_dropout=0.0):
        self.rows, self.side, self.seed, self.caption_dropout = rows, side, seed, caption_dropout

    def __getitem__(self, position):
        row = self.row(position)
        caption = draws.caption(self.seed, position, captions_of(row), self.caption_dropout)
        return {"pixels": self.pixels(row), "captions": caption, "positions": position}

    def row(self, position):
        return self.rows[draws.row_at(self.seed, position, len(self.rows))]

    def pixels(self, row):
        """A row's picture as the image encoder takes it, (3, R, R)."""
        return preprocess(open_picture(row), self.side)

    def row_numbers(self, micro_batches):
        """The numbers of the rows at some ranges of positions, to name them in a message."""
        return [self.row(place)["number"] for places in micro_batches for place in places]


def to_device(tensor, device):
    """The tensor on the device; on a GPU without waiting for what the GPU is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(samples):
    """B samples in one: {"pixels": (B, 3, R, R), "captions": B texts, "positions": B numbers}."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {n: torch.stack(v) if torch.is_tensor(v[0]) else v for n, v in batch.items()}


def batches(pairs, places, workers=0, pin_memory=False):
    """An iterator over the batches at `places`, ranges of positions of the stream.

    workers: processes that read ahead; 0 reads when asked.
    """
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_sampler=places,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=signals.in_worker,
        generator=torch.Generator(),  # the loader draws from it: the global one belongs to dropout
    )
    try:
        yield from loader
    except UserError as error:  # a worker's comes inside a traceback, of which it is the end
        line = str(error).strip().splitlines()[-1].removeprefix("minwurst.config.UserError: ")
        met = UserError(line)
        met.alone = True
        raise met from None
