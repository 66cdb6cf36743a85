"""Settings and schedules; whole runs through the command line: they repeat, log what they measure, and resume."""

import json
import os
import pickle
import shutil
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from cases import assert_state, counted_accuracy, settings_of
from torch import nn
from torchvision import datasets

import checkpoints
import data
import evaluate
import train_dynat
from cli import UserError
from models import build_model
from settings import TINY, learning_rate, parse, run_name, skipped_rates
from train_dynat import METHODS, main

DYNAT = {"guide": "resnet18", "inner": False, "static_labels": False, "beta": 1.0}
INNER = {**DYNAT, "inner": True}
AWP = {"kl_weight": 1.0, "awp_gamma": 0.005, "awp_start": 10}
GAIRAT = {"label_smoothing": 0.2, "burn_in": 70}
WARM_UP = [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)]
FAT_RATES = [(1, 1.0), (60, 0.1), (90, 0.01), (110, 0.005)]
MAIL_RATES = [(1, 1.0), (76, 0.1), (91, 0.01), (101, 0.001)]
TRADES_RATES = [(1, 1.0), (75, 0.1), (90, 0.01), (100, 0.001)]
SAT_RATES = [(1, 1.0), (41, 0.1), (61, 0.01), (81, 0.001)]
LATE_RATES = [(1, 1.0), (101, 0.1), (151, 0.01)]
PUBLISHED = {  # epochs, lr, weight decay, epsilon, step size, milestones, the method's own; on CIFAR-10 with WRN-34-10
    "dynat": (100, 0.1, 2e-4, 0.031, 2 / 255, WARM_UP, DYNAT | {"clean_forward": True}),
    "dynat-inner": (100, 0.1, 2e-4, 0.031, 2 / 255, WARM_UP, INNER | {"clean_forward": True}),
    "dynat-awp": (100, 0.1, 2e-4, 0.031, 2 / 255, WARM_UP, DYNAT | AWP),
    "dynat-inner-awp": (100, 0.1, 2e-4, 0.031, 2 / 255, WARM_UP, INNER | AWP),
    "dynat-gairat": (120, 0.1, 5e-4, 0.031, 0.007, FAT_RATES, DYNAT | GAIRAT),
    "dynat-inner-gairat": (120, 0.1, 5e-4, 0.031, 0.007, FAT_RATES, INNER | GAIRAT),
    "dynat-mail": (100, 0.01, 3.5e-3, 0.031, 0.007, MAIL_RATES, DYNAT | {"burn_in": 76}),
    "dynat-inner-mail": (100, 0.01, 3.5e-3, 0.031, 0.007, MAIL_RATES, INNER | {"burn_in": 76}),
    "pgd-at": (200, 0.1, 5e-4, 8 / 255, 2 / 255, LATE_RATES, {}),
    "trades": (76, 0.1, 2e-4, 0.031, 0.007, TRADES_RATES, {"kl_weight": 6.0}),
    "mart": (90, 0.1, 7e-4, 0.031, 0.007, TRADES_RATES, {"kl_weight": 6.0}),
    "fat": (120, 0.1, 2e-4, 0.031, 0.007, FAT_RATES, {"tau_milestones": [(1, 0), (51, 1), (91, 2)]}),
    "sat": (100, 0.05, 5e-4, 8 / 255, 2 / 255, SAT_RATES, {"difficulty": 0.4, "easy_until": 30, "hardest_from": 70}),
    "gairat": (120, 0.1, 2e-4, 0.031, 0.007, FAT_RATES, {"burn_in": 59}),
    "mail": (120, 0.01, 3.5e-3, 0.031, 0.007, MAIL_RATES, {"burn_in": 76}),
    "mail-mse": (100, 0.01, 3.5e-3, 0.031, 0.007, MAIL_RATES, {"guide": "resnet18", "burn_in": 76}),
    "at-awp": (200, 0.1, 5e-4, 8 / 255, 2 / 255, LATE_RATES, {"awp_gamma": 0.01, "awp_start": 1}),
    "trades-awp": (200, 0.1, 5e-4, 8 / 255, 2 / 255, [(1, 1.0), (100, 0.1), (150, 0.01)], AWP | {"kl_weight": 6.0}),
    "lbgat": (100, 0.1, 2e-4, 0.031, 0.007, WARM_UP, {"guide": "resnet18-lbgat", "kl_weight": 0.0}),
}


