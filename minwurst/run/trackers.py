"""Trackers: TensorBoard, Weights & Biases, and log.jsonl, which is always written."""

import contextlib
import importlib.util
import json

import numpy as np

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.base.ranks import is_main
from minwurst.base.settings import public
from minwurst.edge.files import replacing


class JsonLines:
    """`log.jsonl`: one line {"step": …, name: number, …} per entry.

    A resumed run drops the lines after its checkpoint, and a fresh one drops all.
    """

    def __init__(self, folder, first_step):
        file = folder / "log.jsonl"
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off by a kill
                if json.loads(line)["step"] < first_step:
                    kept.append(line + "\n")
        with replacing(file) as draft:
            draft.write_text("".join(kept), encoding="utf-8")
        self.file = open(file, "a", encoding="utf-8")  # noqa: SIM115

    def scalars(self, step, values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def image(self, step, name, image):
        pass

    def close(self):
        self.file.close()


class TensorBoard:
    """A resumed run hides the entries after its checkpoint. Each start shows its settings as text.

    Cards are sorted by name, so all but the losses are grouped as "training", after "loss".
    """

    LOSSES = ("loss", "validation_loss")

    def __init__(self, folder, first_step, settings=None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(folder, purge_step=first_step)
        if settings:
            rows = [f"| {name} | `{value}` |" for name, value in settings.items()]
            table = "\n".join(["| setting | value |", "|---|---|", *rows])
            self.writer.add_text("settings", table, max(0, first_step - 1))

    def scalars(self, step, values):
        for name, value in values.items():
            group = "" if name.split("/")[0] in self.LOSSES else "training/"
            self.writer.add_scalar(group + name, value, step)
        self.writer.flush()

    def image(self, step, name, image):
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A resumed run continues under the id it had."""

    def __init__(self, folder, project, run_id, settings):
        import wandb  # optional; Settings.check has made sure that it is installed

        self.wandb_image = wandb.Image
        self.run = wandb.init(
            project=project, dir=folder, id=run_id, resume="allow", config=settings
        )
        # wandb's own step counter only increases, and would drop what a resumed run logs again.
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step, values):
        self.run.log({**values, "step": step})

    def image(self, step, name, image):
        self.run.log({name: self.wandb_image(image), "step": step})

    def close(self):
        self.run.finish()


def check(report_to):
    """UserError if a tracker would ask for a login; better now than after loading the models."""
    if report_to not in ("wandb", "all") or not importlib.util.find_spec("wandb"):
        return
    import wandb

    try:
        logged_in = wandb.setup().settings.mode != "online" or wandb.login(prompt=False)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError, ValueError):
        logged_in = False
    except wandb.errors.Error as error:  # the server is down; the tracker will be dropped
        say(f"wandb: {error}")
        logged_in = True
    if not logged_in:
        raise UserError(
            f"--report_to {report_to}: no valid wandb login found. Run `wandb login`, or set "
            "WANDB_API_KEY, or set WANDB_MODE=offline to log to disk only."
        )


def open_trackers(run):
    """log.jsonl and the trackers that --report_to names, as a list; empty on ranks that do not log.

    "all" includes wandb if it is installed.
    """
    if not is_main():
        return []
    settings, report_to = run.settings, run.settings.report_to
    folder, first_step = run.folder / settings.logging_dir, run.step + 1 if run.checkpoint else 0
    trackers, wanted = [], [(JsonLines, folder, first_step)]
    if report_to in ("tensorboard", "all"):
        wanted.append((TensorBoard, folder, first_step, public(settings)))
    if report_to == "wandb" or report_to == "all" and importlib.util.find_spec("wandb"):
        project = settings.tracker_project_name
        wanted.append((WandB, folder, project, run.id, public(settings)))
    for kind, *options in wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)  # wandb would write to a temporary folder
            trackers.append(kind(*options))
        except Exception as error:  # a server that is down must not stop a run
            say(f"{kind.__name__} did not start and is dropped: {error}")
    return trackers
