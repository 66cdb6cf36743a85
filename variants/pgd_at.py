"""PGD-AT (Madry et al., 2018; Rice et al., 2020): min over f of CE(f(x_adv), y), x_adv maximising the same.

Source: robust_overfitting, train_cifar10.py. It normalises its images, pads by reflection and changes the learning rate
one batch before the epoch's end; here images are in [0, 1] and padded with zeros, for every method alike.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch
import torch.nn.functional as F

from attacks import linf_pgd


def pgd_at_step(target, optimizer, x, y, start, *, epsilon, step_size, steps):
    """One update of CE(f(x_adv), y). Arguments as `dynat_step`, without a guide.

    The attack runs in train mode, so BatchNorm sees each of its forwards. It also sees the release's two forwards for
    logging: one at the end of the attack, one on clean images after the update.
    """
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)
    with torch.no_grad():
        target(x_adv)  # no loss term: the release computes the attack's final loss here, and BatchNorm sees it

    adv_logits = target(x_adv)  # (B, C)
    loss = F.cross_entropy(adv_logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        target(x)  # no loss term: the release logs clean accuracy in train mode, so clean statistics enter BatchNorm
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "pgd-at": {
        "step": pgd_at_step,
        "start": "uniform",
        "step_settings": {"epsilon": 8 / 255, "step_size": 2 / 255},
        "training": {"epochs": 200, "milestones": [(1, 1.0), (101, 0.1), (151, 0.01)], "weight_decay": 5e-4},
    }
}
