"""MART (Wang et al., 2020): BCE(f(x_adv), y) + kl_weight * KL(f(x) || f(x_adv)) * (1 - p_y(x)).

Source: mart.py, train_wideresnet.py, train_resnet.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import mart_loss


def mart_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, kl_weight):
    """One update of MART's loss, x_adv maximising CE(f(.), y). Arguments as `dynat_step`, without a guide."""
    with eval_mode(target):
        objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    clean_logits = target(x)  # (B, C)
    adv_logits = target(x_adv)  # (B, C)
    loss = mart_loss(clean_logits, adv_logits, y, kl_weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "mart": {
        "step": mart_step,
        "start": "gaussian",
        "step_settings": {"step_size": 0.007, "kl_weight": 6.0},
        "training": {"epochs": 90, "milestones": [(1, 1.0), (75, 0.1), (90, 0.01), (100, 0.001)], "weight_decay": 7e-4},
        "for_target": {"resnet18": {"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3, "kl_weight": 5.0}},
    }
}
