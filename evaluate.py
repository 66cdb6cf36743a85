"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K, C&W and AutoAttack, each with its 95 %
interval.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw,aa

fgsm     one step of epsilon on CE, no random start
pgdK     K steps on CE from a uniform start; an image once fooled stays fooled
cw       20 such steps on C&W's margin, max_{c != y} z_c - z_y, kappa = 0
apgd     AutoAttack's first attack alone: Auto-PGD on CE, 100 steps, one restart
aa-fast  its first two, Auto-PGD on CE and on the targeted DLR loss
aa       AutoAttack "standard": these two, targeted FAB and Square with 5,000 queries

fgsm, pgdK and cw are the evaluations of the paper's tables (auto_attack_eval1.py in its release), AutoAttack is its
authors' code (Croce and Hein, 2020; the package pyautoattack, unmodified). All run in float32 and in eval mode, on
images still classified correctly alone: pgdK and cw refill their batch as images are fooled, AutoAttack after each of
its attacks.

--protocol standard  every attack with epsilon 8/255 on the whole test set
--protocol paper     as the release: AutoAttack with epsilon 0.031 on the first 1,000 test images, the rest as above
"""

import hashlib
import json
import logging
import math
import re
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
from attacks import eval_mode, linf_pgd, margin, uniform_start
from cli import Parser, UserError, bounded, command, full_float32, number, pick_device, provenance, write_text
from data import DATASETS, Images, check_classes, generator, load_images, pixels, subset
from models import build_model

# What AutoAttack's versions are made of: each stage attacks the images that still stand after those before it.
AUTO_ATTACK = {
    "apgd": ("clean", "apgd-ce"),
    "aa-fast": ("clean", "apgd-ce", "apgd-t"),
    "aa": ("clean", "apgd-ce", "apgd-t", "fab-t", "square"),
}
BLOCK = 32  # consecutive test images whose starts are drawn together: a generator for each costs more than its draws
SAVE_EVERY = 5  # seconds, and as much work as an interruption may cost
TARGETS = 9  # classes that apgd-t and fab-t aim at, where there are so many others
SETTINGS = {  # fixed, and reported with the figures; pgd's steps are in its name
    "fgsm": {"steps": 1},
    "cw": {"steps": 20, "restarts": 1, "kappa": 0},
    "apgd-ce": {"steps": 100, "restarts": 1},
    "apgd-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "fab-t": {"steps": 100, "restarts": 1, "targets": TARGETS},
    "square": {"queries": 5000, "restarts": 1},
}
ATTACKS = "clean,pgd10,pgd20,pgd50,cw"
HEADINGS = {"cw": "C&W", "apgd": "APGD", "aa-fast": "AA-fast", "aa": "AA", "fgsm": "FGSM"}  # of the table's columns


def correct(model, x, y):
    """Whether argmax model(x) = y. Images (B, 3, H, W), y (B,); returns (B,) bool."""
    return model(x).argmax(1) == y


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


def iterated(name):
    """The loop and the number of steps behind the name of an attack: pgd20 is (pgd, 20). None where it has no such
    loop."""
    if name == "cw":
        return cw, SETTINGS["cw"]["steps"]
    return (pgd, int(name.removeprefix("pgd"))) if name.startswith("pgd") else None


def auto_attack(model, stage, x, y, *, epsilon, seed):
    """One of AutoAttack's attacks, apgd-ce, apgd-t, fab-t or square, as its standard version runs it (one restart).

    Images (B, 3, H, W) in [0, 1], y (B,); returns x_adv, x itself where the attack failed. The targeted attacks need at
    least four classes.
    """
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # `doubts` says it once, not at every batch
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    adversary = AutoAttack(model, norm="Linf", eps=epsilon, version="standard", seed=seed, device=x.device)
    adversary.attacks_to_run = [stage]
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(TARGETS, classes - 1)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # the package seeds torch's global generator
        x_adv, _ = adversary.run_standard_evaluation(x.contiguous(), y, batch_size=len(y))
    return x_adv


def starts(x, places, epsilon, key):
    """A uniform start for each image, drawn from `key` and the image's place in the test set and from nothing else, so
    that neither the batch nor what was attacked before changes it. Images x (B, 3, H, W), places (B,) on the CPU."""
    start, blocks = torch.empty_like(x), places // BLOCK
    for block in blocks.unique().tolist():
        members = blocks == block
        within = places[members] % BLOCK
        whole = x.new_zeros(BLOCK, *x.shape[1:])
        whole[within] = x[members]
        start[members] = uniform_start(whole, epsilon, generator(x.device, *key, block))[within]
    return start


def attack_batch(model, name, x, y, places, *, epsilon, step_size, seed):
    """The images that attack `name` makes of x, checked: in the epsilon ball, in [0, 1] and finite, elementwise.

    Images x (B, 3, H, W) in [0, 1], y (B,), their places in the test set (B,), from which, `name` and `seed` all
    randomness comes. Raises UserError where an image fails the check.
    """
    key = (seed, name)
    if name == "clean":
        return x
    if name == "fgsm":
        x_adv = fgsm(model, x, y, epsilon)
    elif iterated(name):
        attack, steps = iterated(name)
        start = starts(x, places, epsilon, key)
        x_adv = attack(model, x, y, start, epsilon=epsilon, step_size=step_size, steps=steps)
    else:
        draws = generator("cpu", *key, int(places[0]))
        x_adv = auto_attack(model, name, x, y, epsilon=epsilon, seed=draws.initial_seed())
        return checked(name, x, x_adv, epsilon, slack=1e-6)  # FAB measures |x_adv - x|, which rounds
    return checked(name, x, x_adv, epsilon)


def checked(name, x, x_adv, epsilon, slack=0.0):
    """x_adv, if all of it lies in the epsilon ball of x and in [0, 1] and is finite; else raises UserError."""
    allowed = (x_adv >= x - epsilon - slack) & (x_adv <= x + epsilon + slack) & (x_adv >= 0) & (x_adv <= 1)
    if not allowed.all():  # false for NaN as well
        raise UserError(f"{name} left the epsilon ball or [0, 1], or met a NaN: are the weights finite?")
    return x_adv


def chosen(images, places):
    """The images at `places` (B,): x (B, 3, H, W) in [0, 1] and y (B,)."""
    places = places.to(images.x.device)
    return pixels(images.x[places]), images.y[places]


def refilled(model, attack, images, places, key, *, epsilon, step_size, steps, batch_size):
    """`attack`, pgd or cw, on the images at `places` (N,), in a batch whose slots are refilled: an image leaves it once
    it is misclassified or has had all its steps, so that none is paid for in vain.

    A round is one step of `attack` on the batch; its own forward says who is misclassified. Each image gets what
    attack(model, x, y, start, steps=steps) makes of it, but for the rounding of networks whose logits depend on the
    rest of the batch. Yields, as images leave, their places (B,), x_adv (B, 3, H, W) and logits (B, C).
    """
    logits = None

    def watched(x_adv):
        nonlocal logits
        found = model(x_adv)  # (B, C)
        logits = found.detach()
        return found

    waiting, batch, taken = places, places[:0], places[:0]  # `taken`: how many steps each of the batch has had
    x_adv, _ = chosen(images, batch)
    ended, ended_x_adv = batch, x_adv  # after their last step, still to be judged
    while len(waiting) or len(batch):
        free = batch_size - len(batch)
        fresh, waiting = waiting[:free], waiting[free:]
        batch, taken = torch.cat([batch, fresh]), torch.cat([taken, torch.zeros_like(fresh)])
        x, y = chosen(images, batch)
        x_adv = torch.cat([x_adv, starts(x[len(x_adv) :], fresh, epsilon, key)])
        x_adv = attack(watched, x, y, x_adv, epsilon=epsilon, step_size=step_size, steps=1)
        fooled = (logits.argmax(1) != y).cpu()  # the round's one wait for the device
        if fooled.any():
            yield batch[fooled], x_adv[fooled], logits[fooled]
        taken += 1
        last, further = ~fooled & (taken == steps), ~fooled & (taken < steps)
        ended, ended_x_adv = torch.cat([ended, batch[last]]), torch.cat([ended_x_adv, x_adv[last]])
        batch, taken, x_adv = batch[further], taken[further], x_adv[further]
        if len(ended) >= batch_size or (len(ended) and not len(waiting) + len(batch)):
            with torch.no_grad():
                logits = model(ended_x_adv)
            yield ended, ended_x_adv, logits
            ended, ended_x_adv = ended[:0], ended_x_adv[:0]


def attacked(model, name, images, places, *, epsilon, step_size, batch_size, seed):
    """Attack `name` on the images at `places` (N,). Yields, as images are done with, their places (B,), their checked
    x_adv (B, 3, H, W) and its logits (B, C)."""
    budget = {"epsilon": epsilon, "step_size": step_size}
    if iterated(name):
        attack, steps = iterated(name)
        rounds = refilled(model, attack, images, places, (seed, name), **budget, steps=steps, batch_size=batch_size)
        for done, x_adv, logits in rounds:
            yield done, checked(name, chosen(images, done)[0], x_adv, epsilon), logits
        return
    for batch in places.split(batch_size) if len(places) else ():
        x, y = chosen(images, batch)
        x_adv = attack_batch(model, name, x, y, batch, **budget, seed=seed)
        with torch.no_grad():
            logits = model(x_adv)
        yield batch, x_adv, logits


def begin(attacked):
    """An attack on the images `attacked`, (N,) bool, before its first batch, as `robust` carries it on."""
    return {
        "attacked": attacked.clone(),
        "stands": attacked.clone(),
        "done": torch.zeros_like(attacked),
        "seconds": 0.0,
    }


def robust(model, images, name, *, epsilon, step_size, batch_size, seed, found=None, keep=lambda: None):
    """Which images are still classified as their label under attack `name`: (N,) bool, on the CPU.

    In eval mode. `found` is where to begin and is carried on, `keep()` is called whenever images are done with: an
    evaluation that ends at any moment continues from what `found` then was to the same result. Raises UserError where a
    logit is not finite.
    """
    found = found or begin(torch.ones(len(images.y), dtype=torch.bool))
    places = (found["attacked"] & ~found["done"]).nonzero().squeeze(1)
    total, done = int(found["attacked"].sum()), int(found["done"].sum())
    budget = {"epsilon": epsilon, "step_size": step_size, "batch_size": batch_size, "seed": seed}
    with eval_mode(model), tqdm(total=total, initial=done, desc=name, unit="img", disable=None, leave=False) as bar:
        began = time.perf_counter()
        for batch, _, logits in attacked(model, name, images, places, **budget):
            if not logits.isfinite().all():
                raise UserError("the network's logits are not finite: its weights are damaged")
            found["stands"][batch] = (logits.argmax(1) == images.y[batch.to(images.y.device)]).cpu()
            found["done"][batch] = True
            found["seconds"] += time.perf_counter() - began
            keep()
            bar.update(len(batch))
            began = time.perf_counter()
    return found["stands"]


def wilson(hits, n):
    """The 95 % confidence interval of a share, `hits` of `n` (Wilson, 1927): (low, high)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(stands):
    """Flags (N,) bool as what a table's cell holds: n, correct, accuracy, interval."""
    n, hits = len(stands), int(stands.sum())
    return {"n": n, "correct": hits, "accuracy": hits / n, "interval": wilson(hits, n)}


