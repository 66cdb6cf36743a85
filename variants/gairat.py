"""GAIRAT (Zhang et al., 2021): w * CE(f(x_adv), y), w larger the sooner PGD gets an image across the boundary.

Source: Geometry-aware-Instance-reweighted-Adversarial-Training, GAIRAT.py, GAIR.py, attack_generator.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import counting_pgd, eval_mode
from losses import gairat_weights


def gairat_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, burn_in, epoch, all_reduce=None):
    """One update of w * CE(f(x_adv), y), w = 1 during the first `burn_in` epochs.

    Arguments as `dynat_step`, without a guide; `all_reduce` as in `gairat_weights`.
    """
    with eval_mode(target):
        x_adv, kappa = counting_pgd(target, x, start, y, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = F.cross_entropy(adv_logits, y, reduction="none")  # (B,)
    if epoch > burn_in:
        losses = gairat_weights(kappa, steps, all_reduce=all_reduce) * losses
    loss = losses.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "gairat": {
        "step": gairat_step,
        "start": "uniform",
        "loop_arguments": ("epoch", "all_reduce"),
        "step_settings": {"step_size": 0.007, "burn_in": 59},
        "training": {"epochs": 120, "milestones": [(1, 1.0), (60, 0.1), (90, 0.01), (110, 0.005)]},
    }
}
