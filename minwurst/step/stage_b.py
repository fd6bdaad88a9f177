"""Würstchen's Stage B: from the prior's latents to those of Stage A. Frozen; skip it at first.

    stage_b = WuerstchenDiffNeXt.from_pretrained(folder).eval()
    noise = stage_b(x, t, effnet=latents, clip=states)       # (B, 4, 256, 256) for 1024 pixels

A U-Net of the prior's own blocks that predicts the noise in Stage A's latents. Every level sees the
prior's latents, resized to its grid and mapped to c_cond channels; text matters little here.
Activations are (B, H, W, C), as in prior.py. Parameter names and shapes are those of diffusers'
class of this name, so files load both ways. Architecture: arXiv 2306.00637, section 3.

    B  batch        H, W  height and width of a level's grid, halved from each level to the next
    C  width        L     text tokens (77)
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from minwurst.step import prior
from minwurst.step.prior import TimestepBlock, embed_timestep


def norm(c):
    return nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)


class ResBlock(prior.ResBlock):
    """The prior's, with c_skip more channels before those of each pixel are mixed."""

    def __init__(self, c, c_skip, kernel_size, dropout):
        super().__init__(c, dropout)
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.channelwise[0] = nn.Linear(c + c_skip, 4 * c)

    def forward(self, x, time, text, skip):
        mixed = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H, W, C)
        return x + self.channelwise(torch.cat([mixed, *skip], dim=-1))


