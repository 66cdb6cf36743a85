"""SAT (Sitawarin et al., 2021): CE(f(x_adv), y) on examples whose difficulty grows with the epochs, a curriculum.

Source: adv-exp, adv/adv_model.py, train_cifar.py. The release leaves its schedule open; this is its linear one.

To copy it away, take attacks.py and losses.py as well: nothing else but torch is needed.
"""

import torch.nn.functional as F

from attacks import eval_mode, linf_pgd
from losses import probability_gap


def sat_step(target, optimizer, x, y, start, *, epsilon, step_size, steps, difficulty, easy_until, hardest_from, epoch):
    """One update of CE(f(x_adv), y), where an image moves while max_{c != y} p_c - p_y is at most the difficulty.

    The difficulty is 0 until epoch `easy_until` (an image stops once it is misclassified), then grows linearly to its
    final value, `difficulty`, at epoch `hardest_from`; 1 would be plain adversarial training. Other arguments as
    `dynat_step`, without a guide.
    """
    grown = (epoch - easy_until) / max(1, hardest_from - easy_until)
    limit = difficulty * min(1, max(0, grown))

    with eval_mode(target):
        x_adv = linf_pgd(
            target, x, start, lambda logits: F.cross_entropy(logits, y, reduction="sum"),
            epsilon=epsilon, step_size=step_size, steps=steps,
            active=lambda logits: probability_gap(logits, y) <= limit,
        )  # fmt: skip

    adv_logits = target(x_adv)  # (B, C)
    loss = F.cross_entropy(adv_logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {"loss": loss.detach(), "adv_acc": (adv_logits.argmax(1) == y).float().mean()}


CURRICULUM = {"difficulty": 0.4, "easy_until": 30, "hardest_from": 70}
METHODS = {
    "sat": {
        "step": sat_step,
        "start": "uniform",
        "needs": ("epoch",),
        "step_settings": {"epsilon": 8 / 255, "step_size": 2 / 255, **CURRICULUM},
        "training": {
            "epochs": 100,
            "lr": 0.05,
            "milestones": [(1, 1.0), (41, 0.1), (61, 0.01), (81, 0.001)],
            "weight_decay": 5e-4,
        },
    }
}
