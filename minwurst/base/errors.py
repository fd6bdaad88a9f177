"""UserError: a mistake the user can fix, reported in one line instead of a traceback."""

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


def command_with(*words):
    """This run's own command with more words, as it is to be typed."""
    ranks = local_world_size()
    launcher = f"torchrun --nproc_per_node={ranks}" if world_size() > 1 else "python"
    return f"{launcher} {shlex.join([*sys.argv, *completing, *words])}"


def exit_with(error):
    """End the process: exit code 2 and one line for a UserError, 1 and a traceback for a bug.

    An error that all ranks share is printed once per machine.
    """
    for function in leaving:
        function()
    code = 2 if isinstance(error, UserError) else 1
    if code == 1:
        traceback.print_exception(error)
    elif error.one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    else:  # if this rank left first, torchrun would end the one that is still printing
        time.sleep(10)
    sys.stdout.flush(), sys.stderr.flush()
    if world_size() > 1:  # an orderly exit can hang while other ranks still wait for this one
        os._exit(code)
    sys.exit(code)
