"""LoRA: training a low-rank change of frozen weights (Hu et al. 2021, arXiv 2106.09685).

    adapters = inject(prior, rank=4, alpha=4, targets=["attention"])
    save(prior, "pytorch_lora_weights.safetensors")
    load(prior, "pytorch_lora_weights.safetensors")     # into a prior without adapters

    python -m minwurst.lora show FILE
    python -m minwurst.lora merge FILE PRIOR OUTPUT --scale 0.8

A frozen W becomes W + (alpha/rank)·B·A (the paper's eq. 3), where A is (rank, in) and B is
(out, rank). B starts at zero, so a fresh adapter changes nothing. Files carry no alpha: alpha/rank
is multiplied into B, which every version of diffusers and PEFT reads alike.
"""

import argparse
import difflib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minwurst import checkpoint, models
from minwurst.config import UserError

FILE = "pytorch_lora_weights.safetensors"
EVERY = "*"
PRESETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"], "all-linear": [EVERY]}


class LoRALinear(nn.Module):
    """A frozen linear layer and its change: base(x) + scale · (alpha/rank) · B·A·dropout(x).

    scale may be set at any time after training: 0 is the base layer bit for bit, 1 as trained.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, 1.0
        self.dropout = nn.Dropout(dropout)
        drawn = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # as nn.Linear draws its weight
        zeros = torch.zeros(base.out_features, rank, dtype=torch.float32)
        device = base.weight.device  # drawn on the CPU, so that any device starts alike
        self.lora_A, self.lora_B = nn.Parameter(drawn.to(device)), nn.Parameter(zeros.to(device))

    def forward(self, x):
        if self.scale == 0:
            return self.base(x)
        out = self.base(x)                                                         # (…, out)
        a, b = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        low = F.linear(F.linear(self.dropout(x), a), b)                            # (…, out)
        return out + self.scale * self.alpha / self.rank * low

    @torch.no_grad()
    def merged(self):
        """The plain linear layer that computes the same, in the base's type."""
        change = self.scale * self.alpha / self.rank * (self.lora_B @ self.lora_A)  # (out, in)
        weight = self.base.weight.float() + change
        self.base.weight.copy_(weight.to(self.base.weight.dtype))
        return self.base


def adapters(prior):
    """The prior's adapters by the name of the layer they wrap."""
    return {name: m for name, m in prior.named_modules() if isinstance(m, LoRALinear)}


def trainable(prior):
    """The adapters' weights by name: all that is trained, saved and averaged."""
    weights = prior.named_parameters()
    return {name: weight for name, weight in weights if name.endswith((".lora_A", ".lora_B"))}


def set_scale(prior, scale):
    """How much of the LoRA is in effect: 0 none, 1 as trained; between and beyond are allowed."""
    for adapter in adapters(prior).values():
        adapter.scale = scale


def find_targets(prior, targets):
    """The names of the linear layers that `targets` mean: presets, names, or the ends of names."""
    layers = dict(prior.named_modules())
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    ends = [end for target in targets for end in PRESETS.get(target, [target])]
    found = set()
    for end in ends:
        hits = {name for name in linear if end == EVERY or f".{name}".endswith(f".{end}")}
        if not hits and any(f".{name}".endswith(f".{end}") for name in layers):
            inside = {f"{end}.{n.split(f'.{end}.')[1]}" for n in linear if f".{end}." in f".{n}"}
            hint = f" In it: {', '.join(sorted(inside))}." if inside else ""
            raise UserError(f"--lora_targets {end}: that is no linear layer.{hint}")
        if not hits:
            parts = {part for name in linear for part in (name, name.split(".", 2)[-1])}
            parts |= {name.split(".")[-1] for name in linear if not name[-1].isdigit()}
            near = difflib.get_close_matches(end, [*parts, *PRESETS]) or [*PRESETS]
            raise UserError(f"--lora_targets {end} matches no layer; near it: {', '.join(near)}.")
        found |= hits
    return [name for name in linear if name in found]


def wrap(prior, name, rank, alpha, dropout=0.0):
    """Put an adapter around the layer of this name, and return it."""
    parent, _, child = name.rpartition(".")
    adapter = LoRALinear(prior.get_submodule(name), rank, alpha, dropout)
    setattr(prior.get_submodule(parent), child, adapter)
    return adapter


