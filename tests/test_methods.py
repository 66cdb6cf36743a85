"""Every method in a short run, with its mechanism seen at work; published settings, how they scale, what is refused."""

import functools
from contextlib import contextmanager
from inspect import signature

import pytest
import torch
from cases import mutant
from torch import nn

import data
import train_dynat
from cli import UserError
from train_dynat import METHODS, options, resolve
from variants.fat import fat_step


def settings_of(method, dataset="cifar10", **typed):
    return resolve({"method": method, "dataset": dataset, "preset": "paper", "seed": 1, **typed})[0]


# Short runs


@functools.cache
def cached_images(dataset, split, data_dir):
    return data.load_images(dataset, split, data_dir)


def watch(monkeypatch, step):
    """Makes the parts that `step` calls keep what they did: how far images moved, which stopped, weights, noise."""
    seen = {"moved": [], "stopped": [], "noise": [], "perturbation": [], "weights": []}
    parts = dict(step.__globals__)

    def linf_pgd(model, x, start, objective, *, active=None, noise=None, **settings):
        def noted_noise(k):
            seen["noise"].append(noise(k).abs().max())
            return noise(k)

        def noted_active(logits):
            moving = active(logits)
            seen["stopped"].append((~moving).sum())
            return moving

        noted = {"active": active and noted_active, "noise": noise and noted_noise}
        x_adv = attack(model, x, start, objective, **noted, **settings)
        seen["moved"].append((x_adv - x).abs().max())
        return x_adv

    @contextmanager
    def weight_perturbation(target, objective, gamma):
        former = target.model.conv1.weight.clone()
        with parts["weight_perturbation"](target, objective, gamma):
            seen["perturbation"].append((target.model.conv1.weight - former).norm() / former.norm() / gamma)
            yield

    def weights(function):
        def noted(*args):
            seen["weights"].append(function(*args))
            return seen["weights"][-1]

        return noted

    caller = parts["geometry_pgd"].__globals__ if "geometry_pgd" in parts else step.__globals__
    attack = caller["linf_pgd"]
    monkeypatch.setitem(caller, "linf_pgd", linf_pgd)
    for name in ("gairat_weights", "mail_weights"):
        if name in parts:
            monkeypatch.setitem(step.__globals__, name, weights(parts[name]))
    if "weight_perturbation" in parts:
        monkeypatch.setitem(step.__globals__, "weight_perturbation", weight_perturbation)
    return seen