def doubts(model, x, y):
    """Why figures of this network may say little, as AutoAttack's own checks do: a list of sentences, mostly empty.

    Images x (B, 3, H, W), y (B,).
    """
    found = []
    x = x.clone().requires_grad_()
    with eval_mode(model):
        logits, again = model(x), model(x)  # (B, C)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    directions = F.normalize(logits.detach()), F.normalize(again.detach())
    if (directions[0] - directions[1]).norm(dim=1).max() > 1e-4:
        found.append("its outputs are random: the same images got different logits, and each attack sees only one draw")
    vanished = int((gradient.flatten(1) == 0).all(1).sum())
    if vanished:
        found.append(
            f"gradients vanish: of {len(y)} images, {vanished} have a gradient of exactly 0, where PGD is blind"
        )
    return found


def masked(row):
    """AutoAttack's check of itself: a list with a sentence if Square, which needs no gradient, still fooled 0.2 %."""
    last = row.get("stages", [row])[-1]
    if last["attack"] != "square" or last["attacked"] - last["correct"] <= 0.002 * row["n"]:
        return []
    fooled = last["attacked"] - last["correct"]
    return [f"Square fooled {fooled} images that stood against the gradient attacks: gradients may be masked"]


class Progress:
    """What is known of each attack, in a file from the first batch to the end of the evaluation, so that an interrupted
    one can be resumed. `identity` is what the figures depend on.

    Raises UserError where the file is there but not asked for, or of another evaluation.
    """

    def __init__(self, path, identity, resume):
        self.path, self.identity, self.attacks, self.kept = path, identity, {}, True
        self.due = 0  # when to write next
        if not path.exists():
            return
        if not resume:
            raise UserError(f"{path} is of an interrupted evaluation: continue it with --resume, or delete it")
        content = checkpoints.load(path)
        if checkpoints.lacking(content, {"identity": dict, "known": dict}):
            raise UserError(f"{path} is not of an interrupted evaluation: delete or rename it")
        differing = [name for name, value in identity.items() if content["identity"].get(name) != value]
        if differing:
            raise UserError(f"{path} is of an evaluation with another {', another '.join(differing)}: delete it first")
        self.attacks = content["known"]

    def of(self, key, attacked):
        """Where the attack `key` on the images `attacked` (N,) bool is to begin."""
        return self.attacks.setdefault(key, begin(attacked))

    def keep(self):
        if time.monotonic() < self.due:
            return
        try:
            checkpoints.save(self.path, {"identity": self.identity, "known": self.attacks})
        except (UserError, OSError):
            if self.kept:
                print(f"note: {self.path} cannot be written, so an interrupted evaluation starts anew", file=sys.stderr)
            self.kept = False
        self.due = time.monotonic() + SAVE_EVERY

    def end(self):
        self.path.unlink(missing_ok=True)


