"""Decode one image with both sides, each in its own process: seconds, and the peak of memory.

    python -m tests.benchmark decode         # calls this file; its weights are random

Memory is what decoding adds to the loaded models: on a GPU counted by torch, on a CPU the
difference of the process's resident memory.
"""

import json
import sys
import time

import torch

from minwurst.edge.decoders import FullDecoder
from minwurst.step import diffusion
from tests import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resident(which):
    """This process's resident memory in bytes: VmRSS now, or VmHWM, the highest since `reset`."""
    with open("/proc/self/status") as opened:
        lines = dict(line.split(":", 1) for line in opened)
    return int(lines[which].split()[0]) * 1024


def reset():
    with open("/proc/self/clear_refs", "w") as opened:
        opened.write("5")


def main(side, folder, cells, steps):
    latents = torch.randn(1, 16, cells, cells, generator=torch.Generator().manual_seed(1)) / 42
    half = DEVICE.type == "cuda"
    if side == "ours":
        decoder = FullDecoder(folder, DEVICE, half)
        modules = [module.to(DEVICE) for module in decoder.modules]

        diffusion.stage_b_times = lambda: torch.linspace(1, 0, steps + 1)

        def decode():
            return decoder(latents, "a bear", torch.Generator().manual_seed(3))
    else:
        reference.WuerstchenDiffNeXt._init_weights = lambda *_: None  # takes minutes, then loaded
        pipeline = reference.decoder_pipeline(folder).to(DEVICE)
        pipeline = pipeline.to(torch.float16) if half else pipeline
        modules = pipeline.decoder, pipeline.vqgan, pipeline.text_encoder
        encoded = (latents * 42 - 1).to(DEVICE, pipeline.decoder.dtype)

        def decode():
            generator = torch.Generator().manual_seed(3)
            return pipeline(
                encoded, "a bear", num_inference_steps=steps, generator=generator
            ).images[0]

    with torch.no_grad():
        for weight in (weight for module in modules for weight in module.parameters()):
            weight.sum()  # reads it from its file, so that this does not count
        reset(), torch.cuda.reset_peak_memory_stats() if half else None
        before = torch.cuda.memory_allocated() if half else resident("VmRSS")
        decode()
        peak = torch.cuda.max_memory_allocated() if half else resident("VmHWM")
        start = time.perf_counter()
        image = decode()
        seconds = time.perf_counter() - start
    pixels = image.resize((8, 8)).tobytes().hex()  # shows that both sides decode the same
    print(json.dumps({"memory": peak - before, "seconds": seconds, "pixels": pixels}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
