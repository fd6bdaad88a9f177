"""UserError: a mistake the user can fix, reported in one line instead of a traceback."""

import contextlib
import os
import shlex
import sys
import time
import traceback

from minwurst.base.ranks import local_world_size, world_size

completing = []  # words that belong to this run's command: the seed, if it was drawn
leaving = []  # functions to call before this process ends with an error


class UserError(Exception):
    """A mistake the user can fix. Its text names the flag, file or row and says what to do."""

    def __init__(self, message, one_rank=False):
        """one_rank: True where only this rank met the error, so that it has to report it."""
        super().__init__(message)
        self.one_rank = one_rank


@contextlib.contextmanager
def blame(where, value):
    """Use as a context manager: a UserError inside begins with this flag and its value."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(("--", f"{where} {value}")):
            raise
        text = str(error).removeprefix(f"LoRA {value}: ")
        raise UserError(f"{where} {value}: {text}") from None


def command_with(*words):
    """This run's own command with more words, as it is to be typed."""
    ranks = local_world_size()
    launcher = f"torchrun --nproc_per_node={ranks}" if world_size() > 1 else "python"
    return f"{launcher} {shlex.join([*sys.argv, *completing, *words])}"


@contextlib.contextmanager
def one_line(program):
    """Use as a context manager around a program of one process: exit code 1 and one line for a
    UserError, or for what the operating system says about a file.
    """
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()  # an error of it belongs here, too
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except OSError as error:
        if not error.errno:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{program}: {where}{error.strerror}.")


def exit_with(error, program=None):
    """End the process: exit code 2 and one line for a UserError, 1 and a traceback for a bug.

    An error that all ranks share is printed once per machine. What the operating system says about
    a file is no bug. program: its name in the line, by default the script's.
    """
    for function in leaving:
        function()
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in str(error):
        found = (str(error).splitlines() or ["the system has none left"])[0]
        error = UserError(
            f"Out of memory ({found}). Lower --train_batch_size or --resolution, or add "
            "--gradient_checkpointing.",
            one_rank=True,
        )
    if isinstance(error, OSError) and error.filename:
        error = UserError(f"{error.filename}: {error.strerror}.", one_rank=True)
    code = 2 if isinstance(error, UserError) else 1
    if code == 1:
        traceback.print_exception(error)
    elif error.one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program or os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:  # if this rank left first, torchrun would end the one that is still printing
        time.sleep(10)
    sys.stdout.flush(), sys.stderr.flush()
    if world_size() > 1:  # an orderly exit can hang while other ranks still wait for this one
        os._exit(code)
    sys.exit(code)