def run_attack(model, images, name, progress, role, **budget):
    """Attacks `images` with `name`, stage by stage where it is a version of AutoAttack.

    Returns which images stand, (N,) bool, and the figures of a table's cell with the attack's settings.
    """
    stands, stages = torch.ones(len(images.y), dtype=torch.bool), []
    for stage in AUTO_ATTACK.get(name, (name,)):
        key = f"{role} {stage} on {len(stands)}" + (f" with {budget['epsilon']}" if stage != "clean" else "")
        found = progress.of(key, stands)
        stands = robust(model, images, stage, **budget, found=found, keep=progress.keep)
        settings = dict(SETTINGS.get(stage, {}))
        if iterated(stage):
            settings |= {"steps": iterated(stage)[1], "restarts": 1}
        if "targets" in settings:
            settings["targets"] = min(TARGETS, len(images.classes) - 1)
        count = {"attacked": int(found["attacked"].sum()), "correct": int(stands.sum())}
        stages.append({"attack": stage, **settings, **count, "seconds": found["seconds"]})
        if name in AUTO_ATTACK:
            print(f"       {name}: {count['correct']} of {len(stands)} stand after {stage}", flush=True)
    row = {"network": role, "attack": name, **share(stands), "seconds": sum(stage["seconds"] for stage in stages)}
    if name != "clean":
        row["epsilon"] = budget["epsilon"]
    if iterated(name):
        row["step_size"] = budget["step_size"]
    row |= {"stages": stages} if name in AUTO_ATTACK else settings
    return stands, row


