"""What a checkpoint holds: declared once, by keyword, for saving and restoring.

    state = State(weights=trainable, optimizer=optimizer, ema=ema.average, scaler=scaler)
    tensors, numbers = state.collect()
    state.restore(tensors, numbers)

Another thing to save is another keyword: a dict of tensors, an optimizer, or any object with
state_dict and load_state_dict whose state is JSON. Random numbers need no state.
"""

import torch


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
        state stays as it is: a GradScaler in a run that was not fp16 before.
        """
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


@torch.no_grad()
def copy_into(tensors, source):
    """Copy source's tensors into those of the same name; both must have the same names."""
    assert tensors.keys() == source.keys(), sorted(tensors.keys() ^ source.keys())[:3]
    for name, tensor in tensors.items():
        tensor.copy_(source[name])