def inject(prior, rank, alpha, targets, dropout=0.0):
    """Freeze the prior and put an adapter around each target. Returns what is trained, by name."""
    prior.requires_grad_(False)
    for name in find_targets(prior, targets):
        layer = prior.get_submodule(name)
        widest = min(layer.in_features, layer.out_features)
        if not 1 <= rank <= widest:
            raise UserError(f"--rank is {rank}; {name} takes 1 to {widest}.")
        wrap(prior, name, rank, alpha, dropout)
    return trainable(prior)


def merge(prior):
    """Turn every adapter, at its present scale, into plain weights; the prior is ordinary then."""
    for name, adapter in adapters(prior).items():
        parent, _, child = name.rpartition(".")
        setattr(prior.get_submodule(parent), child, adapter.merged())
    return prior


def state_dict(prior):
    """The adapters as diffusers and PEFT name them, alpha/rank multiplied into B, on the CPU."""
    state = {}
    for name, adapter in adapters(prior).items():
        folded = adapter.lora_B.detach() * (adapter.alpha / adapter.rank)
        state[f"prior.{name}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
        state[f"prior.{name}.lora_B.weight"] = folded.cpu().contiguous()
    return state


def save(prior, file):
    """Write the adapters to a file, whole or not at all; UserError where that fails."""
    file = Path(file)
    draft = file.with_name(f".{file.name}.part")
    try:
        save_file(state_dict(prior), draft, metadata={"format": "pt"})
        checkpoint.flush(draft)
        draft.replace(file)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{file} was not written: {error}. Its checkpoint is intact.") from None


def read(file):
    """A LoRA file as {layer: (A (rank, in), B (out, rank))}, alpha/rank multiplied into B.

    file: ours, one that diffusers or PEFT wrote, or the folder of one. Raises UserError that names
    the key it does not know, or says that the file is broken.
    """
    file = Path(file)
    if file.is_dir():
        inside = [file / name for name in (FILE, "adapter_model.safetensors")]
        file = next((path for path in inside if path.is_file()), inside[0])
    if not file.is_file():
        raise UserError(f"LoRA {file}: there is no such file.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"LoRA {file} can't be read: {error}") from None

    factors = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").removeprefix("prior.").removeprefix("unet.")
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            raise UserError(f"LoRA {file}: the key {key} is not of a form known here.")
        pair = factors.setdefault(name.removesuffix(end), {})
        if ENDS[end] in pair:
            raise UserError(f"LoRA {file}: {key} is there twice, under two names.")
        pair[ENDS[end]] = tensor.float()
    of_peft = any(key.startswith("base_model.model.") for key in tensors)
    scaling = scaling_of(file, metadata, of_peft)
    layers = {}
    for name, pair in factors.items():
        shapes = [pair[factor].shape for factor in "AB" if factor in pair]
        if [len(s) for s in shapes] != [2, 2] or not shapes[0][0] == shapes[1][1] > 0:
            sizes = " and ".join(str(list(shape)) for shape in shapes)
            raise UserError(f"LoRA {file}: the factors of {name} are no A and B: {sizes}.")
        layers[name] = pair["A"], pair["B"] * scaling(name, len(pair["A"]))
    if not layers:
        raise UserError(f"LoRA {file} holds no adapters.")
    return layers


ENDS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B",
}  # fmt: skip


def scaling_of(file, metadata, of_peft):
    """(layer, rank) → alpha/rank by diffusers' metadata or PEFT's adapter_config.json, else 1."""
    beside = file.with_name("adapter_config.json")
    if of_peft and not beside.is_file():
        raise UserError(f"LoRA {file} is PEFT's: its alpha is in {beside}, which is missing.")
    stored = beside.read_text(encoding="utf-8", errors="replace") if of_peft else "{}"
    stored = metadata.get("lora_adapter_metadata", stored)
    try:
        config = {  # diffusers writes PEFT's settings, each behind "prior."
            key.removeprefix("prior.").removeprefix("unet."): value
            for key, value in json.loads(stored).items()
        }
        patterns = dict(config.get("alpha_pattern") or {})
        alphas = [config.get("lora_alpha", 1), *patterns.values()]
        assert all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas)
        # PEFT takes a pattern as a regular expression for the end of the layer's name.
        patterns = {re.compile(rf"(.*\.)?({end})$"): alpha for end, alpha in patterns.items()}
    except (ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, re.error):
        raise UserError(f"LoRA {file}: its settings can't be read: {stored[:100]}") from None

    def scaling(layer, rank):
        own = [alpha for end, alpha in patterns.items() if end.match(layer)]
        alpha = own[0] if own else config.get("lora_alpha", rank)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling


