"""One of several processes that train together in float64: what test_engine.py starts, with torchrun's variables set.

    python tests/several.py FOLDER ENTRY ...

An entry is METHOD-NETWORK, with +NAME for something broken on purpose or for an interruption; each is a run of three
updates in FOLDER/ENTRY, where every process leaves its networks.
"""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import mutant

import data
import engine
import losses
import train_dynat
import variants.awp
from models import CNN


def plain(num_classes):
    """A network without BatchNorm: no image sees another one of its batch."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, num_classes),
    )  # fmt: skip


def alone(*tensors):
    return tensors


def own_start(x, draws):
    return x + 0.001 * torch.randn(x.shape, generator=data.generator("cpu", engine.rank()), dtype=x.dtype)


BROKEN = {
    "share": lambda: mock.patch.object(
        engine, "global_gradient", mutant(engine.global_gradient, ("share * gradient", "gradient / count()"))
    ),
    "gradient": lambda: mock.patch.object(engine, "sum_over_processes", alone),
    "weights": lambda: mock.patch.object(losses, "sum_over_processes", alone),
    "perturbation": lambda: mock.patch.object(variants.awp, "sum_over_processes", alone),
    "draws": lambda: mock.patch.object(train_dynat, "near_start", own_start),
    "statistics": lambda: mock.patch.object(engine, "average_statistics", lambda _: None),
}


def run(folder, entry):
    """The run of an entry; leaves this process's networks in FOLDER/ENTRY/RANK.pt."""
    name, _, extra = entry.partition("+")
    method, _, network = name.rpartition("-")
    out = folder / entry
    build = {"plain": plain, "cnn": CNN}[network]
    argv = ["--dataset", "tiny", "--method", method, "--train-images", "70", "--batch-size", "29", "--epochs", "1"]
    argv += ["--steps", "3", "--ema", "0.9", "--val-images", "21", "--lr-milestones", "9", "--out", str(out)]
    used = train_dynat.options(train_dynat.METHODS[method])
    for flag, value in (("burn_in", "0"), ("awp_start", "1")):  # weights and perturbation from the first epoch on
        argv += [f"--{flag.replace('_', '-')}", value] if flag in used else []
    kept, prepare = [], train_dynat.prepare_networks

    def keep(*args):
        kept.append(prepare(*args))
        return kept[-1]

    def stop(stopped):
        if engine.rank() == engine.count() - 1:  # one process alone gets the signal
            signal.raise_signal(signal.SIGTERM)
        return asked(stopped)

    asked = engine.Stop.asked
    with mock.patch.object(train_dynat, "build_model", lambda _, classes: build(classes)):
        if extra == "stopped":
            with mock.patch.object(engine.Stop, "asked", stop):
                assert train_dynat.main(argv) == 143
            argv = ["--out", str(out), "--resume"]
        with mock.patch.object(train_dynat, "prepare_networks", keep), BROKEN.get(extra, mock.MagicMock)():
            assert train_dynat.main(argv) == 0
    networks, _ = kept[-1]
    state = {f"{role}.{key}": value for role, model in networks.items() for key, value in model.state_dict().items()}
    torch.save(state, out / f"{engine.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    data.TINY_SIZE = {"train": 100, "test": 20}
    if "RANK" in os.environ:  # one group for all runs: a second one at the same address would not be safe
        dist.init_process_group("gloo")
        dist.init_process_group = dist.destroy_process_group = lambda *_: None
    for entry in sys.argv[2:]:
        run(Path(sys.argv[1]), entry)
