"""A command line on which a mistake is reported in one line, without the usage before it.

    parser = Parser(prog="python -m minwurst.hub")      # otherwise as argparse.ArgumentParser
    given = parser.parse_args()

It takes no abbreviated flags, and proposes the nearest flag for an unknown one.
"""

import argparse
import difflib

from minwurst.base.errors import UserError, exit_with

KINDS = {int: "a whole number", float: "a number"}


def name_of(action):
    """A flag or argument as the user types it."""
    return action.option_strings[0] if action.option_strings else action.metavar or action.dest


class Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, allow_abbrev=False, **options):
        super().__init__(*arguments, allow_abbrev=allow_abbrev, **options)

    def error(self, message):
        """End the process with exit code 2 and one line."""
        message = message.removeprefix("argument ")
        message = message.replace("ignored explicit argument", "takes no value, but there is")
        exit_with(UserError(message), self.prog.removeprefix("python -m "))

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]  # without its value, which may be a secret
            if not flag.startswith("--"):
                self.error("found a value without a flag; see --help.")
            near = difflib.get_close_matches(flag, self.flags(), n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help."
            self.error(f"unknown flag {flag}; {hint}")
        return known

    def flags(self):
        """All flags, also those of subcommands."""
        found = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for verb in action.choices.values() for flag in verb.flags()]
        return found

    # argparse calls these two for each value; if it stops doing so, its own messages appear.

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            *others, last = map(str, action.choices)
            choices = f"{', '.join(others)} or {last}" if others else last
            self.error(f"{name_of(action)} {value}: choose {choices}.")

    def _get_value(self, action, arg_string):
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            kind = KINDS.get(action.type, "another value")
            self.error(f"{name_of(action)} {arg_string}: must be {kind}.")
