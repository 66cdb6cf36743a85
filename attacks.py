"""The L-infinity PGD loop, its starts and objectives, the evaluation's PGD and C&W, and the weight perturbation (AWP).
This file needs nothing but torch.

    S(x) = { x' : |x' - x| <= epsilon, x' in [0, 1] }                                    Eq. (1)
    x_adv <- P_S( x_adv + step_size * sign( grad objective(model(x_adv)) ) )              `steps` times

The attack is a pure function: the caller draws the start, chooses the objective and sets the network's mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with`. Afterwards, also after an error, every submodule gets back its own flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def gaussian_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """x + 0.001 * N(0, 1), not clamped: where the attacks of TRADES, LBGAT, MART, MAIL and DYNAT begin.

    Images x (B, 3, H, W) in [0, 1]; the generator is on their device.
    """
    return x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def uniform_start(x: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """clamp( x + U(-epsilon, epsilon), 0, 1 ): where PGD begins in evaluation. Arguments as of `gaussian_start`."""
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + epsilon * (2 * noise - 1)).clamp(0, 1)


def linf_pgd(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    active: Callable[[Tensor], Tensor] | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """x_adv <- clamp( clamp( x_adv + step_size * sign(gradient), x - epsilon, x + epsilon ), 0, 1 ), `steps` times.

    model       images to logits (B, C). The caller sets its mode; in eval mode the attack changes nothing of it.
    x           clean images (B, 3, H, W) in [0, 1].
    start       the first x_adv, of the same shape. It is not projected; `steps` = 0 returns it.
    objective   logits (B, C) to a scalar that the attack increases: a sum over the batch, so that no image's
                gradient depends on another image.
    epsilon     radius of the ball; like `step_size` in units of pixels in [0, 1], such as 8 / 255.
    active      logits (B, C) to (B,) bool, called in each step: which images take it. None: all.
    noise       step number 0 .. steps - 1 to a tensor (B, 3, H, W) that is added to the step before the projection.

    Returns x_adv (B, 3, H, W), detached. Every call makes `steps` steps and reads nothing back from the device. Raises
    RuntimeError under torch.inference_mode(), in which torch computes no gradient.
    Source: Madry et al. (2018). TRADES, LBGAT, AWP and DYNAT (trades.py, dynat.py) project in the same order.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an attack needs gradients, which torch.inference_mode() rules out: use torch.no_grad()")
    low, high = x - epsilon, x + epsilon
    x_adv = start.detach()
    for k in range(steps):
        with torch.enable_grad():
            x_adv.requires_grad_()
            logits = model(x_adv)  # (B, C)
            # The gradient of the images alone: that of the weights would cost as much again.
            (gradient,) = torch.autograd.grad(objective(logits), x_adv)
        step = step_size * gradient.sign()
        if noise is not None:
            step = step + noise(k)
        moved = torch.clamp(torch.clamp(x_adv.detach() + step, low, high), 0, 1)
        if active is not None:
            moved = torch.where(active(logits.detach()).view(-1, 1, 1, 1), moved, x_adv.detach())
        x_adv = moved
    return x_adv


