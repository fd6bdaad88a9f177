"""Lines and progress bars on the console, from the main rank only."""

import contextlib
import math
import os
import sys

from tqdm import tqdm

from minwurst.base.ranks import is_main


class Outlived:
    """A stream whose end (a closed pipe or terminal, a full disk) does not end the program."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that lacks some of the characters
            encoding = self.stream.encoding
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self.drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.drop()

    def drop(self):
        """From now on, write to nowhere."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def outlive():
    """Let the program continue when nobody can read what it prints, from the start or any more."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file to be opened would receive what is printed
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, Outlived):
            setattr(sys, name, Outlived(stream))


def say(text):
    """Print one line above the progress bar."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()  # otherwise a log file stays empty for the next hundred lines


def progress(items, label, **options):
    """Iterate over the items with a progress bar, if the output is a terminal.

    There is no bar where nothing is left to do: where options say that total is initial or less.
    """
    done = options.get("total", math.inf) <= options.get("initial", 0)
    return tqdm(items, label, disable=True if done or not is_main() else None, **options)


def gib(count):
    """Format bytes: 12345678 → "11.8 MiB", 12345678901 → "11.50 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
