"""Checkpoints: folders `checkpoint-{step}` that are whole or not there at all.

    save(output_dir, step, {"weights": {...}, "optimizer": {...}}, state, keep=3)
    folder = find("latest", output_dir)
    tensors, state = load(folder)

A checkpoint is one safetensors file per group of tensors and a state.json. It is written under a
temporary name, sealed by a manifest with every file's size and SHA-256, flushed to the disk, and
only then renamed; only after that are older ones removed. A kill at any moment leaves the newest
complete checkpoint in place, and what is not complete is never taken for one. No pickle is written
or read.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minwurst.config import UserError

NAME = re.compile(r"checkpoint-(\d+)")
UNDER_WAY = re.compile(r"\.checkpoint-\d+\.(part|old)")  # being written or removed
MANIFEST = "manifest.json"


# The state of a run that starts afresh.
FRESH = {"step": 0, "updates": 0, "seed": None, "settings": {}, "identity": {}}


def make_folder(output_dir, flag="output_dir"):
    """The output folder as a Path, made if need be; UserError where it can't be written."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--{flag} {output_dir} can't be written: {error.strerror}.") from None
    return folder


def lock(folder):
    """Make this process the folder's only run until it ends; UserError where another one is there.

    The kernel holds the lock for this process and none of its children, and drops it with the
    process, however that ends.
    """
    global held  # open until the process ends, or locks another folder
    held = open(Path(folder) / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"--output_dir {folder}: another run is writing there. Wait for its end, or name "
            "another folder."
        ) from None
    except OSError as error:  # a file system that knows no locks
        print(f"{folder} can't be locked ({error}): start no second run on it.", flush=True)


def save(output_dir, step, groups, state, keep=None):
    """Write `checkpoint-{step}` and keep the newest `keep` (None: all).

    groups: {"weights": {name: tensor}, …}, one file each; empty groups are left out. state: what
    JSON can hold. An older checkpoint of the same step is replaced.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    draft = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # what an interrupted save left behind
        draft.mkdir()
        for group, tensors in groups.items():
            if tensors:
                save_file(apart(tensors), draft / f"{group}.safetensors")
        (draft / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        seal = {file.name: describe(file) for file in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        put_in_place(draft, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        raise UserError(
            f"{folder} was not written: {error}. It needs {size:,} bytes. Free some space; earlier "
            "checkpoints are intact, and --resume_from_checkpoint=latest goes on from them."
        ) from None
    for old in list_all(output_dir)[:-keep] if keep else []:
        try:
            remove(old)
        except OSError as error:  # a full disk later is better than a stop now
            print(f"{old.name} could not be removed: {error}", flush=True)


def put_in_place(draft, folder):
    """Flush a finished draft to the disk and give it its name; what bore that name goes last."""
    for path in [*draft.rglob("*"), draft]:
        flush(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def apart(tensors):
    """The tensors, each with memory of its own, which safetensors wants and 8-bit Adam lacks."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return found


