"""Aspect buckets: images of several shapes, each step's batch of one shape.

    shapes = choose_shapes(sizes, side=24, most=7, least=64)           # [(24, 24), (20, 28), …]
    nearest = nearest_shapes(sizes, shapes)                            # each image's shape
    buckets = Buckets(shapes, nearest, batch=64, seed=7)
    bucket, index = buckets.at(position)                               # of the stream of samples

A shape is the height and width of latents; one latent covers 32×32 pixels. Without buckets, there
is one, of the square, and everything is as if there were none.
"""

import fractions

import numpy as np

from minwurst.step import randomness

STRIDE = 32  # pixels of an image per latent, along each side
STEEPEST = 4  # sides differ at most by this factor; longer images are cropped to it


def candidates(side):
    """All shapes with whole sides and at most side² latents, as many as fit; the square first."""
    heights = range(-(-side // 2), side)  # of which the width is at most 4 times as large
    wide = [(height, side**2 // height) for height in heights]
    wide = [(h, w) for h, w in wide if w <= STEEPEST * h]
    return [(side, side), *wide, *((w, h) for h, w in wide)]


def cropped(sizes, shapes):
    """The fraction of each image that each shape crops away, (images, shapes).

    sizes: (N, 2), widths and heights of images in pixels.
    """
    sizes, shapes = np.asarray(sizes, dtype=float), np.asarray(shapes, dtype=float)
    ratios = (sizes[:, :1] / sizes[:, 1:]) * (shapes[:, 0] / shapes[:, 1])               # (N, S)
    return 1 - np.minimum(ratios, 1 / ratios)


def nearest_shapes(sizes, shapes):
    """The number of the shape that crops least, for each image; the first of equals."""
    return cropped(sizes, shapes).argmin(axis=1)


def choose_shapes(sizes, side, most, least):
    """At most `most` shapes for images of these sizes, each with at least `least` images.

    One after the other, the shape is added that lowers the cropped fraction of all images most.
    Then the shape with the fewest images is dropped, and its images go to their next shape, until
    all have enough or one is left.
    """
    possible = candidates(side)
    losses = cropped(sizes, possible)
    chosen, lost = [0], losses[:, 0]
    while len(chosen) < min(most, len(possible)):
        sums = np.minimum(lost[:, None], losses).sum(axis=0)
        best = int(sums.argmin())
        if sums[best] >= lost.sum() - 1e-9:
            break
        chosen.append(best)
        lost = np.minimum(lost, losses[:, best])
    while len(chosen) > 1:
        counts = np.bincount(losses[:, chosen].argmin(axis=1), minlength=len(chosen))
        if counts.min() >= least:
            break
        del chosen[int(counts.argmin())]
    return [possible[number] for number in chosen]


class Schedule:
    """Which bucket each step takes: a function of the buckets' sizes, the seed and the step.

    After any number of steps, every bucket has had its share of them, give or take less than one
    step (Tijdeman 1980, "The chairman assignment problem"): of the buckets that are far enough
    behind their share, the one takes the step that would be too late first.
    """

    def __init__(self, sizes, seed):
        """sizes: the number of rows of each bucket."""
        self.sizes, self.total = [int(size) for size in sizes], int(sum(sizes))
        self.order = randomness.generator(seed, randomness.BUCKETS).permutation(len(sizes))
        self.done, self.steps = [0] * len(sizes), []  # steps: it repeats after `total` of them

    def at(self, step):
        """(bucket, how many earlier steps took it) of a step, from 0."""
        round_, step = divmod(step, self.total)
        while len(self.steps) <= step:
            self.extend()
        bucket, earlier = self.steps[step]
        return bucket, earlier + round_ * self.sizes[bucket]

    def extend(self):
        """Assign the next step, in whole numbers: in units of 1 / (total · unit) steps."""
        step, unit = len(self.steps) + 1, max(1, 2 * len(self.sizes) - 2)
        behind = [
            unit * (step * size - done * self.total)
            for size, done in zip(self.sizes, self.done, strict=True)
        ]
        chosen = min(
            (bucket for bucket, value in enumerate(behind) if value >= self.total),
            key=lambda bucket: (
                fractions.Fraction((unit - 1) * self.total - behind[bucket], self.sizes[bucket]),
                self.order[bucket],
            ),
        )
        self.steps.append((chosen, self.done[chosen]))
        self.done[chosen] += 1


class Buckets:
    """The rows of each shape, and which row is at a position of the stream of samples.

    A step takes `batch` consecutive positions, all of one bucket, whichever ranks and micro-steps
    they go to. Each bucket has its own endless stream of permutations of its rows.
    """

    def __init__(self, shapes, shape_of, batch, seed, skipped=()):
        """shapes: (h, w) of each bucket. shape_of: for each row, the number of its shape. batch: of
        a step, over all ranks. skipped: indices of rows that others of their shape replace.
        """
        numbers = np.asarray(shape_of)
        members = [np.flatnonzero(numbers == number) for number in range(len(shapes))]
        kept = [number for number, rows in enumerate(members) if len(rows)]
        self.shapes, self.members = [shapes[n] for n in kept], [members[n] for n in kept]
        self.skipped = [set(np.flatnonzero(np.isin(rows, list(skipped)))) for rows in self.members]
        self.batch, self.seed = batch, seed
        self.schedule = Schedule([len(rows) for rows in self.members], seed)

    @classmethod
    def one(cls, rows, side, seed, skipped=()):
        """A single bucket: `rows` images of side² latents."""
        return cls([(side, side)], [0] * rows, 1, seed, skipped)

    def place(self, position):
        """(bucket, place in the bucket's own stream) of a position."""
        step, offset = divmod(position, self.batch)
        bucket, earlier = self.schedule.at(step)
        return bucket, earlier * self.batch + offset

    def at(self, position):
        """(shape, index of the row) at a position."""
        bucket, place = self.place(position)
        members = self.members[bucket]
        index = randomness.row_at(
            self.seed, place, len(members), self.skipped[bucket], bucket, position
        )
        return self.shapes[bucket], int(members[index])


class EachOnce(Buckets):
    """For held-out rows: every row once, one bucket after the other, in batches of one shape."""

    def place(self, position):
        for bucket, rows in enumerate(self.members):
            if position < len(rows):
                return bucket, position
            position -= len(rows)
        raise IndexError(position)

    def batches(self, size):
        """Ranges of at most `size` positions, each within one bucket."""
        ranges, first = [], 0
        for rows in self.members:
            end = first + len(rows)
            ranges += [range(start, min(start + size, end)) for start in range(first, end, size)]
            first = end
        return ranges
