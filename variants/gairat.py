"""GAIRAT (Zhang et al., 2021): w * CE(f(x_adv), y), w larger the sooner PGD gets an image across the boundary.

Source: Geometry-aware-Instance-reweighted-Adversarial-Training, GAIRAT.py, GAIR.py, attack_generator.py.
"""

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import gairat_weights


def geometry_pgd(target, x, start, labels, *, epsilon, step_size, steps):
    """PGD on CE(f(.), labels), and kappa, how many of its iterates 0 .. steps - 1 were still classified as the label.

    A count, not the step of the first mistake, and the last iterate is not among them. Images x, start (B, 3, H, W),
    labels (B,) int64; returns x_adv (B, 3, H, W) and kappa (B,) int64. The target's mode is the caller's.
    """
    kappa = torch.zeros_like(labels)

    def count(logits):
        kappa.add_(logits.argmax(1) == labels)
        return torch.ones_like(labels, dtype=torch.bool)  # every image moves at every step

    objective = lambda logits: F.cross_entropy(logits, labels, reduction="sum")
    x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps, active=count)
    return x_adv, kappa


def gairat_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, burn_in, epoch):
    """One update of w * CE(f(x_adv), y), w = 1 during the first `burn_in` epochs. Arguments as `dynat_step`, without a
    guide."""
    with eval_mode(target):
        x_adv, kappa = geometry_pgd(target, x, start, y, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = F.cross_entropy(adv_logits, y, reduction="none")  # (B,)
    if epoch > burn_in:
        losses = gairat_weights(kappa, steps) * losses
    loss = losses.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_target": loss.detach(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


METHODS = {
    "gairat": {
        "step": gairat_step,
        "start": "uniform",
        "epochs": 120,
        "milestones": [(1, 1.0), (60, 0.1), (90, 0.01), (110, 0.005)],
        "step_size": 0.007,
        "burn_in": 59,
    }
}
