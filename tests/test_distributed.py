"""Real processes: several that train together agree with one; a run whose process is killed goes on."""

import signal

import pytest
import torch
from several import plain, start

import distributed
from cli import UserError
from models import CNN
from train_dynat import METHODS, main

SHORT = ["--dataset", "tiny", "--device", "cpu", "--train-images", "70", "--batch-size", "29", "--steps", "2"]


def arguments(method):
    """One epoch: batches of 29, 29 and 12 images; instance weights and AWP from the first update on."""
    used = METHODS[method]["step_settings"]
    early = [flag for name, flag in (("burn_in", "--burn-in=0"), ("awp_start", "--awp-start=1")) if name in used]
    return [*SHORT, "--method", method, "--epochs", "1", "--ema", "0.9", "--val-images", "21", *early]


def finish(processes):
    """Their exit statuses, negative after a signal. If rank 0 is killed, so are the others, as torchrun does it."""
    for process in processes:
        process.join(200)
        if process.exitcode is None or processes[0].exitcode < 0:  # it waits for another in vain
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def train(folder, world_size, methods, network=plain, disturbance=""):
    """A run of each method; returns what rank N's last checkpoint holds: found(method, N)."""
    processes = start(folder, world_size, network, disturbance, [(method, arguments(method)) for method in methods])
    assert finish(processes) == [0] * world_size, (folder / "0.txt").read_text()
    assert not any((folder / f"{rank}.txt").read_text() for rank in range(1, world_size)), "only rank 0 prints"
    return lambda method, rank=0: torch.load(folder / f"{method}-{rank}.pt", weights_only=True)


def difference(a, b):
    """The largest one between the tensors of two checkpoints: networks, EMA, momentum."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item()
    if isinstance(a, dict):
        return max((difference(a[key], b[key]) for key in a), default=0)
    return 0


# what all ranks together compute


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


# accidents

TWO_EPOCHS = [*SHORT, "--epochs", "2"]


@pytest.mark.parametrize(
    ("world_size", "accident", "status", "said"),
    [
        (1, "killed in a save", -signal.SIGKILL, ""),
        (1, "terminated", -signal.SIGTERM, ""),
        (1, "interrupted", 130, "interrupted: everything up to epoch 1 is saved; to go on, add --out {} --resume\n"),
        (2, "killed in a save", -signal.SIGKILL, ""),
        (2, "full disk", 2, "error: cannot write {}/last.pt: "),
    ],
)
def test_a_run_goes_on_to_the_same_bytes_after(tmp_path, world_size, accident, status, said):
    run = [("run", [*TWO_EPOCHS, "--resume"])]
    assert finish(start(tmp_path, world_size, CNN, accident, run))[0] == status
    printed = (tmp_path / "0.txt").read_text()
    assert said.format(tmp_path / "run") in printed and "Traceback" not in printed
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    assert finish(start(tmp_path, world_size, CNN, "", [*run, ("whole", TWO_EPOCHS)])) == [0] * world_size
    run_dirs = [tmp_path / "run", tmp_path / "whole"]
    assert len({(run_dir / "weights.pt").read_bytes() for run_dir in run_dirs}) == 1
    assert difference(*(torch.load(run_dir / "last.pt", weights_only=True) for run_dir in run_dirs)) == 0
    assert not list((tmp_path / "run").glob(".*")), "an unfinished file stayed"


@pytest.mark.parametrize("where", ["file/run", "taken"])
def test_a_mistake_of_one_rank_ends_all_with_one_line(tmp_path, where):
    """Rank 0 alone makes the run directory."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "taken").mkdir()
    assert finish(start(tmp_path, 2, CNN, "", [(where, TWO_EPOCHS)])) == [2, 2]
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert printed[0].startswith(f"error: {tmp_path / where}") and printed[0].count("\n") == 1 and printed[1] == ""
    assert (tmp_path / "file").read_text() == "precious" and list((tmp_path / "taken").iterdir()) == []


def test_of_several_processes_the_first_one_says_what_is_wrong(monkeypatch, capsys):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["--beta", "much"]) == 2
        assert capsys.readouterr().err.count("\n") == lines
