"""GAIRAT (Zhang et al., 2021): weights w, larger the sooner PGD gets an image across the boundary.

    GAIRAT        w * CE(f(x_adv), y)
    DYNAT-GAIRAT  CE(g(x), y) + beta * w * CE(f(x_adv), labels), with or without Inner

Source: Geometry-aware-Instance-reweighted-Adversarial-Training, GAIRAT.py, GAIR.py, attack_generator.py. No code for
DYNAT-GAIRAT has been published. It is GAIRAT's script with the dynamic label in the place of y: in the target's loss,
smoothed as the paper says, and with Inner also in the attack, which counts kappa.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import counting_pgd, eval_mode
from losses import dynamic_labels, gairat_weights, guide_loss


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


def dynat_gairat_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, label_smoothing, burn_in, epoch, static_labels=False, all_reduce=None,
):  # fmt: skip
    """One update of CE(g(x), y) + beta * w * CE(f(x_adv), labels), w = 1 during the first `burn_in` epochs.

    inner             False: the attack and its kappa use the ground truth y. True: the dynamic labels, Eq. (7).
    label_smoothing   a: the target's loss has 1 - a + a / C at the label and a / C elsewhere. The labels of the attack
                      and of the guide's loss stay hard.
    all_reduce        as in `gairat_weights`.
    Other arguments as `dynat_step`.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    guide_labels = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else guide_labels

    attacked = labels if inner else y
    with eval_mode(target):
        x_adv, kappa = counting_pgd(target, x, start, attacked, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    losses = F.cross_entropy(adv_logits, labels, label_smoothing=label_smoothing, reduction="none")  # (B,)
    if epoch > burn_in:
        losses = gairat_weights(kappa, steps, all_reduce=all_reduce) * losses
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


MILESTONES = [(1, 1.0), (60, 0.1), (90, 0.01), (110, 0.005)]
PAPER = {"label_smoothing": 0.2, "burn_in": 70}  # so is the weight decay of 5e-4, whose exponent it has lost
DYNAT_GAIRAT = {
    "step": dynat_gairat_step,
    "start": "uniform",
    "needs": ("epoch", "all_reduce"),
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "step_size": 0.007, **PAPER},
    "training": {"guide": "resnet18", "epochs": 120, "milestones": MILESTONES, "weight_decay": 5e-4},
    "for_preset": {"release": {"guide": "resnet18-lbgat"}},
}
METHODS = {
    "dynat-gairat": DYNAT_GAIRAT,
    "dynat-inner-gairat": {**DYNAT_GAIRAT, "step_settings": {**DYNAT_GAIRAT["step_settings"], "inner": True}},
    "gairat": {
        "step": gairat_step,
        "start": "uniform",
        "needs": ("epoch", "all_reduce"),
        "step_settings": {"step_size": 0.007, "burn_in": 59},
        "training": {"epochs": 120, "milestones": MILESTONES},
    },
}
