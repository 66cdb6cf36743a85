"""A run survives what happens to it, repeats, and does not depend on how many processes share it."""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from cases import mutant
from conftest import ROOT

import checkpoints
import cli
import data
import engine
import train_dynat
from train_dynat import METHODS, main

SHORT = ["--dataset", "tiny", "--train-images", "60", "--batch-size", "20", "--epochs", "2", "--steps", "2"]
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 200, "test": 40})


def rows(out):
    """The log's rows but for the times in them."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in log]


def ending(out):
    """What a run ends in: a checksum of weights.pt (pytest explains unequal bytes for minutes), and the log."""
    return hashlib.sha256((out / "weights.pt").read_bytes()).hexdigest(), rows(out)


def error_of(capsys, *argv):
    """Runs a command line that must fail: status 2, one line on standard error. Returns the line."""
    assert main(list(argv)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# going on


@contextmanager
def signalled(after, number=signal.SIGTERM):
    """Inside the `with`, the signal comes in the `after`-th update of whichever run trains."""
    asked, calls = engine.Stop.asked, []

    def ask(stop):
        calls.append(None)
        if len(calls) == after:
            signal.raise_signal(number)
        return asked(stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Stop, "asked", ask)
        yield


def check_stopped_and_resumed(folder, *argv, after=2):
    argv = [*SHORT, "--ema", "0.9", "--eval-every", "2", *argv]
    assert main([*argv, "--out", str(folder / "whole")]) == 0
    with signalled(after):
        assert main([*argv, "--out", str(folder / "parts")]) == 143
    assert not (folder / "parts" / "weights.pt").exists()
    assert main(["--out", str(folder / "parts"), "--resume"]) == 0
    assert ending(folder / "parts") == ending(folder / "whole")
    a, b = (torch.load(folder / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for role in {"target", "guide", "ema"} & a.keys():
        assert all(torch.equal(a[role][key], b[role][key]) for key in a[role]), role
    momenta = [[group["momentum_buffer"] for group in x["optimizer"]["state"].values()] for x in (a, b)]
    assert all(torch.equal(*pair) for pair in zip(*momenta, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stopped_within_an_epoch_goes_on_to_the_same_bytes(tmp_path, method):
    used = train_dynat.options(METHODS[method])
    early = [flag for name, flag in (("burn_in", "--burn-in=0"), ("awp_start", "--awp-start=1")) if name in used]
    check_stopped_and_resumed(tmp_path, "--method", method, *early)


@pytest.mark.parametrize("after", [1, 3, 4, 6])  # the first update, an epoch's last one, its save, the next epoch
def test_a_run_stopped_at_any_update_goes_on_to_the_same_bytes(tmp_path, after):
    check_stopped_and_resumed(tmp_path, "--val-images", "20", after=after)


def test_a_resumed_epoch_that_begins_anew_is_rejected(tmp_path, monkeypatch):
    broken = mutant(train_dynat.train_epoch, ('settings["seed"], epoch, done["step"])', 'settings["seed"], epoch, 0)'))
    monkeypatch.setattr(train_dynat, "train_epoch", broken)
    with pytest.raises((AssertionError, KeyError)):
        check_stopped_and_resumed(tmp_path)


@pytest.mark.parametrize("forgotten", ["totals", "step"])
def test_a_checkpoint_without_its_position_is_rejected(tmp_path, monkeypatch, forgotten):
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda path: {**load(path), forgotten: {"totals": {}, "step": 0}[forgotten]})
    with pytest.raises(AssertionError):
        check_stopped_and_resumed(tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(tmp_path, capfd, number, status):
    out = tmp_path / "a"
    with signalled(2, number):
        assert main([*SHORT, "--out", str(out)]) == status
    said = capfd.readouterr().err
    assert f"after update 2 of epoch 1; to go on, add --out {out} --resume" in said
    assert "Traceback" not in said
    last = torch.load(out / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"], last["log"]) == (0, 2, [])
    assert (out / "log.jsonl").read_text() == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_in_the_last_update_lets_the_run_end(tmp_path):
    with signalled(7):  # of two epochs with three updates each, and one question after the first save
        assert main([*SHORT, "--out", str(tmp_path) + "/a"]) == 0
    assert (tmp_path / "a" / "weights.pt").exists()


def test_a_second_ctrl_c_ends_the_run_at_once_and_the_last_save_is_there(tmp_path, capfd):
    out = tmp_path / "a"
    save = engine.save

    def interrupted(*args):
        save(*args)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save", interrupted)
        assert main([*SHORT, "--out", str(out)]) == 130
    assert f"add --out {out} --resume" in capfd.readouterr().err
    assert main(["--out", str(out), "--resume"]) == 0
    assert main([*SHORT, "--out", str(tmp_path / "b")]) == 0
    assert ending(out) == ending(tmp_path / "b")


def test_a_killed_process_goes_on_to_the_same_bytes():
    """A real process, killed in the middle of a save, at a random moment, and by SIGTERM."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "3", "--methods", "dynat"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills (1 SIGKILL in a save, 1 SIGKILL, 1 SIGTERM, 0 SIGINT)" in done.stdout
    assert "1 of 1 runs ended in the same bytes" in done.stdout


