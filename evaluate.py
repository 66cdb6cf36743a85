"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K, C&W and AutoAttack, each with its 95 %
interval.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw,aa

fgsm     one step of epsilon on CE, no random start
pgdK     K steps on CE from a uniform start; an image once fooled stays fooled
cw       20 such steps on C&W's margin, max_{c != y} z_c - z_y, kappa = 0
"""

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd, margin, uniform_start
from cli import UserError
from data import make_generator, to_float
from speed import memory_format

ALL = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1 is the mean over these
BLOCK = 32  # consecutive test images whose starts are drawn together: a generator for each costs more than its draws
CW_STEPS = 20


@torch.no_grad()
def correct(model, x, y):
    """Whether argmax model(x) = y. Images (B, 3, H, W), y (B,); returns (B,) bool. Raises UserError if a logit is not
    finite."""
    logits = model(x)  # (B, C)
    if not logits.isfinite().all():
        raise UserError("the network's logits are not finite: its weights are damaged")
    return logits.argmax(1) == y


def fgsm(model, x, y, epsilon):
    """x_adv = x + epsilon * sign(grad CE), clamped to [0, 1] (Goodfellow et al., 2015): one step, no random start."""
    objective = lambda z: F.cross_entropy(z, y, reduction="sum")
    return linf_pgd(model, x, x, objective, epsilon=epsilon, step_size=epsilon, steps=1)


def pgd(model, x, y, start, **budget):
    """PGD on CE(., y) that moves only the images still classified as y, so an image once fooled stays fooled.

    Images and start (B, 3, H, W) in [0, 1], y (B,); `budget` is epsilon, step_size and steps; returns x_adv.
    Source: DYNAT, auto_attack_eval1.py, attack_pgd.
    """
    objective = lambda z: F.cross_entropy(z, y, reduction="sum")
    return linf_pgd(model, x, start, objective, active=lambda z: z.argmax(1) == y, **budget)


def cw(model, x, y, start, **budget):
    """The same loop on C&W's margin, max_{c != y} z_c - z_y, with kappa = 0. Source: auto_attack_eval1.py,
    cw_Linf_attack."""
    objective = lambda z: -margin(z, y).sum()
    return linf_pgd(model, x, start, objective, active=lambda z: z.argmax(1) == y, **budget)


def starts(x, indices, epsilon, key):
    """A uniform start for each image. It depends on `key` and the image's index in the test set alone, not on the batch
    or on what was attacked before. Images x (B, 3, H, W), indices (B,) int64 on the CPU."""
    blocks, block_of = (indices // BLOCK).unique(return_inverse=True)
    slots = (block_of * BLOCK + indices % BLOCK).to(x.device)
    start = x.new_zeros(len(blocks) * BLOCK, *x.shape[1:])
    start[slots] = x
    for block, rows in zip(blocks.tolist(), start.split(BLOCK), strict=True):
        rows.copy_(uniform_start(rows, epsilon, make_generator(x.device, *key, block)))
    return torch.empty_like(x).copy_(start[slots])  # in the memory format of x


def shrinking(attack, model, x, y, start, *, steps, **budget):
    """What `attack`, pgd or cw, makes of a batch, but for rounding: an image that is fooled leaves the batch at once.

    Images and start (B, 3, H, W) in [0, 1], y (B,); `budget` is epsilon and step_size; returns x_adv.
    """
    x_adv = start.clone()
    active = torch.arange(len(y), device=x.device)
    for _ in range(steps):
        logits = []

        def watched(images, logits=logits):
            logits.append(model(images))  # (B, C)
            return logits[0]

        x_adv[active] = attack(watched, x[active], y[active], x_adv[active], steps=1, **budget)
        active = active[logits[0].argmax(1) == y[active]]  # the step's one wait for the device
        if not len(active):
            break
    return x_adv


def attack_batch(model, name, x, y, indices, *, epsilon, step_size, seed):
    """The images that attack `name` makes of x, checked elementwise: in the epsilon ball, in [0, 1] and finite.

    Images x (B, 3, H, W) in [0, 1], y (B,), their indices in the test set (B,) on the CPU. All randomness comes from
    these, `name` and `seed`. Raises UserError if an image fails the check.
    """
    key = (seed, name)
    if name == "clean":
        return x
    if name == "fgsm":
        x_adv = fgsm(model, x, y, epsilon)
    else:
        attack, steps = (cw, CW_STEPS) if name == "cw" else (pgd, int(name.removeprefix("pgd")))
        start = starts(x, indices, epsilon, key)
        x_adv = shrinking(attack, model, x, y, start, epsilon=epsilon, step_size=step_size, steps=steps)
    return checked(name, x, x_adv, epsilon)


def checked(name, x, x_adv, epsilon, slack=0.0):
    """x_adv, if all of it lies in the epsilon ball of x and in [0, 1] and is finite; else raises UserError."""
    allowed = (x_adv >= x - epsilon - slack) & (x_adv <= x + epsilon + slack) & (x_adv >= 0) & (x_adv <= 1)
    if not allowed.all():  # false for NaN as well
        raise UserError(f"{name} left the epsilon ball or [0, 1], or met a NaN: are the weights finite?")
    return x_adv


def still_correct(model, images, attack, *, epsilon, step_size, batch_size, seed, indices=None):
    """Which images are classified as their label under `attack`: clean, fgsm, pgdK or cw. In eval mode.

    indices   which of `images`, (M,) int64 on the CPU (default: all). Starts depend on them, not on the batch.

    Returns (M,) bool on the CPU. Raises UserError if a logit is not finite.
    """
    if indices is None:
        indices = torch.arange(len(images.y))
    settings = {"epsilon": epsilon, "step_size": step_size, "seed": seed}
    layout = memory_format(images.x.device, "fp32")
    masks = [torch.zeros(0, dtype=torch.bool)]
    with eval_mode(model):
        for batch in indices.split(batch_size) if len(indices) else ():
            selected = images.select(batch.to(images.y.device))
            x_adv = attack_batch(model, attack, to_float(selected.x, layout), selected.y, batch, **settings)
            masks.append(correct(model, x_adv, selected.y).cpu())
    return torch.cat(masks)