def together(rows, flags):
    """Which images stand against every attack of equal epsilon and images, per network: a cell for each such group of
    several."""
    groups = {}
    for row, stands in zip(rows, flags, strict=True):
        groups.setdefault((row["network"], row.get("epsilon"), row["n"]), []).append((row["attack"], stands))
    cells = []
    for (role, epsilon, n), members in groups.items():
        if epsilon is None or len(members) < 2:
            continue
        members = groups.get((role, None, n), []) + members  # an image misread without any attack does not stand
        everywhere = torch.stack([stands for _, stands in members]).all(0)
        cells.append({"network": role, "attacks": [name for name, _ in members], "epsilon": epsilon,
                      **share(everywhere)})  # fmt: skip
    return cells


def table(rows):
    """One network's row of the paper's tables in Markdown, and what each figure rests on. "All" is the mean over the
    attacks."""

    def column(row):
        name = row["attack"]
        low, high = row["interval"]
        return [HEADINGS.get(name, name.replace("pgd", "PGD-")), f"{row['accuracy']:.2%}", f"{low:.2%} to {high:.2%}",
                f"{row['epsilon']:.5f}" if "epsilon" in row else "", str(row["n"])]  # fmt: skip

    columns = [["", f"{rows[0]['network']} {rows[0]['name']}", "95 % interval", "epsilon", "n"], *map(column, rows)]
    attacked = [row["accuracy"] for row in rows if row["attack"] != "clean"]
    if attacked:
        columns.append(["All", f"{sum(attacked) / len(attacked):.2%}", "", "", ""])
    lines = ["| " + " | ".join(line) + " |" for line in zip(*columns, strict=True)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def attack_names(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"clean|fgsm|cw|apgd|aa|aa-fast|pgd[1-9]\d{0,3}", name):
            raise UserError(
                f"unknown attack '{name}': choose from clean, fgsm, pgd<steps> as pgd20, cw, apgd, aa-fast, aa"
            )
    if not names:
        raise UserError("--attacks names no attack")
    return list(dict.fromkeys(names))


def check_json(path):
    """Raises UserError unless figures can be written to `path` at the end, after hours."""
    if path.suffix != ".json":
        raise UserError(f"--json {path}: it ends in .json")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --json")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder")
    try:
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def role_names(text):
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= {"target", "guide"}:
        raise UserError(f"--network {text}: it is target, guide or target,guide")
    return list(dict.fromkeys(names))