def counting_pgd(
    model: nn.Module, x: Tensor, start: Tensor, labels: Tensor, *, epsilon: float, step_size: float, steps: int
) -> tuple[Tensor, Tensor]:
    """PGD on CE(f(.), labels) that counts kappa: how many of the iterates 0 .. steps - 1 were classified as the label.

    Images x, start (B, 3, H, W), labels (B,) int64; returns x_adv (B, 3, H, W) and kappa (B,) int64. kappa counts all
    such iterates, also those after a first mistake; the last iterate is not counted. The caller sets the model's mode.
    Source: Zhang et al. (2021), GAIRAT's attack_generator.py.
    """
    kappa = torch.zeros_like(labels)

    def count(logits):
        kappa.add_(logits.argmax(1) == labels)
        return torch.ones_like(labels, dtype=torch.bool)  # every image takes every step

    objective = lambda logits: F.cross_entropy(logits, labels, reduction="sum")
    x_adv = linf_pgd(model, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps, active=count)
    return x_adv, kappa


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_label - max_{c != label} z_c: positive where the label is predicted.

    Logits (B, C), labels (B,) int64; returns (B,). C&W's objective with kappa = 0 is `-margin(logits, y).sum()`.
    Source: Carlini and Wagner (2017); DYNAT, auto_attack_eval1.py.
    """
    label = labels.unsqueeze(1)
    others = logits.scatter(1, label, float("-inf"))  # (B, C), without the label's own logit
    return logits.gather(1, label).squeeze(1) - others.amax(1)


def pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, **budget: float) -> Tensor:
    """PGD on CE(f(.), y) that moves only the images still classified as y, so an image once fooled stays fooled.

    Images x, start (B, 3, H, W) in [0, 1], y (B,) int64; `budget` is epsilon, step_size and steps of `linf_pgd`.
    Returns x_adv (B, 3, H, W).
    Source: DYNAT, auto_attack_eval1.py, attack_pgd.
    """
    still_correct = lambda logits: logits.argmax(1) == y
    objective = lambda logits: F.cross_entropy(logits, y, reduction="sum")
    return linf_pgd(model, x, start, objective, active=still_correct, **budget)


def cw(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, **budget: float) -> Tensor:
    """`pgd` on C&W's objective, max_{c != y} z_c - z_y, with kappa = 0. Source: cw_Linf_attack, in the same file."""
    still_correct = lambda logits: logits.argmax(1) == y
    objective = lambda logits: -margin(logits, y).sum()
    return linf_pgd(model, x, start, objective, active=still_correct, **budget)


def drop_fooled(
    attack: Callable, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, steps: int, **budget: float
) -> Tensor:
    """What `attack`, pgd or cw, makes of a batch, but for rounding. An image that a step does not move is fooled, or no
    step would move it: it leaves the batch, which saves its forwards. Other arguments and the result as of `pgd`."""
    x_adv = start.clone()
    remaining = torch.arange(len(y), device=x.device)  # the images that the last step moved
    for _ in range(steps):
        before = x_adv[remaining]
        after = attack(model, x[remaining], y[remaining], before, steps=1, **budget)
        x_adv[remaining] = after
        moved = (after != before).flatten(1).any(1)
        remaining = remaining[moved]  # the step's one wait for the device
        if len(remaining) == 0:
            break
    return x_adv


@contextmanager
def weight_perturbation(
    model: nn.Module, objective: Callable[[], Tensor], gamma: float, all_reduce: Callable | None = None
) -> Iterator[None]:
    """Adversarial weight perturbation (AWP): w_l + gamma * |w_l| * g_l / |g_l| inside the `with`, for each layer l.

    model       in train mode. The weights of its convolutions and linear layers are perturbed, biases and BatchNorm
                are not. A weight that needs no gradient, or gets none, stays as it is.
    objective   no argument to a scalar, a sum over the batch. g is its gradient. It runs the model, whose BatchNorm
                statistics are put back afterwards.
    gamma       the size of the perturbation, relative to the norm of each weight tensor.
    all_reduce  *tensors to the sum of each over the processes that share the batch. None: there is one process.

    The optimizer steps inside the `with`, so weight decay and momentum see the perturbed weights, as in the release.
    At the end the perturbation is subtracted. The release takes g from a copy of the network; here the network itself
    gives it. Source: Wu et al. (2020), utils_awp.py.
    """
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 and "weight" in name]
    weights = [p for p in weights if p.requires_grad]
    statistics = [buffer.clone() for buffer in model.buffers()]
    try:
        gradients = torch.autograd.grad(objective(), weights, materialize_grads=True)  # 0 where a weight has none
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(before)
    if all_reduce is not None:
        gradients = all_reduce(*gradients)
    with torch.no_grad():
        pairs = zip(weights, gradients, strict=True)
        perturbation = [gamma * w.norm() / (g.norm() + 1e-20) * g for w, g in pairs]  # 0 where g = 0
        for w, v in zip(weights, perturbation, strict=True):
            w.add_(v)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, v in zip(weights, perturbation, strict=True):
                w.sub_(v)
