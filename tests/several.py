"""Trains in processes of their own, several together as torchrun starts them, and disturbs them."""

import functools
import multiprocessing
import os
import resource
import signal
import socket
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import checkpoints
import data
import distributed
import train_dynat

FORKSERVER = multiprocessing.get_context("forkserver")  # a process that has imported this file and forks the others
FORKSERVER.set_forkserver_preload(["several"])

# What happens when the last epoch of a run begins: accidents, and ranks that do not share what they must.
DISTURBANCES = {
    "killed in a save": lambda: setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGKILL)),
    "terminated": lambda: signal.raise_signal(signal.SIGTERM),
    "interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    "no weight": lambda: setattr(distributed.GradientReducer, "weight", property(lambda _: 0.5, lambda *_: None)),
    "no sum": lambda: setattr(distributed, "all_reduce", lambda *tensors: tensors),
    "no argument": lambda: [method.update(loop_arguments=("epoch",)) for method in train_dynat.METHODS.values()],
    "no buffers": lambda: setattr(distributed, "average_buffers", lambda _: None),
    "own start": lambda: setattr(train_dynat, "gaussian_start", lambda x, _: x + 0.001 * torch.randn_like(x)),
    "own noise": lambda: setattr(train_dynat, "normal_noise", lambda x, _, shard, k: torch.randn_like(x[shard])),
}


def plain(num_classes):
    """A network without BatchNorm: no image depends on another one of its batch."""
    hidden = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(144, num_classes))


def train(folder, variables, network, disturbance, runs):
    """Trains each (name, arguments) of `runs` in FOLDER/NAME, one after the other. Rank N leaves its last checkpoint
    beside it in NAME-N.pt and what it prints in N.txt. Exits with the first status that is not 0."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    rank = int(variables.get("RANK", 0))
    sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)
    data.TINY_SIZE = {"train": 100, "test": 20}
    train_dynat.build_model = lambda _, num_classes: network(num_classes)
    # One process group for all runs: a second one at the same address would not be safe.
    dist.init_process_group, dist.destroy_process_group = functools.cache(dist.init_process_group), lambda: None
    learning_rate, run_on_rank0 = train_dynat.learning_rate, distributed.run_on_rank0

    def disturbed(settings, epoch):
        if disturbance and epoch == settings["epochs"]:
            DISTURBANCES[disturbance]()
        return learning_rate(settings, epoch)

    def keep(function, *args, **kwargs):
        result = run_on_rank0(function, *args, **kwargs)
        if function is checkpoints.save_run:
            torch.save(args[1], folder / f"{args[0].name}-{rank}.pt")
        return result

    train_dynat.learning_rate, distributed.run_on_rank0 = disturbed, keep
    for name, arguments in runs:
        if status := train_dynat.main([*arguments, "--out", str(folder / name)]):
            sys.exit(status)


def start(folder, world_size, *job):
    """Starts `train` on every rank. Returns the processes."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    processes = []
    for rank in range(world_size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, **of_all} if world_size > 1 else {}
        processes.append(FORKSERVER.Process(target=train, args=(folder, variables, *job)))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # so that it can import this file
            processes[-1].start()
    return processes
