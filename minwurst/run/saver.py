"""Saving in a thread, while training continues from where it is.

    saver = Saver()
    saver.save(folder, step, groups, progress, *kept)    # returns once everything is copied
    saver.wait()                                         # until it is on disk; raises its error

One save is in flight at most; the next one waits for it. What the thread writes is a copy in this
machine's memory. If that is too small, the save happens in step. An error in the thread becomes a
pending signal, so that all ranks hear of it in the next step and stop. No process may be forked
while the thread runs, so whoever starts data-loading workers waits first.
"""

import contextlib
import threading
from pathlib import Path

from minwurst.base import errors
from minwurst.base.console import gib, say
from minwurst.base.errors import UserError
from minwurst.run import checkpoint
from minwurst.step import signals


class Saver:
    """Of the main rank; other ranks have one that is never used."""

    def __init__(self):
        self.thread, self.error = None, None
        errors.leaving.append(self.join)

    def save(self, folder, step, groups, progress, *kept):
        """Copy the groups and write them as checkpoint.save does, in a thread."""
        self.wait()
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        free = available_memory()
        if free is not None and size > 0.8 * free:
            say(f"--async_checkpointing: {gib(size)} to copy, {gib(free)} free; saving in step.")
            return checkpoint.save(folder, step, groups, progress, *kept)
        copies = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        self.thread = threading.Thread(
            target=self.write, args=(folder, step, copies, progress, *kept), name="saver"
        )
        self.thread.start()

    def write(self, *arguments):
        try:
            checkpoint.save(*arguments)
        except Exception as error:  # raised by `wait`
            self.error = error
            signals.received.add(signals.FAILURE)

    def join(self):
        if self.thread:
            self.thread.join()

    def wait(self):
        """Until the save in flight, if any, is on disk; UserError if it failed."""
        self.join()
        self.thread = None
        if self.error and isinstance(self.error, UserError):
            raise self.error
        if self.error:
            raise RuntimeError("saving failed") from self.error


def available_memory(root="/"):
    """Bytes that this machine or its container (cgroup v2) can still give, or None if unknown."""
    free = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in read(root, "proc/meminfo").splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is no number
        limit, used = (int(read(root, f"sys/fs/cgroup/memory.{n}")) for n in ("max", "current"))
        lines = dict(line.split() for line in read(root, "sys/fs/cgroup/memory.stat").splitlines())
        free.append(limit - used + int(lines["inactive_file"]))
    return min(free, default=None)


def read(root, name):
    return (Path(root) / name).read_text(encoding="ascii")
