"""Where latents and conditions come from: the encoders at every step, or a cache of their output.

    source = open_source(run, data, compute_type)
    samples = source.samples(data.rows, seed, caption_dropout)
    latents, condition = source.encode(next(batches(samples, positions)))

Both sources have the same attributes and methods, so nothing else needs to know which one it is.
`prompts` holds the conditions of the validation prompts: {prompt: {name: (2, …)}}, the rows of the
prompt and of the empty caption.
"""

import dataclasses
import functools

from minwurst.edge import cache, dataset, models
from minwurst.step.samples import Samples
from minwurst.step.transfer import to_device


@dataclasses.dataclass
class LiveSource:
    """Encodes every batch when it is needed."""

    encoders: object
    side: int
    prompts: dict
    compute_type: object

    def samples(self, rows, seed, caption_dropout=0.0):
        """The stream of these rows' samples, to read with `batches`."""
        return Samples(rows, self.side, seed, caption_dropout)

    def encode(self, batch):
        """(latents (B, 16, h, w) fp32, condition {name: (B, …)}), on the device."""
        return self.encoders.encode(batch)

    def frozen(self):
        """The modules that stay on the device."""
        return [self.encoders.text[1], self.encoders.image]


@dataclasses.dataclass
class CachedSource:
    """Reads what the encoders gave before training started; see cache.py."""

    encoded: cache.EncodedRows
    side: int
    prompts: dict
    compute_type: object
    device: object

    def samples(self, rows, seed, caption_dropout=0.0):
        return cache.EncodedSamples(rows, self.side, seed, caption_dropout, encoded=self.encoded)

    def encode(self, batch):
        move = functools.partial(to_device, device=self.device)
        condition = {name: move(tensor) for name, tensor in batch["condition"].items()}
        return move(batch["latents"]), condition

    def frozen(self):
        return []


def open_source(run, data, compute_type):
    """The source that the settings ask for. With --cache_latents, everything is encoded here.

    run: a Run, identified. data: a dataset.CaptionedImages. compute_type: of the text encoder.
    """
    settings, side = run.settings, run.settings.resolution
    encoders = models.make_encoders(run.parts, compute_type, run.device)
    prompts = settings.validation_prompts or []
    if prompts:
        encoders.report_truncated(prompts)
    prompts = {prompt: encoders.condition([prompt, ""]) for prompt in prompts}
    if not settings.cache_latents:
        return LiveSource(encoders, side, prompts, compute_type)
    folder = cache.folder_for(
        dataset.cache_folder(settings), data=data.fingerprint, encoders=run.identity["encoders"],
        resolution=side, text_type=str(compute_type),
    )  # fmt: skip
    encoded = cache.encode_all(
        folder, data.every, encoders, side, settings.dataloader_num_workers,
        entry_bytes=models.encoded_bytes(run.parts, side, compute_type),
    )  # fmt: skip
    return CachedSource(encoded, side, prompts, compute_type, run.device)
