"""Write inputs and outputs of torchvision to a file, for comparison with our code.

    PYTHONPATH=.torchvision python tests/torchvision_numbers.py numbers.safetensors

This runs in a separate process with torchvision in a separate folder: the wheel is built for CUDA,
and next to a CPU build of torch it would break every import of transformers.
"""

import sys

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import torchvision_schemas

torchvision_schemas.define()
import torchvision  # noqa: E402
from torchvision import transforms  # noqa: E402

SIZES = [(100, 70), (70, 100), (64, 64), (51, 200), (333, 90), (1, 1), (40, 41), (301, 299)]


def efficientnet(numbers):
    """EfficientNetV2-S with random weights and non-default batch norm statistics."""
    torch.manual_seed(0)
    features = torchvision.models.efficientnet_v2_s().features.eval()
    with torch.no_grad():
        for name, buffer in features.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        numbers["pictures"] = torch.randn(2, 3, 96, 128)
        numbers["features"] = features(numbers["pictures"])
    numbers.update({f"backbone.{name}": tensor for name, tensor in features.state_dict().items()})


def preprocessing(numbers, side=64):
    """Random images of several shapes, resized, cropped and normalised."""
    steps = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    random = np.random.default_rng(0)
    for width, height in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        numbers[f"picture {width}x{height}"] = torch.from_numpy(pixels)
        numbers[f"result {width}x{height}"] = steps(Image.fromarray(pixels))


if __name__ == "__main__":
    computed = {}
    efficientnet(computed)
    preprocessing(computed)
    save_file({name: tensor.contiguous() for name, tensor in computed.items()}, sys.argv[1])
