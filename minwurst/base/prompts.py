"""Prompts, each with an image size and a seed of its own if it names them.

    Prompt.of("a bear --width 1536 --height 1024 --seed 3")
    read("prompts.txt", "prompt_file")                      # one prompt per line, as texts

Width and height are those of the generated image in pixels.
"""

import dataclasses
import re
from pathlib import Path

from minwurst.base.errors import UserError

OPTION = re.compile(r"\s+--(\w[\w-]*)(?:[ =](\S+))?")
LEAST, MOST = 128, 8192  # pixels along a side; the decoder's smallest image is 3 latents wide


@dataclasses.dataclass(frozen=True)
class Prompt:
    """line: as it was written. width, height, seed: None where the default applies."""

    line: str
    text: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, line, where="prompt"):
        """UserError for an option that does not exist, or a number that can't be used."""
        start = OPTION.search(line)
        text, rest = (line[: start.start()], line[start.start() :]) if start else (line, "")
        options = {}
        for name, value in OPTION.findall(rest):
            if name not in ("width", "height", "seed"):
                raise UserError(f"{where} “{line}”: --{name} is not --width, --height or --seed.")
            if not value.isascii() or not value.isdigit() or len(value) > 12:
                raise UserError(f"{where} “{line}”: --{name} needs a whole number.")
            options[name] = int(value)
        if OPTION.sub("", rest).strip():
            raise UserError(f"{where} “{line}”: options come after the text.")
        prompt = cls(line, text.strip(), **options)
        check_size(prompt.width, prompt.height, f"{where} “{line}”: ")
        return prompt


def check_size(width, height, where=""):
    """UserError for an image size that can't be generated; both None is the default size."""
    if (width is None) != (height is None):
        given, missing = ("width", "height") if height is None else ("height", "width")
        raise UserError(f"{where}--{given} needs a --{missing} beside it.")
    for name, value in (("width", width), ("height", height)):
        if value is not None and not LEAST <= value <= MOST:
            raise UserError(f"{where}--{name} is {value}; it must be between {LEAST} and {MOST}.")


def read(file, flag):
    """The lines of a file that are not empty and don't start with #; UserError if there are none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag} {file} can't be read: {error}.") from None
    lines = [line.strip() for line in lines]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"--{flag} {file} contains no prompt.")
    return lines