def test_every_method_comes_with_its_published_settings():
    names = ("epochs", "lr", "weight_decay", "epsilon", "step_size", "milestones")
    common = {"target": "wrn34-10", "batch_size": 128, "momentum": 0.9, "steps": 10, "dataset": "cifar10", "seed": 1}
    common |= {"preset": "paper", "data_dir": os.path.abspath("data"), "precision": "fp32", "deterministic": True}
    common |= {"val_images": 0, "ema": 0.0, "eval_every": 1, "compile": False, "sync_bn": False}
    common |= dict.fromkeys(("train_images", "lr_milestones", "keep_from"))
    for method, (*values, own) in PUBLISHED.items():
        expected = dict(zip(names, values, strict=True)) | {"method": method, "schedule_epochs": values[0]}
        assert settings_of(f"--method {method}") == {**common, **expected, **own}, method
    assert settings_of("") == settings_of("--method dynat --dataset cifar10 --target wrn34-10")


def test_data_set_target_preset_and_typed_flags_decide_in_this_order():
    expected = {
        "mart --target resnet18": {"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3, "kl_weight": 5},
        "mart --target resnet18 --dataset tiny": {"epochs": 10, "lr": 0.01, "batch_size": 32, "kl_weight": 5},
        "lbgat --dataset cifar100": {"kl_weight": 6},
        "dynat-inner-awp --dataset cifar100": {"beta": 0.2, "kl_weight": 1, "guide": "resnet18"},
        "dynat-inner-awp --dataset cifar100 --beta 1/2": {"beta": 0.5},
        "dynat --preset release": {"beta": 1, "step_size": 0.007, "guide": "resnet18-lbgat"},
        "dynat --preset release --step-size 2/255": {"step_size": 2 / 255},
        "dynat --preset release --dataset tiny": {"guide": "cnn", "target": "cnn", "data_dir": None},
        "dynat-awp --preset release": {"beta": 0.2, "step_size": 0.007, "guide": "resnet18-lbgat"},
    }
    for argv, values in expected.items():
        settings = settings_of(f"--method {argv}")
        assert {name: settings[name] for name in values} == values, argv


@pytest.mark.parametrize("method", PUBLISHED)
def test_help_shows_a_methods_own_flags_and_defaults_and_any_other_flag_is_refused(capsys, method):
    with pytest.raises(SystemExit):
        main(["--method", method, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    epochs, *_, own = PUBLISHED[method]
    assert f"is scaled to it (default: {epochs})" in shown
    assert "kl_weight" not in own or f"KL term (default: {own['kl_weight']:g})" in shown
    for typed in ("--guide cnn", "--static-labels", "--beta 2", "--kl-weight 2", "--awp-gamma 0.1", "--awp-start 2",
                  "--burn-in 3", "--label-smoothing 0.1", "--no-clean-forward"):  # fmt: skip
        flag = typed.split()[0]
        name = flag.replace("--no-", "--").removeprefix("--").replace("-", "_")
        assert (f" {flag} " in shown) == (name in own)
        if name in own:
            assert settings_of(f"--method {method} {typed}")[name] != own[name]
        else:
            with pytest.raises(UserError, match=f"{method} does not use {flag}: leave it out"):
                settings_of(f"--method {method} {typed}")


def test_a_run_is_named_by_what_differs_from_the_methods_defaults():
    names = {
        "": "dynat-cifar10-wrn34-10-s1",
        "--dataset tiny --epochs 10 --seed 3": "dynat-tiny-cnn-s3",
        "--method mart --target resnet18 --epochs 120 --kl-weight 5": "mart-cifar10-resnet18-s1",
        "--no-clean-forward --preset release": "dynat-cifar10-wrn34-10-s1-preset-release-no-clean-forward",
        "--epochs 76 --schedule-epochs 100": "dynat-cifar10-wrn34-10-s1-epochs-76-schedule-epochs-100",
        "--lr-milestones 9 8 --static-labels": "dynat-cifar10-wrn34-10-s1-static-labels-lr-milestones-9-8",
        "--data-dir x --eval-every 3 --keep-from 2 --no-deterministic --device cpu": "dynat-cifar10-wrn34-10-s1",
    }
    for argv, name in names.items():
        typed, _, flags = parse(argv.split(), METHODS)
        assert run_name(typed, METHODS, flags) == name


def check_schedules():
    def schedule(method, epochs, dataset="cifar10"):
        typed = f"--epochs {epochs}" if epochs else ""
        return settings_of(f"--method {method} --dataset {dataset} {typed}")

    assert schedule("dynat", 200)["milestones"] == [(1, 0.2), (3, 1.0), (151, 0.1), (181, 0.01)]
    assert schedule("fat", 240)["tau_milestones"] == [(1, 0), (101, 1), (181, 2)]
    assert schedule("at-awp", 20)["awp_start"] == 1 and schedule("trades-awp", 100)["awp_start"] == 6
    sat = schedule("sat", None, "tiny")  # at tiny's 10 epochs
    assert (sat["easy_until"], sat["hardest_from"]) == (4, 8)
    for epochs in range(1, 130):  # the first lower rate and the first weights come together, as in the release
        gairat = schedule("gairat", epochs)
        assert gairat["milestones"][1][0] == gairat["burn_in"] + 1
    for method in METHODS:
        assert learning_rate(schedule(method, 1), 1) == learning_rate(schedule(method, None), 1)


def test_a_schedule_moves_with_the_epochs_unless_typed():
    check_schedules()
    typed = settings_of("--method dynat-mail --epochs 50 --burn-in 40 --lr-milestones 45 30")
    assert (typed["burn_in"], typed["milestones"]) == (40, [(1, 1.0), (30, 0.1), (45, 0.01)])
    assert settings_of("--epochs 76 --schedule-epochs 100")["milestones"] == WARM_UP
    rates = [learning_rate(settings_of(""), epoch) for epoch in (1, 2, 75, 76, 90, 91, 100)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


SHORT = ["--dataset", "tiny", "--device", "cpu", "--epochs", "2", "--steps", "1", "--batch-size", "20"]
SHORT += ["--train-images", "50", "--ema", "0.75"]  # three updates per epoch, the last one on 10 images
LONG = [*SHORT, "--val-images", "20", "--keep-from", "2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_SIZE", {"train": 90, "test": 30})
        yield


def run(run_dir, *argv):
    assert main([*SHORT, "--out", str(run_dir), *argv]) == 0
    return checkpoints.load(run_dir / "last.pt")


def checksum(content):
    """One number for all that a checkpoint holds."""
    return hash(json.dumps(content, default=torch.Tensor.tolist))


def ending(run_dir):
    """What a run ends in: the bytes of weights.pt, all of last.pt but for the times, the names of its files."""
    last = checkpoints.load(run_dir / "last.pt")
    assert [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()] == last["log"]
    assert checksum(checkpoints.load(run_dir / "weights.pt")) == checksum(last["target"])
    assert json.loads((run_dir / "config.json").read_text()) == json.loads(json.dumps(last["config"]))
    for row in last["log"]:
        del row["seconds"], row["images_per_second"]
    return hash((run_dir / "weights.pt").read_bytes()), checksum(last), sorted(os.listdir(run_dir))


def copy_before_renames(patch, run_dir):
    """Before each rename of a file, `run_dir` is copied: what a kill would leave there. Returns the list of copies."""
    replace, copies = os.replace, []

    def copy_and_replace(*paths):
        copies.append(Path(shutil.copytree(run_dir, f"{run_dir}-{len(copies)}")))
        replace(*paths)

    patch.setattr(os, "replace", copy_and_replace)
    return copies


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run; its copies; its training images; each update's number of images, lr, metrics and weights after it."""
    run_dir, step, updates = tmp_path_factory.mktemp("whole") / "run", METHODS["dynat"]["step"], []
    batches = Mock(side_effect=train_dynat.train_batches)

    def watched(*, target, optimizer, x, **others):
        x_adv, metrics = step(target=target, optimizer=optimizer, x=x, **others)
        state = {name: value.clone() for name, value in target.model.state_dict().items()}
        updates.append((len(x), optimizer.param_groups[0]["lr"], metrics, state))
        return x_adv, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS["dynat"], "step", watched)
        patch.setattr(train_dynat, "train_batches", batches)
        copies = copy_before_renames(patch, run_dir)
        run(run_dir, *LONG)
    return run_dir, copies, batches.call_args.args[0], updates


def test_two_runs_with_one_seed_end_in_the_same_bytes_and_another_seed_changes_networks_and_images(tmp_path, whole):
    again, other = run(tmp_path / "again", *LONG), run(tmp_path / "other", *LONG, "--seed", "2")
    assert ending(tmp_path / "again") == ending(whole[0])
    assert other["images"]["train"] != again["images"]["train"]
    first_weights = set()
    for seed in (1, 2):
        networks, _ = train_dynat.prepare_networks(settings_of(f"--dataset tiny --seed {seed}"), 10, CPU)
        first_weights |= {network.linear.weight[0, 0].item() for network in networks.values()}
    assert len(first_weights) == 4


def test_the_guide_depends_neither_on_the_target_nor_on_its_labels_or_beta(tmp_path):
    variants = ([], ["--target", "wrn10-1"], ["--static-labels"], ["--beta", "3"], ["--method", "dynat-inner"])
    guides = {checksum(run(tmp_path / str(i), *argv)["guide"]) for i, argv in enumerate(variants)}
    assert len(guides) == 1


def test_the_log_holds_means_over_images_and_the_ema_follows_the_target(whole):
    run_dir, _, _, updates = whole
    last = checkpoints.load(run_dir / "last.pt")
    for row, epoch in zip(last["log"], (updates[:3], updates[3:]), strict=True):
        assert [(n, lr) for n, lr, *_ in epoch] == [(20, row["lr"]), (20, row["lr"]), (10, row["lr"])]
        for name in ("loss", "loss_guide", "loss_target", "label_acc", "adv_acc"):
            assert row[name] == pytest.approx(sum(n * metrics[name].item() for n, _, metrics, _ in epoch) / 50)
        assert row["images_per_second"] == pytest.approx(50 / row["seconds"])
    ema = updates[0][-1]["linear.weight"]  # the first update copies
    for *_, state in updates[1:]:
        ema = 0.75 * ema + 0.25 * state["linear.weight"]
    torch.testing.assert_close(last["ema"]["linear.weight"], ema)


def test_networks_are_kept_from_an_epoch_on_for_evaluation(whole):
    kept = whole[0] / "epoch002.pt"
    content, _ = checkpoints.load_trained(kept)
    assert list(whole[0].glob("epoch*")) == [kept] and "optimizer" not in content
    for role in ("target", "guide"):
        network = checkpoints.load_network(content, role, kept, 10)
        assert_state(network, checkpoints.load(whole[0] / "last.pt")[role], 0, role)
    assert evaluate.main([str(kept), "--attacks", "clean", "--device", "cpu"]) == 0


def test_what_is_measured_is_what_is_counted_by_hand_and_held_out_images_are_not_trained_on(whole):
    settings = settings_of("--dataset tiny --train-images 50 --val-images 20")
    images = train_dynat.prepare_images(settings, CPU)
    held_out, rest = data.hold_out(data.tiny("train"), 20, 1)
    train = data.class_balanced_subset(rest, 50, 1)
    assert train.sha256() == images["train"].sha256() == whole[2].sha256()
    seen = data.class_balanced_subset(train, 30, 1)  # as many as there are test images
    torch.manual_seed(1)  # so that all the accuracies differ
    network = lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(3072), nn.Linear(3072, 10))
    networks = {"target": network(), "guide": network()}
    row = train_dynat.measure(networks, images, settings)
    for role, prefix in (("target", ""), ("guide", "guide_")):
        assert row[f"{prefix}test_acc"] == pytest.approx(counted_accuracy(networks[role], data.tiny("test")))
        assert row[f"{prefix}train_acc"] == pytest.approx(counted_accuracy(networks[role], seen))
    assert row["val_clean"] == pytest.approx(counted_accuracy(networks["target"], held_out)) and row["val_pgd"] == 0


def test_best_pt_is_the_first_epoch_with_the_best_accuracy_under_pgd_on_held_out_images(tmp_path, monkeypatch):
    values = iter([1 / 3, 2 / 3, 2 / 3])
    measured = lambda _, images, attack, __: next(values) if (attack, len(images.y)) == ("pgd10", 20) else 0.5
    monkeypatch.setattr(train_dynat, "accuracy", measured)
    log = run(tmp_path / "run", "--val-images", "20", "--epochs", "3")["log"]
    assert [row["val_pgd"] for row in log] == [1 / 3, 2 / 3, 2 / 3]
    assert checkpoints.load(tmp_path / "run" / "best.pt")["epoch"] == 2


def write_cifar(root, name, classes):
    """200 made-up images in the layout of cifar10 or cifar100. Returns them by split."""
    reader, written, names = getattr(datasets, name.upper()), {}, [f"thing{label}" for label in range(classes)]
    folder = root / reader.base_folder
    folder.mkdir()
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}, protocol=2))
    for split, size, files in (("train", 150, reader.train_list), ("test", 50, reader.test_list)):
        x, y = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8), torch.arange(size) * 7 % classes
        written[split] = data.Images(x, y, names)
        for (file, _), indices in zip(files, torch.arange(size).chunk(len(files)), strict=True):
            listed = y[indices].tolist()
            content = {"data": x[indices].flatten(1).numpy(), "labels": listed, "fine_labels": listed}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return written


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_its_published_layout_trains_and_evaluates(name, classes, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, _: Path(path).is_file())
    written = write_cifar(tmp_path, name, classes)
    assert all(data.load_images(name, split, tmp_path).sha256() == images.sha256() for split, images in written.items())
    argv = ["--dataset", name, "--data-dir", str(tmp_path), "--target", "cnn", "--guide", "cnn"]
    last = run(tmp_path / "run", *argv, "--epochs", "1")
    network = build_model("cnn", classes)
    network.load_state_dict(last["target"])
    argv = [str(tmp_path / "run" / "last.pt"), "--attacks", "clean", "--device", "cpu"]
    assert evaluate.main([*argv, "--json", str(tmp_path / "report.json")]) == 0
    row = json.loads((tmp_path / "report.json").read_text())["results"][0]
    assert (row["n"], row["correct"]) == (50, 50 * counted_accuracy(network, written["test"]))


