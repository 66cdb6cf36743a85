"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K and C&W, each with its 95 % interval.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw

fgsm   one step of epsilon on CE, no random start
pgdK   K steps on CE from a uniform start; an image once fooled stays fooled
cw     20 such steps on C&W's margin, max_{c != y} z_c - z_y, kappa = 0
These are the evaluations of the paper's tables (auto_attack_eval1.py in its release). They run in float32 and in eval
mode, on the whole test set unless --images says otherwise.
"""

import hashlib
import json
import math
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints
from attacks import eval_mode, linf_pgd, margin, uniform_start
from cli import Parser, UserError, bounded, command, full_float32, number, pick_device, provenance, write_text
from data import DATASETS, check_classes, generator, load_images, pixels, subset
from models import build_model


def correct(model, x, y):
    """Whether argmax model(x) = y. Images (B, 3, H, W), y (B,); returns (B,) bool."""
    return model(x).argmax(1) == y


def fgsm(model, x, y, epsilon):
    """x_adv = x + epsilon * sign(grad CE), clamped to [0, 1] (Goodfellow et al., 2015): one step, no random start."""
    return linf_pgd(
        model, x, x, lambda z: F.cross_entropy(z, y, reduction="sum"), epsilon=epsilon, step_size=epsilon, steps=1
    )


def pgd(model, x, y, start, *, epsilon, step_size, steps):
    """PGD on CE(., y) that moves only the images still classified as y, so an image once fooled stays fooled.

    Images and start (B, 3, H, W) in [0, 1], y (B,); returns x_adv. Source: DYNAT, auto_attack_eval1.py, attack_pgd.
    """
    return linf_pgd(
        model,
        x,
        start,
        lambda z: F.cross_entropy(z, y, reduction="sum"),
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        active=lambda z: z.argmax(1) == y,
    )


def cw(model, x, y, start, *, epsilon, step_size, steps=20):
    """The same loop on C&W's margin, max_{c != y} z_c - z_y, with kappa = 0. Source: auto_attack_eval1.py,
    cw_Linf_attack."""
    return linf_pgd(
        model,
        x,
        start,
        lambda z: -margin(z, y).sum(),
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        active=lambda z: z.argmax(1) == y,
    )


def starts(x, places, epsilon, key):
    """A uniform start for each image, drawn from `key` and the image's place in the test set and from nothing else, so
    that neither the batch size nor what was attacked before changes it. Images x (B, 3, H, W), places (B,)."""
    drawn = [
        uniform_start(image, epsilon, generator(x.device, *key, place))
        for image, place in zip(x, places.tolist(), strict=True)
    ]
    return torch.stack(drawn).contiguous(memory_format=torch.channels_last)


def attack_batch(model, name, x, y, start, epsilon, step_size):
    """The images that attack `name` makes of x, checked: in the epsilon ball, in [0, 1] and finite, elementwise."""
    if name == "clean":
        return x
    if name == "fgsm":
        x_adv = fgsm(model, x, y, epsilon)
    elif name == "cw":
        x_adv = cw(model, x, y, start, epsilon=epsilon, step_size=step_size)
    else:
        steps = int(name.removeprefix("pgd"))
        x_adv = pgd(model, x, y, start, epsilon=epsilon, step_size=step_size, steps=steps)
    allowed = (x_adv >= x - epsilon) & (x_adv <= x + epsilon) & (x_adv >= 0) & (x_adv <= 1)  # false for NaN
    if not allowed.all():
        raise UserError(f"{name} left the epsilon ball or [0, 1], or met a NaN: are the weights finite?")
    return x_adv


def robust(model, images, name, *, epsilon, step_size, batch_size, seed):
    """Which images are still classified as their label under attack `name`: (N,) bool, on the CPU.

    In eval mode; the starts are drawn from (seed, name). Raises UserError where a logit is not finite.
    """
    kept = []
    places = torch.arange(len(images.y), device=images.x.device)
    with eval_mode(model), tqdm(total=len(places), desc=name, unit="img", disable=None, leave=False) as bar:
        for chosen in places.split(batch_size):
            x, y = pixels(images.x[chosen]), images.y[chosen]
            start = starts(x, chosen, epsilon, (seed, name))
            x_adv = attack_batch(model, name, x, y, start, epsilon, step_size)
            with torch.no_grad():
                logits = model(x_adv)
            if not logits.isfinite().all():
                raise UserError("the network's logits are not finite: its weights are damaged")
            kept.append((logits.argmax(1) == y).cpu())
            bar.update(len(y))
    return torch.cat(kept)


def accuracy(model, images, batch_size=256):
    """The share of images classified as their label, in eval mode."""
    hits = 0
    with eval_mode(model), torch.no_grad():
        for x, y in zip(images.x.split(batch_size), images.y.split(batch_size), strict=True):
            hits += correct(model, pixels(x), y).sum()
    return int(hits) / len(images.y)


def wilson(hits, n):
    """The 95 % confidence interval of a share, `hits` of `n` (Wilson, 1927): (low, high)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def attack_names(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"clean|fgsm|cw|pgd[1-9]\d{0,3}", name):
            raise UserError(f"unknown attack '{name}': choose from clean, fgsm, pgd<steps> as pgd20, cw")
    if not names:
        raise UserError("--attacks names no attack")
    return list(dict.fromkeys(names))


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
    group.add_argument("--target", metavar="NAME",
                       help="what a file with bare weights is, as wrn34-10 (default: the run's)")  # fmt: skip
    group = p.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help="default: the run's")
    group.add_argument("--data-dir", metavar="D", help="default: the run's, else 'data'")
    group.add_argument("--images", type=bounded(int, 1), metavar="N",
                       help="a class-balanced subset of the test images, drawn from --seed (default: all)")  # fmt: skip
    group = p.add_argument_group("attack")
    group.add_argument("--attacks", default="clean,pgd10,pgd20,pgd50,cw", metavar="LIST",
                       help="of clean, fgsm, pgd<steps>, cw (default: clean,pgd10,pgd20,pgd50,cw)")  # fmt: skip
    group.add_argument("--epsilon", type=bounded(number, 0, 1), default=8 / 255, metavar="E",
                       help="radius in units of pixels in [0, 1] (default: 8/255, the release)")  # fmt: skip
    group.add_argument("--step-size", type=bounded(number, 0, 1), default=2 / 255, metavar="A",
                       help="of pgd and cw (default: 2/255, the paper)")  # fmt: skip
    group = p.add_argument_group("run")
    group.add_argument("--batch-size", type=bounded(int, 1), default=256, metavar="B", help="default: 256")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    group.add_argument("--seed", type=bounded(int, 0), default=0, metavar="S", help="of starts and subset (default: 0)")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return p


