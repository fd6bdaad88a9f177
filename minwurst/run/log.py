"""The log of a run: numbers and images to the console and the trackers.

    log = open_log(run)
    log.step(step, loss, norm, learning_rate)
"""

import contextlib
import resource
import sys
import time

import torch

from minwurst.base.console import progress, say
from minwurst.base.settings import public
from minwurst.run.trackers import open_trackers
from minwurst.step import distributed


def open_log(run):
    """The Log of a Run, with the trackers that its settings name."""
    settings, folder = run.settings, run.folder / run.settings.logging_dir
    trackers = open_trackers(
        settings.report_to, folder, run.steps.start, settings.tracker_project_name, run.id,
        public(settings),
    )  # fmt: skip
    return Log(trackers, settings.logging_steps, run.steps, run.layout.global_batch)


class Log:
    """All ranks must call its methods.

    Every --logging_steps it has the loss, learning rate, gradient norm, images per second and
    memory. The loss is the mean over these steps and over ranks; it is summed on the device and
    read only when it is due. Trackers are a list, which may be empty, and one that fails is
    dropped.
    """

    def __init__(self, trackers, every, steps, global_batch):
        """every: steps between entries. steps: the range to run. global_batch: images per step."""
        self.trackers, self.every = trackers, every
        self.last_step, self.global_batch = steps.stop - 1, global_batch
        self.loss, self.last_entry, self.start = 0.0, steps.start - 1, time.perf_counter()
        self.bar = progress(None, "steps", initial=self.last_entry, total=self.last_step)

    def step(self, step, loss, norm, learning_rate):
        """loss: this rank's, of the step. norm: of the gradient, before clipping. Tensors."""
        self.loss = self.loss + loss
        self.bar.update()
        if step % self.every and step != self.last_step:
            return
        steps, now = step - self.last_entry, time.perf_counter()
        values = {
            "loss": distributed.mean(self.loss / steps),
            "learning_rate": learning_rate,
            "gradient_norm": norm.item(),
            "pictures_per_second": steps * self.global_batch / (now - self.start),
            "memory_gib": peak_memory(norm.device) / 2**30,
        }
        self.scalars(step, values)
        say(
            f"step {step}/{self.last_step}  loss {values['loss']:.5f}  lr {learning_rate:.2e}  "
            f"gradient {values['gradient_norm']:.3f}  "
            f"{values['pictures_per_second']:.2f} images/s"
        )
        self.loss, self.last_entry, self.start = 0.0, step, now

    @contextlib.contextmanager
    def paused(self):
        """Use as a context manager: time spent inside does not count as training."""
        start = time.perf_counter()
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


def peak_memory(device):
    """Bytes: the maximum of all tensors on a GPU so far, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
