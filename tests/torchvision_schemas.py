"""What torchvision's wheel needs to be imported beside a CPU build of torch."""

import torch

SCHEMAS = ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a) -> Tensor")
library = torch.library.Library("torchvision", "FRAGMENT")


def define():
    """On import, torchvision needs the schemas of operators that only its CUDA build registers."""
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library.define(schema)
