"""Real processes: several that train together agree with one; a run whose process is killed goes on."""

import functools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import checkpoints
import cli
import data
import distributed
import evaluate
import train_dynat
from cli import UserError
from models import CNN
from train_dynat import METHODS, main

SHORT = ["--dataset", "tiny", "--device", "cpu", "--train-images", "70", "--batch-size", "29", "--steps", "2"]

FORKSERVER = multiprocessing.get_context("forkserver")  # a process that has imported this file and forks the others
FORKSERVER.set_forkserver_preload(["test_distributed"])

# What happens when the last epoch of a run begins: accidents, and ranks that do not share what they must.
DISTURBANCES = {
    "killed in a save": lambda: setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGKILL)),
    "terminated": lambda: signal.raise_signal(signal.SIGTERM),
    "interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    "no weight": lambda: setattr(distributed.GradientReducer, "weight", property(lambda _: 0.5, lambda *_: None)),
    "no sum": lambda: setattr(distributed, "all_reduce", lambda *tensors: tensors),
    "no argument": lambda: [method.update(needs=("epoch",)) for method in METHODS.values()],
    "no buffers": lambda: setattr(distributed, "average_buffers", lambda _: None),
    "own start": lambda: setattr(train_dynat, "gaussian_start", lambda x, _: x + 0.001 * torch.randn_like(x)),
    "own noise": lambda: setattr(train_dynat, "normal_noise", lambda x, _, shard, k: torch.randn_like(x[shard])),
}


def plain(num_classes):
    """A network without BatchNorm: no image depends on another one of its batch."""
    hidden = [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(144, num_classes))


def train_all(folder, variables, network, disturbance, runs):
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
        if status := main([*arguments, "--out", str(folder / name)]):
            sys.exit(status)


def evaluate_on_rank(folder, variables, accident, arguments):
    """One evaluation, with an accident when rank 0 has written its second batch, or a mistake on rank 1."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    rank = int(variables.get("RANK", 0))
    sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    append, attack, lines = evaluate.append, evaluate.attack_columns, []

    def disturbed_append(path, line):
        append(path, line)
        lines.append(line)
        if isinstance(accident, signal.Signals) and len(lines) == 3:  # a head and two batches
            signal.raise_signal(accident)

    def disturbed_attack(*arguments, **settings):
        if accident == "mistake" and rank == 1:
            raise UserError("rank 1 found a damaged image")
        if accident == "mistake" and not lines[1:]:
            time.sleep(2)  # rank 1 gets a batch
        return attack(*arguments, **settings)

    evaluate.append, evaluate.attack_columns = disturbed_append, disturbed_attack
    sys.exit(evaluate.main(arguments))


def lifted_on_rank(folder, variables):
    """Three updates of dynat_step in somebody's loop, with DistributedDataParallel; rank N leaves its weights."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    networks = [plain(10), plain(10)]
    weights = [weight for network in networks for weight in network.parameters()]
    optimizer, called, shard = torch.optim.SGD(weights, 0.1, 0.9), networks, slice(None)
    if variables:
        dist.init_process_group("gloo")
        called = [nn.parallel.DistributedDataParallel(network) for network in networks]
        shard = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    for _ in range(3):
        x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
        start = x + 0.001 * torch.randn_like(x)
        settings = {"inner": True, "beta": 1.0, "epsilon": 0.031, "step_size": 2 / 255, "steps": 3}
        train_dynat.dynat_step(*called, optimizer, x[shard], y[shard], start[shard], **settings)
    torch.save(weights, folder / f"{variables.get('RANK', 'alone')}.pt")


def launch(folder, world_size, *job, target=train_all):
    """`target` on every rank, as torchrun starts them. Returns the exit statuses, negative after a signal."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    processes = []
    for rank in range(world_size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, **of_all} if world_size > 1 else {}
        processes.append(FORKSERVER.Process(target=target, args=(folder, variables, *job)))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # so that it can import this file
            processes[-1].start()
    for process in processes:
        process.join(200)
        if process.exitcode is None or processes[0].exitcode < 0:  # torchrun kills the others with rank 0
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def arguments(method):
    """One epoch: batches of 29, 29 and 12 images; instance weights and AWP from the first update on."""
    used = METHODS[method]["step_settings"]
    early = [flag for name, flag in (("burn_in", "--burn-in=0"), ("awp_start", "--awp-start=1")) if name in used]
    return [*SHORT, "--method", method, "--epochs", "1", "--ema", "0.9", "--val-images", "21", *early]


def train(folder, world_size, methods, network=plain, disturbance=""):
    """A run of each method; returns what rank N's last checkpoint holds: found(method, N)."""
    runs = [(method, arguments(method)) for method in methods]
    assert launch(folder, world_size, network, disturbance, runs) == [0] * world_size, (folder / "0.txt").read_text()
    assert not any((folder / f"{rank}.txt").read_text() for rank in range(1, world_size)), "only rank 0 prints"
    return lambda method, rank=0: torch.load(folder / f"{method}-{rank}.pt", weights_only=True)


