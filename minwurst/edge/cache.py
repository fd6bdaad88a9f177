"""Images and captions encoded once, before training, instead of in every epoch.

    encoded = encode_all(folder, rows, encoders)            # reads and writes `folder`
    samples = encoded.samples(rows, seed)                   # as from encoders.Encoders,
    latents, condition = encoded.encode(batch)              # but nothing is encoded any more

All rows' latents and the conditions of all distinct captions, including the empty one, are stored
in safetensors files of SHARD entries each, in a folder named after everything that they depend on.
A file is written completely or not at all and carries the SHA-256 of its numbers. At the start, a
missing or truncated file is encoded again, and an interrupted run continues where it was; the
numbers are checked when a file is first read. The files are memory-mapped, so they take no memory
that others need.
"""

import contextlib
import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minwurst.base.console import gib, progress, say
from minwurst.base.errors import UserError
from minwurst.base.ranks import rank, world_size
from minwurst.edge import dataset, files, models
from minwurst.step import distributed
from minwurst.step.distributed import to_device
from minwurst.step.images import open_image, preprocess
from minwurst.step.samples import Samples, batches, captions_of

FORMAT = "1, pictures resized and cropped in the centre"
SHARD = 64  # entries per file: 2.3 MiB of latents at 768 pixels, 12 MiB of half-precision text
BATCH = 8  # entries per forward pass, whatever the training's batch, so that files are identical


def folder_for(root, **facts):
    """The cache's folder for these facts; another fact means another folder."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return Path(root) / f"latents-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def digest(tensors):
    """The SHA-256 of the numbers of some tensors, {name: tensor}."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


class ShardedTensors:
    """`count` entries {name: tensor} of one kind, SHARD per file."""

    def __init__(self, folder, kind, count):
        self.folder, self.kind, self.count, self.opened = folder, kind, count, {}

    def __reduce__(self):  # another process maps the files itself
        return ShardedTensors, (self.folder, self.kind, self.count)

    def __getitem__(self, number):
        start = number - number % SHARD
        if start not in self.opened:
            self.opened[start] = self.read(start)
        return {name: tensor[number % SHARD] for name, tensor in self.opened[start].items()}

    def file(self, start):
        """The file whose first entry is number `start`."""
        return self.folder / f"{self.kind}-{start:08}.safetensors"

    def length(self, start):
        """The number of entries in this file."""
        return min(SHARD, self.count - start)

    def read(self, start):
        """A file's tensors; UserError if they are not what was written, and then it is deleted."""
        try:
            if self.is_intact(start):
                return load_file(self.file(start))
            self.file(start).unlink()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.file(start)} can't be read: {error}", one_rank=True) from None
        raise UserError(
            f"{self.file(start)} has changed since it was written, and is deleted. Resume to "
            "encode it again.",
            one_rank=True,
        )

    def is_whole(self, start):
        """Whether a file has its full length and number of entries."""
        try:
            with safe_open(self.file(start), "pt") as opened:
                slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118
                return {part.get_shape()[0] for part in slices} == {self.length(start)}
        except (OSError, SafetensorError, IndexError):
            return False

    def is_intact(self, start):
        """Whether a file also contains the numbers that were written."""
        if not self.is_whole(start):
            return False
        with safe_open(self.file(start), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return digest(tensors) == (opened.metadata() or {}).get("sha256")

    def missing(self, recheck=False):
        """The starts of all files that are not whole. Ranks share the work and get the same.

        recheck: also of those whose numbers have changed.
        """
        starts = range(0, self.count, SHARD)[rank() :: world_size()]
        with ThreadPoolExecutor(dataset.threads()) as pool:
            results = pool.map(self.is_intact if recheck else self.is_whole, starts)
            results = progress(results, f"checking {self.kind}", total=len(starts))
            mine = [start for start, intact in zip(starts, results, strict=True) if not intact]
        return sorted(start for part in distributed.gather_objects(mine) for start in part)

    def fill(self, starts, read, encode):
        """Write this rank's share of the files that begin at `starts`.

        read: ranges of entry numbers → an iterable of inputs. encode: input → {name: (B, …)}.
        """
        parts = [
            range(first, min(first + BATCH, start + self.length(start)))
            for start in starts[rank() :: world_size()]
            for first in range(start, start + self.length(start), BATCH)
        ]
        encoded = []
        inputs = progress(read(parts), f"encoding {self.kind}", total=len(parts))
        for part, samples in zip(parts, inputs, strict=True):
            encoded.append(encode(samples))
            if part.stop % SHARD == 0 or part.stop == self.count:
                names = encoded[0]
                tensors = {n: torch.cat([entry[n].cpu() for entry in encoded]) for n in names}
                self.write(part.start - part.start % SHARD, tensors)
                encoded = []

    def write(self, start, tensors):
        file = self.file(start)
        try:
            # Another run may be filling the same folder.
            with files.replacing(file, unique=True, flushed=False) as draft:
                save_file(tensors, draft, metadata={"sha256": digest(tensors)})
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} was not written: {error}. Free some space, or use another --cache_dir. "
                "What is already encoded is kept.",
                one_rank=True,
            ) from None


