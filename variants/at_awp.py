"""AT-AWP (Wu et al., 2020), "AWP" in the paper's tables: CE(f(x_adv), y) at adversarially perturbed weights.

Source: AWP, AT_AWP/train_cifar10.py, which is PGD-AT's script with the perturbation around its update; normalisation,
padding and learning rate differ from here as they do there (pgd_at.py).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from attacks import linf_pgd
from variants.awp import weight_perturbation


def at_awp_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, awp_gamma, awp_start, epoch):
    """One update of CE(f(x_adv), y) at weights perturbed up the gradient of the same, by `awp_gamma` times their norm.

    Arguments as `dynat_step`, without a guide. The attack runs in train mode, with PGD-AT's two forwards for the books.
    """
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)
    with torch.no_grad():
        target(x_adv)  # no loss term: the release asks for the attack's final loss, which BatchNorm notices

    worst = lambda: F.cross_entropy(target(x_adv), y, reduction="sum")
    with weight_perturbation(target, worst, awp_gamma) if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        loss = F.cross_entropy(adv_logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        target(x)  # no loss term: the release logs clean accuracy in train mode, so clean statistics enter BatchNorm
    return x_adv, {
        "loss": loss.detach(),
        "loss_target": loss.detach(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


METHODS = {
    "at-awp": {
        "step": at_awp_step,
        "start": "uniform",
        "epochs": 200,
        "milestones": [(1, 1.0), (101, 0.1), (151, 0.01)],
        "weight_decay": 5e-4,
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        "awp_gamma": 0.01,
        "awp_start": 1,
    }
}
