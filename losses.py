"""The paper's losses, functions of logits and never of models.

    labels = argmax_c g(x)_c                        Eq. (3)   dynamic_labels
    L_g = CE(g(x), y)                               Eq. (4)   guide_loss
    L_t = CE(f(x_adv), labels)                      Eq. (5)   target_loss
    L = L_g + beta * L_t                            Eq. (6)   their sum

g is the guide, f the target, x clean images, x_adv adversarial ones, y the ground truth.
This file needs nothing but torch.
"""

import torch.nn.functional as F


def dynamic_labels(guide_logits):
    """labels = argmax_c g(x)_c, Eq. (3). Logits (B, C); returns (B,) int64, the first maximum at a tie.

    An argmax carries no gradient: the target's loss never trains the guide, so in Eq. (6) the guide's weights appear in
    L_g alone, the target's in L_t alone, and beta scales the target's gradient and nothing else. Source: DYNAT,
    dynat.py.
    """
    return guide_logits.argmax(dim=1)


def guide_loss(guide_logits, y):
    """L_g = CE(g(x), y), Eq. (4). Logits (B, C) on clean images, ground truth y (B,) int64; returns a scalar, mean
    over B."""
    return F.cross_entropy(guide_logits, y)


def target_loss(adv_logits, labels):
    """L_t = CE(f(x_adv), labels), Eq. (5). Logits (B, C) on adversarial images, dynamic labels (B,) int64; returns a
    scalar, mean over B."""
    return F.cross_entropy(adv_logits, labels)


def kl_divergence(p_logits, q_logits):
    """KL(p || q) = sum_c p_c (ln p_c - ln q_c) with p, q the softmax of each. Logits (B, C); returns (B,).

    TRADES' "clean || adversarial" is `kl_divergence(clean_logits, adv_logits)`; gradient flows into both arguments.
    Source: Zhang et al. (2019), trades.py.
    """
    return F.kl_div(F.log_softmax(q_logits, 1), F.log_softmax(p_logits, 1), reduction="none", log_target=True).sum(1)
