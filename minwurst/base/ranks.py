"""Which of torchrun's processes this one is, by the environment variables that torchrun sets."""

import os


def rank():
    """This process's number among all processes of the run, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size():
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main():
    """Whether this is the rank that writes files and prints."""
    return rank() == 0