class EncodedRows:
    """All rows' latents by row number, and all their captions' conditions by caption.

    It has the methods of the encoders that it takes the place of.
    """

    def __init__(self, folder, rows, encoders):
        self.side, self.compute_type = encoders.side, encoders.compute_type
        self.device, self.prompts = encoders.device, encoders.prompts
        self.captions, self.rows = {"": 0}, {}
        for number, text in zip(rows["number"][:], rows["text"][:], strict=True):
            self.rows[number] = len(self.rows)
            for caption in captions_of({"number": number, "text": text}):
                self.captions.setdefault(caption, len(self.captions))
        self.latents = ShardedTensors(folder, "latents", len(self.rows))
        self.text = ShardedTensors(folder, "text", len(self.captions))

    def samples(self, rows, seed, caption_dropout=0.0, skipped=()):
        """The stream of these rows' samples, to read with `batches`."""
        return EncodedSamples(rows, self.side, seed, caption_dropout, skipped, encoded=self)

    def encode(self, batch):
        """(latents, condition) of a batch, on the device."""
        condition = batch["condition"].items()
        condition = {name: to_device(tensor, self.device) for name, tensor in condition}
        return to_device(batch["latents"], self.device), condition

    def frozen(self):
        return []


class EncodedSamples(Samples):
    """Samples with latents and a condition in place of pixels and a caption."""

    def __init__(self, rows, side, seed, caption_dropout=0.0, skipped=(), *, encoded):
        super().__init__(rows, side, seed, caption_dropout, skipped)
        self.encoded, self.texts = encoded, rows.select_columns(["text", "number"])

    def __getitem__(self, position):
        row, encoded = self.texts[self.row_index(position)], self.encoded
        return {
            **encoded.latents[encoded.rows[row["number"]]],                        # (16, h, w)
            "condition": encoded.text[encoded.captions[self.caption(row, position)]],
            "positions": position,
        }  # fmt: skip


class ImagesInOrder(torch.utils.data.Dataset):
    """The rows' images, one after the other, as the image encoder takes them."""

    def __init__(self, rows, side):
        self.rows, self.side = rows, side

    def __getitem__(self, number):
        return {"pixels": preprocess(open_image(self.rows[number]), self.side)}


def open_source(run, data, compute_type):
    """Where latents and conditions come from: the encoders, or with --cache_latents, EncodedRows.

    In the latter case, everything is encoded here. run: a Run, identified. data: a
    dataset.CaptionedImages. compute_type: of the text encoder.
    """
    settings, side = run.settings, run.settings.resolution
    encoders = models.make_encoders(run.parts, side, compute_type, run.device)
    encoders.add_prompts(settings.validation_prompts or [])
    if not settings.cache_latents:
        return encoders
    facts = {"skipped": sorted(data.skipped)} if data.skipped else {}
    folder = folder_for(
        dataset.cache_folder(settings), data=data.fingerprint, encoders=run.identity["encoders"],
        resolution=side, text_type=str(compute_type), **facts,
    )  # fmt: skip
    entry_bytes = models.encoded_bytes(run.parts, side, compute_type)
    workers, recheck = settings.dataloader_num_workers, settings.recheck_data
    return encode_all(folder, data.every, encoders, workers, entry_bytes, recheck)


def encode_all(folder, rows, encoders, workers=0, entry_bytes=(0, 0), recheck=False):
    """The EncodedRows in `folder`. Whatever is missing is encoded, shared by the ranks.

    rows: all rows that will be asked for, checked. encoders: unloaded afterwards; an encoder that
    is not needed is not even loaded. entry_bytes: of one image's latents and one condition.
    """
    encoded = EncodedRows(folder, rows, encoders)
    kinds = encoded.latents, encoded.text
    missing = [(tensors, tensors.missing(recheck)) for tensors in kinds]
    distributed.on_main(announce, folder, missing, entry_bytes)
    captions = list(encoded.captions)

    def read_captions(parts):
        return ([captions[number] for number in part] for part in parts)

    def read_images(parts):
        loaded = batches(ImagesInOrder(rows, encoders.side), parts, workers)
        return (batch["pixels"] for batch in loaded)

    def encode_images(pixels):
        return {"latents": encoders.latents(pixels)}

    encoded.text.fill(missing[1][1], read_captions, encoders.condition)
    encoded.latents.fill(missing[0][1], read_images, encode_images)
    encoders.unload()
    distributed.gather_objects(None)  # wait for the other ranks' files
    if not all(tensors.file(start).is_file() for tensors, starts in missing for start in starts):
        raise UserError(
            f"{folder} has to be the same folder on all machines, and is not.", one_rank=True
        )
    return encoded


def announce(folder, missing, entry_bytes):
    """Report what will be encoded and its size; UserError if the disk can't hold it.

    missing: [(ShardedTensors, the starts of its missing files), …], for latents and text.
    """
    counts = [sum(tensors.length(start) for start in starts) for tensors, starts in missing]
    size = sum(tensors.count * one for (tensors, _), one in zip(missing, entry_bytes, strict=True))
    needed = sum(count * one for count, one in zip(counts, entry_bytes, strict=True))
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
