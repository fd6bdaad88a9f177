"""Every random number of a run, as a function of the seed and a position. Nothing is stored.

Training reads one endless stream of samples: epochs are seeded permutations of the rows, one after
the other. What happens to the sample at position p of the stream (its row, caption, timestep and
noise) depends on (seed, p) alone. It is therefore the same on any device and for any number of
ranks, workers and accumulation steps, and a resumed run continues without replaying anything. Only
dropout inside the network uses torch's own generator, which is seeded anew for each (step, rank).
"""

import functools
import hashlib
import secrets

import numpy as np
import torch

from minwurst.step.distributed import to_device

# Each purpose has its own independent family of streams.
(
    ORDER, CAPTION, TIMESTEP, NOISE, DROPOUT, HELD_OUT, SAMPLING, DECODING, REPLACEMENT, BUCKETS,
    FLIP, CROP,
) = range(12)  # fmt: skip
CPU = torch.device("cpu")


def choose_seed(given, saved):
    """The run's seed: the given one, else the checkpoint's, else a random one."""
    known = [seed for seed in (given, saved) if seed is not None]
    return known[0] if known else secrets.randbelow(2**32)


def generator(seed, purpose, *key):
    """A NumPy generator whose stream depends on its arguments alone (non-negative integers)."""
    return np.random.default_rng((seed, purpose, *key))


@functools.lru_cache(maxsize=32)  # a bucket's batch lies in few epochs; validation has its own
def epoch_order(seed, epoch, rows, bucket=0):
    """The permutation of `rows` row numbers in which an epoch visits them."""
    return generator(seed, ORDER, epoch, *[bucket] * (bucket > 0)).permutation(rows)


def row_at(seed, place, rows, skipped=(), bucket=0, position=None):
    """The row at a place of a bucket's stream. Each row occurs once in every `rows` places.

    skipped: rows each of whose places takes another row, drawn at random by the position in the
    stream of samples, which differs from the place if there are several buckets.
    """
    epoch, index = divmod(place, rows)
    row = int(epoch_order(seed, epoch, rows, bucket)[index])
    if row in skipped:
        others = [other for other in range(rows) if other not in skipped]
        key = place if position is None else position
        row = others[generator(seed, REPLACEMENT, key).integers(len(others))]
    return row


def flip(seed, position):
    """Whether the image at a position is mirrored."""
    return generator(seed, FLIP, position).random() < 0.5


def crop(seed, position):
    """Where the image at a position is cropped: two numbers from 0 (left, top) to 1."""
    return generator(seed, CROP, position).random(2)


def caption(seed, position, captions, dropout=0.0):
    """One of a row's captions, uniformly; with probability `dropout` the empty string instead.

    Guidance compares the prediction for the prompt with the one for the empty string, so the model
    has to keep knowing what the empty string means.
    """
    numbers = generator(seed, CAPTION, position)
    if numbers.random() < dropout:
        return ""
    return captions[int(numbers.integers(len(captions)))]


def uniform(seed, positions, device=CPU):
    """One number in [0, 1) per position, (B,) fp32, from which the timestep is computed."""
    numbers = [generator(seed, TIMESTEP, int(p)).random(dtype=np.float32) for p in positions]
    return to_device(torch.from_numpy(np.array(numbers, dtype=np.float32)), device)


def noise(seed, positions, shape):
    """Standard normal noise, (B, *shape) fp32."""
    streams = [generator(seed, NOISE, int(p)) for p in positions]
    return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))


def noise_like(latents, seed, positions):
    """Noise for latents (B, …): of their shape and on their device, fp32."""
    return to_device(noise(seed, positions, latents.shape[1:]), latents.device)


def dropout_seed(seed, step, rank):
    """The seed of torch's generator at the start of a step, for dropout inside the network."""
    words = np.random.SeedSequence((seed, DROPOUT, step, rank)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def held_out_seed(seed):
    """The seed of the held-out rows: which rows they are, and their own noise and timesteps."""
    return int(generator(seed, HELD_OUT).integers(2**63))


def image_key(prompt, number):
    """The key of a prompt's image number 0, 1, …, independent of the other images of a run."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]), number


def sampling_noise(seed, key, shape, steps=30):
    """All the noise for sampling one image's latents, (steps, 1, *shape) fp32."""
    numbers = generator(seed, SAMPLING, *key).standard_normal((steps, 1, *shape), np.float32)
    return torch.from_numpy(numbers)


def decoding_generator(seed, key):
    """A torch generator on the CPU for the noise of the decoder for one image."""
    return torch.Generator().manual_seed(int(generator(seed, DECODING, *key).integers(2**63)))
