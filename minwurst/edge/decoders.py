"""From latents to images: Stages B and A, or a cheap preview of them.

    decode = FullDecoder(decoder_folder, device, half=True)
    with decode.on_device():
        image = decode(latents, "a bear", generator)
"""

import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from minwurst.base.console import progress, say
from minwurst.base.errors import UserError
from minwurst.edge import models, networks
from minwurst.edge.files import read_json
from minwurst.step import diffusion
from minwurst.step.encoders import encode_text
from minwurst.step.images import unnormalise
from minwurst.step.samples import batches
from minwurst.step.stage_a import PaellaVQModel
from minwurst.step.stage_b import WuerstchenDiffNeXt

PIXELS = 42.67  # of an image along a side, per latent


def latent_shape(decoder, prompt, side):
    """(h, w) of the latents of a prompt's image, as the decoder can decode it.

    side: of the latents of an image whose prompt names no size.
    """
    sizes = [prompt.height, prompt.width] if prompt.height else [side * PIXELS] * 2
    return tuple(decoder.latent_size(size / PIXELS) for size in sizes)


def announce_sizes(decoder, prompts, side):
    """Say which prompts' images are generated at another size than they ask for."""
    for prompt in prompts:
        wanted = (prompt.width, prompt.height) if prompt.width else (round(side * PIXELS),) * 2
        height, width = (round(size * PIXELS) for size in latent_shape(decoder, prompt, side))
        if any(abs(one - other) > 2 for one, other in zip(wanted, (width, height), strict=True)):
            say(
                f"“{prompt.line}” is generated at {width}×{height} pixels: sides are multiples of "
                f"{round(decoder.latent_size(1) * PIXELS)}."
            )


def size_of(module):
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def load_decoder(folder, dtype):
    """(tokenizer, text encoder, Stage B, Stage A, latent_dim_scale) from the decoder's folder.

    latent_dim_scale: the sides of Stage A's latents, as a multiple of the prior's.
    """
    models.check_decoder(folder)
    folder = Path(folder)
    stage_b = networks.load(WuerstchenDiffNeXt, folder / "decoder", dtype).requires_grad_(False)
    stage_a = networks.load(PaellaVQModel, folder / "vqgan", dtype).requires_grad_(False)
    tokenizer, text_encoder = models.load_text(folder, dtype)
    if stage_a.config.latent_channels != stage_b.config.c_in:
        raise UserError(
            f"{folder}: decoder/ works on {stage_b.config.c_in} channels, but vqgan/ on "
            f"{stage_a.config.latent_channels}."
        )
    if text_encoder.config.hidden_size != stage_b.config.clip_embd:
        raise UserError(
            f"{folder}: text_encoder/ has width {text_encoder.config.hidden_size}, but decoder/ "
            f"expects {stage_b.config.clip_embd}."
        )
    return tokenizer, text_encoder, stage_b, stage_a, latent_dim_scale(folder)


def latent_dim_scale(folder):
    """From the decoder's model_index.json, or the published 10.67 where there is none."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return 10.67
    try:
        scale = read_json(index).get("latent_dim_scale", 10.67)
        # Stage B halves four times: 3 latents have to become 32 positions, up to rounding down.
        if isinstance(scale, int | float) and 1 < scale < 100 and int(3 * scale) % 16 == 0:
            return scale
    except (OSError, ValueError):
        pass
    raise UserError(f"{index} can't be read, or its latent_dim_scale is impossible.")


class FullDecoder:
    """Würstchen's Stages B and A: 12 steps without guidance, then pixels."""

    def __init__(self, folder, device, half=False):
        """folder: has `decoder/`, `vqgan/`, `text_encoder/` and `tokenizer/`.

        half: use fp16, except on a CPU, which is slow at it.
        """
        self.device = device
        self.dtype = torch.float16 if half and device.type != "cpu" else torch.float32
        parts = load_decoder(folder, self.dtype)
        self.tokenizer, self.text_encoder, self.stage_b, self.stage_a, self.scale = parts
        self.modules = self.text_encoder, self.stage_b, self.stage_a
        self.nbytes = sum(map(size_of, self.modules))

    @staticmethod
    def latent_size(wanted):
        """The side of latents nearest to `wanted` that it can decode, a multiple of three.

        Stage B works at 10.67 times the latents' side and halves that four times.
        """
        return max(1, round(wanted / 3)) * 3

    @contextlib.contextmanager
    def on_device(self):
        """Use as a context manager: the decoder is on the device inside, in CPU memory outside."""
        for module in self.modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in self.modules:
                module.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def __call__(self, latents, prompt, generator):
        """One RGB image. latents: (1, 16, h, w), scaled as the prior's. generator: for noise."""
        effnet = diffusion.unscale_latents(latents).to(self.device)
        clip = encode_text(self.tokenizer, self.text_encoder, [prompt])
        times, channels = diffusion.stage_b_times(), self.stage_b.config.c_in
        height, width = (int(side * self.scale) for side in latents.shape[-2:])
        noise = [torch.randn(1, channels, height, width, generator=generator) for _ in times]
        half = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

        def predict_noise(x, t):
            return self.stage_b(x, t, effnet, clip)

        with half:
            x = diffusion.sample(predict_noise, torch.stack(noise).to(self.device), times)
            image = self.stage_a.decode(x * self.stage_a.config.scale_factor)[0].float()
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)                   # (3, H, W)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


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
        parts = [range(position, position + 1) for position in range(count)]  # of several shapes
        squares, products = 0.0, 0.0
        for batch in progress(batches(samples, parts), "preview", total=len(parts)):
            latents = encode(batch)[0].cpu()
            inputs = self.neighborhoods(latents)                                 # (B·h·w, 145)
            pixels = batch.get("pixels")
            if pixels is None:  # the samples come from a cache
                position = batch["positions"][0]
                pixels = samples.pixels(samples.row(position), position)[None]
            size = [self.SIDE * side for side in latents.shape[-2:]]
            small = F.interpolate(unnormalise(pixels), size, mode="area")
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
        return round(wanted)

    def on_device(self):
        return contextlib.nullcontext()

    def __call__(self, latents, prompt, generator):
        """As FullDecoder's; prompt and generator are not used."""
        patches = (self.neighborhoods(latents.cpu()) @ self.weights).float()         # (h·w, 192)
        patches = patches.unflatten(0, latents.shape[-2:]).permute(2, 0, 1)          # (192, h, w)
        pixels = F.pixel_shuffle(patches, self.SIDE).clamp(0, 1).permute(1, 2, 0)    # (·, ·, 3)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
