"""Many tensors of one shape in safetensors files of SHARD entries each.

    tensors = ShardedTensors(folder, "latents", count)
    tensors.fill(tensors.missing(), read, encode)                          # ranks share the work
    tensors[5]                                                    # {name: tensor} of one entry

A file is written completely or not at all and carries the SHA-256 of its numbers, which are checked
when it is first read. Files are memory-mapped, so they take no memory that others need.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minwurst.base.console import progress
from minwurst.base.errors import UserError
from minwurst.base.ranks import rank, world_size
from minwurst.edge import dataset, files
from minwurst.step import distributed

SHARD = 64  # entries per file: 2.3 MiB of latents at 768 pixels, 12 MiB of half-precision text
BATCH = 8  # entries per forward pass, whatever the training's batch, so that files are identical


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