def parser():
    p = Parser(prog="evaluate.py", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    group = p.add_argument_group("network")
    group.add_argument("--network", default="target", metavar="target,guide", help="default: target")
    group.add_argument("--weights", choices=("last", "ema"), default="last",
                       help="the target's own, or their average in a run with --ema (default: last)")  # fmt: skip
    group.add_argument("--target", metavar="NAME",
                       help="what a file with bare weights is, as wrn34-10 (default: the run's)")  # fmt: skip
    group = p.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help="default: the run's")
    group.add_argument("--data-dir", metavar="D", help="default: the run's, else 'data'")
    group.add_argument("--images", type=bounded(int, 1), metavar="N",
                       help="a class-balanced subset of the test images, drawn from --seed (default: all)")  # fmt: skip
    group = p.add_argument_group("attack")
    group.add_argument("--protocol", choices=("standard", "paper"), default="standard", help="default: standard")
    group.add_argument("--attacks", metavar="LIST",
                       help="of clean, fgsm, pgd<steps>, cw, apgd, aa-fast, aa "
                            f"(default: {ATTACKS}; with --protocol paper also aa)")  # fmt: skip
    group.add_argument("--epsilon", type=bounded(number, 0, 1), metavar="E",
                       help="radius in units of pixels in [0, 1] (default: 8/255, the release)")  # fmt: skip
    group.add_argument("--step-size", type=bounded(number, 0, 1), metavar="A",
                       help="of pgd and cw (default: 2/255, the paper)")  # fmt: skip
    group = p.add_argument_group("run")
    group.add_argument("--batch-size", type=bounded(int, 1), default=256, metavar="B", help="default: 256")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument("--seed", type=bounded(int, 0), default=0, metavar="S", help="of starts and subset (default: 0)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    group.add_argument("--resume", action="store_true",
                       help="continue an interrupted evaluation, to the same figures; FILE.progress beside the JSON, "
                            "else beside the checkpoint, knows how far it came")  # fmt: skip
    return p


