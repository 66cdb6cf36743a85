"""FAT (Zhang et al., 2020): CE(f(x_adv), y) on friendly examples, whose attack stops soon after it succeeds.

Source: Friendly-Adversarial-Training, FAT.py, earlystop.py.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd

OMEGA = 0.001  # of the Gaussian noise in every PGD step, in units of pixels in [0, 1]


def fat_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, tau_milestones, epoch, noise):
    """One update of CE(f(x_adv), y), where an image stops moving at its (tau + 1)-th misclassified iterate.

    tau_milestones   [(first epoch, tau)]; tau = `steps` would be plain adversarial training.
    noise            k = 0 .. steps - 1 to N(0, 1) of the shape of x.
    Misclassifications are counted, not runs of them: one that is undone still counts. Other arguments as `dynat_step`,
    without a guide.
    """
    tau = [tau for first, tau in tau_milestones if first <= epoch][-1]
    mistakes = torch.zeros_like(y)  # (B,)

    def moving(logits):
        mistakes.add_(logits.argmax(1) != y)
        return mistakes <= tau

    with eval_mode(target):
        x_adv = linf_pgd(
            target, x, start, lambda logits: F.cross_entropy(logits, y, reduction="sum"),
            epsilon=epsilon, step_size=step_size, steps=steps, active=moving, noise=lambda k: OMEGA * noise(k),
        )  # fmt: skip

    adv_logits = target(x_adv)  # (B, C)
    loss = F.cross_entropy(adv_logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


METHODS = {
    "fat": {
        "step": fat_step,
        "start": "uniform",
        "needs": ("epoch", "noise"),
        "step_settings": {"step_size": 0.007, "tau_milestones": [(1, 0), (51, 1), (91, 2)]},
        "training": {"epochs": 120, "milestones": [(1, 1.0), (60, 0.1), (90, 0.01), (110, 0.005)]},
    }
}