def short_run(monkeypatch, out, method, **typed):
    """The log of a run on 128 images of tiny: by default 3 epochs of 2 updates, to which every schedule scales."""
    monkeypatch.setattr(train_dynat, "load_images", cached_images)
    flags = {"train_images": 128, "batch_size": 64, "epochs": 3, "eval_every": 3, "deterministic": True, **typed}
    out.mkdir()
    return train_dynat.train(settings_of(method, "tiny", **flags), out, torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_shows_the_whole_method(monkeypatch, tmp_path, method):
    step = METHODS[method]["step"]
    seen = watch(monkeypatch, step)
    log = short_run(monkeypatch, tmp_path / "run", method)

    assert log[-1]["lr"] < log[0]["lr"], "the learning rate has not dropped"
    for name in ("loss_guide", "label_acc"):
        assert (name in log[0]) == ("guide" in signature(step).parameters)
    assert len(seen["moved"]) == 6
    assert min(seen["moved"]) > 0.02, "the attack has not moved the images"

    assert bool(seen["perturbation"]) == ("awp" in method)
    assert all(abs(size - 1) < 1e-3 for size in seen["perturbation"]), "the perturbation is not gamma times the weights"

    assert bool(seen["weights"]) == ("gairat" in method or "mail" in method)
    if seen["weights"]:
        assert len(seen["weights"]) in (2, 4), "weighted from the first epoch on, or never"
        assert all(weights.std() > 0 for weights in seen["weights"]), "every image weighs the same"

    assert bool(seen["noise"]) == (method == "fat")
    assert all(0.001 < size < 0.01 for size in seen["noise"])
    if method in ("fat", "sat"):
        assert max(seen["stopped"]) > 0, "no image stopped early"
        assert min(seen["stopped"]) < 64, "every image stopped at once"


def test_the_perturbation_begins_in_its_epoch(monkeypatch, tmp_path):
    seen = watch(monkeypatch, METHODS["dynat-awp"]["step"])
    short_run(monkeypatch, tmp_path / "run", "dynat-awp", awp_start=3)
    assert len(seen["perturbation"]) == 2


def test_a_run_of_one_epoch_has_a_schedule_too(monkeypatch, tmp_path):
    short_run(monkeypatch, tmp_path / "run", "sat", epochs=1)


# Counting


class Scripted(nn.Module):
    """Two classes; the k-th forward says whether images of class 0 are classified right, whatever they are."""

    def __init__(self, script):
        super().__init__()
        self.script = iter(script)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        right = 5.0 if next(self.script, True) else -5.0
        brightness = self.scale * x.mean((1, 2, 3))
        return torch.stack([right - brightness, brightness], dim=1)  # brighter is worse: every step is + step_size


def steps_taken_by_fat(step, script, tau):
    target = Scripted(script)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.0)
    x, y = torch.full((4, 3, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    x_adv, _ = step(target, optimizer, x, y, x, epsilon=0.4, step_size=0.02, steps=10,
                    tau_milestones=[(1, tau)], epoch=1, noise=lambda k: torch.zeros(()))  # fmt: skip
    return round((x_adv - x).max().item() / 0.02)


def test_fat_counts_a_mistake_that_was_undone():
    script = [True, False, True, True, False, True, False]  # wrong at iterates 1, 4, 6
    assert [steps_taken_by_fat(fat_step, script, tau) for tau in (0, 1, 2, 3)] == [1, 4, 6, 10]

    reset = ("mistakes.add_(logits.argmax(1) != y)", "mistakes.add_(1).mul_(logits.argmax(1) != y)")
    assert steps_taken_by_fat(mutant(fat_step, reset), script, 1) == 10


# Settings


PUBLISHED = {  # epochs, lr, weight decay, epsilon, step size: with the paper's networks on CIFAR-10
    "dynat": (100, 0.1, 2e-4, 0.031, 2 / 255),
    "dynat-inner": (100, 0.1, 2e-4, 0.031, 2 / 255),
    "dynat-awp": (100, 0.1, 2e-4, 0.031, 2 / 255),
    "dynat-inner-awp": (100, 0.1, 2e-4, 0.031, 2 / 255),
    "dynat-gairat": (120, 0.1, 5e-4, 0.031, 0.007),
    "dynat-inner-gairat": (120, 0.1, 5e-4, 0.031, 0.007),
    "dynat-mail": (100, 0.01, 3.5e-3, 0.031, 0.007),
    "dynat-inner-mail": (100, 0.01, 3.5e-3, 0.031, 0.007),
    "pgd-at": (200, 0.1, 5e-4, 8 / 255, 2 / 255),
    "trades": (76, 0.1, 2e-4, 0.031, 0.007),
    "mart": (90, 0.1, 7e-4, 0.031, 0.007),
    "fat": (120, 0.1, 2e-4, 0.031, 0.007),
    "sat": (100, 0.05, 5e-4, 8 / 255, 2 / 255),
    "gairat": (120, 0.1, 2e-4, 0.031, 0.007),
    "mail": (120, 0.01, 3.5e-3, 0.031, 0.007),
    "mail-mse": (100, 0.01, 3.5e-3, 0.031, 0.007),
    "at-awp": (200, 0.1, 5e-4, 8 / 255, 2 / 255),
    "trades-awp": (200, 0.1, 5e-4, 8 / 255, 2 / 255),
    "lbgat": (100, 0.1, 2e-4, 0.031, 0.007),
}


def test_every_method_of_the_table_is_there():
    assert METHODS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_comes_with_its_published_settings(method):
    settings = settings_of(method)
    names = ("epochs", "lr", "weight_decay", "epsilon", "step_size")
    assert tuple(settings[name] for name in names) == PUBLISHED[method]
    assert settings["milestones"] == METHODS[method]["milestones"]
    assert (settings["batch_size"], settings["momentum"], settings["steps"]) == (128, 0.9, 10)


@pytest.mark.parametrize(
    ("method", "typed", "expected"),
    [
        ("mart", {"target": "resnet18"}, {"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3, "kl_weight": 5}),
        ("mart", {}, {"kl_weight": 6}),
        ("lbgat", {}, {"kl_weight": 0, "guide": "resnet18-lbgat"}),
        ("lbgat", {"dataset": "cifar100"}, {"kl_weight": 6}),
        ("dynat", {"dataset": "cifar100"}, {"beta": 1}),
        ("dynat-awp", {}, {"beta": 1, "kl_weight": 1, "awp_gamma": 0.005, "awp_start": 10}),
        ("dynat-inner-awp", {"dataset": "cifar100"}, {"beta": 0.2, "kl_weight": 1, "guide": "resnet18"}),
        ("dynat-inner-awp", {"dataset": "cifar100", "beta": 0.5}, {"beta": 0.5}),
        ("dynat-awp", {"preset": "release"}, {"beta": 0.2, "step_size": 0.007, "guide": "resnet18-lbgat"}),
        ("dynat", {"preset": "release"}, {"beta": 1, "step_size": 0.007, "guide": "resnet18-lbgat"}),
        ("pgd-at", {"preset": "release"}, {"step_size": 2 / 255}),
        ("dynat-gairat", {}, {"label_smoothing": 0.2, "burn_in": 70}),
        ("gairat", {}, {"burn_in": 59}),
        ("mail-mse", {}, {"burn_in": 76}),
        ("at-awp", {}, {"awp_gamma": 0.01, "awp_start": 1}),
    ],
)
def test_what_depends_on_data_target_or_preset(method, typed, expected):
    settings = settings_of(method, **typed)
    assert {name: settings[name] for name in expected} == expected


def test_every_epoch_number_scales_with_the_epochs():
    assert settings_of("gairat", epochs=60)["burn_in"] == 30
    assert settings_of("gairat", epochs=1)["burn_in"] == 1
    assert settings_of("trades-awp", epochs=100)["awp_start"] == 5
    assert settings_of("trades-awp", epochs=100)["milestones"] == [(1, 1.0), (50, 0.1), (75, 0.01)]
    assert settings_of("fat", epochs=240)["tau_milestones"] == [(1, 0), (102, 1), (182, 2)]
    assert settings_of("at-awp", epochs=400)["awp_start"] == 1
    assert settings_of("dynat", epochs=200)["milestones"] == [(1, 0.2), (4, 1.0), (152, 0.1), (182, 0.01)]
    sat = settings_of("sat", "tiny")
    assert (sat["easy_until"], sat["hardest_from"]) == (3, 7)
    assert settings_of("mart", target="resnet18", epochs=60)["milestones"][1] == (38, 0.1)


def test_a_typed_epoch_number_does_not_scale():
    settings = settings_of("dynat-mail", epochs=50, burn_in=40, lr_milestones=[30, 45])
    assert settings["burn_in"] == 40
    assert settings["milestones"] == [(1, 1.0), (30, 0.1), (45, 0.01)]
    assert settings_of("at-awp", epochs=50, awp_start=7)["awp_start"] == 7


FLAGS = {
    "guide": "cnn", "beta": 0.5, "clean_forward": False, "kl_weight": 2.0, "awp_gamma": 0.1, "awp_start": 2,
    "label_smoothing": 0.1, "burn_in": 5,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_that_a_method_cannot_use_is_refused(method):
    for name, value in FLAGS.items():
        if name in options(METHODS[method]):
            assert settings_of(method, **{name: value})[name] == value
        else:
            assert name not in settings_of(method)
            flag = "--no-clean-forward" if name == "clean_forward" else "--" + name.replace("_", "-")
            with pytest.raises(UserError, match=f"{method} does not use {flag}"):
                settings_of(method, **{name: value})


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (test_every_epoch_number_scales_with_the_epochs, "scaled(defaults[name])", "defaults[name]"),
        (test_every_epoch_number_scales_with_the_epochs, " if epoch > 1 else epoch", ""),
        (test_every_epoch_number_scales_with_the_epochs, "max(1, round(epoch * stretch))", "round(epoch * stretch)"),
        (test_a_typed_epoch_number_does_not_scale, "defaults, **typed}", "typed, **defaults}"),
        (lambda: test_a_flag_that_a_method_cannot_use_is_refused("trades"), "if flag in unused:", "if False:"),
        (lambda: test_what_depends_on_data_target_or_preset("lbgat", {"dataset": "cifar100"}, {"kl_weight": 6}),
            '(typed["dataset"], target,', "(target,"),
        (lambda: test_what_depends_on_data_target_or_preset("mart", {"target": "resnet18"}, {"kl_weight": 5}),
            '(typed["dataset"], target,', '(typed["dataset"],'),
    ],
)  # fmt: skip
def test_settings_resolved_otherwise_are_rejected(monkeypatch, check, old, new):
    monkeypatch.setitem(globals(), "resolve", mutant(resolve, (old, new)))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
