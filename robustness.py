"""Which test images a network still classifies correctly under each attack: the evaluation's attacks, and the matrix.

The matrix is boolean, images by columns. A column is an attack, or a stage of AutoAttack, on a network; the package
pyautoattack runs these stages. Of this project it imports `attacks`, `cli`, `data` and `speed`.
"""

import logging
import re
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attacks import eval_mode, linf_pgd, margin, uniform_start
from cli import UserError
from data import make_generator, to_float
from speed import memory_format

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")  # of AutoAttack
AUTO_ATTACK = {"apgd": STAGES[:1], "aa-fast": STAGES[:2], "aa": STAGES}
TARGETS = 9  # classes that apgd-t and fab-t aim at, if there are so many others
SETTINGS = {  # what is fixed and reported; the steps of pgd are in its name
    "fgsm": {"steps": 1},
    "cw": {"steps": 20, "restarts": 1, "kappa": 0},
    "apgd-ce": {"steps": 100, "restarts": 1},
    "apgd-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "fab-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "square": {"queries": 5000, "restarts": 1},
}
BLOCK = 32  # consecutive test images whose starts are drawn together: a generator for each costs more than its draws
LOGGER = logging.getLogger("auto-attack")  # of the package pyautoattack


@torch.no_grad()
def correct(model, x, y):
    """Whether argmax model(x) = y, (B,) bool, for images (B, 3, H, W). Raises UserError if a logit is not finite."""
    logits = model(x)  # (B, C)
    if not logits.isfinite().all():
        raise UserError("the network's logits are not finite: its weights are damaged")
    return logits.argmax(1) == y


def pgd(model, x, y, start, **budget):
    """PGD on CE(., y) that moves only the images still classified as y, so an image once fooled stays fooled. Images
    and start (B, 3, H, W) in [0, 1], y (B,); `budget` is epsilon, step_size and steps; returns x_adv. Source: DYNAT,
    auto_attack_eval1.py, attack_pgd."""
    objective = lambda z: F.cross_entropy(z, y, reduction="sum")
    return linf_pgd(model, x, start, objective, active=lambda z: z.argmax(1) == y, **budget)


def cw(model, x, y, start, **budget):
    """The same loop on C&W's margin, max_{c != y} z_c - z_y, with kappa = 0. Source: auto_attack_eval1.py,
    cw_Linf_attack."""
    objective = lambda z: -margin(z, y).sum()
    return linf_pgd(model, x, start, objective, active=lambda z: z.argmax(1) == y, **budget)


def drop_fooled(attack, model, x, y, start, *, steps, **budget):
    """What `attack`, pgd or cw, makes of a batch, but for rounding: an image that is fooled leaves the batch at once.
    Arguments as of `pgd`."""
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


def auto_attack(model, stage, x, y, *, epsilon, seed):
    """A stage of AutoAttack as its standard version runs it. Images (B, 3, H, W) in [0, 1], y (B,); returns x_adv, x
    where the attack failed. The targeted stages need four classes."""
    from pyautoattack import AutoAttack

    with torch.no_grad():
        num_classes = model(x[:1]).shape[1]
    adversary = AutoAttack(model, norm="Linf", eps=epsilon, version="standard", seed=seed, device=x.device)
    adversary.attacks_to_run = [stage]
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(TARGETS, num_classes - 1)
    trace = sys.gettrace()
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # the package seeds torch's global generator
        x_adv, _ = adversary.run_standard_evaluation(x.contiguous(), y, batch_size=len(y))
    sys.settrace(trace)  # the package ends the trace of a debugger or of coverage
    return x_adv


