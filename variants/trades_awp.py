"""TRADES-AWP (Wu et al., 2020): TRADES' loss at weights perturbed up its own gradient.

Source: AWP, trades_AWP/train_trades_cifar.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

from contextlib import nullcontext

import torch

from attacks import eval_mode, linf_pgd, weight_perturbation
from losses import kl_divergence, trades_loss


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


METHODS = {
    "trades-awp": {
        "step": trades_awp_step,
        "start": "gaussian",
        "loop_arguments": ("epoch", "all_reduce"),
        "step_settings": {
            "epsilon": 8 / 255,
            "step_size": 2 / 255,
            "kl_weight": 6.0,
            "awp_gamma": 0.005,
            "awp_start": 10,
        },
        "training": {"epochs": 200, "milestones": [(1, 1.0), (100, 0.1), (150, 0.01)], "weight_decay": 5e-4},
    }
}
