"""From latents to images: Stages B and A, or a cheap preview of them.

    decode = FullDecoder(decoder_folder, device, half=True)
    with decode.on_device():
        image = decode(latents, "a bear", generator)
"""

import contextlib

import torch
import torch.nn.functional as F
from PIL import Image

from minwurst.base.console import progress
from minwurst.edge import diffusers_pipelines
from minwurst.step import diffusion
from minwurst.step.images import unnormalise
from minwurst.step.samples import batches


def size_of(module):
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


class FullDecoder:
    """Würstchen's Stages B and A in diffusers' implementation: 12 steps, no guidance."""

    def __init__(self, folder, device, half=False):
        """folder: has `decoder/`, `vqgan/`, `text_encoder/` and `tokenizer/`.

        half: use fp16, except on a CPU, which is slow at it. Never bf16: diffusers keeps the
        decoder's time in the type of its weights, and bf16 can't distinguish its steps.
        """
        self.device = device
        dtype = torch.float16 if half and device.type != "cpu" else torch.float32
        self.pipeline = diffusers_pipelines.decoder_pipeline(folder, dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        parts = (self.pipeline.decoder, self.pipeline.vqgan, self.pipeline.text_encoder)
        self.nbytes = sum(size_of(part) for part in parts)

    @staticmethod
    def latent_size(wanted):
        """The side of the latents nearest to `wanted` that it can decode, a multiple of three.

        Stage B works at 10.67 times the latents' side and halves that four times.
        """
        return max(1, round(wanted / 3)) * 3

    @contextlib.contextmanager
    def on_device(self):
        """Use as a context manager: the decoder is on the device inside, in CPU memory outside."""
        self.pipeline.to(self.device)
        try:
            yield
        finally:
            self.pipeline.to("cpu", silence_dtype_warnings=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __call__(self, latents, prompt, generator):
        """One RGB image. latents: (1, 16, h, w), scaled as the prior's. generator: for noise."""
        encoded = diffusion.unscale_latents(latents)
        encoded = encoded.to(self.device, self.pipeline.decoder.dtype)
        with diffusers_pipelines.quiet():  # a long prompt has been reported already
            return self.pipeline(encoded, prompt, generator=generator).images[0]


class PreviewDecoder:
    """A linear map from each 3×3 neighborhood of latents to 8×8 pixels: colors and rough shapes.

    It is fitted to images and their latents by least squares, and needs no decoder.
    """

    SIDE = 8  # pixels per latent
    IMAGES = 128  # more than enough: each has (R/32)² latents, and the map 145 × 192 numbers
    nbytes = 0

    def __init__(self, samples, encode):
        """samples: to fit to. encode: of their source, batch → (latents, condition)."""
        count = min(len(samples.rows), self.IMAGES)
        parts = [range(start, min(start + 8, count)) for start in range(0, count, 8)]
        squares, products = 0.0, 0.0
        for batch in progress(batches(samples, parts), "preview", total=len(parts)):
            latents = encode(batch)[0].cpu()
            inputs = self.neighborhoods(latents)                                 # (B·h·w, 145)
            pixels = batch.get("pixels")
            if pixels is None:  # the samples come from a cache
                rows = [samples.row(position) for position in batch["positions"]]
                pixels = torch.stack([samples.pixels(row) for row in rows])
            side = self.SIDE * latents.shape[-1]
            small = F.interpolate(unnormalise(pixels), (side, side), mode="area")
            patches = F.pixel_unshuffle(small, self.SIDE)                         # (B, 192, h, w)
            patches = patches.permute(0, 2, 3, 1).flatten(0, 2).double()         # (B·h·w, 192)
            squares, products = squares + inputs.T @ inputs, products + inputs.T @ patches
        # Ridge regression: few images have fewer latents than the map has numbers.
        ridge = 1e-3 * squares.trace() / len(squares) * torch.eye(len(squares))
        self.weights = torch.linalg.solve(squares + ridge, products)                # (145, 192)

    @staticmethod
    def neighborhoods(latents):
        """(B, 16, h, w) → each latent's 3×3 neighborhood and a 1, (B·h·w, 145) in fp64."""
        padded = F.pad(diffusion.unscale_latents(latents), (1, 1, 1, 1), mode="replicate")
        patches = F.unfold(padded, 3).transpose(1, 2).flatten(0, 1).double()
        return F.pad(patches, (0, 1), value=1.0)

    @staticmethod
    def latent_size(wanted):
        """Any size can be decoded."""
        return wanted

    def on_device(self):
        return contextlib.nullcontext()

    def __call__(self, latents, prompt, generator):
        """As FullDecoder's; prompt and generator are not used."""
        patches = (self.neighborhoods(latents.cpu()) @ self.weights).float()         # (h·w, 192)
        patches = patches.unflatten(0, latents.shape[-2:]).permute(2, 0, 1)          # (192, h, w)
        pixels = F.pixel_shuffle(patches, self.SIDE).clamp(0, 1).permute(1, 2, 0)    # (·, ·, 3)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