def load_checkpoint(path, target, dataset):
    """A run's checkpoint, or a file with bare weights dressed as one. Raises UserError where the flags do not fit
    it."""
    content = checkpoints.load(path)
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        missing = checkpoints.lacking(content, {"target": dict, "classes": list})
        missing += checkpoints.lacking(content["settings"], {"target": str, "dataset": str})
        if missing:
            raise UserError(f"{path} is not a run's checkpoint: it has no {', '.join(missing)}")
        if target not in (None, content["settings"]["target"]):
            raise UserError(f"the target of {path} is {content['settings']['target']}, not {target}")
        return content
    if target is None or dataset is None:
        raise UserError(f"{path} holds bare weights: say --target NAME and --dataset NAME as well")
    return {"target": checkpoints.bare_state_dict(content), "settings": {"target": target}, "classes": None}


def load_test_images(args, content):
    """The test images to attack; their classes are those that the network was trained on, or UserError."""
    trained_on = content["settings"].get("dataset")
    dataset = args.dataset or trained_on
    data_dir = args.data_dir or (content["settings"].get("data_dir") if dataset == trained_on else None)
    images = load_images(dataset, "test", data_dir)
    check_classes(content["classes"] or images.classes, images.classes, f"{args.checkpoint} was trained on")
    return subset(images, args.images, args.seed) if args.images else images


