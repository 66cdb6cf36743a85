"""AT-AWP (Wu et al., 2020), "AWP" in the paper's tables: CE(f(x_adv), y) at adversarially perturbed weights.

Source: AWP, AT_AWP/train_cifar10.py: PGD-AT's script with the perturbation around its update. It differs from this
project in normalisation, padding and learning rate, as pgd_at.py says.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from attacks import linf_pgd, weight_perturbation


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


METHODS = {
    "at-awp": {
        "step": at_awp_step,
        "start": "uniform",
        "loop_arguments": ("epoch", "all_reduce"),
        "step_settings": {"epsilon": 8 / 255, "step_size": 2 / 255, "awp_gamma": 0.01, "awp_start": 1},
        "training": {"epochs": 200, "milestones": [(1, 1.0), (101, 0.1), (151, 0.01)], "weight_decay": 5e-4},
    }
}
