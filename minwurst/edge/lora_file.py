"""LoRA and DoRA files: writing them, and reading ours and those of diffusers and PEFT.

    save(prior, "pytorch_lora_weights.safetensors")
    load(prior, "pytorch_lora_weights.safetensors")     # into a prior without adapters

Our files contain no alpha: alpha/rank is multiplied into B, which every version of diffusers and
PEFT reads the same way. DoRA's magnitudes are stored as they are.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minwurst.base.errors import UserError
from minwurst.edge.files import not_finite, reason, replacing
from minwurst.step.adapter import DoRALinear, adapters, add_adapter

FILE = "pytorch_lora_weights.safetensors"
ENDINGS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B",
    ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
    ".lora_magnitude_vector.default.weight": "m",
}  # fmt: skip


def state_dict(prior):
    """The adapters as diffusers and PEFT name them, alpha/rank multiplied into B, on the CPU."""
    state = {}
    for name, adapter in adapters(prior).items():
        b = adapter.lora_B.detach() * (adapter.alpha / adapter.rank)
        state[f"prior.{name}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
        state[f"prior.{name}.lora_B.weight"] = b.cpu().contiguous()
        if isinstance(adapter, DoRALinear):
            magnitude = adapter.lora_magnitude_vector.detach()
            state[f"prior.{name}.lora_magnitude_vector"] = magnitude.cpu().contiguous()
    return state


def save(prior, file):
    """Write the adapters to a file, and return its path; UserError if that fails."""
    if name := not_finite(state_dict(prior)):
        raise UserError(f"{name} is not finite, so training has failed; no result was written.")
    try:
        with replacing(file) as draft:
            metadata = {"format": "pt", "prediction_type": prediction_of(prior)}
            if metadata["prediction_type"] == "epsilon":  # which the absence of the entry means
                del metadata["prediction_type"]
            save_file(state_dict(prior), draft, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} was not written: {reason(error)} The last checkpoint is intact, and "
            "--resume_from_checkpoint=latest writes the result from it."
        ) from None
    return Path(file)


def find(path):
    """A LoRA's file: the path itself, or what is in its folder."""
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in (FILE, "adapter_model.safetensors")]
        path = next((file for file in inside if file.is_file()), inside[0])
    if not path.is_file():
        raise UserError(f"LoRA {path}: no such file.")
    return path


def prediction_of(prior):
    return prior.config.get("prediction_type", "epsilon")


def read(file):
    """A LoRA file as {layer: (A (rank, in), B (out, rank))}, alpha/rank multiplied into B.

    A DoRA file's have a third, the magnitudes (out). file: ours, one by diffusers or PEFT, or the
    folder of one. A UserError names an unknown key, or says what is wrong with the file.
    """
    file = find(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"LoRA {file} can't be read: {error}") from None
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"LoRA {file}: {key} has type {tensor.dtype}.")
    if name := not_finite(tensors):
        raise UserError(f"LoRA {file}: {name} is not finite.")

    factors = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").removeprefix("prior.").removeprefix("unet.")
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            raise UserError(f"LoRA {file}: unknown key {key}.")
        pair = factors.setdefault(name.removesuffix(ending), {})
        if ENDINGS[ending] in pair:
            raise UserError(f"LoRA {file}: {key} occurs twice, under two names.")
        pair[ENDINGS[ending]] = tensor.float()
    from_peft = any(key.startswith("base_model.model.") for key in tensors)
    scaling = scaling_of(file, metadata, from_peft)
    layers = {}
    for name, pair in factors.items():
        shapes = [pair[factor].shape for factor in "AB" if factor in pair]
        if [len(s) for s in shapes] != [2, 2] or not shapes[0][0] == shapes[1][1] > 0:
            sizes = " and ".join(str(list(shape)) for shape in shapes)
            raise UserError(f"LoRA {file}: {name} is not a pair of factors A and B: {sizes}.")
        layers[name] = pair["A"], pair["B"] * scaling(name, len(pair["A"]))
        if "m" in pair:
            if list(pair["m"].shape) != [shapes[1][0]]:
                raise UserError(
                    f"LoRA {file}: the magnitudes of {name} have shape {list(pair['m'].shape)} "
                    f"instead of [{shapes[1][0]}]."
                )
            layers[name] += (pair["m"],)
    if not layers:
        raise UserError(f"LoRA {file} contains no adapters.")
    if lacking := [name for name in layers if is_dora(layers) and len(layers[name]) == 2]:
        raise UserError(
            f"LoRA {file} is a DoRA, but {lacking[0]} has no lora_magnitude_vector: part of the "
            "file is missing."
        )
    return layers


