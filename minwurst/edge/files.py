"""Files that are written completely or not at all, and checksums.

    with replacing(folder / "run.json") as draft:
        draft.write_text(text)

The draft is written beside the target under a temporary name, flushed to disk and renamed. A kill
at any moment leaves either the old file or the new one; an exception removes the draft.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from minwurst.base.console import say
from minwurst.base.errors import UserError


@contextlib.contextmanager
def replacing(path, unique=False, flushed=True):
    """Use as a context manager: it gives the path of a draft, a file or folder yet to be created.

    Whatever has the target's name is replaced, except a folder by a file. A link is replaced, not
    followed. unique: for targets that several processes may write at once. flushed: False for what
    can be computed again, which need not survive a power cut.
    """
    path = Path(path)
    suffix = f".{secrets.token_hex(4)}.part" if unique else ".part"
    draft, old = path.with_name(f".{path.name}{suffix}"), path.with_name(f".{path.name}.old")
    remove(draft)  # left behind by an interrupted write
    try:
        yield draft
        if flushed:
            for part in [*draft.rglob("*"), draft]:
                flush(part)
        if draft.is_dir():  # a folder can't be replaced in one step
            remove(old)
            if os.path.lexists(path):
                path.rename(old)
            draft.rename(path)
        else:
            draft.replace(path)
        if flushed:
            flush(path.parent)
        if path.is_dir():
            remove(old)
    except Exception:
        remove(draft)
        raise


def remove(path):
    """Delete a file, a link or a folder, if it exists and the system allows it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush(path):
    """Wait until the disk has a file's bytes, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems can't flush a folder
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def not_finite(tensors):
    """The name of the first tensor with a number that is not finite, or None."""
    for name, tensor in tensors.items():
        # A sum is quick, and finite unless a number is not, or all are enormous.
        suspicious = tensor.is_floating_point() and not tensor.sum().isfinite()
        if suspicious and not tensor.isfinite().all():
            return name
    return None


def reason(error):
    """What an operating system's error means to the user, and what to do, in one sentence."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    folder = isinstance(error, IsADirectoryError)
    return f"{error}." + " Free some space." * full + " Move this folder away." * folder


def check_regular(file):
    """OSError if a file is none; a pipe would be waited for without end."""
    if Path(file).exists() and not Path(file).is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_json(file):
    """The object in a JSON file as a dict; OSError or ValueError if there is none."""
    check_regular(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def describe(file):
    """A file's size in bytes and its SHA-256."""
    check_regular(file)
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def make_folder(path, flag="output_dir"):
    """The folder as a Path, created if missing; UserError if it is not writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable-{secrets.token_hex(4)}"
        trial.touch()
        trial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--{flag} {path} is not writable: {error.strerror}.") from None
    return folder


def lock(folder):
    """Make this process the folder's only run until it ends; UserError if there is another.

    The kernel holds the lock for this process and none of its children, and releases it when the
    process ends, however it ends.
    """
    global lock_file  # open until the process ends, or locks another folder
    try:
        lock_file = open(Path(folder) / ".lock", "a", opener=no_waiting)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't open its .lock: {error}.") from None
    try:
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"--output_dir {folder}: another run is using it. Wait until it ends, or use another "
            "folder."
        ) from None
    except OSError as error:  # a file system without locks
        say(f"{folder} can't be locked ({error}): don't start a second run on it.")


def no_waiting(path, how):
    """Open a file; one that turns out to be a pipe is an error, not waited for."""
    return os.open(path, how | os.O_NONBLOCK)
