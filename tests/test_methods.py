"""Every method at work in a short run; what its step reports; guide, beta, static labels and clean forward of DYNAT."""

import copy
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import TinyNet, assert_state, settings_of, step_arguments
from torch import nn

import attacks
import data
import losses
import train_dynat
from settings import ATTACK
from train_dynat import METHODS
from variants.fat import fat_step

PAPER = ("dynat", "dynat-inner", "dynat-awp", "dynat-inner-awp", "dynat-gairat", "dynat-inner-gairat", "dynat-mail",
         "dynat-inner-mail", "pgd-at", "trades", "mart", "fat", "sat", "gairat", "mail", "mail-mse", "at-awp",
         "trades-awp", "lbgat")  # fmt: skip


def watch(monkeypatch, method):
    """What a method's step and the parts that it calls returned, call by call."""
    seen, step = defaultdict(list), METHODS[method]["step"]

    def keep(name, function):
        def kept(*args, **kwargs):
            seen[name].append(function(*args, **kwargs))
            return seen[name][-1]

        return kept

    def linf_pgd(*args, active=None, noise=None, **settings):
        active, noise = active and keep("active", active), noise and keep("noise", noise)
        return attacks.linf_pgd(*args, active=active, noise=noise, **settings)

    @contextmanager
    def weight_perturbation(*args):
        seen["perturbed"].append(True)
        with attacks.weight_perturbation(*args):
            yield

    def moving_step(*, x, **arguments):
        x_adv, metrics = step(x=x, **arguments)
        seen["moved"].append((x_adv - x).abs().max())
        return x_adv, metrics

    watched = {"linf_pgd": linf_pgd, "weight_perturbation": weight_perturbation}
    watched |= {weights.__name__: keep("weights", weights) for weights in (losses.gairat_weights, losses.mail_weights)}
    for name in watched.keys() & step.__globals__.keys():
        monkeypatch.setitem(step.__globals__, name, watched[name])
    monkeypatch.setitem(METHODS[method], "step", moving_step)
    return seen


@pytest.mark.parametrize("method", PAPER)
def test_a_short_run_shows_the_whole_method(monkeypatch, tmp_path, method):
    """On 64 images of tiny: 3 epochs of 2 updates, to which every schedule scales."""
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 64, "test": 10})
    seen = watch(monkeypatch, method)
    settings = settings_of(f"--method {method} --dataset tiny --epochs 3 --batch-size 32")
    log = train_dynat.train(settings, tmp_path, torch.device("cpu"))

    assert [row["lr"] for row in log] == [train_dynat.learning_rate(settings, epoch) for epoch in (1, 2, 3)]
    assert len(seen["moved"]) == 6 and min(seen["moved"]) > 0.02, "the attack has not moved the images"
    assert len(seen["perturbed"]) == {"at-awp": 6}.get(method, 4 if "awp" in method else 0)
    assert len(seen["weights"]) in ((2, 4) if "gairat" in method or "mail" in method else (0,)), "not after a burn-in"
    assert all(weights.std() > 0 for weights in seen["weights"]), "every image weighs the same"
    assert len(seen["noise"]) == (60 if method == "fat" else 0)
    assert all(0.001 < noise.abs().max() < 0.01 for noise in seen["noise"])
    if method in ("fat", "sat"):
        assert any(moving.any() and not moving.all() for moving in seen["active"]), "no image stopped before another"


