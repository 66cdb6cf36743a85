"""The paper's losses, functions of logits alone.

    labels = argmax_c g(x)_c                        Eq. (3)   dynamic_labels
    L_g = CE(g(x), y)                               Eq. (4)   guide_loss
    L_t = CE(f(x_adv), labels)                      Eq. (5)   target_loss
    L = L_g + beta * L_t                            Eq. (6)   their sum

g is the guide, f the target, x clean images, x_adv adversarial images, y the ground truth. Then come the terms and
instance weights of the methods that the paper compares and combines: KL, MSE, TRADES, MART, GAIRAT, MAIL.
This file needs nothing but torch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_labels(guide_logits: Tensor) -> Tensor:
    """labels = argmax_c g(x)_c, Eq. (3). Logits (B, C); returns (B,) int64, the first maximum at a tie.

    An argmax carries no gradient, so the target's loss never trains the guide: in Eq. (6) the guide's weights appear
    in L_g alone, the target's in L_t alone, and beta scales the target's gradient alone. Source: DYNAT, dynat.py.
    """
    return guide_logits.argmax(dim=1)


def guide_loss(guide_logits: Tensor, y: Tensor) -> Tensor:
    """L_g = CE(g(x), y), Eq. (4). Logits (B, C) on clean images, ground truth y (B,) int64; returns a scalar, mean
    over B. Source: DYNAT, dynat.py."""
    return F.cross_entropy(guide_logits, y)


def target_loss(adv_logits: Tensor, labels: Tensor) -> Tensor:
    """L_t = CE(f(x_adv), labels), Eq. (5). Logits (B, C) on adversarial images, dynamic labels (B,) int64; returns a
    scalar, mean over B. Source: DYNAT, dynat.py."""
    return F.cross_entropy(adv_logits, labels)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (ln p_c - ln q_c), p and q the softmax of the logits. Logits (B, C); returns (B,).

    TRADES' "clean || adversarial" is `kl_divergence(clean_logits, adv_logits)`. Gradient flows into both arguments.
    Logits in 16 bits, as a network under autocast gives them, become float32 first: at the start of an attack p and q
    differ by less than bf16 can tell, and an attack without a gradient finds nothing. Float64 stays float64.
    Source: Zhang et al. (2019), trades.py.
    """
    exact = torch.promote_types(p_logits.dtype, torch.float32)
    log_p, log_q = F.log_softmax(p_logits.to(exact), 1), F.log_softmax(q_logits.to(exact), 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def logit_mse(adv_logits: Tensor, guide_logits: Tensor) -> Tensor:
    """(1/C) sum_c (f(x_adv)_c - g(x)_c)^2. Logits (B, C) of the target and of the guide; returns (B,).

    Gradient flows into both, so LBGAT's guide learns from it as well. Source: Cui et al. (2021), lbgat.py.
    """
    return (adv_logits - guide_logits).square().mean(1)


def trades_loss(clean_logits: Tensor, adv_logits: Tensor, y: Tensor, kl_weight: float) -> Tensor:
    """CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)). Logits (B, C), ground truth y (B,) int64; returns a scalar, mean
    over B. kl_weight is TRADES' beta, also called 1/lambda. Source: Zhang et al. (2019), trades.py."""
    return F.cross_entropy(clean_logits, y) + kl_weight * kl_divergence(clean_logits, adv_logits).mean()


def mart_loss(clean_logits: Tensor, adv_logits: Tensor, y: Tensor, kl_weight: float) -> Tensor:
    """BCE + kl_weight * KL(p || q) * (1 - p_y), with p, q the softmax of f(x), f(x_adv), and
    BCE = -ln q_y - ln(1 - max_{c != y} q_c). KL counts more where the clean image is classified with less confidence.

    Logits (B, C), ground truth y (B,) int64; returns a scalar, mean over B. Gradient flows through every factor. The
    constants that keep the logarithms finite are the release's. Source: Wang et al. (2020), mart.py.
    """
    p, q = F.softmax(clean_logits, 1), F.softmax(adv_logits, 1)  # (B, C)
    p_y = p.gather(1, y.unsqueeze(1)).squeeze(1)  # (B,)
    bce = F.cross_entropy(adv_logits, y, reduction="none") - (1.0001 - _largest_other(q, y) + 1e-12).log()
    kl = (p * (F.log_softmax(clean_logits, 1) - (q + 1e-12).log())).sum(1)
    return (bce + kl_weight * kl * (1.0000001 - p_y)).mean()


def probability_gap(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{c != label} p_c - p_label with p the softmax: SAT's difficulty, and MAIL's margin with the opposite sign.

    Logits (B, C), labels (B,) int64; returns (B,) in [-1, 1], positive where another class is predicted.
    Source: Sitawarin et al. (2021), adv/adv_model.py; Liu et al. (2021), mail_loss.py.
    """
    p = F.softmax(logits, 1)
    return _largest_other(p, labels) - p.gather(1, labels.unsqueeze(1)).squeeze(1)


def gairat_weights(kappa: Tensor, steps: int, shift: float = -1.0, all_reduce: Callable | None = None) -> Tensor:
    """w = (1 + tanh(shift + 5 * (1 - 2 * kappa / steps))) / 2, divided by its mean over the batch.

    kappa (B,): how many of the attack's `steps` iterates were classified as the label. Few mean near the decision
    boundary, and a large weight. Returns (B,) with mean 1 over the whole batch. all_reduce: *tensors to the sum of each
    over the processes that share the batch; None where there is one process. shift is GAIRAT's Lambda: -1 in the
    release for every network; infinity makes all weights 1. Source: Zhang et al. (2021), GAIR.py.
    """
    weights = (1 + torch.tanh(shift + 5 * (1 - 2 * kappa / steps))) / 2
    total, count = weights.sum(), torch.ones_like(weights).sum()
    if all_reduce is not None:
        total, count = all_reduce(total, count)
    return weights / (total / count)


def mail_weights(adv_logits: Tensor, labels: Tensor, slope: float = 10.0, bias: float = -0.5) -> Tensor:
    """w = 3 * sigmoid(slope * (m + bias)) with m = max_{c != label} p_c - p_label at x_adv. Carries no gradient.

    Logits (B, C), labels (B,) int64; returns (B,) in (0, 3). The release multiplies by 3 instead of normalising over
    the batch. slope and bias are MAIL-AT's. Source: Liu et al. (2021), mail_loss.py.
    """
    return 3 * torch.sigmoid(slope * (probability_gap(adv_logits.detach(), labels) + bias))


def _largest_other(p: Tensor, labels: Tensor) -> Tensor:
    """max_{c != label} p_c. Probabilities (B, C), labels (B,) int64; returns (B,)."""
    return p.scatter(1, labels.unsqueeze(1), 0.0).amax(1)