def check_resume(folder, copy, whole, *argv):
    """A copy that a kill left resumes, in `folder`, to what the whole run ended in."""
    resumed = Path(shutil.copytree(copy, folder / copy.name))
    assert main([*argv, "--out", str(resumed), "--resume"]) == 0
    assert ending(resumed) == ending(whole)


def test_a_run_killed_before_any_rename_of_a_file_resumes_to_the_same_bytes(tmp_path, whole):
    run_dir, copies, _, _ = whole
    assert ending(run_dir)[2] == ["best.pt", "config.json", "epoch002.pt", "last.pt", "log.jsonl", "weights.pt"]
    assert checkpoints.load(run_dir / "last.pt")["config"]["images"] == {"train": 50, "test": 30, "val": 20}
    assert len(copies) == 11
    for copy in copies:
        check_resume(tmp_path, copy, run_dir, *LONG)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_killed_in_the_save_of_its_second_epoch_resumes_to_the_same_bytes(tmp_path, method, monkeypatch):
    early = ["--burn-in", "1"] if "burn_in" in METHODS[method]["step_settings"] else []
    with monkeypatch.context() as patch:
        copies = copy_before_renames(patch, tmp_path / "whole")
        run(tmp_path / "whole", "--method", method, *early)
    assert checkpoints.load(copies[5] / "last.pt")["epoch"] == 1
    check_resume(tmp_path / "resumed", copies[5], tmp_path / "whole")


