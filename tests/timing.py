"""Timing in turns, and the rows of the benchmark's table.

Both sides alternate, so that other load on the machine affects both. Times are medians over rounds;
ratios are medians of the per-round ratios, with the lowest and the highest.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORK = Path("runs/benchmark")


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(sides, rounds):
    """Seconds per round of each function in `sides`, by name. A first warm-up round is dropped."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(sides):
            wait()
            start = time.perf_counter()
            sides[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def duration(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def row(what, theirs, ours):
    """Print a table row from the seconds per round of both sides."""
    ratios = [one / two for one, two in zip(theirs, ours, strict=True)]
    medians = [duration(statistics.median(found)) for found in (theirs, ours)]
    spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
    print(f"| {what} | {medians[0]} | {medians[1]} | {statistics.median(ratios):.2f} | {spread} |")
    sys.stdout.flush()


def seconds(what, theirs, ours):
    """Print a table row of both sides' times, which are of different work: no ratio."""
    print(f"| {what} | {duration(theirs)} | {duration(ours)} | | |", flush=True)


def note(what, text):
    print(f"| {what} | | {text} | | |", flush=True)
