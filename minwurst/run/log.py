"""The log of a run: numbers and images to the console, to log.jsonl and to the trackers.

    log = open_log(run)
    log.step(step, loss, norm, learning_rate)

A further number is one line where it arises: `metrics.report` (step/metrics.py).
"""

import contextlib
import resource
import sys
import time

import torch

from minwurst.base import errors
from minwurst.base.console import progress, say
from minwurst.base.ranks import is_main
from minwurst.run import result
from minwurst.run.trackers import open_trackers
from minwurst.step import metrics


def open_log(run):
    """The Log of a Run, with the trackers that its settings name."""
    return Log(open_trackers(run), run)


class Log:
    """All ranks must call its methods.

    Every --logging_steps it has the loss, learning rate, gradient norm, images per second, memory,
    and whatever was reported to `metrics`. Means are over these steps and over ranks; they are
    summed on the device and read only when an entry is due. Trackers are a list, which may be
    empty, and one that fails is dropped.
    """

    def __init__(self, trackers, run):
        self.trackers, self.run = trackers, run
        self.steps, self.start = 0, time.perf_counter()  # since the last entry
        self.bar = progress(None, "steps", initial=run.step, total=run.last_step)
        self.last, self.is_first, self.is_open = run.step, True, True
        metrics.totals.clear()
        errors.leaving.append(self.summarize)

    def step(self, step, loss, norm, learning_rate):
        """loss: this rank's, of the step. norm: of the gradient, before clipping. Tensors."""
        metrics.report("loss", loss)
        self.steps, self.last = self.steps + 1, step
        self.bar.update(step - self.bar.n)  # some steps may be skipped
        if not self.run.is_due(step, self.run.settings.logging_steps):
            return
        now, means = time.perf_counter(), metrics.means()
        images = self.steps * self.run.layout.global_batch
        values = {
            "loss": means.pop("loss"),
            "learning_rate": learning_rate,
            "gradient_norm": norm.item(),
            "pictures_per_second": images / (now - self.start),
            "memory_gib": peak_memory(norm.device) / 2**30,
            **means,
        }
        self.scalars(step, values)
        quarters = [means.get(f"loss/{quarter}") for quarter in metrics.QUARTERS]
        quarters = " ".join("–" if value is None else f"{value:.3f}" for value in quarters)
        if self.is_first:
            say(f"In brackets: the loss for t in {', '.join(metrics.SHORT)} (0 clean, 1 noise).")
        self.is_first = False
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)
        others = [f"  {name} {value:.4g}" for name, value in means.items() if "/" not in name]
        say(
            f"step {step}/{self.run.last_step}  loss {values['loss']:.5f} ({quarters})  "
            f"lr {learning_rate:.2e}  gradient {values['gradient_norm']:.3f}  "
            f"{values['pictures_per_second']:.2f} images/s{''.join(others)}"
        )
        self.steps, self.start = 0, now

    @contextlib.contextmanager
    def paused(self):
        """Use as a context manager: what happens inside does not count as training."""
        start = time.perf_counter()
        with metrics.ignored():
            yield
        self.start += time.perf_counter() - start

    def scalars(self, step, values):
        """values: {name: number}."""
        self.send("scalars", step, values)

    def image(self, step, name, image):
        """image: RGB, PIL."""
        self.send("image", step, name, image)

    def send(self, method, *values):
        """Call a method of every tracker. One that fails is dropped, and training continues."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:  # a full disk or a server that is down must not stop a run
                self.trackers.remove(tracker)
                say(f"{type(tracker).__name__} failed and is dropped: {error}")

    def close(self):
        self.bar.close()
        self.send("close")
        self.summarize()

    def summarize(self):
        """Once, at the end or before an error ends the process: the result on the main rank."""
        if self.is_open and is_main():
            self.is_open = False
            unlogged = time.perf_counter() - self.start if self.steps else 0.0
            result.report(self.run, self.last, unlogged)


def peak_memory(device):
    """Bytes: the maximum of all tensors on a GPU so far, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