def load_checkpoint(path, target, dataset):
    """A run's checkpoint, or a file with bare weights dressed as one. Raises UserError where the flags do not fit
    it."""
    content = checkpoints.load(path)
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
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
    data_dir = args.data_dir or (content["settings"]["data_dir"] if dataset == trained_on else None)
    images = load_images(dataset, "test", data_dir)
    check_classes(content["classes"] or images.classes, images.classes, f"{args.checkpoint} was trained on")
    return subset(images, args.images, args.seed) if args.images else images


def load_network(content, role, path, num_classes):
    """The `role`, target or guide, of a checkpoint, with every weight in place. Raises UserError where it does not
    fit."""
    if role not in content:
        raise UserError(f"{path} holds no {role}")
    try:
        model = build_model(content["settings"][role], num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    checkpoints.load_weights(model, content[role], f"the {role} in {path}")
    return model.to(memory_format=torch.channels_last).eval()


@command
def main(argv):
    args = parser().parse_args(argv)
    attacks, roles = attack_names(args.attacks), role_names(args.network)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"there is no folder {args.json.parent} for --json")
    device = pick_device(args.device)
    full_float32()
    torch.backends.cudnn.deterministic = True
    content = load_checkpoint(args.checkpoint, args.target, args.dataset)
    images = load_test_images(args, content).to(device)
    networks = {role: load_network(content, role, args.checkpoint, len(images.classes)).to(device) for role in roles}

    settings = content["settings"]
    if "method" in settings:
        print(f"{settings['method']} on {settings['dataset']}, epoch {content['epoch']}: {args.checkpoint}")
    print(f"{len(images.y)} test images, epsilon {args.epsilon:.5f}, step size {args.step_size:.5f}, seed {args.seed}")
    report = {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "checkpoint": str(args.checkpoint),
        "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
        **provenance(device),
        "trained": {"epoch": content.get("epoch"), "settings": settings},
        "seed": args.seed,
        "results": [],
    }
    for role, model in networks.items():
        for name in attacks:
            row = {"network": role, "name": settings[role], "attack": name, "n": len(images.y)}
            if name != "clean":
                row["epsilon"] = args.epsilon
            if name not in ("clean", "fgsm"):
                row["step_size"] = args.step_size
            began = time.perf_counter()
            hits = robust(model, images, name, epsilon=args.epsilon, step_size=args.step_size,
                          batch_size=args.batch_size, seed=args.seed)  # fmt: skip
            row["correct"] = int(hits.sum())
            row["accuracy"] = row["correct"] / row["n"]
            row["interval"] = wilson(row["correct"], row["n"])
            row["seconds"] = time.perf_counter() - began
            report["results"].append(row)
            low, high = row["interval"]
            print(f"{role:6} {row['name']:8} {name:6} {row['accuracy']:7.2%}   95 % interval {low:.2%} to {high:.2%}   "
                  f"n = {row['n']}   {row['seconds']:.1f} s", flush=True)  # fmt: skip
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
