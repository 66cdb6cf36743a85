"""MAIL (MSE), a row of the paper's Table 4 that it does not define: MAIL's weights on LBGAT's loss.

    CE(g(x), y) + w * (1/C) * |f(x_adv) - g(x)|^2

No code for it has been published. This reading has a guide, as the row's numbers suggest, and the MSE to which the
paper compares its labels. It is trained like dynat_mail.py, the row beside it in that table.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import guide_loss, logit_mse, mail_weights


def mail_mse_step(target, guide, optimizer, x, y, start, *, epsilon, step_size, steps, burn_in, epoch):
    """One update of CE(g(x), y) + w * (1/C) * |f(x_adv) - g(x)|^2, w = 1 during the first `burn_in` epochs.

    Attack and margin are MAIL's, on the ground truth; the guide learns from both terms, as in LBGAT. Arguments as
    `dynat_step`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update

    with eval_mode(target):
        objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = logit_mse(adv_logits, guide_logits)  # (B,)
    if epoch > burn_in:
        losses = mail_weights(adv_logits, y) * losses
    loss_guide = guide_loss(guide_logits, y)
    loss_target = losses.mean()
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


METHODS = {
    "mail-mse": {
        "step": mail_mse_step,
        "start": "gaussian",
        "loop_arguments": ("epoch",),
        "step_settings": {"step_size": 0.007, "burn_in": 76},
        "training": {
            "epochs": 100,
            "guide": "resnet18",
            "lr": 0.01,
            "milestones": [(1, 1.0), (76, 0.1), (91, 0.01), (101, 0.001)],
            "weight_decay": 3.5e-3,
        },
        "for_preset": {"release": {"guide": "resnet18-lbgat"}},
    }
}