@contextmanager
def sanity_warnings():
    """A list, to which AutoAttack's own checks add what they find inside the `with`."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    LOGGER.addHandler(handler)
    try:
        yield found
    finally:
        LOGGER.removeHandler(handler)


def attack_batch(model, name, x, y, indices, *, epsilon, step_size, seed):
    """The images that attack `name`, or a stage of AutoAttack, makes of x (B, 3, H, W) in [0, 1], with labels y (B,).
    All randomness comes from the images' `indices` in the test set, (B,) on the CPU, `name` and `seed`. Raises
    UserError if an image leaves the epsilon ball or [0, 1] or is not finite."""
    if name == "clean":
        return x
    radius = epsilon
    if name in STAGES:
        radius += 1e-6  # FAB measures |x_adv - x|, which rounds
        generator = make_generator("cpu", seed, name, int(indices[0]))
        x_adv = auto_attack(model, name, x, y, epsilon=epsilon, seed=generator.initial_seed())
    elif name == "fgsm":  # Goodfellow et al. (2015): x + epsilon * sign(grad CE), clamped to [0, 1]
        x_adv = pgd(model, x, y, x, epsilon=epsilon, step_size=epsilon, steps=1)
    else:
        attack, steps = (cw, SETTINGS["cw"]["steps"]) if name == "cw" else (pgd, int(name.removeprefix("pgd")))
        start = starts(x, indices, epsilon, (seed, name))
        x_adv = drop_fooled(attack, model, x, y, start, epsilon=epsilon, step_size=step_size, steps=steps)
    allowed = (x_adv >= x - radius) & (x_adv <= x + radius) & (x_adv >= 0) & (x_adv <= 1)
    if not allowed.all():  # false for NaN as well
        raise UserError(f"{name} left the epsilon ball or [0, 1], or met a NaN: are the weights finite?")
    return x_adv


def still_correct(model, images, indices, attack, *, epsilon, step_size, batch_size, seed):
    """Which of the images at `indices`, (M,) int64 on the CPU, are classified as their label under `attack` in eval
    mode: (M,) bool on the CPU. Raises UserError if a logit is not finite."""
    budget = {"epsilon": epsilon, "step_size": step_size, "seed": seed}
    layout = memory_format(images.x.device, "fp32")
    masks = [torch.zeros(0, dtype=torch.bool)]
    with eval_mode(model):
        for batch in indices.split(batch_size) if len(indices) else ():
            selected = images.select(batch.to(images.y.device))
            x_adv = attack_batch(model, attack, to_float(selected.x, layout), selected.y, batch, **budget)
            masks.append(correct(model, x_adv, selected.y).cpu())
    return torch.cat(masks)


class Column(NamedTuple):
    """A column of the matrix: an attack, or a stage of AutoAttack, on a network and the first n images."""

    network: str  # target or guide
    attack: str
    epsilon: float | None
    n: int


def plan_columns(roles, attacks, total):
    """The columns behind each asked attack: {(network, attack): [clean, ...]}. Each attacks the images that are still
    correct in the one before. AutoAttack's versions share theirs. `attacks` is {name: (number of images, epsilon)},
    `total` the number of all images."""
    chains = {}
    for role in roles:
        for name, (n, epsilon) in attacks.items():
            stages = AUTO_ATTACK.get(name, [] if name == "clean" else [name])
            attacked = [Column(role, stage, epsilon, n) for stage in stages]
            chains[role, name] = [Column(role, "clean", None, total), *attacked]
    return chains


def attack_columns(networks, chains, images, indices, *, step_size, seed):
    """The matrix's rows for the images at `indices`, as a progress file holds them: "rows" (of an image, a 0 or 1 per
    column), "seconds" (per column) and AutoAttack's "warnings"."""
    masks, seconds, warnings = {}, [], []
    for chain in chains.values():
        active = torch.ones(len(indices), dtype=torch.bool)
        for column in chain:
            if column not in masks:
                began = time.perf_counter()
                active = active & (indices < column.n)
                masks[column] = torch.zeros_like(active)
                with sanity_warnings() as sentences:
                    masks[column][active] = still_correct(
                        networks[column.network], images, indices[active], column.attack,
                        epsilon=column.epsilon, step_size=step_size, batch_size=len(indices), seed=seed,
                    )  # fmt: skip
                where = f"{column.network}: AutoAttack on images {indices[0]} to {indices[-1]}"
                warnings += [f"{where}: {sentence}" for sentence in sentences]
                seconds.append(time.perf_counter() - began)
            active = masks[column]
    rows = torch.stack(list(masks.values()), 1).int().tolist()
    return {"rows": ["".join(map(str, row)) for row in rows], "seconds": seconds, "warnings": warnings}


def matrix_of(chains, batches):
    """({column: mask over the images of the batches}, {column: seconds}). Raises LookupError, TypeError, ValueError or
    RuntimeError if the batches are not of these columns."""
    columns = {column: None for chain in chains.values() for column in chain}  # in order
    bits = "".join(row for batch in batches for row in batch["rows"]).encode()
    masks = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(-1, len(columns)) == ord("1")
    seconds = torch.tensor([batch["seconds"] for batch in batches], dtype=torch.float64).sum(0).tolist()
    return dict(zip(columns, masks.T, strict=True)), dict(zip(columns, seconds, strict=True))


def collect_warnings(chains, masks, batches):
    """What AutoAttack's own checks found, of sentences that differ in numbers alone the first. The check of Square,
    whether it fooled many images that the other stages had left, needs the whole test set."""
    sentences = [sentence for batch in batches for sentence in batch["warnings"]]
    for (role, name), chain in chains.items():
        if name == "aa":
            from pyautoattack.checks import check_square_sr

            accuracies = {column.attack: masks[column][: column.n].double().mean().item() for column in chain[1:]}
            accuracies["clean"] = masks[chain[0]][: chain[-1].n].double().mean().item()
            with sanity_warnings() as found:
                check_square_sr(accuracies, logger=LOGGER)
            sentences += [f"{role}: AutoAttack: {sentence}" for sentence in found]
    kinds = {}
    for sentence in sentences:
        kinds.setdefault(re.sub(r"\d+", "", sentence), sentence)
    return list(kinds.values())
