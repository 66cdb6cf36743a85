"""LBGAT (Cui et al., 2021): CE(g(x), y) + (1/C) * |f(x_adv) - g(x)|^2 + kl_weight * KL(f(x) || f(x_adv)).

Source: lbgat.py, train_lbgat_cifar100.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch

from attacks import eval_mode, linf_pgd
from losses import guide_loss, kl_divergence, logit_mse


def lbgat_step(target, guide, optimizer, x, y, start, *, epsilon, step_size, steps, kl_weight):
    """One update of CE(g(x), y) + (1/C) * |f(x_adv) - g(x)|^2 + kl_weight * KL(f(x) || f(x_adv)), x_adv maximising KL.

    The guide's logits are not detached: the guide, too, learns from the MSE. Arguments as `dynat_step`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update

    with eval_mode(target):
        with torch.no_grad():
            clean_logits = target(x)  # (B, C)  the same at every PGD step
        objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    with torch.set_grad_enabled(kl_weight > 0):  # else only for BatchNorm's statistics
        clean_logits = target(x)  # (B, C)
    loss_guide = guide_loss(guide_logits, y)
    loss_target = logit_mse(adv_logits, guide_logits).mean()
    loss_target = loss_target + kl_weight * kl_divergence(clean_logits, adv_logits).mean()
    loss = loss_guide + loss_target
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_guide": loss_guide.detach(),
        "loss_target": loss_target.detach(),
        "label_acc": (guide_logits.argmax(1) == y).float().mean(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


MILESTONES = [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)]
METHODS = {
    "lbgat": {
        "step": lbgat_step,
        "start": "gaussian",
        "step_settings": {"step_size": 0.007, "kl_weight": 0.0},
        "training": {"guide": "resnet18-lbgat", "epochs": 100, "milestones": MILESTONES},
        "for_dataset": {"cifar100": {"kl_weight": 6.0}},
    }
}
