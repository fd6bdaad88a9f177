"""Write the tour as one web page.

    python -m minwurst.tour [--output runs/tour] [--full]
"""

import argparse
import sys
import time
from pathlib import Path

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.tour import page, panels, sampling, training
from minwurst.tour.bench import Bench


def make(output, full=False, only=None):
    """Perform the panels and write output/tour.html. full: also those that train."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    bench, results = Bench(output / "runs"), {}
    for panel in (*sampling.PANELS, *training.PANELS):
        trains = panel in training.PANELS
        if only and panel.__name__ not in only:
            continue
        if trains and not full:
            results[panel] = panels.load(panel.__name__)
            continue
        start = time.perf_counter()
        results[panel] = panels.perform(panel, bench)
        say(f"{panel.__name__}: {time.perf_counter() - start:.0f} s")
        if trains:
            panels.save(results[panel], panel.__name__)
    file = output / "tour.html"
    file.write_text(page.page(results), encoding="utf-8")
    say(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return file


def main():
    parser = argparse.ArgumentParser(prog="python -m minwurst.tour", description=__doc__)
    parser.add_argument("--output", default="runs/tour", help="folder of the page (runs/tour)")
    parser.add_argument("--full", action="store_true", help="also perform the panels that train")
    names = [panel.__name__ for panel in (*sampling.PANELS, *training.PANELS)]
    parser.add_argument("--only", nargs="+", choices=names, help="perform some panels only")
    given = parser.parse_args()
    make(given.output, given.full, given.only)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"minwurst.tour: {error}")