def test_a_run_that_died_between_checkpoint_and_log_mends_the_log(tmp_path, monkeypatch):
    out = tmp_path / "a"
    write = engine.write_log

    def dies(out, log):
        if len(log) == 2:
            raise KeyboardInterrupt
        write(out, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "write_log", dies)
        assert main([*SHORT, "--out", str(out)]) == 130
    assert len(rows(out)) == 1 and torch.load(out / "last.pt", weights_only=True)["epoch"] == 2
    assert main(["--out", str(out), "--resume"]) == 0
    assert len(rows(out)) == 2


def test_a_run_beyond_the_epochs_asked_for_is_refused(tmp_path, capsys):
    out = str(tmp_path / "a")
    assert main([*SHORT, "--out", out]) == 0
    before = ending(tmp_path / "a")
    assert "--epochs" in error_of(capsys, "--out", out, "--resume", "--epochs", "1")
    assert ending(tmp_path / "a") == before


# the run's folder


def test_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path, capsys):
    out = tmp_path / "a"
    with engine.claimed(out, resuming=False):
        assert "another run" in error_of(capsys, *SHORT, "--out", str(out), "--resume")
        assert list(out.iterdir()) == []
    assert not out.exists()  # nothing was written into it
    assert main([*SHORT, "--out", str(out), "--resume"]) == 0


def test_a_folder_that_is_not_locked_lets_a_second_run_in(tmp_path, monkeypatch):
    broken = mutant(engine.claimed, ("fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"))
    with broken(tmp_path / "a", resuming=False), engine.claimed(tmp_path / "a", resuming=True):
        pass
    first, second = engine.claimed(tmp_path / "a", resuming=False), engine.claimed(tmp_path / "a", resuming=True)
    with first, pytest.raises(cli.UserError), second:
        pass


def test_an_unfinished_save_of_a_killed_run_goes_when_the_run_goes_on(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / f".last.pt.123{cli.PARTIAL}").write_bytes(b"half")
    (out / ".mine").write_text("precious")
    assert main([*SHORT, "--out", str(out), "--resume"]) == 0
    assert sorted(file.name for file in out.iterdir() if file.name.startswith(".")) == [".mine"]


def check_full_disk(folder, capsys):
    """A file that cannot grow beyond 100 kB while the second epoch is saved: one line, the first epoch still there."""
    out, limits = folder / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    save = engine.save

    def full(*args):
        if args[1]["epoch"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save", full)
        try:
            line = error_of(capsys, *SHORT, "--out", str(out))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt" in line
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "last.pt", "log.jsonl"]
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 1 == len(rows(out))
    assert main(["--out", str(out), "--resume"]) == 0
    assert main([*SHORT, "--out", str(folder / "whole")]) == 0
    assert ending(out) == ending(folder / "whole")


def test_a_full_disk_loses_nothing(tmp_path, capsys):
    check_full_disk(tmp_path, capsys)


def test_a_save_in_place_is_rejected(tmp_path, capsys, monkeypatch):
    broken = mutant(checkpoints.save, ("with written_whole(path) as aside, open(aside,", "with open(path,"))
    monkeypatch.setattr(checkpoints, "save", broken)
    with pytest.raises((AssertionError, RuntimeError)):  # the checkpoint is gone, or cut off
        check_full_disk(tmp_path, capsys)


# divergence


def check_first_bad_update(folder, capsys, spoil, said):
    """`spoil(step's result, target)` in the second update of the second epoch is named, and not saved."""
    out, calls = folder / "a", []
    method = METHODS["dynat"]

    def step(*, target, **others):
        calls.append(None)
        result = method["step"](target=target, **others)
        return spoil(result, target) if len(calls) == 5 else result

    step.__signature__ = train_dynat.signature(method["step"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dynat", {**method, "step": step})
        line = error_of(capsys, *SHORT, "--out", str(out))
    assert said in line and "--lr" in line
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["epoch"] == 1 and all(value.isfinite().all() for value in last["target"].values())
    assert main(["--out", str(out), "--resume"]) == 0  # the good state goes on


def nan_loss(result, target):
    result[1]["loss"] = result[1]["loss"] * float("nan")
    return result


def nan_everywhere(result, target):
    """From this update on, every loss is bad."""
    inf_bias(result, target)
    return nan_loss(result, target)


def inf_bias(result, target):
    with torch.no_grad():
        target.model.linear.bias[0] = float("inf")
    return result


def late_inf(result, target):
    """A weight that no loss shows."""
    target.model.register_parameter("idle", torch.nn.Parameter(torch.tensor(float("inf"))))
    return result


def test_the_first_update_whose_loss_is_not_finite_is_named(tmp_path, capsys):
    check_first_bad_update(tmp_path, capsys, nan_loss, "update 2 of epoch 2")


def test_a_weight_that_is_not_finite_is_seen_in_the_next_loss(tmp_path, capsys):
    check_first_bad_update(tmp_path, capsys, inf_bias, "update 3 of epoch 2")


def test_a_weight_that_no_loss_shows_is_seen_before_the_save(tmp_path, capsys):
    check_first_bad_update(tmp_path, capsys, late_inf, "a weight is not finite after update 3 of epoch 2")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('bad.clamp(max=done["step"])', 'torch.full_like(bad, done["step"])'),  # the last bad one
        ('torch.where(figures["loss"].isfinite(), bad,', 'torch.where(figures["loss"].isinf(), bad,'),
    ],
)
def test_another_than_the_first_bad_update_is_rejected(tmp_path, capsys, monkeypatch, old, new):
    monkeypatch.setattr(train_dynat, "train_epoch", mutant(train_dynat.train_epoch, (old, new)))
    with pytest.raises(AssertionError):
        check_first_bad_update(tmp_path, capsys, nan_everywhere, "update 2 of epoch 2")