def load(folder):
    """What `save` was given: ({"weights": {name: tensor}, …}, state), on the CPU."""
    folder = Path(folder)
    groups = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return groups, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def list_all(output_dir):
    """The folders named `checkpoint-{step}`, oldest first; what else lies there is not ours."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    steps = {path: NAME.fullmatch(path.name) for path in folders}
    return sorted((path for path in folders if steps[path]), key=lambda path: int(steps[path][1]))


def find(wanted, output_dir):
    """The checkpoint to resume from, verified: a path, or None for a fresh start.

    wanted: None, "latest" or a path. Raises UserError where a path is missing or damaged, or where
    output_dir holds checkpoints and `wanted` does not say what to do with them.
    """
    existing = list_all(output_dir)
    if wanted is None:
        if existing:
            raise UserError(
                f"--output_dir {output_dir} already holds {existing[-1].name}: add "
                "--resume_from_checkpoint=latest to go on, or name another folder."
            )
        return None
    if wanted != "latest":
        folder = Path(wanted)
        if not folder.is_dir():
            folder = Path(output_dir) / folder.name  # the reference's way: a name inside output_dir
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted}: there is no such folder.")
        if reason := damage(folder):
            raise UserError(
                f"--resume_from_checkpoint {wanted}: {reason}. `latest` takes the newest whole one."
            )
        return folder
    for folder in reversed(existing):
        reason = damage(folder)
        if not reason:
            return folder
        print(f"{folder.name} is passed over: {reason}.", flush=True)
    if existing:
        raise UserError(
            f"--output_dir {output_dir}: none of its {len(existing)} checkpoints is whole; remove "
            "them to start afresh."
        )
    return None


def set_aside_later(output_dir, step):
    """Rename checkpoints beyond the step a run goes on from: they are of a branch that was left.

    Else rotation would count them, and `latest` would take them for this run's. None is deleted.
    What a kill left of saving and removing is: it is no checkpoint, but as large as one.
    """
    for path in Path(output_dir).glob(".checkpoint-*"):
        if UNDER_WAY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for folder in list_all(output_dir):
        if int(NAME.fullmatch(folder.name)[1]) > step:
            aside = folder.with_name(f"{folder.name}.left-{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            print(f"{folder.name} lies beyond step {step} and is now {aside.name}", flush=True)


def damage(folder):
    """Why a checkpoint can't be trusted, in a few words; None where it is as it was sealed."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, so it was not finished or is no checkpoint of this project"
    try:
        seal = json.loads(manifest.read_text(encoding="utf-8"))
        if not {"state.json", "weights.safetensors"} <= seal.keys():
            return f"its {MANIFEST} names no weights"
        for name, promised in seal.items():
            file = Path(folder) / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != promised["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {promised['size']}"
            if describe(file) != promised:
                return f"{name} has changed since it was written"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} can't be read"
    except OSError as error:
        return f"it can't be read: {error}"
    return None


def describe(file):
    """A file's size in bytes and SHA-256, as the manifest holds them."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def flush(path):
    """Ask the disk to have a file's bytes, or a folder's entries, before going on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def remove(folder):
    """Remove a checkpoint; the rename comes first, so that a kill midway leaves no half of one."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


# What a resumed run may change and still be the same run; any other difference is refused.
FREE = """
    learning_rate lr_scheduler lr_warmup_steps max_train_steps num_train_epochs max_grad_norm
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon ema_decay
    mixed_precision gradient_checkpointing allow_tf32
    train_batch_size gradient_accumulation_steps world dataloader_num_workers
    pretrained_prior_model_name_or_path image_encoder_name_or_path
    dataset_name dataset_config_name train_data_dir image_column caption_column
    output_dir cache_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    lora_weights cache_latents
    demo logging_dir logging_steps report_to tracker_project_name
    validation_prompts validation_epochs validation_steps validation_decoder
    pretrained_decoder_model_name_or_path skip_bad_samples push_to_hub hub_model_id hub_private
""".split()
# What stands behind the names in a run's identity, for the message that refuses a change.
MEANING = {
    "global_batch": "the pictures of a step (--train_batch_size × --gradient_accumulation_steps × "
    "processes)",
    "data": "the data's content (a fingerprint)",
    "encoders": "the encoders' files (a fingerprint)",
    "prior": "the prior (its sizes; for a LoRA, its files' fingerprint)",
}
# Nobody needs to be told of these.
QUIET = {"demo", "output_dir", "cache_dir", "resume_from_checkpoint"}


def changes(before, now):
    """Lines that say what changed since a checkpoint; UserError where it may not change.

    before, now: settings by name, or a run's identity. As settings, batch size and paths may
    change; that what they come to has not changed is for the identity to tell.
    """
    changed = [name for name in before if name in now and before[name] != now[name]]
    for name in changed:
        if name not in FREE:
            raise UserError(
                f"--resume_from_checkpoint: {MEANING.get(name, f'--{name}')} was {before[name]} "
                f"and is {now[name]} now, so this would be another run. Put it back, or start "
                "in another --output_dir."
            )
    return [f"{name} {before[name]} → {now[name]}" for name in changed if name not in QUIET]