def test_ctrl_c_before_the_first_save_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_dynat, "train_batches", Mock(side_effect=KeyboardInterrupt))
    assert main([*SHORT, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was saved yet\n"


@pytest.mark.parametrize(
    ("first", "said"), [(5, "loss is not finite in update 2 of epoch 2"), (6, "weight is not finite after epoch 2")]
)
def test_an_update_that_is_not_finite_is_named_and_not_saved(tmp_path, capsys, whole, monkeypatch, first, said):
    step, calls = METHODS["dynat"]["step"], count(1)

    def spoil(*, target, **others):
        x_adv, metrics = step(target=target, **others)
        if next(calls) >= first:
            spoiled = {5: metrics["loss"], 6: target.model.linear.bias.data}[first]
            spoiled.fill_(float("inf"))
        return x_adv, metrics

    with monkeypatch.context() as patch:
        patch.setitem(METHODS["dynat"], "step", spoil)
        assert main([*LONG, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count(f"{said}: this epoch is not saved") == 1
    check_resume(tmp_path / "resumed", tmp_path / "run", whole[0])


def test_a_short_run_names_the_rates_that_its_schedule_loses():
    lost = {"dynat": [0.1, 0.001], "pgd-at": [0.01], "trades": [0.01], "trades --target cnn --dataset tiny": [0.01]}
    for method, rates in lost.items():
        settings = settings_of(f"--method {method} --epochs 2")
        assert skipped_rates(settings, METHODS) == pytest.approx(rates), method
    for method in METHODS:
        for argv in ("", "--target resnet18"):
            assert skipped_rates(settings_of(f"--method {method} {argv}"), METHODS) == [], method


def test_an_idle_flag_is_refused():
    with pytest.raises(UserError, match="--preset release changes nothing of --method pgd-at"):
        settings_of("--method pgd-at --preset release")
    with pytest.raises(UserError, match="--lr-milestones is the whole schedule: leave --schedule-epochs out"):
        settings_of("--lr-milestones 9 --schedule-epochs 20")
    settings_of("--method fat --lr-milestones 9 --schedule-epochs 20")  # its tau is scaled


def test_resume_finds_the_run_by_its_default_name_and_more_epochs_leave_its_schedule(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TINY, "epochs", 1)
    argv, other = ["--dataset", "tiny", "--device", "cpu", "--steps", "1", "--resume"], ["--seed=2", "--epochs=2"]
    more = ["--epochs=3", "--out=runs/dynat-tiny-cnn-s1-steps-1"]
    for typed, note in (([], True), ([], False), (more, False), (other, True), (other, False)):
        assert main([*argv, *typed]) == 0
        assert ("note: no run in runs/" in capsys.readouterr().out) == note
    assert sorted(os.listdir("runs")) == ["dynat-tiny-cnn-s1-steps-1", "dynat-tiny-cnn-s2-epochs-2-steps-1"]
    log = checkpoints.load("runs/dynat-tiny-cnn-s1-steps-1/last.pt")["log"]
    assert [row["lr"] for row in log] == pytest.approx([0.02, 0.001, 0.001])  # the schedule of one epoch
