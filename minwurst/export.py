"""Write the result of a run from one of its checkpoints: the best on held-out rows, or the newest.

    python -m minwurst.export runs/demo
    python -m minwurst.export runs/demo --checkpoint checkpoint-80 --output runs/demo-80

The result is what the run itself would have written at that step: prior_pipeline/ or the LoRA file,
with averaged weights if the run has them. It needs the run's models, and no data.
"""

import dataclasses
import math
from pathlib import Path

import torch

from minwurst.base.errors import UserError, one_line
from minwurst.base.parser import Parser
from minwurst.base.settings import LoRASettings, Settings
from minwurst.edge import export, files, lora_file, models, run_file
from minwurst.run import checkpoint
from minwurst.run.state import check_fit, copy_into
from minwurst.step.adapter import add_adapters


def choose(folder, wanted):
    """A checkpoint of a run's folder, verified. wanted: its name or path; None: the best by its
    held-out loss, or the newest if none has one.
    """
    if wanted is None:
        found = checkpoint.best(folder)[0] or next(reversed(checkpoint.list_all(folder)), None)
        if not found:
            raise UserError(f"{folder}: there is no checkpoint.")
    else:
        found = folder / Path(wanted).name
        if not found.is_dir():
            raise UserError(f"--checkpoint {wanted}: no such folder in {folder}.")
    if wrong := checkpoint.damage(found):
        raise UserError(f"--checkpoint {found.name}: {wrong}.")
    return found


def settings_of(run):
    """The settings that a run was made with, without what only validation needs."""
    kind = LoRASettings if "rank" in run["settings"] else Settings
    names = {field.name for field in dataclasses.fields(kind)}
    known = {name: value for name, value in run["settings"].items() if name in names}
    return kind(**{**known, "validation_prompts": None})


def rebuild(settings, tensors, seed):
    """(prior with a checkpoint's weights, averaged if it has averages; models.Parts)."""
    parts = models.find(settings)
    if isinstance(settings, LoRASettings):
        prior = models.load_prior(parts.prior)
        trained = add_adapters(prior, **settings.adapter_options())
    else:
        prior = models.initial_prior(parts, seed)
        trained = dict(prior.named_parameters())
    group = "ema" if "ema" in tensors else "weights"
    check_fit(group, tensors[group], trained, every=True)
    copy_into(trained, tensors[group])
    return prior, parts


@torch.no_grad()
def write(folder, wanted, output=None):
    """Write a run's result from a checkpoint. Returns (its path, the checkpoint)."""
    run = run_file.read(folder)
    if not output:
        files.lock(folder)  # a run that is still training would replace the result
    found, settings = choose(folder, wanted), settings_of(run)
    tensors, progress = checkpoint.load(found)
    prior, parts = rebuild(settings, tensors, progress["seed"])
    name = lora_file.FILE if isinstance(settings, LoRASettings) else export.FOLDER
    target = files.make_folder(output or folder, "output") / name
    if isinstance(settings, LoRASettings):
        lora_file.save(prior, target)
    else:
        export.save_pipeline(prior, target, parts.text, settings.said())
    if not output:
        exported = {"checkpoint": found.name, "steps": progress["step"]}
        run_file.add(folder, exported=exported)
    return target, found


def main():
    parser = Parser(prog="python -m minwurst.export")
    parser.add_argument("folder", type=Path, help="the --output_dir of a run")
    parser.add_argument(
        "--checkpoint",
        help="its name, such as checkpoint-500; by default the one with the lowest held-out loss, "
        "or the newest if none has such a loss",
    )
    parser.add_argument(
        "--output", type=Path,
        help="folder for the result; by default the run's own, whose result is replaced",
    )  # fmt: skip
    given = parser.parse_args()
    with one_line("minwurst.export"):
        target, found = write(given.folder, given.checkpoint, given.output)
        loss = checkpoint.held_out(found)
        print(f"{target}: {found.name}" + f", held-out loss {loss:.5f}" * (loss < math.inf))


if __name__ == "__main__":
    main()
