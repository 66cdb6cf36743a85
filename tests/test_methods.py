"""Every method in a short run, with its mechanism seen at work; published settings, how they scale, what is refused."""

import functools
from inspect import signature

import pytest
import torch
from cases import mutant

import attacks
import data
import train_dynat
from cli import UserError
from losses import gairat_weights, mail_weights
from train_dynat import METHODS, resolve
from variants.awp import weight_perturbation
from variants.fat import fat_step


def typed(method, dataset="cifar10", **flags):
    return {"method": method, "dataset": dataset, "preset": "paper", "seed": 1, **flags}


# Short runs. Three epochs: the schedules scale to them, so that drops, burn-in and perturbation all come to pass.


@functools.cache
def tiny_images(dataset, split, data_dir):
    return data.load_images(dataset, split, data_dir)


class Watch:
    """Stands in for a function of a step's module and keeps what `look` makes of its arguments and its result."""

    def __init__(self, monkeypatch, step, name, look):
        self.seen = []
        original = step.__globals__[name]

        @functools.wraps(original)
        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            self.seen.append(look(result, *args, **kwargs))
            return result

        monkeypatch.setitem(step.__globals__, name, watched)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains a method on 128 images of tiny for 3 epochs; returns its log."""
    monkeypatch.setattr(train_dynat, "load_images", tiny_images)

    def short(method, **flags):
        flags = {"train_images": 128, "epochs": 3, "eval_every": 3, "deterministic": True, **flags}
        settings, _ = resolve(typed(method, "tiny", **flags))
        return train_dynat.train(settings, tmp_path / method, torch.device("cpu"))

    return short


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_shows_the_whole_method(run, monkeypatch, method):
    step = METHODS[method]["step"]
    names = step.__globals__
    perturbed = "awp" in method and Watch(monkeypatch, step, "weight_perturbation", lambda _, *args: args[2])
    weighted = {name: Watch(monkeypatch, step, name, lambda w, *_: w) for name in WEIGHTS if name in names}
    moved = {}
    for name in {"linf_pgd", "geometry_pgd"} & names.keys():
        distance = lambda result, model, x, *args, **kwargs: (
            ((result[0] if type(result) is tuple else result) - x).abs().amax((1, 2, 3))
        )
        moved = Watch(monkeypatch, step, name, distance)

    log = run(method)

    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert log[-1]["lr"] < log[0]["lr"], "the learning rate never drops"
    assert ("label_acc" in log[0]) == ("loss_guide" in log[0]) == ("guide" in signature(step).parameters)
    assert torch.stack(moved.seen).max() > 0.02, "the images do not move"
    assert len(moved.seen) == 6
    if perturbed:
        assert perturbed.seen and min(perturbed.seen) > 0
    for watch in weighted.values():
        assert 0 < len(watch.seen) < 6, "weighted in every epoch or in none"
        assert torch.stack(watch.seen).std() > 0.01, "the weights are all the same"
