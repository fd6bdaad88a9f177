"""Reading this project's networks from folders that anybody may have written.

    prior = load(WuerstchenPrior, folder, torch.float32)

The config has to describe a network of possible size, and the safetensors files have to contain
exactly its tensors: floating point, finite, of the right shapes. Whatever is wrong is a UserError
that names the folder, or the file in it. Nothing is initialised at random first, which would take
longer than reading.
"""

import inspect
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minwurst.base.console import say
from minwurst.base.errors import UserError
from minwurst.edge.files import check_regular, read_json

LARGEST = 100_000  # of any size in a config; the published networks have at most 8,192
MOST_BLOCKS = 1_000


def load_part(load, folder):
    """load(folder); if that fails, a UserError names the folder."""
    try:
        for file in Path(folder).glob("*"):  # of a file, none
            if not file.is_dir():
                check_regular(file)
        return load(folder)
    except UserError:
        raise
    except Exception as error:  # a config or file of somebody else's can fail anywhere in a library
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} can't be loaded: {reason}") from None


def load(kind, folder, dtype):
    """A network of class `kind` in evaluation mode. dtype: of its floating-point tensors."""

    def read(folder):
        config = read_config(kind, folder)
        new = getattr(kind, "NEW_LAYERS", ())
        with torch.device("cpu" if new else "meta"):
            model = kind.from_config(config)
        expected = model.state_dict()
        tensors = read_tensors(folder, expected)
        missing = [key for key in expected if key not in tensors]
        refuse([key for key in missing if not key.startswith(new)], "missing keys")
        tensors = {
            name: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in tensors.items()
        }
        model.load_state_dict(tensors, strict=False, assign=True)
        return model.to(dtype).eval()

    return load_part(read, Path(folder))


def read_config(kind, path):
    """A network's config as a dict, checked. path: of the .json file, or of its folder."""
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / "config.json"
    try:
        config = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    name = config.get("_class_name", kind.__name__)
    if name != kind.__name__:
        raise ValueError(f"it is a {name}, not a {kind.__name__}")
    parameters = inspect.signature(kind.__init__).parameters
    known = {*parameters, "prediction_type"}
    for key, value in config.items():
        default = parameters[key].default if key in parameters else None
        if type(default) in (int, float) and not (
            type(value) in (int, float) and (value > 0 or default <= 0 or "dropout" in key)
        ):
            raise ValueError(f"config.json: {key} is {value!r:.40}, which is not possible")
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        say(f"{file}: unknown entries are ignored: {', '.join(unknown)}")
    check_sizes(config)
    return {key: value for key, value in config.items() if key in known or key.startswith("_")}


def config_of(kind, folder):
    """A network's settings with their defaults, without building it."""
    given = load_part(lambda place: read_config(kind, place), folder)
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"} | given


def check_sizes(config):
    """ValueError for numbers that no network can have, before anything is built from them."""
    for key, value in config.items():
        numbers = [value] if isinstance(value, int | float) else value
        if not isinstance(numbers, list) or key.startswith("_"):
            continue
        numbers = [number for number in numbers if isinstance(number, int | float)]
        blocks = sum(numbers) if "block" in key or key == "depth" else 0
        if any(not -1 <= number <= LARGEST for number in numbers) or blocks > MOST_BLOCKS:
            raise ValueError(f"its config: {key} is {value}, which is not possible")


def read_tensors(folder, expected=None):
    """All tensors of a folder's safetensors files, {name: tensor}, checked.

    expected: {name: tensor of the right shape and kind}; without it, only that they are finite
    floating-point numbers. A copy in half precision beside the weights (`….fp16.safetensors`) is
    not read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(".") and ".fp16" not in file.name]
    if not files:
        raise ValueError("it has no .safetensors file")
    tensors = {}
    for file in files:
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file.name}: {error}") from None
        # Older CLIP files also hold position numbers, which are not weights.
        found = {key: t for key, t in found.items() if not key.endswith("position_ids")}
        refuse([key for key in found if key in tensors], "repeated keys", file)
        if expected is not None:
            refuse([key for key in found if key not in expected], "unexpected keys", file)
        for key, tensor in found.items():
            like = tensor if expected is None else expected[key]
            if like.shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, not {list(like.shape)}"
                raise ValueError(f"{file.name}: mismatched {key}: {shapes}")
            counts = expected is not None and not like.is_floating_point()  # of batches
            if not counts and not tensor.is_floating_point():
                raise ValueError(f"{file.name}: {key} has type {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{file.name}: {key} is not finite")
        tensors |= found
    return tensors


def refuse(keys, problem, file=None):
    if keys:
        names = ", ".join(str(key) for key in sorted(keys)[:3])
        where = f"{file.name}: " if file else ""
        raise ValueError(f"{where}its weights have {problem}: {names}")
