"""The stream of samples: which one a rank reads when, and how it is loaded.

    layout = BatchLayout(batch=4, accumulation=4, world=2)
    samples = Samples(rows, buckets, seed)                    # item p: the sample at position p
    stream = batches(samples, layout.positions(step=1, rank=0))

A batch is a dict: {"pixels": (B, 3, 32·h, 32·w), "captions": B strings, "positions": B integers}.
Rows are {"image": {"bytes", "path"}, "text", "number"}, as edge/dataset.py reads them.
"""

import dataclasses
import re

import torch

from minwurst.base.errors import UserError, command_with
from minwurst.step import randomness, signals
from minwurst.step.buckets import STRIDE, Buckets, EachOnce
from minwurst.step.images import open_image, preprocess


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the samples of an optimizer step are divided among micro-steps and ranks.

    batch: images per rank and micro-step. accumulation: micro-steps per step. world: ranks.
    """

    batch: int
    accumulation: int
    world: int

    @property
    def global_batch(self):
        """Images per optimizer step."""
        return self.batch * self.accumulation * self.world

    def positions(self, step, rank):
        """A rank's positions in a step (from 1): `accumulation` ranges of length `batch`.

        A step takes `global_batch` consecutive positions of the stream, so any layout with the same
        global batch sees the same samples.
        """
        micro_batches = range((step - 1) * self.accumulation, step * self.accumulation)
        starts = [(number * self.world + rank) * self.batch for number in micro_batches]
        return [range(start, start + self.batch) for start in starts]


def captions_of(row):
    """A row's captions as a list of at least one; a UserError names the row if there is none."""
    captions = [row["text"]] if isinstance(row["text"], str) else row["text"]
    good = isinstance(captions, list) and captions
    if not good or not all(isinstance(text, str) and text.strip() for text in captions):
        path = (row.get("image") or {}).get("path")
        where = f" ({path})" if path else ""
        raise UserError(
            f"Row {row['number']}{where}: bad caption {row['text']!r}. It must be a string or a "
            "list of strings, none of them empty."
        )
    return captions


class Samples(torch.utils.data.Dataset):
    """The stream as a map: item p is the sample at position p, in whatever order it is read."""

    def __init__(self, rows, buckets, seed, caption_dropout=0.0, flip=False, crop=False):
        """buckets: Buckets of these rows. flip, crop: whether images are mirrored and cropped at
        random, instead of never and in the center.
        """
        self.rows, self.buckets, self.seed = rows, buckets, seed
        self.caption_dropout, self.flip, self.crop = caption_dropout, flip, crop

    @classmethod
    def for_training(cls, data, run, **more):
        """The endless shuffled stream. data: a dataset.CaptionedImages. run: a Run."""
        settings, numbers = run.settings, data.rows["number"][:]
        skipped = [index for index, number in enumerate(numbers) if number in data.skipped]
        shape_of = [data.shape_of[number] for number in numbers]
        buckets = Buckets(data.shapes, shape_of, run.layout.global_batch, run.seed, skipped)
        augment = {"flip": settings.random_flip, "crop": settings.random_crop}
        return cls(data.rows, buckets, run.seed, settings.caption_dropout, **augment, **more)

    @classmethod
    def held_out(cls, data, run, **more):
        """The held-out rows, each once."""
        seed = randomness.held_out_seed(run.seed)
        shape_of = [data.shape_of[number] for number in data.held_out["number"][:]]
        return cls(data.held_out, EachOnce(data.shapes, shape_of, 1, seed), seed, **more)

    def __getitem__(self, position):
        row = self.row(position)
        return {
            "pixels": self.pixels(row, position),
            "captions": self.caption(row, position),
            "positions": position,
        }

    def row(self, position):
        return self.rows[self.buckets.at(position)[1]]

    def pixels(self, row, position):
        """The image at a position as the image encoder takes it, (3, 32·h, 32·w)."""
        (height, width), _ = self.buckets.at(position)
        image, where = open_image(row), self.where(position)
        pixels = preprocess(image, height * STRIDE, width * STRIDE, where)
        return pixels.flip(-1) if self.is_flipped(position) else pixels

    def where(self, position):
        """Where the image is cropped: two numbers from 0 (left, top) to 1."""
        return randomness.crop(self.seed, position) if self.crop else (0.5, 0.5)

    def is_flipped(self, position):
        return self.flip and randomness.flip(self.seed, position)

    def caption(self, row, position):
        return randomness.caption(self.seed, position, captions_of(row), self.caption_dropout)


def collate(samples):
    """Several samples as one batch: tensors stacked, everything else in lists.

    A value that is itself a dict of tensors stays one.
    """
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if torch.is_tensor(values[0]):
            values = torch.stack(values)
        elif isinstance(values[0], dict):
            values = collate(values)
        batch[name] = values
    return batch


def batches(samples, positions, workers=0):
    """An iterator over the batches at `positions`, ranges of positions of the stream.

    workers: processes that read ahead; 0 reads when asked.
    """
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=signals.in_worker,
        generator=torch.Generator(),  # the loader draws from it; the global one is for dropout
    )
    try:
        yield from loader
    except UserError as error:  # from a worker, its message is the last line of a traceback
        line = str(error).strip().splitlines()[-1]
        line = line.removeprefix(f"{UserError.__module__}.UserError: ")
        if row := re.match(r"Row (\d+)", line):
            words = "--resume_from_checkpoint=latest", f"--skip_rows={row[1]}"
            line = f"{line}. To put other rows in its places: {command_with(*words)}"
        raise UserError(line, one_rank=True) from None
