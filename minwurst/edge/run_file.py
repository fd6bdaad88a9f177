"""run.json: what another person needs to repeat a run. Never a token."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.base.ranks import world_size
from minwurst.base.settings import LoRASettings, public
from minwurst.edge import export
from minwurst.edge.files import read_json, reason, replacing

FILE = "run.json"
# The types of a setting's values in JSON, by its name.
KINDS = {
    field.name: (field.type, int, type(None)) if field.type is float else (field.type, type(None))
    for field in dataclasses.fields(LoRASettings)
}
PACKAGES = ("torch", "diffusers", "transformers", "datasets", "huggingface_hub", "safetensors")


def earlier(folder):
    """What run.json contains so far; {} if that can't be read, since training does not need it."""
    try:
        return read_json(folder / FILE)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        say(f"{folder / FILE} can't be read, and what it said of earlier starts is lost: {error}")
        return {}


def folder_of(path):
    """The output folder of the run whose folder, result or file this is; None if it is none."""
    if not path:
        return None
    path = Path(path)
    places = (path, path.parent) if path.is_file() or path.name == export.FOLDER else (path,)
    return next((folder for folder in places if (folder / FILE).is_file()), None)


def write(run):
    """Write a Run's run.json. Each start of the run adds an entry to `starts`."""
    file, settings = run.folder / FILE, public(run.settings)
    starts = run.earlier.get("starts")
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed_from": run.checkpoint.name if run.checkpoint else None,
        "device": f"{world_size()} × {device_name(run.device)}",
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }
    content = {
        "id": run.id,
        "settings": settings,
        "identity": run.identity,
        "published": publishable_names(settings, run.parts.prior_alone),
        "steps": max(run.last_step, run.step),
        "images": run.rows,
        "prediction_type": run.identity["prediction"],
        "starts": [*(starts if isinstance(starts, list) else ()), start],
    }
    replace(file, content)


def add(folder, **entries):
    """Add entries to a run's run.json. The next start of the run drops them."""
    replace(folder / FILE, {**earlier(folder), **entries})


def replace(file, content):
    text = json.dumps(content, indent=1, ensure_ascii=False)
    try:
        with replacing(file) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} was not written: {reason(error)}") from None


def read(folder):
    """The content of a run's run.json, with the steps of its result; UserError if there is none."""
    try:
        run = read_json(folder / FILE)
        found = {key: run[key] for key in ("settings", "identity", "published", "steps", "starts")}
        for key, part in (*found.items(), ("the last start", found["starts"][-1])):
            if key not in ("steps", "starts") and not isinstance(part, dict):
                raise TypeError(f"{key} is {part!r:.40}")
        for name, value in found["settings"].items():
            kinds = KINDS.get(name)
            if kinds and not isinstance(value, kinds):
                raise TypeError(f"{name} is {value!r:.40}")
        result = run["result"] if isinstance(run.get("result"), dict) else {}
        if "exported" in run:  # by minwurst.export, from a checkpoint
            found["steps"] = run["exported"]["steps"]
            is_lowest = found["steps"] == result.get("lowest_at_step")
            result = {"validation_loss": result["lowest_validation_loss"]} if is_lowest else {}
        found |= {"images": run.get("images"), "result": result}
        return {**found, "prediction_type": run.get("prediction_type", "epsilon")}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{folder} is not the --output_dir of a run: can't read its {FILE} ({error!r})."
        ) from None


def publishable_names(settings, prior_alone):
    """The Hub repositories that a card may name; local folders become None.

    Decided while the run has them: a name that is a folder here may be a repository elsewhere.
    """
    names = {
        "base": settings["pretrained_prior_model_name_or_path"],
        "decoder": settings["pretrained_decoder_model_name_or_path"],
        "data": settings["dataset_name"],
    }
    for part, name in names.items():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name or "") or Path(name).exists():
            names[part] = None
    return {**names, "prior_alone": prior_alone}


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_commit(folder):
    """The commit of the code in a folder, and whether it was changed; None outside a repository."""
    try:
        commit, changed = (
            subprocess.check_output(["git", "-C", folder, *words], stderr=subprocess.DEVNULL)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.decode().strip() + (" with changes" if changed.strip() else "")
