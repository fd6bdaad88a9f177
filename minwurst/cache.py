"""Pictures and captions encoded once, before training, instead of at every step.

    store = fill(place(root, data=fingerprint, …), rows, encoders, 768)
    pairs = Pairs(rows, 768, seed, store=store)       # as data.Pairs, but already encoded
    latents, text = store.encode(samples)             # the pair that the encoders would give

Every row's latents and every distinct caption's states, the empty one's too, lie in safetensors
files of SHARD each, under a folder named after all that they follow from. A file is written whole
or not at all and carries the SHA-256 of its numbers. That is checked at every start (by reading
it all, as every picture is read then), so a file that is missing, cut short or changed is encoded
again, and a run that was stopped while it encoded goes on where it was. The files are read through
memory maps: they take no memory that others need.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minwurst import checkpoint, cost, data, dist, draws, report
from minwurst.config import UserError

FORMAT = "1, pictures resized and cropped in the centre"
SHARD = 64  # tensors in a file: 2.3 MiB of latents at 768 pixels, 12 MiB of half-precision states
BATCH = 8  # at a time through an encoder, whatever the training's batch, so that files are alike


def place(root, **facts):
    """The folder for what follows from these facts; where one of them changes, another folder."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return Path(root) / f"latents-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


class Shelf:
    """`count` tensors of one shape and kind, SHARD in a file: item n is the n-th."""

    def __init__(self, folder, kind, count):
        self.folder, self.kind, self.count, self.opened = folder, kind, count, {}

    def __reduce__(self):  # in another process: it maps the files itself
        return Shelf, (self.folder, self.kind, self.count)

    def __getitem__(self, number):
        start = number - number % SHARD
        if start not in self.opened:
            self.opened[start] = load_file(self.file(start))[self.kind]
        return self.opened[start][number % SHARD]

    def file(self, start):
        return self.folder / f"{self.kind}-{start:08}.safetensors"

    def length(self, start):
        """How many tensors the file from `start` on holds."""
        return min(SHARD, self.count - start)

    def is_whole(self, start):
        """Whether a file is there, and is what was written."""
        try:
            with safe_open(self.file(start), "pt") as opened:
                tensor, seal = opened.get_tensor(self.kind), opened.metadata()["sha256"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return False
        return len(tensor) == self.length(start) and digest(tensor) == seal

    def missing(self):
        """Where the files start that are not whole, the same on all ranks, which share the work."""
        starts = range(0, self.count, SHARD)[dist.rank() :: dist.world_size()]
        with ThreadPoolExecutor(data.threads()) as pool:
            found = pool.map(self.is_whole, starts)
            found = report.progress(found, f"checking {self.kind}", total=len(starts))
            lacking = [start for start, whole in zip(starts, found, strict=True) if not whole]
        return sorted(start for part in dist.gather(lacking) for start in part)

    def fill(self, starts, read, encode):
        """Write the files that begin at `starts`, this rank its share of them.

        read: ranges of numbers → an iterable of what encode turns into so many tensors.
        """
        batches = [
            range(first, min(first + BATCH, start + self.length(start)))
            for start in starts[dist.rank() :: dist.world_size()]
            for first in range(start, start + self.length(start), BATCH)
        ]
        encoded = []
        bar = report.progress(read(batches), f"encoding {self.kind}", total=len(batches))
        for batch, samples in zip(batches, bar, strict=True):
            encoded.append(encode(samples).cpu())
            if batch.stop % SHARD == 0 or batch.stop == self.count:
                self.write(batch.start - batch.start % SHARD, torch.cat(encoded))
                encoded = []

    def write(self, start, tensor):
        file = self.file(start)
        # Its name is its own: another run may be filling the same folder.
        draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        try:
            save_file({self.kind: tensor}, draft, metadata={"sha256": digest(tensor)})
            draft.replace(file)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            failed = UserError(
                f"{file} was not written: {error}. Free some space, or name another --cache_dir; "
                "what is encoded already is kept."
            )
            failed.alone = True
            raise failed from None


class Store:
    """All rows' latents and all their captions' states, by row number and by caption."""

    def __init__(self, folder, rows, device):
        texts, self.device = rows.select_columns(["text", "number"]), device
        self.captions, self.rows = {"": 0}, {}
        for row in texts:
            self.rows[row["number"]] = len(self.rows)
            for caption in data.captions_of(row):
                self.captions.setdefault(caption, len(self.captions))
        self.latents = Shelf(folder, "latents", len(self.rows))
        self.text = Shelf(folder, "text", len(self.captions))

    def encode(self, samples):
        """{"latents", "text"} as Pairs has them → (B, 16, h, w) fp32, (B, 77, D), on the device."""
        return tuple(data.to_device(samples[name], self.device) for name in ("latents", "text"))


class Pairs(data.Pairs):
    """data.Pairs with latents and text states in place of pictures and captions."""

    def __init__(self, rows, side, seed, caption_dropout=0.0, *, store):
        super().__init__(rows, side, seed, caption_dropout)
        self.store, self.texts = store, rows.select_columns(["text", "number"])

    def __getitem__(self, position):
        row = self.texts[draws.row_at(self.seed, position, len(self.texts))]
        caption = draws.caption(self.seed, position, data.captions_of(row), self.caption_dropout)
        return {
            "latents": self.store.latents[self.store.rows[row["number"]]],         # (16, h, w)
            "text": self.store.text[self.store.captions[caption]],                 # (77, D)
            "positions": position,
        }  # fmt: skip


class InOrder(torch.utils.data.Dataset):
    """The rows' pictures, one after the other, as the image encoder takes them."""

    def __init__(self, rows, side):
        self.rows, self.side = rows, side

    def __getitem__(self, number):
        return {"pixels": data.preprocess(data.open_picture(self.rows[number]), self.side)}


def fill(folder, rows, encoders, side, workers=0):
    """The Store in `folder`; what is not there yet is encoded, shared by the ranks.

    rows: all that will be asked for, checked. encoders: a models.Encoders; it is empty afterwards,
    and what is not needed is not even loaded. side, workers: as for data.Pairs and data.batches.
    """
    store = Store(folder, rows, encoders.device)
    no_latents, no_text = store.latents.missing(), store.text.missing()
    lacks = [(store.latents, no_latents), (store.text, no_text)]
    dist.on_main(announce, folder, lacks, encoders.bytes_each(side))
    captions = list(store.captions)

    def read_captions(batches):
        return ([captions[number] for number in batch] for batch in batches)

    def read_pictures(batches):
        found = data.batches(InOrder(rows, side), batches, workers)
        return (samples["pixels"] for samples in found)

    store.text.fill(no_text, read_captions, encoders.text)
    store.latents.fill(no_latents, read_pictures, encoders.latents)
    encoders.drop()
    dist.gather(None)  # wait for the others' files
    if not all(shelf.file(start).is_file() for shelf, starts in lacks for start in starts):
        error = UserError(f"{folder} is not the same folder on all machines, as it has to be.")
        error.alone = True
        raise error
    return store


def announce(folder, lacks, each):
    """Say what has to be encoded and what it takes; UserError where the disk can't hold it.

    lacks: [(shelf, where its missing files start), …]. each: bytes of one tensor of each shelf.
    """
    counts = [sum(shelf.length(start) for start in starts) for shelf, starts in lacks]
    size = sum(shelf.count * one for (shelf, _), one in zip(lacks, each, strict=True))
    needed = sum(count * one for count, one in zip(counts, each, strict=True))
    encode = f"{counts[0]} pictures and {counts[1]} captions"
    report.say(f"cache: {cost.gib(size)} in {folder}, {encode} to encode")
    checkpoint.make_folder(folder, flag="cache_dir")
    for left in folder.glob(".*.part"):  # by runs that were killed; younger ones may be alive
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--cache_latents: {folder} needs {cost.gib(needed)} more, and {cost.gib(free)} are "
            "free. Free some space, or name another --cache_dir."
        )
