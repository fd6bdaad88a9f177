"""Würstchen's Stage A: pixels ↔ 4 channels at a quarter of the side. Frozen; skip it at first.

    stage_a = PaellaVQModel.from_pretrained(folder).eval()
    images = stage_a.decode(latents * stage_a.config.scale_factor)     # (B, 3, 1024, 1024)

The VQGAN of "Paella" (Rampas, Pernias, Aubreville 2022, arXiv 2211.07292). Its codebook is only
used in its own training: Stage B generates latents that are decoded without it. Activations are
(B, H, W, C). Parameter names and shapes are those of diffusers' class of this name, so files load
both ways.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

ROWS = 2**15  # pixels per pass of the widest layers, when no gradient is needed


class MixingResidualBlock(nn.Module):
    """Mixes neighbouring pixels (3×3, each channel on its own), then the channels of each pixel.

    Both are scaled, shifted and weighted by six learned numbers, which are 0 at first.
    """

    def __init__(self, c, c_wide):
        super().__init__()
        self.norm1 = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.norm2 = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.channelwise = nn.Sequential(nn.Linear(c, c_wide), nn.GELU(), nn.Linear(c_wide, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        scale, shift, gate, wide_scale, wide_shift, wide_gate = self.gammas
        mixed = self.norm1(x) * (1 + scale) + shift                                # (B, H, W, C)
        x = x + self.depthwise(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * gate
        pixels = x.flatten(0, 2)                                                   # (B·H·W, C)
        parts = [
            part + self.channelwise(self.norm2(part) * (1 + wide_scale) + wide_shift) * wide_gate
            for part in ([pixels] if torch.is_grad_enabled() else pixels.split(ROWS))
        ]
        return torch.cat(parts).view(x.shape)


class PaellaVQModel(ModelMixin, ConfigMixin):
    """in_channels, out_channels: of the images. up_down_scale_factor: pixels per cell of the first
    level, in each direction. levels: each has half the side of the one before. bottleneck_blocks:
    in the deepest level of the decoder. embed_dim: width of the deepest level, halved from each to
    the one above. latent_channels, num_vq_embeddings: of the latents and their codebook.
    scale_factor: standard deviation of the latents that Stage B works on.
    """

    @register_to_config
    def __init__(
        self, in_channels=3, out_channels=3, up_down_scale_factor=2, levels=2,
        bottleneck_blocks=12, embed_dim=384, latent_channels=4, num_vq_embeddings=8192,
        scale_factor=0.3764,
    ):  # fmt: skip
        super().__init__()
        widths, cell = [embed_dim // 2**n for n in reversed(range(levels))], up_down_scale_factor
        pixels = nn.Conv2d(in_channels * cell**2, widths[0], kernel_size=1)
        self.in_block = nn.Sequential(nn.PixelUnshuffle(cell), pixels)
        down, up = [], [nn.Sequential(nn.Conv2d(latent_channels, widths[-1], kernel_size=1))]
        for n, c in enumerate(widths):
            if n:
                down.append(nn.Conv2d(widths[n - 1], c, kernel_size=4, stride=2, padding=1))
            down.append(MixingResidualBlock(c, 4 * c))
        down.append(nn.Sequential(
            nn.Conv2d(widths[-1], latent_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(latent_channels),
        ))  # fmt: skip
        for n, c in reversed(list(enumerate(widths))):
            count = bottleneck_blocks if n == levels - 1 else 1
            up += [MixingResidualBlock(c, 4 * c) for _ in range(count)]
            if n:
                up.append(nn.ConvTranspose2d(c, widths[n - 1], kernel_size=4, stride=2, padding=1))
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = Quantiser(num_vq_embeddings, latent_channels)
        self.up_blocks = nn.Sequential(*up)
        shown = nn.Conv2d(widths[0], out_channels * cell**2, kernel_size=1)
        self.out_block = nn.Sequential(shown, nn.PixelShuffle(cell))

    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] → latents (B, 4, H/4, W/4), not quantised."""
        return run(self.down_blocks, self.in_block(images))

    def decode(self, latents, quantise=False):
        """Latents (B, 4, h, w) → images (B, 3, 4h, 4w), about [0, 1]."""
        latents = self.vquantizer(latents) if quantise else latents
        return self.out_block(run(self.up_blocks, latents))

    def forward(self, images):
        """Images and back."""
        return self.decode(self.encode(images))


def run(blocks, x):
    """Apply blocks to x (B, C, H, W): residual ones in channels last, the others as they are."""
    for block in blocks:
        if isinstance(block, MixingResidualBlock):
            x = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = block(x)
    return x


class Quantiser(nn.Module):
    """Replaces each latent by the nearest entry of a codebook; gradients pass straight through."""

    def __init__(self, count, channels):
        super().__init__()
        self.embedding = nn.Embedding(count, channels)
        nn.init.uniform_(self.embedding.weight, -1 / count, 1 / count)

    def forward(self, latents):
        rows = latents.permute(0, 2, 3, 1)                                       # (B, h, w, 4)
        nearest = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(dim=1)
        quantised = self.embedding(nearest).view(rows.shape).permute(0, 3, 1, 2)
        return latents + (quantised - latents).detach()
