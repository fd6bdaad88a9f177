"""Several processes as one: torchrun starts them, this file connects them.

    device = start()
    model = wrap_ddp(prior, device, autocast)
    with sync_gradients(model, last):       # DDP averages over ranks on the last micro-step only
        ...

A single process runs the same code with a world of 1, so the loop needs no branch. NCCL connects
GPUs, gloo CPUs. Every decision (stop, skip, save) is made from numbers that all ranks share.
"""

import contextlib
import datetime
import os
import signal
import sys
import warnings

import torch
import torch.distributed as torch_distributed
from torch.nn.parallel import DistributedDataParallel

from minwurst.base.console import outlive
from minwurst.base.errors import UserError, exit_with
from minwurst.base.ranks import is_main, look_right, rank, world_size

# How long ranks wait for a slow one. It has to cover what only the main rank does, such as writing
# a 15 GB checkpoint or decoding images.
TIMEOUT = datetime.timedelta(minutes=60)


def launch(main, settings, then):
    """Call main(settings) as a program, and `then(settings)` on the main rank after it.

    `then` runs when all ranks are done, so it may take longer than they would wait. If main returns
    the number of a signal, the signal ended the run: exit code 128 + number, and no `then`. A
    UserError becomes one line and exit code 2.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a traceback
    outlive()
    try:
        number = main(settings)
        # Only now that main's model is gone: freeing a group that DDP still holds can hang.
        if torch_distributed.is_initialized():
            torch_distributed.destroy_process_group()
        if number:
            sys.exit(128 + number)
        if is_main():
            then(settings)
    except Exception as error:
        exit_with(error)


def start():
    """Join the process group that torchrun's variables describe. Returns this rank's device."""
    if not look_right():
        raise UserError(
            "The environment variables RANK, WORLD_SIZE and LOCAL_RANK are not as torchrun sets "
            "them. Start the script with torchrun, or unset them.",
            one_rank=True,
        )
    world, local_rank = world_size(), int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Process {local_rank} of this machine has no GPU; there are only "
                f"{torch.cuda.device_count()}. Use torchrun --nproc_per_node=gpu.",
                one_rank=True,
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        # The CPU's fused attention has a slow backward pass: without it, a bf16 step of the
        # miniature takes a quarter less time. The switch is CUDA's in name only.
        torch.backends.cuda.enable_flash_sdp(False)
    if world > 1:
        # torchrun keeps its store through restarts, and in it the addresses of dead ranks
        # (pytorch/pytorch#135712). Agents on several machines count restarts differently.
        store, _, _ = next(torch_distributed.rendezvous("env://", timeout=TIMEOUT))
        one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if one_machine else "any"
        torch_distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, rank=rank(),
            world_size=world, store=torch_distributed.PrefixStore(f"start {attempt}", store),
        )  # fmt: skip
    return device


def to_device(tensor, device):
    """The tensor on the device. On a GPU the copy overlaps with the work already queued."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def wrap_ddp(model, device, autocast):
    """The model under DDP, with rank 0's weights on every rank; the model itself if alone."""
    if world_size() == 1:
        return model
    # gradient_as_bucket_view: gradients live in DDP's buckets, which saves a copy of them.
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # After its first backward pass, DDP rebuilds the buckets in the order in which gradients became
    # ready. With three or more ranks this changes the order of sums, so a resumed run would not
    # equal an uninterrupted one. Two passes on a tiny input get this done at the start of both: the
    # first triggers the rebuild, the second moves the gradients into the new buckets.
    with warnings.catch_warnings():
        # The depthwise gradients' strides look odd to DDP; over one channel all strides are equal.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        for _ in range(2):
            x, t, condition = model.example_inputs()
            with autocast:
                output = wrapped(x, t, **condition)
            output.sum().backward()
            wrapped.zero_grad(set_to_none=False)
    return wrapped


def sync_gradients(model, last):
    """A context for one micro-step: gradients are averaged over ranks only if `last` is true."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def mean(value):
    """The mean of a scalar tensor over ranks, as a float. Synchronises with the device."""
    value = value.clone()
    if torch_distributed.is_initialized():
        torch_distributed.all_reduce(value)
    return value.item() / world_size()


def all_gather(tensor):
    """Each rank's small tensor as a list, in the order of ranks. Synchronises with the device."""
    if not torch_distributed.is_initialized():
        return [tensor.tolist()]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    torch_distributed.all_gather(tensors, tensor)
    return torch.stack(tensors).tolist()


def gather_objects(value):
    """Every rank's picklable value, as a list on all ranks."""
    if not torch_distributed.is_initialized():
        return [value]
    values = [None] * world_size()
    torch_distributed.all_gather_object(values, value)
    return values


def on_main(function, *arguments):
    """Call on the main rank only. Every rank gets its result, or raises its UserError."""
    result, error = None, None
    if is_main():
        try:
            result = function(*arguments)
        except UserError as raised:
            error = str(raised)
    if torch_distributed.is_initialized():
        outcome = [result, error]
        torch_distributed.broadcast_object_list(outcome)
        result, error = outcome
    if error is not None:
        raise UserError(error)
    return result
