"""TRADES (Zhang et al., 2019): CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)), x_adv maximising the KL.

Source: trades.py, train_trades_cifar10.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch

from attacks import eval_mode, linf_pgd
from losses import kl_divergence, trades_loss


def trades_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, kl_weight):
    """One update of CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)). Arguments as `dynat_step`, without a guide."""
    with eval_mode(target):
        with torch.no_grad():
            clean_logits = target(x)  # (B, C)  the same at every PGD step
        objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    clean_logits = target(x)  # (B, C)
    adv_logits = target(x_adv)  # (B, C)
    with torch.no_grad():
        target(x)  # the release's second clean forward: the same logits, but BatchNorm sees them again

    loss = trades_loss(clean_logits, adv_logits, y, kl_weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "trades": {
        "step": trades_step,
        "start": "gaussian",
        "step_settings": {"step_size": 0.007, "kl_weight": 6.0},
        "training": {"epochs": 76, "milestones": [(1, 1.0), (75, 0.1), (90, 0.01), (100, 0.001)]},
    }
}