def is_dora(layers):
    """Whether a file, as `read` gives it, has magnitudes."""
    return any(len(factors) == 3 for factors in layers.values())


def scaling_of(file, metadata, from_peft):
    """(layer, rank) → alpha/rank by diffusers' metadata or PEFT's adapter_config.json, else 1."""
    beside = file.with_name("adapter_config.json")
    if from_peft and not beside.is_file():
        raise UserError(f"LoRA {file} is PEFT's, and {beside} with its alpha is missing.")
    stored = beside.read_text(encoding="utf-8", errors="replace") if from_peft else "{}"
    stored = metadata.get("lora_adapter_metadata", stored)
    try:
        config = {  # diffusers writes PEFT's settings, each behind "prior."
            key.removeprefix("prior.").removeprefix("unet."): value
            for key, value in json.loads(stored).items()
        }
        patterns = dict(config.get("alpha_pattern") or {})
        alphas = [config.get("lora_alpha", 1), *patterns.values()]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
            raise ValueError("alpha is no number")
        # PEFT treats a pattern as a regular expression for the end of the layer's name.
        patterns = {re.compile(rf"(.*\.)?({end})$"): alpha for end, alpha in patterns.items()}
    except (ValueError, TypeError, AttributeError, ArithmeticError, re.error,
            RecursionError):  # fmt: skip
        raise UserError(f"LoRA {file}: its settings can't be read: {stored[:100]}") from None

    def scaling(layer, rank):
        own = [alpha for pattern, alpha in patterns.items() if pattern.match(layer)]
        alpha = own[0] if own else config.get("lora_alpha", rank)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling


def check_layers(prior, layers, file):
    """UserError if a file's layers, shapes or prediction are not the prior's."""
    with safe_open(find(file), framework="pt") as opened:
        predicted = (opened.metadata() or {}).get("prediction_type", "epsilon")
    if predicted != prediction_of(prior):
        raise UserError(
            f"LoRA {file} is for a prior that predicts {predicted}, and this one predicts "
            f"{prediction_of(prior)}."
        )
    linear = {name: m for name, m in prior.named_modules() if isinstance(m, nn.Linear)}
    for name, (a, b, *_) in layers.items():
        layer = linear.get(name) or linear.get(f"{name}.base")
        if layer is None and name in dict(prior.named_modules()):
            raise UserError(f"LoRA {file}: {name} is not a linear layer; others are not supported.")
        if layer is None:
            raise UserError(f"LoRA {file} is for another model: the prior has no layer {name}.")
        if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise UserError(
                f"LoRA {file}: {name} is {a.shape[1]} → {b.shape[0]} wide, but {layer.in_features} "
                f"→ {layer.out_features} in the prior."
            )


@torch.no_grad()
def load(prior, file):
    """Add a file's adapters to a prior, frozen, ready for `set_scale` or `merge`."""
    layers = read(file)
    check_layers(prior, layers, file)
    for name, (a, b, *magnitude) in layers.items():
        adapter = add_adapter(prior, name, rank=len(a), alpha=len(a), dora=bool(magnitude))
        fill(adapter, a, b, *magnitude)
    prior.requires_grad_(False)
    return prior


@torch.no_grad()
def start_from(prior, file):
    """Copy a file into adapters of the same layers and rank, to continue training it."""
    layers, own = read(file), adapters(prior)
    check_layers(prior, layers, file)
    if is_dora(layers) != any(isinstance(adapter, DoRALinear) for adapter in own.values()):
        kind, remedy = ("DoRA", "add") if is_dora(layers) else ("LoRA, without magnitudes", "drop")
        raise UserError(f"--lora_weights {file} is a {kind}: {remedy} --use_dora.")
    if layers.keys() != own.keys():
        name = sorted(layers.keys() ^ own.keys())[0]
        raise UserError(
            f"--lora_weights {file}: {name} is in the file or in --lora_targets, but not in both."
        )
    for name, (a, b, *magnitude) in layers.items():
        adapter = own[name]
        if len(a) != adapter.rank:
            raise UserError(f"--lora_weights {file} has rank {len(a)}; --rank is {adapter.rank}.")
        fill(adapter, a, b / (adapter.alpha / adapter.rank), *magnitude)


def fill(adapter, a, b, magnitude=None):
    """Copy factors into an adapter, and the magnitudes into DoRA's."""
    adapter.lora_A.copy_(a), adapter.lora_B.copy_(b)
    if magnitude is not None:
        adapter.lora_magnitude_vector.copy_(magnitude)
