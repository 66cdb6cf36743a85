"""One L-infinity PGD loop, and what goes into it.

    S(x) = { x' : |x' - x| <= epsilon, x' in [0, 1] }                                    Eq. (1)
    x_adv <- P_S( x_adv + step_size * sign( grad objective(model(x_adv)) ) )              `steps` times

The attack is a pure function: the caller draws the start, chooses the objective and the network's mode.

    start = uniform_start(x, 8 / 255, generator)
    with eval_mode(model):
        x_adv = linf_pgd(model, x, start, lambda logits: F.cross_entropy(logits, y, reduction="sum"),
                         epsilon=8 / 255, step_size=2 / 255, steps=20)

This file needs nothing but torch.
"""

from contextlib import contextmanager

import torch


@contextmanager
def eval_mode(model):
    """Eval mode inside the `with`; afterwards every submodule gets its own former flag back, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def near_start(x, draws):
    """x + 0.001 * N(0, 1), not clamped: where TRADES, LBGAT, MART, MAIL and DYNAT begin. `draws` is a torch.Generator
    on the device of x, images (B, 3, H, W) in [0, 1]."""
    return x + 0.001 * torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)


def uniform_start(x, epsilon, draws):
    """clamp( x + U(-epsilon, epsilon), 0, 1 ): where PGD begins in evaluation. `draws` is a torch.Generator on the
    device of x, images (B, 3, H, W) in [0, 1]."""
    uniform = torch.rand(x.shape, generator=draws, device=x.device, dtype=x.dtype)
    return (x + epsilon * (2 * uniform - 1)).clamp(0, 1)


def linf_pgd(model, x, start, objective, *, epsilon, step_size, steps, active=None, noise=None):
    """x_adv <- clamp( clamp( x_adv + step_size * sign(grad), x - epsilon, x + epsilon ), 0, 1 ), `steps` times.

    model      maps images to logits (B, C). Its mode is the caller's: in eval mode nothing of it changes, neither
               buffers nor gradients nor random state.
    x          clean images (B, 3, H, W) in [0, 1]; `start`, of the same shape, is where the attack begins. The start
               itself is not projected (TRADES starts outside of [0, 1]); with `steps` = 0 it is returned as it is.
    objective  logits (B, C) to a scalar to be increased, a sum over the batch so that images do not touch each other.
    epsilon, step_size   in units of pixels in [0, 1]: 8 / 255, 2 / 255.
    active     logits (B, C) to (B,) bool, asked before each step: which images still move. The others keep their
    iterate. noise      k = 0 .. steps - 1 to a tensor (B, 3, H, W), added to step k before the projection.

    Returns x_adv (B, 3, H, W), detached. The number of steps is fixed, images stop by mask: no branch depends on data.
    Source: Madry et al. (2018); the order, ball then box, is that of TRADES, LBGAT, AWP and DYNAT (trades.py,
    dynat.py).
    """
    low, high = x - epsilon, x + epsilon
    x_adv = start.detach()
    for k in range(steps):
        with torch.enable_grad():
            x_adv.requires_grad_()
            logits = model(x_adv)  # (B, C)
            # Only the images' gradient is asked for: the weights' costs as much again.
            (gradient,) = torch.autograd.grad(objective(logits), x_adv)
        step = step_size * gradient.sign()
        if noise is not None:
            step = step + noise(k)
        moved = torch.clamp(torch.clamp(x_adv.detach() + step, low, high), 0, 1)
        if active is None:
            x_adv = moved
        else:
            x_adv = torch.where(active(logits.detach()).view(-1, 1, 1, 1), moved, x_adv.detach())
    return x_adv


def margin(logits, labels):
    """z_label - max_{c != label} z_c, how far each decision is from changing: positive where it is correct.

    Logits (B, C), labels (B,) int64; returns (B,). C&W's objective with kappa = 0 is `-margin(logits, y).sum()`.
    Source: Carlini and Wagner (2017); DYNAT, auto_attack_eval1.py.
    """
    label = labels.unsqueeze(1)
    others = logits.scatter(1, label, float("-inf"))  # (B, C), the label's own logit out of the race
    return logits.gather(1, label).squeeze(1) - others.amax(1)
