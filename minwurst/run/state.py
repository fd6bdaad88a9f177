"""What a checkpoint holds: declared once, by keyword, for saving and restoring.

    state = State(weights=trainable, optimizer=optimizer, ema=ema.average, scaler=scaler)
    tensors, numbers = state.collect()
    state.restore(tensors, numbers)

Another thing to save is another keyword: a dict of tensors, an optimizer, or any object with
state_dict and load_state_dict whose state is JSON. Random numbers need no state.
"""

import torch

from minwurst.base.errors import UserError


class State:
    def __init__(self, weights, **parts):
        """weights: the trained parameters by name. Optimizer state is saved under these names."""
        self.parts = {"weights": weights, **parts}
        self.weights = weights

    def collect(self):
        """({keyword: {name: tensor}}, {keyword: what JSON can hold}), nothing copied."""
        tensors, numbers = {}, {}
        for keyword, part in self.parts.items():
            if isinstance(part, dict):
                tensors[keyword] = part
            elif isinstance(part, torch.optim.Optimizer):
                tensors[keyword], numbers[keyword] = optimizer_state(part, self.weights)
            else:
                numbers[keyword] = part.state_dict()
        return tensors, numbers

    def restore(self, tensors, numbers):
        """Put back what `collect` gave.

        Learning rates and other options stay as the optimizer was made with. A part with no saved
        state stays as it is: a GradScaler in a run that was not fp16 before. Names and shapes are
        checked before anything is copied; a UserError names the first that does not fit.
        """
        for keyword, part in self.parts.items():
            expected = self.weights if isinstance(part, torch.optim.Optimizer) else part
            if isinstance(expected, dict):
                check_fit(keyword, tensors.get(keyword, {}), expected, every=expected is part)
            if isinstance(part, torch.optim.AdamW):
                check_adam(tensors.get(keyword, {}), expected)
        try:
            self.copy(tensors, numbers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--resume_from_checkpoint: its state.json does not fit this model ({error!r}). "
                "Resume from another checkpoint by its path."
            ) from None

    def copy(self, tensors, numbers):
        """`restore`, with whatever error there may be."""
        for keyword, part in self.parts.items():
            saved, counted = tensors.get(keyword, {}), numbers.get(keyword, {})
            if isinstance(part, dict):
                copy_into(part, saved)
            elif isinstance(part, torch.optim.Optimizer):
                restore_optimizer(part, self.weights, saved, counted)
            elif counted:
                part.load_state_dict(counted)


def optimizer_state(optimizer, weights):
    """The optimizer's state as ({"weight.exp_avg": tensor, …}, {"weight.key": number, …})."""
    tensors, numbers = {}, {}
    for name, weight in weights.items():
        for key, value in optimizer.state.get(weight, {}).items():
            (tensors if torch.is_tensor(value) else numbers)[f"{name}.{key}"] = value
    return tensors, numbers


def restore_optimizer(optimizer, weights, tensors, numbers):
    """The inverse, for any number of parameter groups."""
    groups = optimizer.param_groups
    index = {id(weight): i for i, weight in enumerate(w for g in groups for w in g["params"])}
    state = {}
    for path, value in {**tensors, **numbers}.items():
        name, key = path.rsplit(".", 1)
        if torch.is_tensor(value):  # copied, because a loaded tensor is a view of the file
            value = value.to(weights[name].device, copy=True)
        state.setdefault(index[id(weights[name])], {})[key] = value
    options = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": options})


def check_fit(keyword, saved, expected, every):
    """UserError if saved tensors do not belong to the expected ones.

    every: all of them are saved, under the same names. Otherwise, "name.key" belongs to "name", and
    has its shape if it has more than one dimension.
    """
    missing = sorted(expected.keys() - saved.keys()) if every else []
    for name, tensor in saved.items():
        like = expected.get(name if every else name.rsplit(".", 1)[0])
        unlike = like is None or tensor.shape != like.shape and (every or tensor.dim() > 1)
        if unlike or every and tensor.is_floating_point() != like.is_floating_point():
            shape = list(tensor.shape)
            missing.insert(0, f"{name} {shape}, for {list(like.shape) if like is not None else 0}")
    if missing:
        raise UserError(
            f"--resume_from_checkpoint: its {keyword}.safetensors does not fit this model: "
            f"{missing[0]}. Use the model and flags that it was written with."
        )


def check_adam(saved, weights):
    """UserError unless every trained weight, or none, has all that torch's AdamW remembers of it.

    The fused AdamW would read beyond a tensor that has fewer numbers than its weight. Buffers,
    which may be among the weights, have no such state.
    """
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    for name, weight in trained.items() if saved else ():
        for key, shape in (("step", ()), ("exp_avg", weight.shape), ("exp_avg_sq", weight.shape)):
            found = saved.get(f"{name}.{key}")
            if found is None or found.shape != shape or not found.is_floating_point():
                raise UserError(
                    f"--resume_from_checkpoint: its optimizer.safetensors has no {name}.{key} that "
                    "fits this model. Use another checkpoint."
                )


@torch.no_grad()
def copy_into(tensors, source):
    """Copy source's tensors into those of the same name."""
    for name, tensor in tensors.items():
        tensor.copy_(source[name])
