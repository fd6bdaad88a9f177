"""The frozen image encoder: EfficientNetV2-S and a 1×1 mapper. Skip this file on first reading.

    encoder = EfficientNetEncoder.from_pretrained(folder).eval()
    encoded = encoder(images)          # (B, 3, R, R), ImageNet mean and std → (B, 16, R/32, R/32)

Its output, scaled, is what the prior learns to generate. Only inference is implemented: no
stochastic depth, no classifier. Parameter names are those of torchvision's
`efficientnet_v2_s().features`, so `warp-ai/EfficientNetEncoder` on the Hub loads unchanged.
Architecture: "EfficientNetV2" (Tan, Le 2021, arXiv 2104.00298), table 4.
"""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# One row per stage: (kind, expansion, kernel, stride, channels out, layers). Before them comes the
# stem, 24 channels at stride 2; after them a 1×1 convolution to c_cond channels.
EFFICIENTNET_V2_S = (
    ("fused", 1, 3, 1, 24, 2),
    ("fused", 4, 3, 2, 48, 4),
    ("fused", 4, 3, 2, 64, 4),
    ("mbconv", 4, 3, 2, 128, 6),
    ("mbconv", 6, 3, 1, 160, 9),
    ("mbconv", 6, 3, 2, 256, 15),
)


def convolution(c_in, c_out, kernel=1, stride=1, groups=1, active=True):
    """Convolution, batch norm and (if `active`) SiLU."""
    layers = [
        nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if active else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """A gate per channel, computed from the channels' means over the image."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        means = x.mean(dim=(2, 3), keepdim=True)                                   # (B, C, 1, 1)
        return x * self.fc2(nn.functional.silu(self.fc1(means))).sigmoid()


class InvertedBottleneck(nn.Module):
    """Expand, convolve, project; "fused" expands and convolves in one full 3×3 convolution."""

    def __init__(self, kind, expansion, kernel, stride, c_in, c_out):
        super().__init__()
        wide = c_in * expansion
        if kind == "fused" and expansion == 1:
            self.block = nn.Sequential(convolution(c_in, c_out, kernel, stride))
        elif kind == "fused":
            self.block = nn.Sequential(
                convolution(c_in, wide, kernel, stride), convolution(wide, c_out, active=False)
            )
        else:
            self.block = nn.Sequential(
                convolution(c_in, wide),
                convolution(wide, wide, kernel, stride, groups=wide),
                SqueezeExcitation(wide, max(1, c_in // 4)),
                convolution(wide, c_out, active=False),
            )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """c_latent: channels of the latent. c_cond: channels before the mapper. effnet: the backbone.

    stages: None for EfficientNetV2-S, or another table of the same form for a smaller encoder,
    whose stem has as many channels as its first stage.
    """

    @register_to_config
    def __init__(self, c_latent=16, c_cond=1280, effnet="efficientnet_v2_s", stages=None):
        super().__init__()
        if stages is None and effnet != "efficientnet_v2_s":
            raise ValueError(f"unknown effnet {effnet!r}; only efficientnet_v2_s is supported.")
        stages = stages or EFFICIENTNET_V2_S
        c_in = stages[0][4]
        layers = [convolution(3, c_in, kernel=3, stride=2)]
        for kind, expansion, kernel, stride, c_out, count in stages:
            blocks = []
            for number in range(count):
                step = stride if number == 0 else 1
                blocks.append(InvertedBottleneck(kind, expansion, kernel, step, c_in, c_out))
                c_in = c_out
            layers.append(nn.Sequential(*blocks))
        layers.append(convolution(c_in, c_cond))
        self.backbone = nn.Sequential(*layers)
        self.mapper = nn.Sequential(
            nn.Conv2d(c_cond, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent)
        )

    def forward(self, images):
        """(B, 3, R, R) → (B, c_latent, R/32, R/32), standard deviation about 42."""
        return self.mapper(self.backbone(images))
