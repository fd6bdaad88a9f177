"""Several processes as one: `torchrun` starts them, this page joins them.

    rank, world, device = start()
    model = wrap(prior, device)
    with sync_gradients(model, last):   # DDP averages over ranks on the last micro-step only
        ...

One process is the same code with a world of 1: nothing here branches in the loop. NCCL joins GPUs,
gloo joins CPUs. Everything that decides (stop, skip, save) is decided on numbers all ranks share.
"""

import contextlib
import datetime
import os
import signal
import sys
import time
import traceback
import warnings

import torch
import torch.distributed as torch_dist
from torch.nn.parallel import DistributedDataParallel

from minwurst import config
from minwurst.config import UserError

# How long ranks wait for one that stalls. It covers what only one does: writing a checkpoint of
# 15 GB, drawing pictures.
PATIENCE = datetime.timedelta(minutes=60)


def run(main, afterwards, kind):
    """Call main(settings) with the command line as a `kind` of Settings; what `train.py` starts.

    When all ranks are through, afterwards(settings) is called on the main one, which may then take
    longer than the others would wait. A UserError becomes one line, once a machine, and exit
    code 2. Where main returns the number of a signal, it ended the run: exit code 128 + number.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends, without a page of traceback
    try:
        settings = config.parse(kind)
        number = main(settings)
        last = is_main()
        # Only now that main's model is gone: a group that DDP holds can hang when it is freed.
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        if number:
            sys.exit(128 + number)
        if last:
            afterwards(settings)
    except Exception as error:
        mistake = isinstance(error, UserError)
        if not mistake:
            traceback.print_exc()
        elif error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        else:  # leaving first would have torchrun end the rank that speaks before it has spoken
            time.sleep(10)
        sys.stdout.flush(), sys.stderr.flush()
        if world_size() > 1:  # leaving in good order can hang while others still wait for us
            os._exit(2 if mistake else 1)
        sys.exit(2 if mistake else 1)


def start():
    """Join the process group that torchrun's variables describe. Returns (rank, world, device)."""
    number, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            error = UserError(
                f"Process {local_rank} of this machine finds no GPU left of "
                f"{torch.cuda.device_count()}. Start one a GPU: torchrun --nproc_per_node=gpu."
            )
            error.alone = True
            raise error
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world > 1:
        # torchrun keeps its store through restarts, and with it the addresses of ranks that are
        # dead (pytorch/pytorch#135712). Agents of several machines count restarts differently.
        store, _, _ = next(torch_dist.rendezvous("env://", timeout=PATIENCE))
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        start = os.environ["TORCHELASTIC_RESTART_COUNT"] if alone else "any"
        torch_dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, rank=number,
            world_size=world, store=torch_dist.PrefixStore(f"start {start}", store),
        )  # fmt: skip
    return number, world, device


def world_size():
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank():
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def is_main():
    """Whether this is the rank that writes files and talks."""
    return rank() == 0


def wrap(model, device, autocast):
    """The model under DDP, every rank with rank 0's weights; one process has the model itself."""
    if world_size() == 1:
        return model
    # Gradients live in DDP's buckets, which saves a copy of them.
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # After its first backward pass DDP lays the buckets out anew, in the order in which gradients
    # became ready. From three ranks on that changes the order of sums, so a resumed run would not
    # equal an uninterrupted one. Passes on next to nothing get it over with in both: the first has
    # them laid out anew, the second puts the gradients into the new ones.
    with warnings.catch_warnings():
        # It finds the depthwise gradients' strides odd; over one channel all strides are the same.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        for _ in range(2):
            with autocast:
                output = wrapped(*model.example_inputs())
            output.sum().backward()
            wrapped.zero_grad(set_to_none=False)
    return wrapped


def sync_gradients(model, last):
    """A context for one micro-step: gradients are averaged over ranks only where `last` is true."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def mean(value):
    """The mean over ranks of a scalar tensor, as a float. Waits for the device."""
    value = value.clone()
    if torch_dist.is_initialized():
        torch_dist.all_reduce(value)
    return value.item() / world_size()


def share(flags):
    """A small tensor of each rank as one list a rank, the same everywhere. Waits for the device."""
    if not torch_dist.is_initialized():
        return [flags.tolist()]
    everyone = [torch.empty_like(flags) for _ in range(world_size())]
    torch_dist.all_gather(everyone, flags)
    return torch.stack(everyone).tolist()


def gather(value):
    """Every rank's picklable value, as a list on all ranks."""
    if not torch_dist.is_initialized():
        return [value]
    values = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def on_main(function, *args):
    """Call on the main rank only; every rank gets its result or its UserError, and goes on."""
    outcome = [None, None]
    if is_main():
        try:
            outcome = [function(*args), None]
        except UserError as error:
            outcome = [None, str(error)]
    if torch_dist.is_initialized():
        torch_dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
