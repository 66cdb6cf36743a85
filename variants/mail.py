"""MAIL (Liu et al., 2021): weights w, larger the smaller the probabilistic margin at x_adv.

    MAIL-AT     w * CE(f(x_adv), y)
    DYNAT-MAIL  CE(g(x), y) + beta * w * CE(f(x_adv), labels), with or without Inner
    MAIL (MSE)  CE(g(x), y) + w * (1/C) * |f(x_adv) - g(x)|^2

Source: MAIL, mail_loss.py, at_loss.py, with its ResNet-18's learning rate and weight decay. No code for the others has
been published. DYNAT-MAIL (the paper's DYNAT-AT-MAIL and DYNAT-MAIL-Inner) is MAIL-AT's script with the dynamic label
in the place of y: in the target's loss, in the margin behind w, which takes the label of the loss there, and with Inner
also in the attack. MAIL (MSE) is a row of the paper's Table 4 that it does not define. This reading has a guide, as the
row's numbers suggest, and the MSE to which the paper compares its labels. It is trained like DYNAT-MAIL.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import dynamic_labels, guide_loss, logit_mse, mail_weights


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


def dynat_mail_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, burn_in, epoch, static_labels=False,
):  # fmt: skip
    """One update of CE(g(x), y) + beta * w * CE(f(x_adv), labels), w = 1 during the first `burn_in` epochs.

    inner   False: the attack uses the ground truth y. True: the dynamic labels, Eq. (7). The margin behind w uses the
            dynamic labels either way. Other arguments as `dynat_step`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    guide_labels = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else guide_labels

    attacked = labels if inner else y
    with eval_mode(target):
        objective = lambda logits: F.cross_entropy(logits, attacked, reduction="sum")
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = F.cross_entropy(adv_logits, labels, reduction="none")  # (B,)
    if epoch > burn_in:
        losses = mail_weights(adv_logits, labels) * losses
    loss_guide = guide_loss(guide_logits, y)
    loss_target = losses.mean()
    loss = loss_guide + beta * loss_target
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_guide": loss_guide.detach(),
        "loss_target": loss_target.detach(),
        "label_acc": (guide_labels == y).float().mean(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


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


TRAINING = {"lr": 0.01, "milestones": [(1, 1.0), (76, 0.1), (91, 0.01), (101, 0.001)], "weight_decay": 3.5e-3}
DYNAT_MAIL = {
    "step": dynat_mail_step,
    "start": "gaussian",
    "needs": ("epoch",),
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "step_size": 0.007, "burn_in": 76},
    "training": {**TRAINING, "guide": "resnet18", "epochs": 100},  # MAIL's schedule up to the epoch that it reports
    "for_preset": {"release": {"guide": "resnet18-lbgat"}},
}
METHODS = {
    "dynat-mail": DYNAT_MAIL,
    "dynat-inner-mail": {**DYNAT_MAIL, "step_settings": {**DYNAT_MAIL["step_settings"], "inner": True}},
    "mail": {
        "step": mail_step,
        "start": "gaussian",
        "needs": ("epoch",),
        "step_settings": {"step_size": 0.007, "burn_in": 76},
        "training": {**TRAINING, "epochs": 120},
    },
    "mail-mse": {**DYNAT_MAIL, "step": mail_mse_step, "step_settings": {"step_size": 0.007, "burn_in": 76}},
}