def difference(a, b):
    """The largest one between the tensors of two checkpoints: networks, EMA, momentum."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item()
    if isinstance(a, dict):
        return max((difference(a[key], b[key]) for key in a), default=0)
    return 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), 1, METHODS)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_two_and_four_processes_agree_in_every_method(tmp_path, alone, world_size):
    """In float64 and without BatchNorm to 1e-9 after three updates."""
    found = train(tmp_path, world_size, METHODS)
    for method in METHODS:
        assert max(difference(found(method, rank), alone(method)) for rank in range(world_size)) < 1e-9, method
        for name in ("loss", "adv_acc", "test_acc", "train_acc", "val_pgd"):
            assert found(method)["log"][0][name] == pytest.approx(alone(method)["log"][0][name], abs=1e-6)


BROKEN = [("dynat", "no weight"), ("dynat", "no sum"), ("dynat", "own start"), ("fat", "own noise"),
          ("gairat", "no argument"), ("at-awp", "no argument")]  # fmt: skip


@pytest.mark.parametrize(("method", "broken"), BROKEN)
def test_ranks_that_do_not_share_what_they_must_are_rejected(tmp_path, alone, method, broken):
    assert difference(train(tmp_path, 2, [method], disturbance=broken)(method), alone(method)) > 1e-7


def test_with_batchnorm_all_ranks_have_the_same_networks_because_they_average_its_statistics(tmp_path):
    found = train(tmp_path, 2, ["dynat-inner-awp", "pgd-at"], CNN)
    assert difference(found("dynat-inner-awp", 0), found("dynat-inner-awp", 1)) == 0
    assert difference(found("pgd-at", 0), found("pgd-at", 1)) == 0
    broken = train(tmp_path, 2, ["dynat"], CNN, "no buffers")
    assert difference(broken("dynat", 0), broken("dynat", 1)) > 1e-6


def test_running_statistics_become_their_mean_over_the_ranks(monkeypatch):
    network = CNN(10)
    network.bn1.running_mean.fill_(3)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda *tensors: [tensor + 1 for tensor in tensors])  # 3 and 1
    distributed.average_buffers({"target": network})
    assert set(network.bn1.running_mean.tolist()) == {2}


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for images, batch_size in ((70, 29), (8, 4), (4, 100)):
        distributed.check_batch_size(images, batch_size)
    for images, batch_size in ((70, 3), (9, 4), (3, 100)):
        with pytest.raises(UserError, match="--batch-size"):
            distributed.check_batch_size(images, batch_size)


def test_a_lifted_step_works_under_distributeddataparallel(tmp_path):
    for world_size in (1, 2):
        assert launch(tmp_path, world_size, target=lifted_on_rank) == [0] * world_size
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", 0, 1))
    for weights in ranks:
        assert max(difference(a, b) for a, b in zip(weights, alone, strict=True)) < 1e-12


STOPPED = "interrupted: everything up to epoch 1 is saved; to go on, add --out {} --resume\n"
TWO_EPOCHS = [*SHORT, "--epochs", "2", "--val-images", "20"]


@pytest.mark.parametrize(("world_size", "accident", "status", "said"), [
    (1, "killed in a save", -signal.SIGKILL, ""),
    (1, "terminated", 143, STOPPED),
    (1, "interrupted", 130, STOPPED),
    (2, "killed in a save", -signal.SIGKILL, ""),
    (2, "terminated", 143, STOPPED),
    (2, "full disk", 2, "error: cannot write {}/last.pt: File too large\n"),
])  # fmt: skip
def test_a_run_goes_on_to_the_same_bytes_after(tmp_path, world_size, accident, status, said):
    run = [("run", [*TWO_EPOCHS, "--resume"])]
    assert launch(tmp_path, world_size, CNN, accident, run)[0] == status
    printed = (tmp_path / "0.txt").read_text()
    assert said.format(tmp_path / "run") in printed and "Traceback" not in printed
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    assert launch(tmp_path, world_size, CNN, "", [*run, ("whole", TWO_EPOCHS)]) == [0] * world_size
    run_dirs = [tmp_path / "run", tmp_path / "whole"]
    assert len({(run_dir / "weights.pt").read_bytes() for run_dir in run_dirs}) == 1
    for name in ("last.pt", "best.pt"):
        assert difference(*(torch.load(run_dir / name, weights_only=True) for run_dir in run_dirs)) == 0
    assert not list((tmp_path / "run").glob(".*")), "an unfinished file stayed"


@pytest.mark.parametrize("where", ["file/run", "taken"])
def test_a_mistake_of_one_rank_ends_all_with_one_line(tmp_path, where):
    """Rank 0 alone makes the run directory."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "taken").mkdir()
    assert launch(tmp_path, 2, CNN, "", [(where, TWO_EPOCHS)]) == [2, 2]
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert printed[0].startswith(f"error: {tmp_path / where}") and printed[0].count("\n") == 1 and printed[1] == ""
    assert (tmp_path / "file").read_text() == "precious" and list((tmp_path / "taken").iterdir()) == []