def one_update(method, guide_is_right=False, **settings):
    """An update of tiny nets, late in training: what went in, what came out, what the networks and the loss were."""
    torch.manual_seed(0)
    target, guide = TinyNet().double(), TinyNet().double()
    x = (torch.rand(32, 3, 1, 1) + 0.1 * torch.rand(32, 3, 8, 8)).clamp(0, 1).double()
    y = torch.randint(0, 10, (32,))
    for third, network in enumerate((target, guide)):  # each network is right about a third of the images, and a few
        y[third::3] = copy.deepcopy(network)(x).argmax(1)[third::3]
    networks = {"target": target, "guide": guide} if "guide" in METHODS[method]["training"] else {"target": target}
    if guide_is_right:
        guide.register_forward_hook(lambda _, images, logits: logits + 100 * F.one_hot(y, 10))
    forwards = {target: [], guide: []}
    for network, calls in forwards.items():
        network.register_forward_hook(lambda _, images, logits, calls=calls: calls.append((*images, logits.detach())))

    arguments = step_arguments(method, epoch=1000, **settings)
    optimizer = torch.optim.SGD([weight for network in networks.values() for weight in network.parameters()], lr=1.0)
    step = METHODS[method]["step"]
    with mock.patch.object(torch.Tensor, "backward", autospec=True, side_effect=torch.Tensor.backward) as backward:
        x_adv, metrics = step(**networks, optimizer=optimizer, x=x, y=y, start=x + 0.001, **arguments)
    return SimpleNamespace(
        target=target, guide=guide, x=x, y=y, x_adv=x_adv, metrics=metrics, loss=backward.call_args.args[0].detach(),
        adv_logits=[logits for images, logits in forwards[target] if torch.equal(images, x_adv)][-1],
        guide_logits=[logits for _, logits in forwards[guide]],
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_its_loss_and_what_is_classified_right(method):
    """Reported are the loss, the share of adversarial images classified as y, and that of a guide's right decisions."""
    update = one_update(method)
    share = lambda logits: (logits.argmax(1) == update.y).float().mean()
    expected, more = {"loss": update.loss, "adv_acc": share(update.adv_logits)}, set()
    if update.guide_logits:
        expected["label_acc"], more = share(update.guide_logits[-1]), {"loss_guide", "loss_target"}
    if method in PAPER:
        assert update.metrics.keys() == expected.keys() | more
        assert share(-update.adv_logits) != expected["adv_acc"]  # so that the least likely class would show
    assert all(torch.equal(update.metrics[name], value) for name, value in expected.items())
    assert all(value.shape == () and not value.requires_grad for value in update.metrics.values())


def check_beta(method):
    """beta scales the target's gradient and nothing else."""
    full, quarter = (one_update(method, beta=beta, kl_weight=0.0) for beta in (1.0, 0.25))
    gradient = full.target.linear.weight.grad
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(quarter.target.linear.weight.grad, 0.25 * gradient, rtol=1e-9, atol=1e-12)
    assert_state(quarter.guide, full.guide.state_dict(), 0, "guide")


def check_static_labels(method):
    """The target trains as beside a guide that is always right; guide and label_acc are as with dynamic labels."""
    static, dynamic = one_update(method, static_labels=True), one_update(method)
    right = one_update(method, guide_is_right=True)
    assert torch.equal(static.x_adv, right.x_adv) and static.metrics["loss_target"] == right.metrics["loss_target"]
    assert static.metrics["label_acc"] == dynamic.metrics["label_acc"] < 1 == right.metrics["label_acc"]
    assert_state(static.target, right.target.state_dict(), 0, "target")
    assert_state(static.guide, dynamic.guide.state_dict(), 0, "guide")


@pytest.mark.parametrize("method", ["dynat", "dynat-inner"])
def test_the_clean_forward_moves_the_targets_batchnorm(method):
    """Of the target: r <- 0.81 r + 0.09 s_adv + 0.10 s_clean, or without the clean forward 0.9 r + 0.1 s_adv."""
    for clean_forward in (True, False):
        update = one_update(method, clean_forward=clean_forward)
        conv = update.target.conv1.weight + update.target.conv1.weight.grad  # as it was before the step
        s_adv, s_clean = (F.conv2d(images, conv, padding=1).mean((0, 2, 3)) for images in (update.x_adv, update.x))
        expected = 0.09 * s_adv + 0.10 * s_clean if clean_forward else 0.1 * s_adv
        torch.testing.assert_close(update.target.bn1.running_mean, expected, rtol=1e-9, atol=1e-12)
        assert update.guide.bn1.num_batches_tracked == 1


@pytest.mark.parametrize(("check", "setting"), [(check_beta, "beta"), (check_static_labels, "static_labels")])
def test_beta_and_static_labels_change_the_targets_training_alone(check, setting):
    for method in METHODS:
        if setting in METHODS[method]["step_settings"]:
            check(method)


def steps_taken_by_fat(wrong, tau):
    """How many of ten steps an image takes that is misclassified at the iterates `wrong`."""
    net, x, y, moving = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]), []
    optimizer = torch.optim.SGD(net.parameters())

    def linf_pgd(*_, active, **settings):
        moving.extend(active(F.one_hot(y + (k in wrong), 3)) for k in range(10))
        return x

    with mock.patch.dict(fat_step.__globals__, linf_pgd=linf_pgd):
        fat_step(net, optimizer, x, y, x, **ATTACK, tau_milestones=[(1, tau)], epoch=1, noise=None)
    return torch.stack(moving).sum(0).tolist()


def test_fat_counts_a_mistake_that_was_undone():
    assert [steps_taken_by_fat({1, 4, 6}, tau) for tau in range(4)] == [[1, 1], [4, 4], [6, 6], [10, 10]]
