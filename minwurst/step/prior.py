"""Würstchen's Stage C: the network that is trained. It predicts the noise in a 16-channel latent.

    prior = WuerstchenPrior.from_pretrained(folder)
    predicted = prior(noisy, t, text=states)

Activations are (B, H, W, C), channels last, throughout: each pixel of the latent is a row, which is
what LayerNorm, the linear layers and attention work on, and the convolutions accept the same memory
as it is. Parameter names and shapes are those of diffusers' class of this name, so files load both
ways. Architecture: "Würstchen" (Pernias, Rampas, Richter, Pal, Aubreville 2023, arXiv 2306.00637).

    B  batch        H, W  height and width of the latent (24 × 24 for an image of 1024 pixels)
    C  width        L     text tokens (77)        D  width of the text states (1280)
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

PUBLISHED = {
    "c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24, "dropout": 0.1,
}  # fmt: skip


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm relative to the mean over channels (ConvNeXt V2, 2301.00808).

    The paper's γ·(x·n) + β + x is written as x·(1 + γ·n) + β, which is one pass over x, the widest
    tensor of the network. The norm is summed in fp32 whatever the type of x.
    """

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)                # (B, 1, 1, C)
        return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * relative).to(x.dtype))


class ResBlock(nn.Module):
    """Mixes neighbouring pixels (3×3, each channel on its own), then the channels of each pixel."""

    def __init__(self, c, dropout):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size=3, padding=1, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.channelwise = nn.Sequential(
            nn.Linear(c, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout),
            nn.Linear(4 * c, c),
        )

    def forward(self, x, time, text):
        mixed = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)     # (B, H, W, C)
        return x + self.channelwise(self.norm(mixed))


class TimestepBlock(nn.Module):
    """Scales and shifts every channel as a function of the timestep."""

    def __init__(self, c, c_r):
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * c)

    def forward(self, x, time, text):
        scale, shift = self.mapper(time)[:, None, None].to(x.dtype).chunk(2, dim=-1)  # (B, 1, 1, C)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention. `to_out` includes the dropout, as in diffusers' numbering."""

    def __init__(self, c, nhead, dropout):
        super().__init__()
        if nhead < 1 or c % nhead:
            raise ValueError(f"{c} channels can't be divided among {nhead} heads")
        self.nhead = nhead
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Dropout(dropout))

    def forward(self, queries, keys):
        q, k, v = (
            x.unflatten(-1, (self.nhead, -1)).transpose(1, 2)              # (B, heads, ·, C/heads)
            for x in (self.to_q(queries), self.to_k(keys), self.to_v(keys))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).flatten(2))                       # (B, H·W, C)


class AttnBlock(nn.Module):
    """Every pixel attends to all pixels and all text tokens, in one attention."""

    def __init__(self, c, nhead, dropout, c_cond=None):
        """c_cond: width of the text, if not c."""
        super().__init__()
        self.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(c, nhead, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond or c, c))

    def forward(self, x, time, text):
        words = self.kv_mapper(text)                                               # (B, L, C)
        pixels = self.norm(x).flatten(1, 2).to(words.dtype)                        # (B, H·W, C)
        mixed = self.attention(pixels, torch.cat([pixels, words], dim=1))
        return x + mixed.unflatten(1, x.shape[1:3])


def embed_timestep(t, width, max_period=10000):
    """Sines and cosines of t·10000 at `width`/2 frequencies, from 1 down to 1/10000.

    t: (B,) in [0, 1], fp32. Returns (B, width) fp32. The fastest sine has 1600 periods over [0, 1],
    so a t rounded to bf16 would randomise it.
    """
    half = width // 2
    step = math.log(max_period) / (half - 1)
    frequencies = torch.exp(-step * torch.arange(half, device=t.device).float())   # (width/2,)
    angles = t.float()[:, None] * max_period * frequencies                         # (B, width/2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class WuerstchenPrior(ModelMixin, ConfigMixin):
    """The prior: `depth` times (ResBlock, TimestepBlock, AttnBlock), all at one resolution.

    c_in: latent channels. c: width. c_cond: width of the text states. c_r: width of the timestep
    embedding. PUBLISHED has the published model's sizes, 993,636,896 parameters; the defaults here
    are those of diffusers' class.
    """

    _supports_gradient_checkpointing = True
    NEW_LAYERS = ()  # beginnings of the names of layers that files may lack: a fork's own

    @register_to_config
    def __init__(self, c_in=16, c=1280, c_cond=1024, c_r=64, depth=16, nhead=16, dropout=0.1):
        super().__init__()
        self.gradient_checkpointing = False
        self.projection = nn.Conv2d(c_in, c, kernel_size=1)
        self.cond_mapper = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks += [ResBlock(c, dropout), TimestepBlock(c, c_r)]
            self.blocks += [AttnBlock(c, nhead, dropout)]
        norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)
        self.out = nn.ModuleList([norm, nn.Conv2d(c, 2 * c_in, kernel_size=1)])

    def enable_gradient_checkpointing(self):
        """Keep only each block's input, and recompute the rest in the backward pass."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        """Keep all that the backward pass needs: a third faster, ten times the memory."""
        self.gradient_checkpointing = False

    def compile_blocks(self):
        """Compile every block in place, each shape on its own. Parameters keep their names.

        Not `dynamic`: with that, what is compiled would depend on the order in which shapes come,
        and a resumed run would round differently. More shapes than the limit are an error; by
        default, torch would silently continue uncompiled. Dropout uses torch's own generator.
        """
        torch._dynamo.config.recompile_limit = 128
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._inductor.config.fallback_random = True
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def example_inputs(self, batch=1, shape=(1, 1), tokens=1):
        """(x, t, condition) of zeros, as forward takes them. shape: (h, w) of the latents."""
        x = torch.zeros(batch, self.config.c_in, *shape, device=self.device)
        text = torch.zeros(batch, tokens, self.config.c_cond, device=self.device)
        return x, torch.zeros(batch, device=self.device), {"text": text}

    def forward(self, x, t, text):
        """Predict the noise in x.

        x: noisy latents (B, c_in, H, W). t: timesteps (B,) in [0, 1], fp32. text: the text
        encoder's states (B, L, c_cond). Returns (B, c_in, H, W).
        """
        text = self.cond_mapper(text)                                              # (B, L, C)
        time = embed_timestep(t, self.config.c_r).to(text.dtype)                   # (B, c_r)
        y = self.projection(x).permute(0, 2, 3, 1).contiguous()                    # (B, H, W, C)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y = recompute_in_backward(block, y, time, text, use_reentrant=False)
            else:
                y = block(y, time, text)
        norm, head = self.out
        y = head(norm(y).permute(0, 3, 1, 2))                                 # (B, 2·c_in, H, W)
        # Noise is what remains of x without a scaled-down image, ε = (x − √ᾱ·x₀)/√(1−ᾱ): the head
        # predicts both parts, a ≈ √ᾱ·x₀ and |1 − b| ≈ √(1−ᾱ). As 1 − b can come near zero, this
        # is fp32 whatever the type of the forward pass.
        a, b = y.float().chunk(2, dim=1)
        return ((x.float() - a) / ((1 - b).abs() + 1e-5)).to(x.dtype)
