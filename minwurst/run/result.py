"""The result of a run in a few lines, in its run.json, and as curves.png; all from log.jsonl.

    report(run, step, unlogged)        # at its end, also after a signal or an error
    draw(run)                          # curves.png alone, after each validation

log.jsonl covers all starts of a run, so a resumed run's result is that of the whole.
"""

import contextlib
import datetime
import json
import math

from minwurst.base.console import say
from minwurst.edge import run_file
from minwurst.edge.curves import picture
from minwurst.edge.files import replacing
from minwurst.run import checkpoint
from minwurst.step.metrics import QUARTERS

CURVES = "curves.png"
POINTS = 200  # of a curve at most; more are averaged in groups


def report(run, step, unlogged):
    """Print a Run's result, add it to run.json and draw curves.png; an error is one line.

    step: the last one taken. unlogged: seconds of training since the last entry of the log.
    """
    try:
        found = summary(run, read_log(run), step, unlogged)
        for line in lines(run, found):
            say(line)
        run_file.add(run.folder, result=found)
        if draw(run):
            say(f"curves: {run.folder / CURVES}")
    except Exception as error:  # the result is written in any case
        say(f"no summary of the run: {type(error).__name__}: {error}")


def read_log(run):
    """The entries of log.jsonl, in order; of those with the same step and names, the last."""
    file, entries = run.folder / run.settings.logging_dir / "log.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off by a full disk
            entry = json.loads(line)
            entries[entry["step"], "loss" in entry] = entry
    return sorted(entries.values(), key=lambda entry: entry["step"])


def summary(run, entries, step, unlogged):
    """A dict for run.json. Of each step, the time is that of the entry that it belongs to.

    So it is the time of training: without loading, validation, and steps that a kill undid.
    """
    trained = [entry for entry in entries if "loss" in entry]
    held_out = {e["step"]: e["validation_loss"] for e in entries if "validation_loss" in e}
    seconds, before, images = unlogged, 0, run.layout.global_batch
    for entry in trained:
        steps = sum(n not in run.skipped for n in range(before + 1, entry["step"] + 1))
        seconds += steps * images / entry["pictures_per_second"]
        before = entry["step"]
    count = sum(n not in run.skipped for n in range(1, step + 1))
    found = {"steps": count, "training_seconds": round(seconds, 1)}
    if seconds:
        found["images_per_second"] = round(count * images / seconds, 2)
    if trained:
        found["loss"] = trained[-1]["loss"]
    if held_out:
        found["validation_loss"] = held_out[max(held_out)]
        lowest = min(held_out, key=lambda n: (math.isnan(held_out[n]), held_out[n], n))
        found["lowest_validation_loss"] = held_out[lowest]
        found["lowest_at_step"] = lowest
    if best := checkpoint.best(run.folder)[0]:
        found["best_checkpoint"] = best.name
    return found


def lines(run, found):
    """What is printed of a summary, without curves.png."""
    time = datetime.timedelta(seconds=round(found["training_seconds"]))
    pace = f", {found['images_per_second']:.2f} images/s" if "images_per_second" in found else ""
    loss = f"; loss {found['loss']:.5f} at the end" if "loss" in found else ""
    steps = f"{found['steps']} step{'s' * (found['steps'] != 1)}"
    yield f"trained {steps} in {time} (without validation){pace}{loss}"
    if "validation_loss" in found:
        step, best = found["lowest_at_step"], found.get("best_checkpoint")
        yield (
            f"held-out loss {found['validation_loss']:.5f} at the end, lowest "
            f"{found['lowest_validation_loss']:.5f} at {f'step {step}' if step else 'the start'}"
            + f"; best checkpoint: {best}" * bool(best)
        )


def draw(run):
    """Write curves.png from log.jsonl. Returns whether there was anything to draw."""
    entries = read_log(run)

    def line(name):
        known = [entry for entry in entries if math.isfinite(entry.get(name, math.inf))]
        return thinned([(entry["step"], entry[name]) for entry in known])

    wanted = [
        ("loss", {"training": line("loss"), "held-out": line("validation_loss")}),
        ("held-out loss by quarter of t", {
            name.removeprefix("t_").replace("_", " to "): line(f"validation_loss/{name}")
            for name in QUARTERS
        }),
        ("learning rate", {"": line("learning_rate")}),
    ]  # fmt: skip
    panels = []
    for title, named in wanted:
        if known := {name: points for name, points in named.items() if points}:
            panels.append((title, known))
    if panels:
        with replacing(run.folder / CURVES, flushed=False) as draft:
            picture(panels, "step").save(draft, "PNG")
    return bool(panels)


def thinned(points):
    """The means of groups of consecutive points, so that there are at most POINTS."""
    size = -(-len(points) // POINTS) or 1
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [tuple(sum(v) / len(group) for v in zip(*group, strict=True)) for group in groups]
