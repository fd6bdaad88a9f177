"""What a run says: the console, TensorBoard, a progress bar. Only the main rank speaks.

    log = Log("tensorboard", folder, every=10, steps=range(1, 101), global_batch=16)
    log.step(step, loss, norm, learning_rate)

A tracker that is off is an object of the same shape that does nothing, so the loop has no branch.
"""

import sys
import time

from tqdm import tqdm

from minwurst import dist


def say(text):
    """One line on the console, from the main rank, above the progress bar."""
    if dist.is_main():
        tqdm.write(text)
        sys.stdout.flush()  # or a log file shows nothing for the next hundred lines


def progress(items, label, **options):
    """The items, with a bar on a terminal; None switches it off where there is none."""
    return tqdm(items, label, disable=None if dist.is_main() else True, **options)


class NullTracker:
    """Takes what a tracker takes and drops it."""

    def scalars(self, step, values):
        pass

    def close(self):
        pass


class TensorBoardTracker:
    """Scalars to TensorBoard; a resumed run hides what was logged after its checkpoint."""

    def __init__(self, folder, first_step):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

        self.writer = SummaryWriter(folder, purge_step=first_step)

    def scalars(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


def make_tracker(report_to, folder, first_step):
    """The tracker that --report_to names, on the main rank; elsewhere one that does nothing."""
    if report_to == "none" or not dist.is_main():
        return NullTracker()
    return TensorBoardTracker(folder, first_step)


class Log:
    """The loss, learning rate, gradient norm and pictures per second, every --logging_steps.

    The loss is the mean over these steps and over ranks; it is summed on the device and read only
    when it is due. All ranks must call `step`.
    """

    def __init__(self, report_to, folder, *, every, steps, global_batch):
        """folder: TensorBoard's. steps: the range to come. global_batch: pictures a step."""
        self.tracker = make_tracker(report_to, folder, steps.start)
        self.every, self.last_step, self.global_batch = every, steps.stop - 1, global_batch
        self.loss, self.written, self.then = 0.0, steps.start - 1, time.perf_counter()
        self.bar = progress(None, "steps", initial=self.written, total=self.last_step)

    def step(self, step, loss, norm, learning_rate):
        """loss: this rank's mean over the step. norm: the gradients', before clipping. Tensors."""
        self.loss = self.loss + loss
        self.bar.update()
        if step % self.every and step != self.last_step:
            return
        steps, now = step - self.written, time.perf_counter()
        values = {
            "loss": dist.mean(self.loss / steps),
            "learning_rate": learning_rate,
            "gradient_norm": norm.item(),
            "pictures_per_second": steps * self.global_batch / (now - self.then),
        }
        self.tracker.scalars(step, values)
        say(
            f"step {step}/{self.last_step}  loss {values['loss']:.5f}  lr {learning_rate:.2e}  "
            f"gradient {values['gradient_norm']:.3f}  "
            f"{values['pictures_per_second']:.2f} pictures/s"
        )
        self.loss, self.written, self.then = 0.0, step, now

    def close(self):
        self.bar.close()
        self.tracker.close()


def opening(settings, device, world, resumed):
    """What this run is, and in one line each what it asks for that is not to be had here."""
    where = f"{world} × {device.type}" if world > 1 else device.type
    say(f"minwurst on {where}, precision {settings.mixed_precision}, seed {settings.seed}")
    if device.type == "cpu":
        say("No GPU here: training on the CPU, which for the published prior is for trying only.")
    if settings.report_to in ("wandb", "all"):
        say("--report_to wandb: not available yet, the log goes to TensorBoard and the console.")
    if settings.validation_prompts:
        say("--validation_prompts: not available yet, no pictures are drawn.")
    if settings.push_to_hub:
        say("--push_to_hub: not available yet, the result stays in --output_dir.")
    if resumed:
        say(f"going on from {resumed}")


def closing(result, log_folder, report_to):
    """Where everything is."""
    say(f"done: {result} holds what was trained")
    if report_to != "none":
        say(f"the log: tensorboard --logdir {log_folder}")
