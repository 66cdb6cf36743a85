"""Adversarial weight perturbation (AWP, Wu et al., 2020): a loss at weights that are perturbed up a gradient.

    AT-AWP      CE(f(x_adv), y)                                                   "AWP" in the paper's tables
    TRADES-AWP  CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv))
    DYNAT-AWP   CE(g(x), y) + beta * CE(f(x_adv), labels) + kl_weight * KL(f(x) || f(x_adv)), with or without Inner

The paper's lambda = 0 and lambda = 1 are DYNAT-AWP's kl_weight. Source: AWP, AT_AWP/train_cifar10.py (PGD-AT's script,
which differs from this project as pgd_at.py says) and trades_AWP/train_trades_cifar.py; DYNAT, AWP_dynat.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd, weight_perturbation
from losses import dynamic_labels, guide_loss, kl_divergence, target_loss, trades_loss

AWP_KL_WEIGHT = 6.0  # in the objective of DYNAT-AWP's perturbation, whatever kl_weight is


def at_awp_step(
    target, optimizer, x, y, start, *, epsilon, step_size, steps, awp_gamma, awp_start, epoch, all_reduce=None
):
    """One update of CE(f(x_adv), y) at perturbed weights, from epoch `awp_start` on.

    The perturbation has `awp_gamma` times the weights' norm and goes up the gradient of the same loss. The attack runs
    in train mode, with PGD-AT's two forwards for logging. Other arguments as `dynat_step`, without a guide;
    `all_reduce` as in `weight_perturbation`.
    """
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)
    with torch.no_grad():
        target(x_adv)  # no loss term: the release computes the attack's final loss here, and BatchNorm sees it

    objective_of_weights = lambda: F.cross_entropy(target(x_adv), y, reduction="sum")
    perturbed = weight_perturbation(target, objective_of_weights, awp_gamma, all_reduce)
    with perturbed if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        loss = F.cross_entropy(adv_logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        target(x)  # no loss term: the release logs clean accuracy in train mode, so clean statistics enter BatchNorm
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


def trades_awp_step(
    target, optimizer, x, y, start, *,
    epsilon, step_size, steps, kl_weight, awp_gamma, awp_start, epoch, all_reduce=None,
):  # fmt: skip
    """One update of CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)) at perturbed weights, from epoch `awp_start` on.

    The perturbation has `awp_gamma` times the weights' norm and goes up the gradient of the same loss. Other arguments
    as `dynat_step`, without a guide; `all_reduce` as in `weight_perturbation`.
    """
    with eval_mode(target):
        with torch.no_grad():
            clean_logits = target(x)  # (B, C)  the same at every PGD step
        objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    objective_of_weights = lambda: len(y) * trades_loss(target(x), target(x_adv), y, kl_weight)
    perturbed = weight_perturbation(target, objective_of_weights, awp_gamma, all_reduce)
    with perturbed if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        clean_logits = target(x)  # (B, C)
        with torch.no_grad():
            target(x)  # the release's second clean forward: the same logits, but BatchNorm sees them again
        loss = trades_loss(clean_logits, adv_logits, y, kl_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


def dynat_awp_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, kl_weight, awp_gamma, awp_start, epoch,
    static_labels=False, all_reduce=None,
):  # fmt: skip
    """One update of CE(g(x), y) + beta * CE(f(x_adv), labels) + kl_weight * KL(f(x) || f(x_adv)) at perturbed weights.

    From epoch `awp_start` on, f's weights are perturbed by `awp_gamma` times their norm, up the gradient of TRADES'
    loss on the ground truth: as in the release, this is not the loss that is trained. Other arguments as `dynat_step`;
    `all_reduce` as in `weight_perturbation`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    guide_labels = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else guide_labels

    with eval_mode(target):
        if inner:  # Eq. (7)
            objective = lambda logits: F.cross_entropy(logits, labels, reduction="sum")
        else:
            with torch.no_grad():
                clean_logits = target(x)  # (B, C)
            objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    objective_of_weights = lambda: len(y) * trades_loss(target(x), target(x_adv), y, AWP_KL_WEIGHT)
    perturbed = weight_perturbation(target, objective_of_weights, awp_gamma, all_reduce)
    with perturbed if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        with torch.set_grad_enabled(kl_weight > 0):  # else only for BatchNorm's statistics
            clean_logits = target(x)  # (B, C)
        loss_guide = guide_loss(guide_logits, y)
        loss_target = target_loss(adv_logits, labels)
        loss = loss_guide + beta * loss_target + kl_weight * kl_divergence(clean_logits, adv_logits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_guide": loss_guide.detach(),
        "loss_target": loss_target.detach(),
        "label_acc": (guide_labels == y).float().mean(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


PERTURBATION = {"awp_gamma": 0.005, "awp_start": 10}
DYNAT_AWP = {
    "step": dynat_awp_step,
    "start": "gaussian",
    "needs": ("epoch", "all_reduce"),
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "kl_weight": 1.0, **PERTURBATION},
    "training": {"guide": "resnet18", "epochs": 100, "milestones": [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)]},
    "for_dataset": {"cifar100": {"beta": 0.2}},  # the paper's value is lost; this is its release's
    "for_preset": {"release": {"guide": "resnet18-lbgat", "step_size": 0.007, "beta": 0.2}},
}
METHODS = {
    "dynat-awp": DYNAT_AWP,
    "dynat-inner-awp": {**DYNAT_AWP, "step_settings": {**DYNAT_AWP["step_settings"], "inner": True}},
    "at-awp": {
        "step": at_awp_step,
        "start": "uniform",
        "needs": ("epoch", "all_reduce"),
        "step_settings": {"epsilon": 8 / 255, "step_size": 2 / 255, "awp_gamma": 0.01, "awp_start": 1},
        "training": {"epochs": 200, "milestones": [(1, 1.0), (101, 0.1), (151, 0.01)], "weight_decay": 5e-4},
    },
    "trades-awp": {
        "step": trades_awp_step,
        "start": "gaussian",
        "needs": ("epoch", "all_reduce"),
        "step_settings": {"epsilon": 8 / 255, "step_size": 2 / 255, "kl_weight": 6.0, **PERTURBATION},
        "training": {"epochs": 200, "milestones": [(1, 1.0), (100, 0.1), (150, 0.01)], "weight_decay": 5e-4},
    },
}
