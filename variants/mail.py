"""MAIL-AT (Liu et al., 2021): w * CE(f(x_adv), y), w larger the smaller the probabilistic margin at x_adv.

Source: MAIL, mail_loss.py, at_loss.py, with its ResNet-18's learning rate and weight decay.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import mail_weights


def mail_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, burn_in, epoch):
    """One update of w * CE(f(x_adv), y), w = 1 during the first `burn_in` epochs. Arguments as `dynat_step`, without a
    guide."""
    with eval_mode(target):
        objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = F.cross_entropy(adv_logits, y, reduction="none")  # (B,)
    if epoch > burn_in:
        losses = mail_weights(adv_logits, y) * losses  # the margin in train mode, from the loss's own forward
    loss = losses.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "mail": {
        "step": mail_step,
        "start": "gaussian",
        "loop_arguments": ("epoch",),
        "step_settings": {"step_size": 0.007, "burn_in": 76},
        "training": {
            "epochs": 120,
            "lr": 0.01,
            "milestones": [(1, 1.0), (76, 0.1), (91, 0.01), (101, 0.001)],
            "weight_decay": 3.5e-3,
        },
    }
}
