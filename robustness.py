"""Which test images a network still classifies correctly under each attack: the table of attacks, and the matrix.

The matrix is boolean, columns by images. A column is an attack, or a stage of AutoAttack, on a network; the package
pyautoattack runs these stages. Of this project it imports `attacks`, `cli`, `data` and `speed`.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from attacks import cw, drop_fooled, eval_mode, pgd, uniform_start
from cli import UserError
from data import make_generator, seed_of, to_float
from speed import memory_format

TARGETS = 9  # classes that apgd-t and fab-t aim at, if there are so many others
BLOCK = 32  # consecutive test images whose starts are drawn together: a generator for each costs more than its draws
LOGGER = logging.getLogger("auto-attack")  # of the package pyautoattack


class Attack(NamedTuple):
    """An attack of the evaluation: a function, or else stages of AutoAttack."""

    title: str  # on a page
    help: str
    settings: dict  # what is fixed, with `steps`, as it is reported
    # Arguments and result as of `attacks.pgd`. It draws no random numbers; no image depends on the rest of the batch.
    function: Callable | None = None
    takes_step_size: bool = True  # or has one of its own
    stages: tuple = ()  # of AutoAttack


def fgsm(model, x, y, start, *, epsilon, step_size, steps):
    """Goodfellow et al. (2015): x + epsilon * sign(grad CE(f(x), y)), clamped to [0, 1]; it uses neither `start` nor
    `step_size`."""
    return pgd(model, x, y, x, epsilon=epsilon, step_size=epsilon, steps=steps)


STAGES = {  # of AutoAttack, in its order: what is fixed, as it is reported
    "apgd-ce": {"steps": 100, "restarts": 1},
    "apgd-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "fab-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "square": {"queries": 5000, "restarts": 1},
}
ATTACKS = {  # by name, in the order of a page; <steps> is a number from 1 to 9999
    "clean": Attack("Clean", "no attack", {}),
    "fgsm": Attack("FGSM", "one step of epsilon on CE from the image itself",
                   {"steps": 1}, fgsm, takes_step_size=False),
    "pgd<steps>": Attack("PGD-<steps>", "so many steps on CE from a uniform start; an image once fooled stays fooled",
                         {"restarts": 1}, partial(drop_fooled, pgd)),
    "apgd": Attack("APGD", "AutoAttack's first attack alone: Auto-PGD on CE, 100 steps, one restart",
                   {}, stages=("apgd-ce",)),
    "cw": Attack("C&W", "20 steps like those of pgd on C&W's margin, max_{c != y} z_c - z_y, kappa = 0",
                 {"steps": 20, "restarts": 1, "kappa": 0}, partial(drop_fooled, cw)),
    "aa-fast": Attack("AA-fast", "AutoAttack's first two, Auto-PGD on CE and on the targeted DLR loss",
                      {}, stages=("apgd-ce", "apgd-t")),
    "aa": Attack("AA", 'AutoAttack "standard": these two, targeted FAB and Square with 5,000 queries',
                 {}, stages=tuple(STAGES)),
}  # fmt: skip


def split_name(name):
    """A name's key in ATTACKS and the steps in it: pgd20 is ("pgd<steps>", 20), cw is ("cw", 0)."""
    numbered = re.fullmatch(r"([a-z]+)([1-9][0-9]{0,3})", name)
    if numbered is None:
        return name, 0
    return f"{numbered[1]}<steps>", int(numbered[2])


def find_attack(name):
    """The attack called `name`, such as cw or pgd20, with its steps among its settings. None if there is none."""
    key, steps = split_name(name)
    attack = ATTACKS.get(key)
    if attack is None or "<" in name:
        return None
    if not steps:
        return attack
    settings = {"steps": steps, **attack.settings}
    return attack._replace(title=attack.title.replace("<steps>", str(steps)), settings=settings)


@torch.no_grad()
def is_correct(model, x, y):
    """Whether argmax model(x) = y, (B,) bool, for images (B, 3, H, W). Raises UserError if a logit is not finite."""
    logits = model(x)  # (B, C)
    if not logits.isfinite().all():
        raise UserError("the network's logits are not finite: its weights are damaged")
    return logits.argmax(1) == y


def uniform_starts(x, indices, epsilon, key):
    """A uniform start for each image of x (B, 3, H, W). It depends on `key` and the image's index in the test set
    alone, not on the batch. Indices (B,) int64 on the CPU."""
    start = torch.empty_like(x)  # in the memory format of x
    blocks = indices // BLOCK
    for block in blocks.unique().tolist():
        rows = (blocks == block).nonzero().squeeze(1)
        places = (indices[rows] % BLOCK).to(x.device)
        rows = rows.to(x.device)
        whole = x.new_zeros(BLOCK, *x.shape[1:])  # noise is drawn for all images of the block, attacked or not
        whole[places] = x[rows]
        generator = make_generator(x.device, *key, block)
        start[rows] = uniform_start(whole, epsilon, generator)[places]
    return start


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
        x_adv = auto_attack(model, name, x, y, epsilon=epsilon, seed=seed_of(seed, name, int(indices[0])))
    else:
        attack = find_attack(name)
        steps = attack.settings["steps"]
        start = uniform_starts(x, indices, epsilon, (seed, name))
        x_adv = attack.function(model, x, y, start, epsilon=epsilon, step_size=step_size, steps=steps)
    allowed = (x_adv >= x - radius) & (x_adv <= x + radius) & (x_adv >= 0) & (x_adv <= 1)
    if not allowed.all():  # false for NaN as well
        raise UserError(f"{name} left the epsilon ball or [0, 1], or met a NaN: are the weights finite?")
    return x_adv


