"""LoRA: training a low-rank update of frozen weights (Hu et al. 2021, arXiv 2106.09685), and DoRA.

    trainable = add_adapters(prior, rank=4, alpha=4, targets=["attention"])

A frozen W becomes W + (alpha/rank)·B·A (the paper's eq. 3), where A is (rank, in) and B is
(out, rank). B starts at zero, so a new adapter changes nothing. DoRA, with dora=True, also trains
the length of each row. Files are in edge/lora_file.py.
"""

import difflib
import math

import torch
import torch.nn.functional as F
from torch import nn

from minwurst.base.errors import UserError

EVERY = "*"
PRESETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"], "all-linear": [EVERY]}


class LoRALinear(nn.Module):
    """A frozen linear layer and its update: base(x) + scale · (alpha/rank) · B·A·dropout(x).

    scale can be set at any time: 0 is the base layer bit for bit, 1 is as trained.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, 1.0
        self.dropout = nn.Dropout(dropout)
        a = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear initialises its weight
        b = torch.zeros(base.out_features, rank, dtype=torch.float32)
        device = base.weight.device  # initialised on the CPU, so that all devices start equal
        self.lora_A, self.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))

    def forward(self, x):
        if self.scale == 0:
            return self.base(x)
        out = self.base(x)                                                         # (…, out)
        a, b = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        update = F.linear(F.linear(self.dropout(x), a), b)                         # (…, out)
        return out + self.scale * self.alpha / self.rank * update

    def change(self):
        """What is added to the weight at scale 1, in fp32."""
        return self.alpha / self.rank * (self.lora_B @ self.lora_A)                # (out, in)

    @torch.no_grad()
    def merged(self):
        """The plain linear layer that computes the same, in the base's type."""
        weight = self.base.weight.float() + self.scale * self.change()
        self.base.weight.copy_(weight.to(self.base.weight.dtype))
        return self.base


class DoRALinear(LoRALinear):
    """LoRA of a weight's direction, beside its magnitude (DoRA: Liu et al. 2024, arXiv 2402.09353).

    With V = W + (alpha/rank)·B·A, each row of W becomes W' = m · V/‖V‖ (the paper's eq. 5). The
    magnitude m, one number per row, is trained too and starts at ‖W‖, so that a new adapter changes
    nothing. The backward pass takes ‖V‖ as a constant (section 4.3).

    scale moves the weight in a straight line, to W + scale · (W' − W): 0 is the base layer bit for
    bit, 1 is as trained. Dropout is on the input of W' − W, as in PEFT.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.lora_magnitude_vector = nn.Parameter(base.weight.detach().float().norm(dim=1))  # (out)

    def forward(self, x):
        out = self.base(x)                                                         # (…, out)
        if self.scale == 0:
            return out
        dropped = self.dropout(x)
        if self.training and self.dropout.p:
            product = F.linear(dropped, self.base.weight)            # without bias, (…, out)
        else:
            product = out if self.base.bias is None else out - self.base.bias.to(out.dtype)
        a, b = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        update = self.alpha / self.rank * F.linear(F.linear(dropped, a), b)        # (…, out)
        # The gain is near 1, so 1 is subtracted before rounding to half precision.
        beyond = (self.gain() - 1).to(out.dtype)                                   # (out)
        return out + self.scale * (update + beyond * (product + update))           # W'·x = gain·V·x

    def gain(self):
        """m/‖V‖, in fp32 also under autocast. A row of zeros stays zero."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            changed = self.base.weight.float() + super().change().detach()         # (out, in)
        norm = changed.norm(dim=1)                                                 # (out)
        return self.lora_magnitude_vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def change(self):
        weight = self.base.weight.float()
        return self.gain()[:, None] * (weight + super().change()) - weight         # (out, in)


def add_adapters(prior, rank, alpha, targets, dropout=0.0, dora=False):
    """Freeze the prior and wrap each target layer. Returns the trainable parameters by name."""
    prior.requires_grad_(False)
    for name in find_targets(prior, targets):
        layer = prior.get_submodule(name)
        largest = min(layer.in_features, layer.out_features)
        if not 1 <= rank <= largest:
            raise UserError(f"--rank is {rank}; {name} allows 1 to {largest}.")
        add_adapter(prior, name, rank, alpha, dropout, dora)
    return adapter_weights(prior)


def add_adapter(prior, name, rank, alpha, dropout=0.0, dora=False):
    """Wrap the layer of this name in an adapter, and return the adapter."""
    parent, _, child = name.rpartition(".")
    kind = DoRALinear if dora else LoRALinear
    adapter = kind(prior.get_submodule(name), rank, alpha, dropout)
    setattr(prior.get_submodule(parent), child, adapter)
    return adapter


def find_targets(prior, targets):
    """The names of the linear layers that `targets` select: presets, names, or endings of names."""
    layers = dict(prior.named_modules())
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    endings = [ending for target in targets for ending in PRESETS.get(target, [target])]
    selected = set()
    for ending in endings:
        matches = {n for n in linear if ending == EVERY or f".{n}".endswith(f".{ending}")}
        if not matches and any(f".{name}".endswith(f".{ending}") for name in layers):
            inside = {
                f"{ending}.{f'.{n}'.split(f'.{ending}.', 1)[1]}"
                for n in linear
                if f".{ending}." in f".{n}"
            }
            hint = f" It contains {', '.join(sorted(inside))}." if inside else ""
            raise UserError(f"--lora_targets {ending}: not a linear layer.{hint}")
        if not matches:
            parts = {part for name in linear for part in (name, name.split(".", 2)[-1])}
            parts |= {name.split(".")[-1] for name in linear if not name[-1].isdigit()}
            near = difflib.get_close_matches(ending, [*parts, *PRESETS]) or [*PRESETS]
            raise UserError(
                f"--lora_targets {ending}: matches no layer. Similar: {', '.join(near)}."
            )
        selected |= matches
    return [name for name in linear if name in selected]


def adapters(prior):
    """The prior's adapters by the name of the layer they wrap."""
    return {name: m for name, m in prior.named_modules() if isinstance(m, LoRALinear)}


def adapter_weights(prior):
    """The adapters' parameters by name: all that is trained, saved and averaged."""
    return {
        f"{name}.{part}": weight
        for name, adapter in adapters(prior).items()
        for part, weight in adapter.named_parameters()
        if not part.startswith("base.")
    }


def set_scale(prior, scale):
    """Set the strength of all adapters: 0 is off, 1 as trained; any number is allowed."""
    for adapter in adapters(prior).values():
        adapter.scale = scale


def merge(prior):
    """Turn every adapter, at its current scale, into plain weights, and return the prior."""
    for name, adapter in adapters(prior).items():
        parent, _, child = name.rpartition(".")
        setattr(prior.get_submodule(parent), child, adapter.merged())
    return prior
