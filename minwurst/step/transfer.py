"""Moving tensors to the device without waiting for it."""


def to_device(tensor, device):
    """The tensor on the device. On a GPU the copy overlaps with the work already queued."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
