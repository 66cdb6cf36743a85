"""DYNAT-AWP and DYNAT-Inner-AWP: Eq. (6) plus a KL term, at adversarially perturbed weights.

    CE(g(x), y) + beta * CE(f(x_adv), labels) + kl_weight * KL(f(x) || f(x_adv)),  f at w + gamma * v

The paper's lambda = 0 and lambda = 1 are kl_weight. Source: DYNAT, AWP_dynat.py.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import dynamic_labels, guide_loss, kl_divergence, target_loss, trades_loss
from variants.awp import weight_perturbation

AWP_KL_WEIGHT = 6.0  # in the perturbation's own objective, whatever kl_weight is


def dynat_awp_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, kl_weight, awp_gamma, awp_start, epoch,
):  # fmt: skip
    """One update of CE(g(x), y) + beta * CE(f(x_adv), labels) + kl_weight * KL(f(x) || f(x_adv)) at perturbed weights.

    Arguments as `dynat_step`. From epoch `awp_start` on, f's weights are perturbed by `awp_gamma` times their norm, up
    the gradient of TRADES' loss on the ground truth: not of the loss being trained, as in the release.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    labels = dynamic_labels(guide_logits)  # (B,)

    with eval_mode(target):
        if inner:  # Eq. (7)
            objective = lambda logits: F.cross_entropy(logits, labels, reduction="sum")
        else:
            with torch.no_grad():
                clean_logits = target(x)  # (B, C)
            objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    worst = lambda: len(y) * trades_loss(target(x), target(x_adv), y, AWP_KL_WEIGHT)
    with weight_perturbation(target, worst, awp_gamma) if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        with torch.set_grad_enabled(kl_weight > 0):  # else it only brings clean statistics into BatchNorm
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
        "label_acc": (labels == y).float().mean(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


DYNAT_AWP = {
    "step": dynat_awp_step,
    "start": "near",
    "epochs": 100,
    "milestones": [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)],
    "kl_weight": 1.0,
    "awp_gamma": 0.005,
    "awp_start": 10,
    "where": {
        "cifar100": {"beta": 0.2},  # the paper's value is lost; this is its release's
        "release": {"guide": "resnet18-lbgat", "step_size": 0.007, "beta": 0.2},
    },
}
METHODS = {"dynat-awp": {**DYNAT_AWP, "inner": False}, "dynat-inner-awp": {**DYNAT_AWP, "inner": True}}
