"""DYNAT-MAIL (the paper's DYNAT-AT-MAIL) and DYNAT-Inner-MAIL (its DYNAT-MAIL-Inner): MAIL's weights on the target's
loss, with dynamic labels.

    CE(g(x), y) + beta * w * CE(f(x_adv), labels)

No code for them has been published. This is MAIL-AT's script with the dynamic label in the place of y: in the target's
loss, in the margin behind w, which takes the label of the loss there, and with Inner also in the attack.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import dynamic_labels, guide_loss, mail_weights


def dynat_mail_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, burn_in, epoch, static_labels=False,
):  # fmt: skip
    """One update of CE(g(x), y) + beta * w * CE(f(x_adv), labels), w = 1 during the first `burn_in` epochs.

    inner   False: the attack uses the ground truth y. True: the dynamic labels, Eq. (7). The margin behind w uses the
            dynamic labels either way. Other arguments as `dynat_step`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    decisions = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else decisions

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
        "label_acc": (decisions == y).float().mean(),
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


DYNAT_MAIL = {
    "step": dynat_mail_step,
    "start": "gaussian",
    "loop_arguments": ("epoch",),
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "step_size": 0.007, "burn_in": 76},
    "training": {
        "guide": "resnet18",
        "epochs": 100,  # MAIL's schedule up to the epoch that it reports
        "lr": 0.01,
        "milestones": [(1, 1.0), (76, 0.1), (91, 0.01), (101, 0.001)],
        "weight_decay": 3.5e-3,
    },
    "for_preset": {"release": {"guide": "resnet18-lbgat"}},
}
METHODS = {
    "dynat-mail": DYNAT_MAIL,
    "dynat-inner-mail": {**DYNAT_MAIL, "step_settings": {**DYNAT_MAIL["step_settings"], "inner": True}},
}