def load_network(content, role, path, num_classes):
    """The `role`, target or guide, of a checkpoint, with every weight in place, frozen and in eval mode. Raises
    UserError where it does not fit."""
    if role not in content or checkpoints.lacking(content["settings"], {role: str}):
        raise UserError(f"{path} holds no {role}")
    try:
        model = build_model(content["settings"][role], num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    state, normalisation = checkpoints.take_normalisation(content[role])
    checkpoints.load_weights(model, state, f"the {role} in {path}")
    if normalisation:
        model = checkpoints.Normalised(model, *normalisation)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def protocol(args, attacks, images):
    """What --protocol and the flags ask for: its name with the flags that differ from it, and per attack its images and
    epsilon. Raises UserError where they contradict each other."""
    standard = {
        "--epsilon": (args.epsilon, 8 / 255),
        "--step-size": (args.step_size, 2 / 255),
        "--images": (args.images, None),
    }
    differing = [f"{flag} {typed:g}" for flag, (typed, usual) in standard.items() if typed not in (None, usual)]
    epsilon = 8 / 255 if args.epsilon is None else args.epsilon
    plan = {name: (images, epsilon) for name in attacks}
    if args.protocol == "paper":
        if differing:
            raise UserError(f"--protocol paper is a fixed set of attacks: leave out {' and '.join(differing)}")
        if args.dataset == "folder":
            raise UserError(
                "--protocol paper takes the first 1,000 test images, in a folder those of the first classes"
            )
        first = Images(images.x[:1000], images.y[:1000], images.classes)
        plan |= {name: (first, 0.031) for name in attacks if name in ("aa", "aa-fast")}
    return " ".join([args.protocol, *(["except for", *differing] if differing else [])]), plan


def check_auto_attack(attacks, classes):
    """The version of pyautoattack, {} if no attack needs it. Raises UserError where an attack cannot run."""
    if not AUTO_ATTACK.keys() & set(attacks):
        return {}
    targeted = [name for name in attacks if "apgd-t" in AUTO_ATTACK.get(name, ())]
    if targeted and classes < 4:
        raise UserError(f"{targeted[0]} needs at least four classes, for its targeted loss; with {classes}, use apgd")
    if targeted and classes <= TARGETS:
        print(f"note: with {classes} classes the targeted attacks aim at {classes - 1}, not {TARGETS}")
    try:
        return {"pyautoattack": metadata.version("pyautoattack")}
    except metadata.PackageNotFoundError:
        raise UserError("AutoAttack is not installed: pip install pyautoattack") from None


def warn(report, role, sentences):
    for sentence in sentences:
        report["warnings"].append(f"{role}: {sentence}")
        print(f"warning: {role}: {sentence}", file=sys.stderr)


@command
def main(argv):
    args = parser().parse_args(argv)
    usual = ATTACKS + (",aa" if args.protocol == "paper" else "")
    attacks = attack_names(usual if args.attacks is None else args.attacks)
    roles = role_names(args.network)
    if args.json:
        check_json(args.json)
    device = pick_device(args.device)
    full_float32()
    torch.backends.cudnn.deterministic = True
    content = load_checkpoint(args.checkpoint, args.target, args.dataset)
    if args.weights == "ema":
        if "ema" not in content:
            raise UserError(f"{args.checkpoint} holds no averaged weights: train with --ema")
        content["target"] = content["ema"]
    settings = content["settings"]
    args.dataset = args.dataset or settings["dataset"]
    images = load_test_images(args, content).to(device)
    networks = {role: load_network(content, role, args.checkpoint, len(images.classes)).to(device) for role in roles}
    name, plan = protocol(args, attacks, images)
    step_size = 2 / 255 if args.step_size is None else args.step_size
    budget = {"step_size": step_size, "batch_size": args.batch_size, "seed": args.seed}
    report = {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "checkpoint": str(args.checkpoint),
        "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
        **provenance(device),
        **check_auto_attack(attacks, len(images.classes)),
        "trained": {"epoch": content.get("epoch"), "settings": settings},
        "dataset": args.dataset,
        "protocol": name,
        "weights": args.weights,
        **budget,
        "warnings": [],
        "results": [],
    }
    # What the figures depend on, besides each attack's own name, epsilon and images.
    identity = {key: report[key] for key in ("sha256", "weights", "torch", "device", "dataset", "protocol", *budget)}
    identity |= {"target": settings["target"], "pyautoattack": report.get("pyautoattack")}
    identity["test images"] = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in images[:2])).hexdigest()
    beside = args.json or args.checkpoint
    progress = Progress(beside.with_name(beside.name + ".progress"), identity, args.resume)

    if "method" in settings:
        print(f"{settings['method']} on {settings['dataset']}, epoch {content.get('epoch')}: {args.checkpoint}")
    print(f"protocol {name}: {len(images.y)} test images, step size {budget['step_size']:.5f}, seed {args.seed}")
    flags = []
    for role, model in networks.items():
        warn(report, role, doubts(model, pixels(images.x[: args.batch_size]), images.y[: args.batch_size]))
        for attack, (attacked, epsilon) in plan.items():
            stands, row = run_attack(model, attacked, attack, progress, role, epsilon=epsilon, **budget)
            report["results"].append({"name": settings[role], **row})
            flags.append(stands)
            low, high = row["interval"]
            print(f"{role:6} {settings[role]:8} {attack:7} {row['accuracy']:7.2%}   95 % interval {low:.2%} to "
                  f"{high:.2%}   n = {row['n']}   {row['seconds']:.1f} s", flush=True)  # fmt: skip
            warn(report, role, masked(row))
    report["together"] = together(report["results"], flags)
    for role in networks:
        print("\n" + table([row for row in report["results"] if row["network"] == role]))
    for cell in report["together"]:
        print(f"\n{cell['network']}: {cell['accuracy']:.2%} ({cell['correct']} of {cell['n']}) stand against each of "
              f"{', '.join(cell['attacks'])} with epsilon {cell['epsilon']:.5f}")  # fmt: skip
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    progress.end()


if __name__ == "__main__":
    sys.exit(main())
