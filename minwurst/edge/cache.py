"""Images and captions encoded once, before training, instead of in every epoch.

    encoded = encode_all(folder, data, encoders)            # reads and writes `folder`
    samples = encoded.samples(data, run)                    # as from encoders.Encoders,
    latents, condition = encoded.encode(batch)              # but nothing is encoded any more

All rows' latents (with --random_flip, of both sides), by shape, and the conditions of all distinct
captions, including the empty one, are stored in files (sharded.py) in a folder named after
everything that they depend on. At the start, a missing or truncated file is encoded again, and an
interrupted run continues where it was.
"""

import contextlib
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch

from minwurst.base.console import gib, say
from minwurst.base.errors import UserError
from minwurst.edge import dataset, files, models
from minwurst.edge.sharded import ShardedTensors
from minwurst.step import distributed
from minwurst.step.buckets import STRIDE
from minwurst.step.distributed import to_device
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import Samples, batches, captions_of

FORMAT = "1, pictures resized and cropped in the centre"


def folder_for(root, **facts):
    """The cache's folder for these facts; another fact means another folder."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return Path(root) / f"latents-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class EncodedRows:
    """All rows' latents by row number, and all their captions' conditions by caption.

    It has the methods of the encoders that it takes the place of. rows: {number of a row: (shape,
    index among the rows of this shape, caption or captions)}.
    """

    def __init__(self, folder, data, encoders):
        """data: a dataset.CaptionedImages, all of whose rows will be asked for."""
        self.compute_type, self.device = encoders.compute_type, encoders.device
        self.prompts = encoders.prompts
        self.captions, self.rows = {"": 0}, {}
        members = [[] for _ in data.shapes]  # indices of rows by shape
        numbers, texts = data.every["number"][:], data.every["text"][:]
        for index, (number, text) in enumerate(zip(numbers, texts, strict=True)):
            shape = data.shape_of[number]
            self.rows[number] = shape, len(members[shape]), text
            members[shape].append(index)
            for caption in captions_of({"number": number, "text": text}):
                self.captions.setdefault(caption, len(self.captions))
        self.members = members
        several = len(data.shapes) > 1
        names = [f"latents-{h}x{w}" if several else "latents" for h, w in data.shapes]
        self.latents = [
            ShardedTensors(folder, name, len(rows))
            for name, rows in zip(names, members, strict=True)
        ]
        self.text = ShardedTensors(folder, "text", len(self.captions))

    def samples(self, data, run):
        """The stream of samples to train on, to read with `batches`."""
        return EncodedSamples.for_training(data, run, encoded=self)

    def held_out(self, data, run):
        """The held-out samples."""
        return EncodedSamples.held_out(data, run, encoded=self)

    def encode(self, batch):
        """(latents, condition) of a batch, on the device."""
        condition = batch["condition"].items()
        condition = {name: to_device(tensor, self.device) for name, tensor in condition}
        return to_device(batch["latents"], self.device), condition

    def frozen(self):
        return []


class EncodedSamples(Samples):
    """Samples with latents and a condition in place of pixels and a caption."""

    def __init__(self, rows, *options, encoded, **more):
        super().__init__(rows, *options, **more)
        self.encoded, self.numbers = encoded, rows["number"][:]

    def __getitem__(self, position):
        encoded, number = self.encoded, self.numbers[self.buckets.at(position)[1]]
        shape, index, text = encoded.rows[number]
        row = {"number": number, "text": text}
        name = "flipped" if self.is_flipped(position) else "latents"
        return {
            "latents": encoded.latents[shape][index][name],                        # (16, h, w)
            "condition": encoded.text[encoded.captions[self.caption(row, position)]],
            "positions": position,
        }  # fmt: skip


class ImagesInOrder(torch.utils.data.Dataset):
    """Some rows' images, one after the other, as the image encoder takes them."""

    def __init__(self, rows, shape):
        self.rows, self.shape = rows, shape

    def __getitem__(self, number):
        height, width = self.shape
        image = open_image(self.rows[number])
        return {"pixels": preprocess(image, height * STRIDE, width * STRIDE)}