def attack_images(model, images, indices, attack, **budget):
    """x_adv of the images at `indices`, (B,) int64 on the CPU, and which of them the model, in eval mode, still
    classifies as their label, (B,) bool on the CPU. `budget` is epsilon, step_size and seed of `attack_batch`. Raises
    UserError if a logit is not finite."""
    selected = images.select(indices.to(images.y.device))
    x = selected.x
    if not x.is_floating_point():
        x = to_float(x, memory_format(x.device, "fp32"))
    with eval_mode(model):
        x_adv = attack_batch(model, attack, x, selected.y, indices, **budget)
        return x_adv, is_correct(model, x_adv, selected.y).cpu()


def correct_under_attack(model, images, indices, attack, *, batch_size, **budget):
    """Which of the images at `indices` are still classified as their label, as `attack_images` says batch by batch."""
    masks = [torch.zeros(0, dtype=torch.bool)]
    for batch in indices.split(batch_size):
        if len(batch):
            masks.append(attack_images(model, images, batch, attack, **budget)[1])
    return torch.cat(masks)


class Column(NamedTuple):
    """An attack, or a stage of AutoAttack, on a network and those of the first n images that are still correct in the
    column `before`."""

    network: str  # target or guide
    attack: str
    epsilon: float | None
    n: int
    before: int | None  # its place in the list of columns


def plan_columns(roles, attacks, total):
    """The columns in order, and {(network, attack): the places of its columns}: the clean one, then its own or those
    of its stages; attacks of equal epsilon and images share their first stages. `attacks` is {name: (number of images,
    epsilon)}, `total` the number of all images."""
    columns, places = [], {}
    for role in roles:
        clean = len(columns)
        columns.append(Column(role, "clean", None, total, None))
        for name, (n, epsilon) in attacks.items():
            places[role, name] = [clean]
            if name == "clean":
                continue
            for stage in find_attack(name).stages or [name]:
                column = Column(role, stage, epsilon, n, before=places[role, name][-1])
                if column not in columns:
                    columns.append(column)
                places[role, name].append(columns.index(column))
    return columns, places


def attack_columns(networks, columns, images, indices, *, step_size, seed):
    """Attacks one batch, the images at `indices`. Returns what a progress file holds of it: "masks" (a string of 0 and
    1 per column), "seconds" (per column) and AutoAttack's "warnings"; and per column x_adv (B, 3, H, W), in which an
    image keeps what fooled it first."""
    masks, x_advs, seconds, warnings = [], [], [], []
    for column in columns:
        began = time.perf_counter()
        if column.before is None:
            attacked = indices < column.n
            x_adv = torch.empty(len(indices), *images.x.shape[1:], device=images.x.device)
        else:
            attacked = (indices < column.n) & masks[column.before]
            x_adv = x_advs[column.before].clone()
        mask = torch.zeros_like(attacked)
        if attacked.any():
            with sanity_warnings() as sentences:
                x_adv[attacked.to(x_adv.device)], mask[attacked] = attack_images(
                    networks[column.network], images, indices[attacked], column.attack,
                    epsilon=column.epsilon, step_size=step_size, seed=seed,
                )  # fmt: skip
            where = f"{column.network}: AutoAttack on images {indices[0]} to {indices[-1]}"
            warnings += [f"{where}: {sentence}" for sentence in sentences]
        masks.append(mask)
        x_advs.append(x_adv)
        seconds.append(time.perf_counter() - began)
    strings = ["".join(map(str, mask.int().tolist())) for mask in masks]
    return {"masks": strings, "seconds": seconds, "warnings": warnings}, x_advs


def read_masks(records):
    """What `attack_columns` found in all batches so far: masks (columns, images) bool."""
    rows = []
    for strings in zip(*(record["masks"] for record in records), strict=True):
        rows.append([bit == "1" for bit in "".join(strings)])
    return torch.tensor(rows)


def collect_warnings(columns, places, masks, records):
    """What AutoAttack's own checks found, of sentences that differ in numbers alone the first. The check of Square
    needs the whole test set."""
    sentences = [sentence for record in records for sentence in record["warnings"]]
    for (role, name), behind in places.items():
        if "square" in find_attack(name).stages:
            from pyautoattack.checks import check_square_sr

            n = columns[behind[-1]].n
            accuracies = {columns[place].attack: masks[place][:n].double().mean().item() for place in behind}
            with sanity_warnings() as found:
                check_square_sr(accuracies, logger=LOGGER)
            sentences += [f"{role}: AutoAttack: {sentence}" for sentence in found]
    kinds = {}
    for sentence in sentences:
        without_numbers = re.sub(r"\d+", "", sentence)
        kinds.setdefault(without_numbers, sentence)
    return list(kinds.values())
