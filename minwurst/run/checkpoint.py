"""Checkpoints: folders `checkpoint-{step}` that are complete or absent.

    save(output_dir, step, {"weights": {...}, "optimizer": {...}}, progress, keep=3)
    folder = find("latest", output_dir)
    tensors, progress = load(folder)

A checkpoint has one safetensors file per group of tensors, a state.json, and a manifest with the
size and SHA-256 of each. It is written under a temporary name, flushed to disk and renamed; only
then are older ones deleted. A kill at any moment leaves the newest complete checkpoint in place,
and an incomplete one is never used. No pickle is written or read. A held_out.json is added when
the checkpoint's step has been validated; the one with the lowest held-out loss is `best`.
"""

import json
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.edge.files import describe, not_finite, read_json, reason, remove, replacing
from minwurst.run.tensor_file import write_tensors

NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY = re.compile(r"\.checkpoint-\d+\.(part|old)")  # being written or deleted
MANIFEST, HELD_OUT = "manifest.json", "held_out.json"


def save(output_dir, step, groups, progress, keep=None, keep_best=False):
    """Write `checkpoint-{step}` and keep the newest `keep` (None: all), and on request the best.

    groups: {"weights": {name: tensor}, …}, one file each; empty groups are skipped. progress: what
    JSON can hold. An older checkpoint of the same step is replaced. UserError if a number is not
    finite, or the disk is full; nothing is written then, and no older checkpoint is deleted.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    groups = {group: tensors for group, tensors in groups.items() if tensors}
    for group, tensors in groups.items():
        check_finite(group, tensors)
    try:
        with replacing(folder) as draft, ThreadPoolExecutor() as pool:
            draft.mkdir()
            written = [
                pool.submit(write_tensors, draft / f"{group}.safetensors", tensors)
                for group, tensors in groups.items()
            ]
            manifest = dict(part.result() for part in written)
            progress = {**progress, "groups": list(groups)}
            (draft / "state.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
            manifest["state.json"] = describe(draft / "state.json")
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        raise UserError(
            f"{folder} was not written: {reason(error)} It needs {size:,} bytes; earlier "
            "checkpoints are intact, and --resume_from_checkpoint=latest resumes from them."
        ) from None
    rotate(output_dir, keep, keep_best)


def check_finite(group, tensors):
    """UserError names a tensor that has a number that is not finite, which must not be saved."""
    if name := not_finite(tensors):
        raise UserError(
            f"{name} is not finite ({group}), so training has failed and nothing was saved. Lower "
            "--learning_rate, or raise --adam_epsilon, and resume from an earlier checkpoint."
        )


def rotate(output_dir, keep, keep_best=False):
    """Delete all but the newest `keep` checkpoints (None: keep all), and on request the best."""
    spared = best(output_dir)[0] if keep_best else None
    for old in list_all(output_dir)[:-keep] if keep else []:
        if old == spared:
            continue
        try:
            delete(old)
        except OSError as error:  # a full disk later is better than a stop now
            say(f"{old.name} could not be deleted: {error}")


def read_progress(folder):
    """A checkpoint's state.json: the last step, the seed, what makes it this run, numbers."""
    return read_json(Path(folder) / "state.json")


def impossible(folder, progress, identity):
    """The first entry of a state.json that no run can have written (it was edited), or None.

    identity: the names that the entry of this name has at least.
    """

    def whole(number, least, most=float("inf")):
        return type(number) is int and least <= number <= most

    def whole_numbers(found):
        return found is None or isinstance(found, list) and all(whole(n, 0) for n in found)

    step, seed, updates = (progress.get(name) for name in ("step", "seed", "updates"))
    settings, known = progress.get("settings"), progress.get("identity")
    scaler = progress.get("scaler", {})
    good = {
        "step": whole(step, 1) and step_of(Path(folder)) in (None, step),
        "seed": whole(seed, 0),
        "updates": whole(step, 1) and whole(updates, 0, step),
        "settings": isinstance(settings, dict) and bool(settings)
        and all(whole_numbers(settings.get(name)) for name in ("skip_steps", "skip_rows")),
        "identity": isinstance(known, dict) and identity <= known.keys(),
        "defaults": isinstance(progress.get("defaults", {}), dict),
        "scaler": isinstance(scaler, dict)
        and all(type(n) in (int, float) and 0 <= n < float("inf") for n in scaler.values()),
    }
    return next((name for name in good if not good[name]), None)


