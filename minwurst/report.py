"""What a run says: console, progress bar, trackers, run.json. Only the main rank speaks.

    log = Log(trackers, every=10, steps=range(1, 101), global_batch=16)
    log.step(step, loss, norm, learning_rate)

Trackers are a list, which may be empty, so the loop has no branch. One that fails leaves the list.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import resource
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minwurst import dist
from minwurst.config import UserError


def say(text):
    """One line on the console, from the main rank, above the progress bar."""
    if dist.is_main():
        tqdm.write(text)
        sys.stdout.flush()  # or a log file shows nothing for the next hundred lines


def progress(items, label, **options):
    """The items, with a bar on a terminal; None switches it off where there is none."""
    return tqdm(items, label, disable=None if dist.is_main() else True, **options)


class TensorBoard:
    """Scalars and pictures to TensorBoard; a resumed run hides what came after its checkpoint."""

    def __init__(self, folder, first_step):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

        self.writer = SummaryWriter(folder, purge_step=first_step)

    def scalars(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step, name, picture):
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """The same to Weights & Biases; a resumed run goes on under the id it had."""

    def __init__(self, folder, project, run_id, settings):
        import wandb  # optional: Settings.check has seen that it is there

        self.image = wandb.Image
        self.run = wandb.init(
            project=project, dir=folder, id=run_id, resume="allow", config=settings
        )
        # Its own counter only goes up, and would drop what a resumed run logs again.
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step, values):
        self.run.log({**values, "step": step})

    def picture(self, step, name, picture):
        self.run.log({name: self.image(picture), "step": step})

    def close(self):
        self.run.finish()


def check_trackers(report_to):
    """UserError where a tracker would ask for a login; better now than after an hour's loading."""
    if report_to not in ("wandb", "all") or not importlib.util.find_spec("wandb"):
        return
    import wandb

    try:
        known = wandb.setup().settings.mode != "online" or wandb.login(prompt=False)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError, ValueError):
        known = False
    except wandb.errors.Error as error:  # a server that is down; the tracker will be left out
        say(f"wandb: {error}")
        known = True
    if not known:
        raise UserError(
            f"--report_to {report_to}: wandb knows no login that holds. Run `wandb login`, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline to log to the disk alone."
        )


def make_trackers(report_to, folder, first_step, project, run):
    """What --report_to names, as a list; on ranks that do not log, an empty one.

    folder: where they write. run: what `write_run` gave. "all" takes wandb where it is installed.
    """
    if not dist.is_main() or report_to == "none":
        return []
    folder.mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary one
    trackers, wanted = [], []
    if report_to in ("tensorboard", "all"):
        wanted.append((TensorBoard, folder, first_step))
    if report_to == "wandb" or report_to == "all" and importlib.util.find_spec("wandb"):
        wanted.append((WandB, folder, project, run["id"], run["settings"]))
    for kind, *options in wanted:
        try:
            trackers.append(kind(*options))
        except Exception as error:  # a server that is down is not worth a run
            say(f"{kind.__name__} did not start and is left out: {error}")
    return trackers


class Log:
    """Numbers and pictures to the console and the trackers. All ranks must call its methods.

    Every --logging_steps it has the loss, learning rate, gradient norm, pictures per second and
    memory. The loss is the mean over these steps and over ranks; it is summed on the device and
    read only when it is due.
    """

    def __init__(self, trackers, *, every, steps, global_batch):
        """steps: the range to come. global_batch: pictures a step."""
        self.trackers = trackers
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
            "memory_gib": peak_memory(norm.device) / 2**30,
        }
        self.scalars(step, values)
        say(
            f"step {step}/{self.last_step}  loss {values['loss']:.5f}  lr {learning_rate:.2e}  "
            f"gradient {values['gradient_norm']:.3f}  "
            f"{values['pictures_per_second']:.2f} pictures/s"
        )
        self.loss, self.written, self.then = 0.0, step, now

    @contextlib.contextmanager
    def paused(self):
        """What is done within the context does not count as training time."""
        start = time.perf_counter()
        yield
        self.then += time.perf_counter() - start

    def scalars(self, step, values):
        self.send("scalars", step, values)

    def picture(self, step, name, picture):
        """picture: a PIL one, RGB."""
        self.send("picture", step, name, picture)

    def send(self, what, *values):
        """To every tracker; one that fails is left out from then on, and training goes on."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, what)(*values)
            except Exception as error:  # a full disk, a server that is down: none is worth a run
                self.trackers.remove(tracker)
                say(f"{type(tracker).__name__} failed and is left out from here on: {error}")

    def close(self):
        self.bar.close()
        self.send("close")


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU so far, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


PACKAGES = ("torch", "diffusers", "transformers", "datasets", "huggingface_hub", "safetensors")


def write_run(file, settings, identity, published, steps, device, resumed):
    """Write run.json, what another person needs to repeat the run, and return what is in it.

    settings: as `config.public` gives them, hence without a token. identity: what makes it this
    run. published: as `hub.published` gives it. steps: in all. A resumed run keeps its id and adds
    a line to its starts.
    """
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if resumed else {}
    except (OSError, ValueError):  # of no use any more, and nothing that training needs
        known = {}
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed_from": resumed.name if resumed else None,
        "device": f"{dist.world_size()} × {device_name(device)}",
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }
    run = {
        "id": known.get("id") or secrets.token_hex(4),
        "settings": settings,
        "identity": identity,
        "published": published,
        "steps": steps,
        "starts": [*known.get("starts", []), start],
    }
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(file)
    return run


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_commit(folder):
    """The commit of the code in a folder, and whether it was changed; None where there is none."""
    try:
        commit, changed = (
            subprocess.check_output(["git", "-C", folder, *words], stderr=subprocess.DEVNULL)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.decode().strip() + (" with changes" if changed.strip() else "")


def opening(settings, device, world, resumed):
    """What this run is, and what is to be known of it before it starts."""
    where = f"{world} × {device.type}" if world > 1 else device.type
    say(f"minwurst on {where}, precision {settings.mixed_precision}, seed {settings.seed}")
    if device.type == "cpu":
        say("No GPU here: training on the CPU, which for the published prior is for trying only.")
    if resumed:
        say(f"going on from {resumed}")


def closing(result, pictures, log_folder, settings):
    """Where everything is, and how to draw more. pictures: a file that may be there."""
    say(f"done: {result} holds what was trained")
    if pictures.is_file():
        say(f"pictures before and after: {pictures}")
    if settings.report_to in ("tensorboard", "all"):
        say(f"the log: tensorboard --logdir {log_folder}")
    kind, prompts = "lora" if result.is_file() else "prior", settings.validation_prompts
    words = ["--prompt", (prompts or ["a bear"])[0], f"--{kind}", str(result.parent)]
    say(f"draw more: python -m minwurst.sample {shlex.join(words)}")
