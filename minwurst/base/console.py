"""Lines and progress bars on the console, from the main rank only."""

import sys

from tqdm import tqdm

from minwurst.base.ranks import is_main


def say(text):
    """Print one line above the progress bar."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()  # otherwise a log file stays empty for the next hundred lines


def progress(items, label, **options):
    """Iterate over the items with a progress bar, if the output is a terminal."""
    return tqdm(items, label, disable=None if is_main() else True, **options)


def gib(count):
    """Format bytes: 12345678 → "11.8 MiB", 12345678901 → "11.50 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
