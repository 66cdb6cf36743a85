"""Several processes under torchrun: each rank has a shard of every batch and its own copy of the networks.

torch documents that DistributedDataParallel does not support `autograd.grad`, which attacks use. So gradients are
all-reduced here, once per update, before `optimizer.step()`. In a single process nothing is exchanged.
Of this project it imports `cli`.
"""

import json
import os
import time
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

from cli import TORCHRUN, UserError, pick_device, under_torchrun


@contextmanager
def process_group(name):
    """This process's device; without a `name` a GPU if there is one. Under torchrun the ranks are connected inside the
    `with` (gloo between CPUs, NCCL between GPUs), and only rank 0 prints. Raises UserError if `name` cannot be used."""
    if not under_torchrun():
        check_launcher()
        yield pick_device(name)
        return
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda:"):
        raise UserError("under torchrun every process takes a GPU of its own: leave --device out, or say --device cuda")
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "cuda" and local_world_size > torch.cuda.device_count():
        raise UserError(f"{local_world_size} processes, but only {torch.cuda.device_count()} GPUs: start fewer")
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() > 0:
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(devnull))
            stack.enter_context(redirect_stderr(devnull))
        yield device


def check_launcher():
    """Raises UserError if somebody has set WORLD_SIZE for several processes, but not all that torchrun sets: each of
    them would train alone."""
    processes = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing and processes.isdecimal() and int(processes) > 1:
        raise UserError(f"WORLD_SIZE is {processes}, but there is no {', '.join(missing)}: start it with torchrun")


def rank():
    """The number of this process; 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(total):
    """The slice of `total` images that belongs to this rank. The ranks' sizes differ by one at most."""
    return slice(total * rank() // world_size(), total * (rank() + 1) // world_size())


def check_batch_size(images, batch_size):
    """Raises UserError if an epoch's last batch has fewer images than there are processes."""
    smallest = images % batch_size or min(images, batch_size)
    if smallest < world_size():
        raise UserError(f"a batch of {smallest} images for {world_size()} processes: choose another --batch-size")


def all_reduce(*tensors):
    """The sum of each tensor over all ranks, in one exchange. In a single process the tensors themselves."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def on_every_rank(function):
    """`function()`. If it fails on one rank, all raise its error: no rank waits for one that has ended."""
    if world_size() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except (UserError, OSError) as raised:
        error = str(raised)
    errors = [None] * world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise UserError(error)
    return result


def run_on_rank0(function, *args):
    """`function(*args)` on rank 0 alone; its result, or its error, on all ranks."""
    if world_size() == 1:
        return function(*args)
    result = [on_every_rank(lambda: function(*args) if rank() == 0 else None)]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def in_order(function, numbers):
    """`function(i)` for each i of the range `numbers`, one by one, on rank 0. Each process takes the next number that
    nobody has, so that none waits for a slower one; the other ranks get nothing. What goes wrong on one of them is
    raised on rank 0. The results are lists, dicts, numbers and strings, which JSON keeps."""
    if world_size() == 1:
        yield from map(function, numbers)
        return
    address = os.environ["MASTER_ADDR"]
    if rank() == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    port = run_on_rank0(lambda: store.port)
    if rank() > 0:
        store = dist.TCPStore(address, port, wait_for_workers=False)

    def take():
        """Works on the next number and keeps the result in the store. False if there is none, or after a mistake."""
        place = store.add("taken", 1) - 1
        if place >= len(numbers):
            return False
        try:
            found = {"result": function(numbers[place])}
        except (UserError, OSError) as error:
            found = {"error": str(error)}
        store.set(str(numbers[place]), json.dumps(found))
        return "error" not in found

    if rank() > 0:
        try:
            while take():
                pass
        except dist.DistError:
            raise UserError("rank 0, which keeps the results, has ended") from None
        return
    for i in numbers:
        while not store.check([str(i)]):
            if not take():
                time.sleep(0.02)
        found = json.loads(store.get(str(i)))
        if "error" in found:
            raise UserError(found["error"])
        yield found["result"]


@contextmanager
def on_rank0(context):
    """`context`, entered on rank 0 alone, around the `with` of all ranks, which get what it gives."""
    with ExitStack() as stack:
        yield run_on_rank0(stack.enter_context, context)


def first_rank_first(function):
    """`function()` on every rank, on each machine's first rank before the others, which then find its downloads."""
    nothing = lambda: None
    if world_size() == 1 or os.environ["LOCAL_RANK"] == "0":
        result = on_every_rank(function)
        on_every_rank(nothing)  # the others' turn
    else:
        on_every_rank(nothing)
        result = on_every_rank(function)
    return result


class GradientReducer:
    """Makes `optimizer.step()` use the gradient of the mean loss over the whole batch.

    Each rank's gradient is of the mean over its own shard. Before each step they are added up, each times `weight`, the
    rank's share of the batch, which the training loop sets."""

    def __init__(self, optimizer):
        self.weight = 1.0
        if world_size() > 1:
            optimizer.register_step_pre_hook(self._reduce)

    def _reduce(self, optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        totals = all_reduce(*(self.weight * gradient for gradient in gradients))
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total)


def average_buffers(networks):
    """BatchNorm normalises with each rank's own statistics, as under DataParallel in the releases. After each update
    its running statistics become their mean over the ranks, so that all ranks keep the same networks."""
    buffers = [b for model in networks.values() for b in model.buffers() if b.is_floating_point()]
    if world_size() > 1 and buffers:
        for buffer, total in zip(buffers, all_reduce(*buffers), strict=True):
            buffer.copy_(total / world_size())