def load(folder):
    """What `save` was given: ({"weights": {name: tensor}, …}, progress), on the CPU."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
        names = sorted(name for name in manifest if name.endswith(".safetensors"))
        groups = {Path(name).stem: load_file(folder / name) for name in names}
        return groups, read_progress(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--resume_from_checkpoint: {folder} can't be read: {error}.") from None


def step_of(folder):
    """The step in a checkpoint folder's name; None for any other folder."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_all(output_dir):
    """The checkpoint folders, oldest first. Everything else in output_dir is left alone."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in folders if step_of(path) is not None), key=step_of)


def record_held_out(output_dir, step, loss):
    """Write the held-out loss of a step into its checkpoint, if there is one.

    There it can't disagree with the checkpoint: both are renamed, replaced and deleted together.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    if folder.is_dir():
        with replacing(folder / HELD_OUT) as draft:
            draft.write_text(json.dumps({"validation_loss": loss}) + "\n", encoding="utf-8")


def held_out(folder):
    """The held-out loss recorded in a checkpoint; inf without one, or if it can't be read."""
    try:
        loss = float(read_json(folder / HELD_OUT)["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return math.inf if math.isnan(loss) else loss


def best(output_dir):
    """(checkpoint with the lowest held-out loss, that loss); (None, inf) if none was validated."""
    losses = {folder: held_out(folder) for folder in list_all(output_dir)}
    lowest = min(losses, key=losses.get, default=None)
    return (lowest, losses[lowest]) if losses.get(lowest, math.inf) < math.inf else (None, math.inf)


def find(wanted, output_dir):
    """The checkpoint to resume from, verified; None for a fresh start.

    wanted: None, "latest" or a path. UserError if a path is missing or damaged, or if output_dir
    has checkpoints and `wanted` does not say what to do with them.
    """
    existing = list_all(output_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"--output_dir {output_dir} already contains {existing[-1].name}: name another "
                "folder, or add --resume_from_checkpoint=latest to continue that run."
            )
        return None
    if wanted != "latest":
        folder = Path(wanted)
        if not folder.is_dir():
            folder = Path(output_dir) / folder.name  # a name inside output_dir, as in the reference
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder.")
        if wrong := damage(folder):
            raise UserError(
                f"--resume_from_checkpoint {wanted}: {wrong}. Use `latest` for the newest intact "
                "checkpoint."
            )
        return folder
    for folder in reversed(existing):
        wrong = damage(folder)
        if not wrong:
            return folder
        say(f"{folder.name} is skipped: {wrong}.")
    if existing:
        raise UserError(
            f"--output_dir {output_dir}: none of its {len(existing)} checkpoints is intact. Remove "
            "them to start afresh."
        )
    return None


def set_aside_later(output_dir, step):
    """Rename checkpoints after the step that a run resumes from: they belong to another branch.

    Otherwise rotation would count them, and `latest` would resume from them. None is deleted. What
    a kill left of saving or deleting a checkpoint is deleted, because it is as large as one.
    """
    for path in Path(output_dir).glob(".checkpoint-*"):
        if TEMPORARY.fullmatch(path.name):
            remove(path)
    for folder in list_all(output_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.left-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            say(f"{folder.name} is after step {step}; renamed to {aside.name}")


def damage(folder):
    """What is wrong with a checkpoint, in a few words; None if it is what was written."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, so it is incomplete or not a checkpoint of this project"
    try:
        expected = read_json(manifest)
        if not {"state.json", "weights.safetensors"} <= expected.keys():
            return f"its {MANIFEST} lists no weights"
        for name, description in expected.items():
            if not re.fullmatch(r"\w+\.(json|safetensors)", name):
                return f"its {MANIFEST} lists {name}"
            file = Path(folder) / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != description["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {description['size']}"
            if describe(file) != description:
                return f"{name} has changed since it was written"
        for group in read_progress(folder).get("groups", ()):
            if f"{group}.safetensors" not in expected:
                return f"its {MANIFEST} lacks {group}.safetensors"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} can't be read"
    except OSError as error:
        return f"it can't be read: {error}"
    return None


def delete(folder):
    """Delete a checkpoint. It is renamed first, so that a kill leaves no incomplete one."""
    temporary = folder.with_name(f".{folder.name}.old")
    remove(temporary)
    folder.rename(temporary)
    temporary.unlink() if temporary.is_symlink() else shutil.rmtree(temporary)
