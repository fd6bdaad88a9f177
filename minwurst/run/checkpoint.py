"""Checkpoints: folders `checkpoint-{step}` that are complete or absent.

    save(output_dir, step, {"weights": {...}, "optimizer": {...}}, progress, keep=3)
    folder = find("latest", output_dir)
    tensors, progress = load(folder)

A checkpoint has one safetensors file per group of tensors, a state.json, and a manifest with the
size and SHA-256 of each. It is written under a temporary name, flushed to disk and renamed; only
then are older ones deleted. A kill at any moment leaves the newest complete checkpoint in place,
and an incomplete one is never used. No pickle is written or read.
"""

import json
import re
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minwurst.base.errors import UserError
from minwurst.edge.files import describe, replacing

NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY = re.compile(r"\.checkpoint-\d+\.(part|old)")  # being written or deleted
MANIFEST = "manifest.json"


def save(output_dir, step, groups, progress, keep=None):
    """Write `checkpoint-{step}` and keep the newest `keep` (None: all).

    groups: {"weights": {name: tensor}, …}, one file each; empty groups are skipped. progress: what
    JSON can hold. An older checkpoint of the same step is replaced.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    try:
        with replacing(folder) as draft:
            draft.mkdir()
            for group, tensors in groups.items():
                if tensors:
                    save_file(separate(tensors), draft / f"{group}.safetensors")
            (draft / "state.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
            manifest = {file.name: describe(file) for file in sorted(draft.iterdir())}
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        raise UserError(
            f"{folder} was not written: {error}. It needs {size:,} bytes. Free some space; earlier "
            "checkpoints are intact, and --resume_from_checkpoint=latest resumes from them."
        ) from None
    for old in list_all(output_dir)[:-keep] if keep else []:
        try:
            delete(old)
        except OSError as error:  # a full disk later is better than a stop now
            print(f"{old.name} could not be deleted: {error}", flush=True)


def separate(tensors):
    """The tensors, each with its own memory, as safetensors requires; 8-bit Adam shares some."""
    result, used = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in used else tensor
        used.add(memory)
    return result


def read_progress(folder):
    """A checkpoint's state.json: the last step, the seed, what makes it this run, numbers."""
    return json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))


def load(folder):
    """What `save` was given: ({"weights": {name: tensor}, …}, progress), on the CPU."""
    folder = Path(folder)
    groups = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return groups, read_progress(folder)


def step_of(folder):
    """The step in a checkpoint folder's name; None for any other folder."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_all(output_dir):
    """The checkpoint folders, oldest first. Everything else in output_dir is left alone."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in folders if step_of(path) is not None), key=step_of)


def find(wanted, output_dir):
    """The checkpoint to resume from, verified; None for a fresh start.

    wanted: None, "latest" or a path. UserError if a path is missing or damaged, or if output_dir
    has checkpoints and `wanted` does not say what to do with them.
    """
    existing = list_all(output_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"--output_dir {output_dir} already contains {existing[-1].name}: add "
                "--resume_from_checkpoint=latest to resume, or use another folder."
            )
        return None
    if wanted != "latest":
        folder = Path(wanted)
        if not folder.is_dir():
            folder = Path(output_dir) / folder.name  # a name inside output_dir, as in the reference
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder.")
        if reason := damage(folder):
            raise UserError(
                f"--resume_from_checkpoint {wanted}: {reason}. Use `latest` for the newest intact "
                "checkpoint."
            )
        return folder
    for folder in reversed(existing):
        reason = damage(folder)
        if not reason:
            return folder
        print(f"{folder.name} is skipped: {reason}.", flush=True)
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
            shutil.rmtree(path, ignore_errors=True)
    for folder in list_all(output_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.left-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            print(f"{folder.name} is after step {step}; renamed to {aside.name}", flush=True)


def damage(folder):
    """What is wrong with a checkpoint, in a few words; None if it is what was written."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, so it is incomplete or not a checkpoint of this project"
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
        if not {"state.json", "weights.safetensors"} <= expected.keys():
            return f"its {MANIFEST} lists no weights"
        for name, description in expected.items():
            file = Path(folder) / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != description["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {description['size']}"
            if describe(file) != description:
                return f"{name} has changed since it was written"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} can't be read"
    except OSError as error:
        return f"it can't be read: {error}"
    return None


def delete(folder):
    """Delete a checkpoint. It is renamed first, so that a kill leaves no incomplete one."""
    temporary = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.rename(temporary)
    shutil.rmtree(temporary)
