"""Every random number of a run, as a function of the seed and a place. Nothing random is stored.

Training reads one endless stream of samples: epochs are seeded permutations of the rows, laid end
to end. What happens to the sample at position p of the stream (its row, its caption, its timestep,
its noise) depends on (seed, p) alone. So it is the same on any device, for any number of ranks,
workers and accumulation steps, and a resumed run goes on where it was without replaying anything.
Only dropout inside the network is drawn by torch, seeded anew for each (step, rank).
"""

import functools
import hashlib
import secrets

import numpy as np
import torch

# One independent family of streams each.
ORDER, CAPTION, TIMESTEP, NOISE, DROPOUT, HELD_OUT, SAMPLING, DECODING = range(8)


def choose_seed(given, saved):
    """The run's seed: the given one, else the checkpoint's, else a fresh one."""
    chosen = [seed for seed in (given, saved) if seed is not None]
    return chosen[0] if chosen else secrets.randbelow(2**32)


def generator(seed, purpose, *place):
    """A NumPy generator whose stream depends on its arguments alone (non-negative integers)."""
    return np.random.default_rng((seed, purpose, *place))


@functools.lru_cache(maxsize=4)  # a batch lies in one epoch or across two; and validation's
def epoch_order(seed, epoch, rows):
    """The permutation of `rows` row numbers in which an epoch visits them."""
    return generator(seed, ORDER, epoch).permutation(rows)


def row_at(seed, position, rows):
    """The row at a position of the stream: each comes once in every `rows` positions."""
    epoch, place = divmod(position, rows)
    return int(epoch_order(seed, epoch, rows)[place])


def micro_batches(step, rank, *, batch, accumulation, world):
    """A rank's positions in an optimizer step (from 1): `accumulation` ranges of length `batch`.

    All micro-steps and ranks of a step share `accumulation · world · batch` positions in a row, so
    any cut of the same global batch sees the same samples.
    """
    pieces = range((step - 1) * accumulation, step * accumulation)
    starts = [(piece * world + rank) * batch for piece in pieces]
    return [range(start, start + batch) for start in starts]


def caption(seed, position, captions, dropout=0.0):
    """One of a row's captions, evenly drawn; with probability `dropout` the empty string instead.

    The empty string is what sampling's guidance uses as "no prompt", hence what must be trained.
    """
    draw = generator(seed, CAPTION, position)
    if draw.random() < dropout:
        return ""
    return captions[int(draw.integers(len(captions)))]


def uniform(seed, positions):
    """One number in [0, 1) a position, (B,) fp32, for the timestep."""
    draws = [generator(seed, TIMESTEP, int(p)).random(dtype=np.float32) for p in positions]
    return torch.from_numpy(np.array(draws, dtype=np.float32))


def noise(seed, positions, shape):
    """Standard normal noise, (B, *shape) fp32."""
    streams = [generator(seed, NOISE, int(p)) for p in positions]
    return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))


def dropout_seed(seed, step, rank):
    """What to seed torch with at the start of a step, for the dropout inside the network."""
    words = np.random.SeedSequence((seed, DROPOUT, step, rank)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def held_out_seed(seed):
    """The seed for rows that are held out: which ones they are, and their own noise and times."""
    return int(generator(seed, HELD_OUT).integers(2**63))


def picture(prompt, number):
    """The place of a prompt's picture number 0, 1, …: the same whatever else is drawn with it."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]), number


def sampling_noise(seed, place, shape, steps=30):
    """All the noise that sampling one picture's latents takes, (steps, 1, *shape) fp32."""
    drawn = generator(seed, SAMPLING, *place).standard_normal((steps, 1, *shape), np.float32)
    return torch.from_numpy(drawn)


def decoding_generator(seed, place):
    """A torch generator, on the CPU, for what the decoder draws for one picture."""
    drawn = int(generator(seed, DECODING, *place).integers(2**63))
    return torch.Generator().manual_seed(drawn)
