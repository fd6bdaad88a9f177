"""The image encoder against torchvision's EfficientNetV2-S."""

import pytest
import torch

from minwurst.step.image_encoder import EfficientNetEncoder
from tests.conftest import relative

pytestmark = pytest.mark.slow


def test_backbone_equals_torchvision(torchvision_numbers):
    ours = EfficientNetEncoder().eval()
    state = {name: t for name, t in torchvision_numbers.items() if name.startswith("backbone.")}
    ours.backbone.load_state_dict({name.removeprefix("backbone."): t for name, t in state.items()})
    with torch.no_grad():
        found = ours.backbone(torchvision_numbers["pictures"])
    assert found.shape == (2, 1280, 3, 4)
    assert relative(found, torchvision_numbers["features"]) < 1e-5


def test_published_size_and_names():
    with torch.device("meta"):
        encoder = EfficientNetEncoder()
    weights = encoder.backbone.state_dict()
    assert sum(weight.numel() for weight in encoder.backbone.parameters()) == 20_177_488
    assert len(weights) == 780
    keys = set(encoder.state_dict()) - {f"backbone.{key}" for key in weights}
    assert keys == {
        "mapper.0.weight", "mapper.1.weight", "mapper.1.bias", "mapper.1.running_mean",
        "mapper.1.running_var", "mapper.1.num_batches_tracked",
    }  # fmt: skip


def test_stride_is_32():
    with torch.no_grad():
        latents = EfficientNetEncoder().eval()(torch.randn(1, 3, 64, 96))
    assert latents.shape == (1, 16, 2, 3)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="efficientnet_v2_l"):
        EfficientNetEncoder(effnet="efficientnet_v2_l")
