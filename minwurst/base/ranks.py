"""Which of torchrun's processes this one is, by the environment variables that torchrun sets."""

import os


def number(name, default):
    """The number in an environment variable; the default if there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def look_right():
    """Whether the variables are unset, or as torchrun sets them."""
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    numbers = all(os.environ[name].isdecimal() for name in names)
    return numbers and rank() < world_size() and (world_size() == 1 or len(names) == 3)


def rank():
    """This process's number among all processes of the run, from 0."""
    return number("RANK", 0)


def world_size():
    """The number of processes."""
    return number("WORLD_SIZE", 1)


def local_world_size():
    """The number of processes on this machine."""
    return number("LOCAL_WORLD_SIZE", 1)


def is_main():
    """Whether this is the rank that writes files and prints."""
    return rank() == 0
