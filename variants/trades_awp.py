"""TRADES-AWP (Wu et al., 2020): TRADES' loss at weights perturbed up its own gradient.

Source: AWP, trades_AWP/train_trades_cifar.py.
"""

from contextlib import nullcontext

import torch

from attacks import eval_mode, linf_pgd
from losses import kl_divergence, trades_loss
from variants.awp import weight_perturbation


def trades_awp_step(
    target, optimizer, x, y, start, *, epsilon, step_size, steps, kl_weight, awp_gamma, awp_start, epoch
):
    """One update of CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)) at perturbed weights, from epoch `awp_start` on.

    The perturbation, `awp_gamma` times the weights' norm, goes up the gradient of the same loss. Arguments as
    `dynat_step`, without a guide.
    """
    with eval_mode(target):
        with torch.no_grad():
            clean_logits = target(x)  # (B, C)  the same at every PGD step
        objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    worst = lambda: len(y) * trades_loss(target(x), target(x_adv), y, kl_weight)
    with weight_perturbation(target, worst, awp_gamma) if epoch >= awp_start else nullcontext():
        adv_logits = target(x_adv)  # (B, C)
        clean_logits = target(x)  # (B, C)
        with torch.no_grad():
            target(x)  # the release's second clean forward: the same logits, but once more into BatchNorm
        loss = trades_loss(clean_logits, adv_logits, y, kl_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_target": loss.detach(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


METHODS = {
    "trades-awp": {
        "step": trades_awp_step,
        "start": "near",
        "epochs": 200,
        "milestones": [(1, 1.0), (100, 0.1), (150, 0.01)],
        "weight_decay": 5e-4,
        "epsilon": 8 / 255,
        "step_size": 2 / 255,
        "kl_weight": 6.0,
        "awp_gamma": 0.005,
        "awp_start": 10,
    }
}
