"""What fits on which GPU: the largest batch at 768 pixels, estimated.

    python -m minwurst.cost
    python -m minwurst.cost --roofline H100         # what bounds a step, by arithmetic

A tenth of each card is left free for what run/estimate.py does not include.
"""

import functools

import torch

from minwurst.base.console import gib
from minwurst.base.errors import one_line
from minwurst.base.parser import Parser
from minwurst.edge.decoders import size_of
from minwurst.run import roofline
from minwurst.run.estimate import activations, memory
from minwurst.step.adapter import add_adapters
from minwurst.step.image_encoder import EfficientNetEncoder
from minwurst.step.prior import PUBLISHED, WuerstchenPrior

TEXT_ENCODER = 2 * 694_659_840  # bytes of CLIP ViT-bigG's text tower in half precision
CARDS = (16, 24, 48, 80)  # GB
COMMANDS = (
    "train.py",
    "train.py --gradient_checkpointing",
    "train.py --gradient_checkpointing --use_ema",
    "train.py --gradient_checkpointing --use_8bit_adam",
    "lora.py --rank=4",
    "lora.py --rank=4 --gradient_checkpointing",
)


def main():
    parser = Parser(prog="python -m minwurst.cost")
    parser.add_argument(
        "--roofline", choices=roofline.CARDS, nargs="?", const="H100", metavar="CARD",
        help="instead, count a step's work against a card's stated peak and bandwidth: "
        + ", ".join(roofline.CARDS) + " (default H100)",
    )  # fmt: skip
    given = parser.parse_args()
    torch.backends.cuda.enable_flash_sdp(True)  # as on a GPU; training on a CPU turns it off
    with one_line("minwurst.cost"):
        if given.roofline:
            print("\n".join(roofline.table(given.roofline)))
        else:
            memory_table()


def memory_table():
    with torch.device("meta"):
        total = sum(weight.numel() for weight in WuerstchenPrior(**PUBLISHED).parameters())
        image_encoder = size_of(EfficientNetEncoder())
        adapt = functools.partial(add_adapters, rank=4, alpha=4, targets=["attention"])
        adapters = sum(weight.numel() for weight in adapt(WuerstchenPrior(**PUBLISHED)).values())
    print("| with --mixed_precision=bf16 | batch 1 |", *(f"{card} GB |" for card in CARDS))
    print("|---|---|" + "---|" * len(CARDS))
    for command in COMMANDS:
        full = command.startswith("train.py")
        common = {
            "compute_type": torch.bfloat16,
            "gradient_checkpointing": "--gradient_checkpointing" in command,
        }
        one, two = (
            activations(PUBLISHED, batch=b, shape=(24, 24), adapt=None if full else adapt, **common)
            for b in (1, 2)
        )
        needs = memory(
            total if full else total + adapters, total if full else adapters, **common,
            use_8bit_adam="8bit" in command, use_ema="ema" in command,
            encoders=TEXT_ENCODER + image_encoder, activations=one,
        )  # fmt: skip
        first = sum(needs.values())
        largest = [int((0.9 * card * 1e9 - first) // (two - one)) + 1 for card in CARDS]
        cells = [f"batch {batch} |" if batch > 0 else "– |" for batch in largest]
        print(f"| `{command}` | {gib(first)} |", *cells)


if __name__ == "__main__":
    main()