def check_layers(prior, layers, file):
    """UserError where a file's layers or shapes are not the prior's."""
    linear = {name: m for name, m in prior.named_modules() if isinstance(m, nn.Linear)}
    for name, (a, b) in layers.items():
        layer = linear.get(name) or linear.get(f"{name}.base")
        if layer is None and name in dict(prior.named_modules()):
            raise UserError(f"LoRA {file}: {name} is no linear layer; only those are adapted here.")
        if layer is None:
            raise UserError(f"LoRA {file} is for another model: the prior has no layer {name}.")
        if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise UserError(
                f"LoRA {file}: {name} is {a.shape[1]} → {b.shape[0]} wide there, and "
                f"{layer.in_features} → {layer.out_features} in the prior."
            )


@torch.no_grad()
def load(prior, file):
    """Put a file's adapters around a prior's layers, frozen, ready for `set_scale` or `merge`."""
    layers = read(file)
    check_layers(prior, layers, file)
    for name, (a, b) in layers.items():
        adapter = wrap(prior, name, rank=len(a), alpha=len(a))
        adapter.lora_A.copy_(a), adapter.lora_B.copy_(b)
    prior.requires_grad_(False)
    return prior


@torch.no_grad()
def start_from(prior, file):
    """Fill injected adapters from a file with the same layers and rank, to train on from there."""
    layers, mine = read(file), adapters(prior)
    check_layers(prior, layers, file)
    if layers.keys() != mine.keys():
        name = sorted(layers.keys() ^ mine.keys())[0]
        raise UserError(f"--lora_weights {file}: {name} is in only one of it and --lora_targets.")
    for name, (a, b) in layers.items():
        adapter = mine[name]
        if len(a) != adapter.rank:
            raise UserError(f"--lora_weights {file} has rank {len(a)}, --rank is {adapter.rank}.")
        adapter.lora_A.copy_(a), adapter.lora_B.copy_(b / (adapter.alpha / adapter.rank))


def show(file):
    """Print what a file holds: layers by kind, rank, parameters, size of the change."""
    layers = read(file)
    kinds = {}
    for name, (a, b) in layers.items():
        kind = ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name
        kinds.setdefault(kind, []).append((len(a), a.numel() + b.numel(), (b @ a).norm().item()))
    total = sum(count for found in kinds.values() for _, count, _ in found)
    print(f"{file}: {len(layers)} layers, {total:,} parameters")
    for kind, found in kinds.items():
        ranks = ", ".join(str(rank) for rank in sorted({rank for rank, _, _ in found}))
        change = sum(norm for *_, norm in found) / len(found)
        print(f"  {kind}: {len(found)} × rank {ranks}, mean ‖B·A‖ {change:.4g}")


def merge_files(file, source, output, scale):
    """Write the prior of folder `source` with a LoRA in its weights to the folder `output`."""
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} is there already: name a new folder.")
    source_folder = models.locate("pretrained_prior_model_name_or_path", source)
    prior = load(models.load_prior(source_folder), file)
    set_scale(prior, scale)
    draft = output.with_name(f".{output.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        merge(prior).save_pretrained(draft)
        checkpoint.put_in_place(draft, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} was not written: {error}") from None
    print(f"{output} holds the prior of {source} with {scale} × {file}")


def main():
    """`python -m minwurst.lora`: see the top of this page."""
    parser = argparse.ArgumentParser(prog="python -m minwurst.lora", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    shown = verbs.add_parser("show", help="what a LoRA file holds")
    merged = verbs.add_parser("merge", help="a prior with a LoRA in its weights")
    shown.add_argument("file", help="the LoRA's file or folder")
    merged.add_argument("file", help="the LoRA's file or folder")
    merged.add_argument("prior", help="folder or Hub repository of the base prior")
    merged.add_argument("output", help="the folder to write")
    merged.add_argument("--scale", type=float, default=1.0, help="how much of the LoRA (default 1)")
    given = parser.parse_args()
    try:
        if given.verb == "show":
            show(given.file)
        else:
            merge_files(given.file, given.prior, given.output, given.scale)
    except UserError as error:
        sys.exit(f"minwurst.lora: {error}")


if __name__ == "__main__":
    main()