def test_a_stopped_run_is_checked_before_it_is_saved(tmp_path, capsys):
    with signalled(2):
        line = error_of(capsys, *SHORT, "--lr", "1e30", "--out", str(tmp_path / "a"))
    assert "epoch 1" in line and not (tmp_path / "a" / "last.pt").exists()


# repeating


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_drawn_on_the_cpu_does_not_depend_on_the_device():
    """The initial weights, the subset and the order of the images; not the crops, flips and starts."""
    settings, _ = train_dynat.resolve({"dataset": "tiny", "train_images": 50, "val_images": 20})
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        networks, _ = train_dynat.prepare_networks(settings, 10, device)
        images = train_dynat.prepare_images(settings, device)
        order = torch.cat([y for _, y, _ in data.train_batches(images["train"], 20, seed=1, epoch=1)])
        found.append([value.cpu() for value in (*networks["guide"].parameters(), images["train"].x, order)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# several processes


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "count", lambda: 4)
    for images, batch_size in ((70, 29), (8, 4), (4, 100)):
        engine.check_batches(images, batch_size)
    for images, batch_size in ((70, 3), (9, 4), (3, 100)):
        with pytest.raises(cli.UserError, match="--batch-size"):
            engine.check_batches(images, batch_size)


def test_of_several_processes_the_first_one_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["--beta", "much"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert "--beta" in error_of(capsys, "--beta", "much")


def together(folder, count, entries):
    """Starts `count` processes of several.py that train together, as torchrun does; returns them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        own = {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if count > 1:
            own |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, str(ROOT / "tests" / "several.py"), str(folder / str(count)), *entries]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return started


PLAIN = [f"{method}-plain" for method in METHODS]
BATCHNORM = ["dynat-inner-awp-cnn", "pgd-at-cnn", "dynat-cnn+stopped", "dynat-cnn"]
BROKEN = ["dynat-plain+share", "dynat-plain+gradient", "gairat-plain+weights", "at-awp-plain+perturbation",
          "dynat-plain+draws", "dynat-cnn+statistics"]  # fmt: skip


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The networks that each of 1, 2 and 4 processes ends with: found(count, entry, rank)."""
    folder = tmp_path_factory.mktemp("several")
    started = [
        *together(folder, 1, PLAIN),
        *together(folder, 2, PLAIN + BATCHNORM + BROKEN),
        *together(folder, 4, PLAIN),
    ]
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    return lambda count, entry, rank=0: torch.load(folder / str(count) / entry / f"{rank}.pt", weights_only=True)


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_four_processes_agree(processes, method):
    """In float64 and without BatchNorm to 1e-9 after three updates, batches of 29, 29 and 12 images."""
    alone = processes(1, f"{method}-plain")
    for count in (2, 4):
        for rank in range(count):
            assert difference(processes(count, f"{method}-plain", rank), alone) < 1e-9


@pytest.mark.parametrize("entry", [entry for entry in BROKEN if "-plain" in entry])
def test_processes_that_do_not_share_what_they_must_are_rejected(processes, entry):
    assert difference(processes(2, entry), processes(1, entry.split("+")[0])) > 1e-7


@pytest.mark.parametrize("entry", BATCHNORM)
def test_with_batchnorm_all_processes_have_the_same_networks(processes, entry):
    assert difference(processes(2, entry, 0), processes(2, entry, 1)) == 0


def test_running_statistics_that_are_not_averaged_are_rejected(processes):
    assert difference(processes(2, "dynat-cnn+statistics", 0), processes(2, "dynat-cnn+statistics", 1)) > 1e-6


def test_several_processes_stopped_and_resumed_end_in_the_same_bytes(processes):
    """The signal reaches one process only; both stop after the same update."""
    assert difference(processes(2, "dynat-cnn+stopped"), processes(2, "dynat-cnn")) == 0