class Resample(nn.Sequential):
    """To the next level: twice or half the side. Indices are diffusers' (0 norm, 1 convolution)."""

    def __init__(self, kind, c_in, c_out):
        super().__init__(norm(c_in), kind(c_in, c_out, kernel_size=2, stride=2))

    def forward(self, x):
        return self[1](self[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class WuerstchenDiffNeXt(ModelMixin, ConfigMixin):
    """c_in, c_out: channels of Stage A's latents. c_r: width of the timestep embedding. patch_size:
    latents per cell of the first level, in each direction. c_cond: channels of what conditions the
    blocks. c_hidden, nhead, blocks, level_config ("C" ResBlock, "T" TimestepBlock, "A" AttnBlock),
    inject_effnet, dropout: one entry per level. effnet_embd, clip_embd: channels of the prior's
    latents and of the text.
    """

    @register_to_config
    def __init__(
        self, c_in=4, c_out=4, c_r=64, patch_size=2, c_cond=1024,
        c_hidden=(320, 640, 1280, 1280), nhead=(-1, 10, 20, 20), blocks=(4, 4, 14, 4),
        level_config=("CT", "CTA", "CTA", "CTA"), inject_effnet=(False, True, True, True),
        effnet_embd=16, clip_embd=1024, kernel_size=3, dropout=0.1,
    ):  # fmt: skip
        super().__init__()
        levels = range(len(c_hidden))
        dropout = dropout if isinstance(dropout, list | tuple) else [dropout] * len(c_hidden)
        self.clip_mapper = nn.Linear(clip_embd, c_cond)
        self.effnet_mappers = nn.ModuleList(
            nn.Conv2d(effnet_embd, c_cond, kernel_size=1) if inject else None
            for inject in [*inject_effnet, *reversed(inject_effnet)]
        )
        self.seq_norm = norm(c_cond)
        patch = nn.Conv2d(c_in * patch_size**2, c_hidden[0], kernel_size=1)
        self.embedding = nn.Sequential(nn.PixelUnshuffle(patch_size), patch, norm(c_hidden[0]))

        def level(n, c_first_skip=0):
            """A level's blocks; the very first one may have more channels to skip from."""
            c, c_skip = c_hidden[n], c_cond if inject_effnet[n] else 0
            for number, kind in enumerate(level_config[n] * blocks[n]):
                if kind == "C":
                    first = c_first_skip if number == 0 else 0
                    yield ResBlock(c, c_skip + first, kernel_size, dropout[n])
                elif kind == "T":
                    yield TimestepBlock(c, c_r)
                elif kind == "A":
                    yield prior.AttnBlock(c, nhead[n], dropout[n], c_cond)
                else:
                    raise ValueError(f"unknown block {kind} in level_config")

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for n in levels:
            shrink = [Resample(nn.Conv2d, c_hidden[n - 1], c_hidden[n])] if n else []
            self.down_blocks.append(nn.ModuleList([*shrink, *level(n)]))
        for n in reversed(levels):
            grow = [Resample(nn.ConvTranspose2d, c_hidden[n], c_hidden[n - 1])] if n else []
            c_first_skip = c_hidden[n] if n < levels[-1] else 0
            self.up_blocks.append(nn.ModuleList([*level(n, c_first_skip), *grow]))
        head = nn.Conv2d(c_hidden[0], 2 * c_out * patch_size**2, kernel_size=1)
        self.clf = nn.Sequential(norm(c_hidden[0]), head, nn.PixelShuffle(patch_size))
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """At first the head's weights are zero, and blocks are scaled down as they add up."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for mapper in [*filter(None, self.effnet_mappers), self.clip_mapper]:
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.channelwise[-1].weight.mul_(sum(self.config.blocks) ** -0.5)
            elif isinstance(module, TimestepBlock):
                nn.init.zeros_(module.mapper.weight)

    def forward(self, x, t, effnet, clip=None):
        """Predict the noise in x.

        x: noisy latents of Stage A (B, c_in, H, W). t: timesteps (B,) in [0, 1], fp32. effnet: the
        prior's latents, unscaled, (B, 16, h, w) of any size. clip: the text encoder's states
        (B, L, clip_embd), if any level has attention. Returns (B, c_out, H, W) fp32.
        """
        text = None if clip is None else self.seq_norm(self.clip_mapper(clip))     # (B, L, c_cond)
        time = embed_timestep(t, self.config.c_r).to(self.clip_mapper.weight.dtype)     # (B, c_r)
        unshuffle, patch, first_norm = self.embedding
        y = first_norm(patch(unshuffle(x)).permute(0, 2, 3, 1))                    # (B, H, W, C)
        outputs, count = [], len(self.down_blocks)
        for blocks, mapper in zip(self.down_blocks, self.effnet_mappers[:count], strict=True):
            y = self.level(y, blocks, mapper, time, text, effnet)
            outputs.append(y)
        for blocks, mapper in zip(self.up_blocks, self.effnet_mappers[count:], strict=True):
            way_down = outputs.pop()
            skip = [] if way_down is y else [way_down]  # the deepest level continues from its own
            y = self.level(y, blocks, mapper, time, text, effnet, skip)
        last_norm, head, shuffle = self.clf
        a, b = shuffle(head(last_norm(y).permute(0, 3, 1, 2))).float().chunk(2, dim=1)
        # As in the prior, ε = (x − a)/b, with b in [0.001, 0.999].
        return (x.float() - a) / (b.sigmoid() * 0.998 + 0.001)

    @staticmethod
    def level(y, blocks, mapper, time, text, effnet, skip=()):
        """One level's blocks. skip: what the first ResBlock sees besides the latents."""
        injected = None
        for block in blocks:
            if isinstance(block, Resample):
                y = block(y)
            elif isinstance(block, ResBlock):
                if injected is None:
                    injected = [inject(mapper, effnet, y)] if mapper is not None else []
                y, skip = block(y, time, text, [*skip, *injected]), ()
            else:
                y = block(y, time, text)
        return y


def inject(mapper, effnet, y):
    """The prior's latents on the grid of y (B, H, W, C), mapped to c_cond channels."""
    resized = F.interpolate(
        effnet.float(), y.shape[1:3], mode="bicubic", antialias=True, align_corners=True
    )
    return mapper(resized.to(mapper.weight.dtype)).permute(0, 2, 3, 1)          # (B, H, W, c_cond)