def open_source(run, data, compute_type):
    """Where latents and conditions come from: the encoders, or with --cache_latents, EncodedRows.

    In the latter case, everything is encoded here. run: a Run, identified. data: a
    dataset.CaptionedImages. compute_type: of the text encoder.
    """
    settings, side = run.settings, run.settings.resolution
    encoders = models.make_encoders(run.parts, compute_type, run.device)
    encoders.add_prompts([prompt.text for prompt in settings.prompts()])
    if not settings.cache_latents:
        return encoders
    facts = {"skipped": sorted(data.skipped)} if data.skipped else {}
    facts |= {"shapes": data.describe_shapes()} if len(data.shapes) > 1 else {}
    facts |= {"flipped": True} if settings.random_flip else {}
    folder = folder_for(
        dataset.cache_folder(settings), data=data.fingerprint, encoders=run.identity["encoders"],
        resolution=side, text_type=str(compute_type), **facts,
    )  # fmt: skip
    image, caption = models.encoded_bytes(run.parts, side, compute_type)
    return encode_all(
        folder, data, encoders, flip=settings.random_flip, workers=settings.dataloader_num_workers,
        recheck=settings.recheck_data, entry_bytes=(image * (1 + settings.random_flip), caption),
    )  # fmt: skip


def encode_all(
    folder, data, encoders, *, flip=False, workers=0, recheck=False, entry_bytes=(0, 0)
):  # fmt: skip
    """The EncodedRows in `folder`. Whatever is missing is encoded, shared by the ranks.

    data: a dataset.CaptionedImages. encoders: unloaded afterwards; an encoder that is not needed is
    not even loaded. flip: whether mirrored images are encoded too. entry_bytes: of one image's
    latents and one condition.
    """
    encoded = EncodedRows(folder, data, encoders)
    kinds = *encoded.latents, encoded.text
    missing = [(tensors, tensors.missing(recheck)) for tensors in kinds]
    distributed.on_main(announce, folder, missing, entry_bytes)
    captions = list(encoded.captions)

    def read_captions(parts):
        return ([captions[number] for number in part] for part in parts)

    def encode_images(pixels):
        both = {"latents": encoders.latents(pixels)}
        if flip:
            both["flipped"] = encoders.latents(pixels.flip(-1))
        return both

    encoded.text.fill(missing[-1][1], read_captions, encoders.condition)
    for (tensors, starts), shape, rows in zip(missing, data.shapes, encoded.members, strict=False):
        images = ImagesInOrder(data.every.select(rows), shape)

        def read_images(parts, images=images):
            loaded = batches(images, parts, workers)
            return (batch["pixels"] for batch in loaded)

        tensors.fill(starts, read_images, encode_images)
    encoders.unload()
    distributed.gather_objects(None)  # wait for the other ranks' files
    if not all(tensors.file(start).is_file() for tensors, starts in missing for start in starts):
        raise UserError(
            f"{folder} has to be the same folder on all machines, and is not.", one_rank=True
        )
    return encoded


def announce(folder, missing, entry_bytes):
    """Report what will be encoded and its size; UserError if the disk can't hold it.

    missing: [(ShardedTensors, the starts of its missing files), …], the last of them of the text.
    """
    size, needed, counts = 0, 0, [0, 0]  # of images, of captions
    for tensors, starts in missing:
        kind = int(tensors.kind == "text")
        count = sum(tensors.length(start) for start in starts)
        counts[kind] += count
        size, needed = size + tensors.count * entry_bytes[kind], needed + count * entry_bytes[kind]
    say(f"cache: {gib(size)} in {folder}, {counts[0]} images and {counts[1]} captions to encode")
    files.make_folder(folder, flag="cache_dir")
    for draft in folder.glob(".*.part"):  # from killed runs; recent ones may be in use
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > 3600:
                draft.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--cache_latents: {folder} needs {gib(needed)} more, and {gib(free)} are free. Free "
            "some space, or use another --cache_dir."
        )