def test_a_launcher_that_sets_only_some_of_torchruns_variables_is_named(capsys):
    with mock.patch.dict(os.environ, WORLD_SIZE="4", RANK="1"):
        assert main(SHORT) == 2
    missing = "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
    assert capsys.readouterr().err == f"error: WORLD_SIZE is 4, but there is no {missing}: start it with torchrun\n"


def test_of_several_processes_the_first_one_says_what_is_wrong(capsys, monkeypatch):
    """torchrun sets six variables. With only some of them a process is alone."""
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)  # in which a silent rank leaves rank 0 the first word
    of_rank = lambda rank: {**dict.fromkeys(cli.TORCHRUN, "1"), "RANK": rank}
    alone = [({name: "1"}, 1) for name in cli.TORCHRUN]
    for variables, lines in (*alone, (of_rank("0"), 1), (of_rank("1"), 0)):
        with mock.patch.dict(os.environ, variables):
            assert main(["--beta", "much"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The figures and images of one process in a folder, and the command without its output files."""
    folder = tmp_path_factory.mktemp("evaluation")
    assert main([*SHORT, "--epochs", "2", "--out", str(folder / "run")]) == 0
    flags = "--attacks clean,pgd2,apgd --images 40 --batch-size 7 --network guide"
    command = [str(folder / "run" / "last.pt"), *flags.split()]
    assert launch(folder, 1, "", [*command, *outputs(folder)], target=evaluate_on_rank) == [0]
    return folder, command


def outputs(folder):
    return ["--json", str(folder / "figures.json"), "--save-images", str(folder / "images.npz")]


def assert_same_evaluation(folder, other):
    """Both have the same matrix, byte for byte, the same images and, but for seconds, the same results."""
    assert len({(path / "figures.npz").read_bytes() for path in (folder, other)}) == 1
    images, others = (np.load(path / "images.npz") for path in (folder, other))
    assert images.files == others.files and all(np.array_equal(images[name], others[name]) for name in images.files)
    figures, expected = (json.loads((path / "figures.json").read_text())["results"] for path in (folder, other))
    for rows in (figures, expected):
        for row in rows:
            for part in (row, *row.get("stages", [])):
                assert part.pop("seconds") >= 0
    assert figures == expected


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_share_an_evaluation_find_what_one_finds(tmp_path, evaluation, world_size):
    expected, command = evaluation
    statuses = launch(tmp_path, world_size, "", [*command, *outputs(tmp_path)], target=evaluate_on_rank)
    assert statuses == [0] * world_size, (tmp_path / "0.txt").read_text()
    assert_same_evaluation(tmp_path, expected)
    assert not any((tmp_path / f"{rank}.txt").read_text() for rank in range(1, world_size)), "only rank 0 prints"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".npz", ".txt"}, "litter"


@pytest.mark.parametrize(("accident", "status", "said"), [
    (signal.SIGKILL, -signal.SIGKILL, ""),
    (signal.SIGTERM, 143, "interrupted: 7 of 40 images are done; to go on, add --resume\n"),
    ("mistake", 2, "error: rank 1 found a damaged image\n"),
])  # fmt: skip
def test_a_shared_evaluation_goes_on_with_another_number_of_processes_after(
    tmp_path, evaluation, accident, status, said
):
    expected, command = evaluation
    command = [*command, *outputs(tmp_path), "--resume"]
    assert launch(tmp_path, 2, accident, command, target=evaluate_on_rank)[0] == status
    printed = (tmp_path / "0.txt").read_text()
    assert said in printed and "Traceback" not in printed and (tmp_path / "1.txt").read_text() == ""
    assert launch(tmp_path, 3, "", command, target=evaluate_on_rank) == [0] * 3
    assert_same_evaluation(tmp_path, expected)
