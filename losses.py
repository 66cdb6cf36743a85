"""The paper's losses, functions of logits and never of models.

    labels = argmax_c g(x)_c                        Eq. (3)   dynamic_labels
    L_g = CE(g(x), y)                               Eq. (4)   guide_loss
    L_t = CE(f(x_adv), labels)                      Eq. (5)   target_loss
    L = L_g + beta * L_t                            Eq. (6)   their sum

g is the guide, f the target, x clean images, x_adv adversarial ones, y the ground truth. Below them stand the terms and
the instance weights of the methods it is compared and combined with: KL, MSE, TRADES, MART, GAIRAT, MAIL.
This file needs nothing but torch.
"""

import torch
import torch.distributed as dist
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


def logit_mse(adv_logits, guide_logits):
    """(1/C) sum_c (f(x_adv)_c - g(x)_c)^2. Logits (B, C) of the target and of the guide; returns (B,).

    Gradient flows into both: in LBGAT the guide, too, learns from it. Source: Cui et al. (2021), lbgat.py.
    """
    return (adv_logits - guide_logits).square().mean(1)


def trades_loss(clean_logits, adv_logits, y, kl_weight):
    """CE(f(x), y) + kl_weight * KL(f(x) || f(x_adv)). Logits (B, C), ground truth y (B,) int64; returns a scalar, mean
    over B. kl_weight is TRADES' beta, also called 1/lambda. Source: Zhang et al. (2019), trades.py."""
    return F.cross_entropy(clean_logits, y) + kl_weight * kl_divergence(clean_logits, adv_logits).mean()


def mart_loss(clean_logits, adv_logits, y, kl_weight):
    """BCE + kl_weight * KL(p || q) * (1 - p_y), with p, q the softmax of f(x), f(x_adv), and
    BCE = -ln q_y - ln(1 - max_{c != y} q_c): the less sure the network is of the clean image, the more KL counts.

    Logits (B, C), ground truth y (B,) int64; returns a scalar, mean over B. Gradient flows through every factor. The
    constants that keep the logarithms finite are the release's. Source: Wang et al. (2020), mart.py.
    """
    p, q = F.softmax(clean_logits, 1), F.softmax(adv_logits, 1)  # (B, C)
    p_y = p.gather(1, y.unsqueeze(1)).squeeze(1)  # (B,)
    bce = F.cross_entropy(adv_logits, y, reduction="none") - (1.0001 - _largest_other(q, y) + 1e-12).log()
    kl = (p * (F.log_softmax(clean_logits, 1) - (q + 1e-12).log())).sum(1)
    return (bce + kl_weight * kl * (1.0000001 - p_y)).mean()


def probability_gap(logits, labels):
    """max_{c != label} p_c - p_label with p the softmax: SAT's difficulty, MAIL's margin with its sign turned.

    Logits (B, C), labels (B,) int64; returns (B,) in [-1, 1], positive where the label loses.
    """
    p = F.softmax(logits, 1)
    return _largest_other(p, labels) - p.gather(1, labels.unsqueeze(1)).squeeze(1)


def gairat_weights(kappa, steps, shift=-1.0):
    """w = (1 + tanh(shift + 5 * (1 - 2 * kappa / steps))) / 2, divided by its mean over the batch.

    kappa (B,), how many of the attack's `steps` iterates were still classified as the label: few means near the
    decision boundary, and a large weight. Returns (B,) with mean 1 over the whole batch, whose parts several processes
    may hold. shift is GAIRAT's Lambda; the release's default is -1 for every network, and infinity makes all weights 1.
    Source: Zhang et al. (2021), GAIR.py.
    """
    weights = (1 + torch.tanh(shift + 5 * (1 - 2 * kappa / steps))) / 2
    total, count = sum_over_processes(weights.sum(), torch.ones_like(weights).sum())
    return weights / (total / count)


def mail_weights(adv_logits, labels, slope=10.0, bias=-0.5):
    """w = 3 * sigmoid(slope * (m + bias)) with m = max_{c != label} p_c - p_label at x_adv. Carries no gradient.

    Logits (B, C), labels (B,) int64; returns (B,) in (0, 3), not normalised over the batch: 3 stands for that in the
    release. slope and bias are MAIL-AT's. Source: Liu et al. (2021), mail_loss.py.
    """
    return 3 * torch.sigmoid(slope * (probability_gap(adv_logits.detach(), labels) + bias))


def sum_over_processes(*tensors):
    """The sum of each tensor over the processes of torch.distributed, in one exchange: new tensors, of the same shapes.
    Without several processes, the tensors themselves."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def _largest_other(p, labels):
    """max_{c != label} p_c. Probabilities (B, C), labels (B,) int64; returns (B,)."""
    return p.scatter(1, labels.unsqueeze(1), 0.0).amax(1)
