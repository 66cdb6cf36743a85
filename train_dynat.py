"""DYNAT, Dynamic Label Adversarial Training: a guide learns clean images from the ground truth, a target learns
adversarial images from the guide's decisions, both from scratch and at the same time.

    python train_dynat.py --dataset tiny                              a minute on a CPU, nothing to download
    python train_dynat.py --dataset cifar10 --target wrn34-10         the paper's main row
    python train_dynat.py --method dynat-inner ...                    Eq. (7), the dynamic inner maximisation
    python train_dynat.py --method trades ...                         any other row of its tables, see variants/

One update is `dynat_step` below; everything under it is the loop and the command line.
"""

import json
import math
import shlex
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import checkpoints
import engine
import variants
from attacks import eval_mode, linf_pgd, near_start, uniform_start
from cli import (
    Parser,
    Stopped,
    UserError,
    bounded,
    command,
    deterministic,
    full_float32,
    number,
    provenance,
    write_text,
)
from data import DATASETS, check_classes, generator, hold_out, load_images, subset, train_batches
from evaluate import begin, robust
from losses import dynamic_labels, guide_loss, kl_divergence, sum_over_processes, target_loss
from models import NAMES, build_model
from speed import Fast, tf32


def dynat_step(target, guide, optimizer, x, y, start, *, inner, epsilon, step_size, steps, beta, clean_forward=True):
    """One update of DYNAT: min over both networks of CE(g(x), y) + beta * CE(f(x_adv), labels), Eq. (6).

    target, guide   f and g, both in train mode, images in [0, 1] to logits (B, C); `optimizer` holds the weights of
    both. x, y, start     clean images (B, 3, H, W) in [0, 1], ground truth (B,) int64, and where the attack begins.
    inner           False: x_adv maximises KL(f(x) || f(.)), as LBGAT's does. True: it maximises CE(f(.), labels), Eq.
    (7). epsilon, step_size, steps   of the attack, in units of pixels in [0, 1].

    Returns x_adv and the update's figures, scalars on the device, detached. Source: DYNAT, dynat.py; its guide
    forward at every PGD step is done once, which changes no weight (its batch statistics are the same each time).
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    labels = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient

    with eval_mode(target):
        if inner:  # Eq. (7)
            objective = lambda logits: F.cross_entropy(logits, labels, reduction="sum")
        else:
            with torch.no_grad():
                clean_logits = target(x)  # (B, C)  the same at every PGD step
            objective = lambda logits: kl_divergence(clean_logits, logits).sum()
        x_adv = linf_pgd(target, x, start, objective, epsilon=epsilon, step_size=step_size, steps=steps)

    adv_logits = target(x_adv)  # (B, C)
    if clean_forward:
        with torch.no_grad():
            target(x)  # no loss term: clean statistics enter the target's BatchNorm, as in the release

    loss_guide = guide_loss(guide_logits, y)  # Eq. (4)
    loss_target = target_loss(adv_logits, labels)  # Eq. (5)
    loss = loss_guide + beta * loss_target  # Eq. (6)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, {
        "loss": loss.detach(),
        "loss_guide": loss_guide.detach(),
        "loss_target": loss_target.detach(),
        "label_acc": (labels == y).float().mean(),  # from weak to strong: the share of dynamic labels that are right
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


# A method: its step, whose keyword-only arguments are the settings it uses (`epoch` and `noise` come from the loop);
# where its attack begins, "near" or "uniform"; its own settings; and "where": those that hold for a data set, for a
# target or for the preset "release" alone. Milestones are (first epoch, learning-rate factor).
DYNAT = {
    "step": dynat_step,
    "start": "near",
    "epochs": 100,
    "milestones": [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)],  # LBGAT's, with its warm-up epoch
    "where": {"release": {"guide": "resnet18-lbgat", "step_size": 0.007}},
}
METHODS = {"dynat": {**DYNAT, "inner": False}, "dynat-inner": {**DYNAT, "inner": True}, **variants.METHODS}

PAPER = {
    "target": "wrn34-10",
    "guide": "resnet18",
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-4,
    "epsilon": 0.031,
    "step_size": 2 / 255,
    "steps": 10,
    "beta": 1.0,
    "clean_forward": True,
}
RUN = {
    "dataset": "cifar10",
    "method": "dynat",
    "preset": "paper",
    "seed": 1,
    "deterministic": True,
    "precision": "fp32",
    "compile": False,
    "sync_bn": False,
    "eval_every": 1,
    "val_images": 0,
    "ema": 0.0,
}
TINY = {"target": "cnn", "guide": "cnn", "epochs": 10, "batch_size": 32}  # about a minute on two cores
SCHEDULES = ("milestones", "tau_milestones")  # [(first epoch, value)]
EPOCHS = ("awp_start", "burn_in", "easy_until", "hardest_from")  # they all scale with --epochs
UNNAMED = ("method", "dataset", "target", "seed", "data_dir", "eval_every", "deterministic")


def options(method):
    """The settings that a method's step uses, and "guide" if it has one."""
    parameters = signature(method["step"]).parameters.values()
    used = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.name == "guide"]
    return [name for name in used if name not in ("epoch", "noise")]


def resolve(typed):
    """Every setting of a run, by flag: the paper's, then the method's own, those of `tiny`, and the typed.

    If the epochs differ from the method's own, every epoch number of its schedule scales with them. Returns the
    settings and the run's default folder, named by what differs from the defaults. Raises UserError for a flag that the
    method cannot use.
    """
    explicit, typed = typed, {**RUN, **typed}
    method = METHODS[typed["method"]]
    used = options(method)
    unused = {name for other in METHODS.values() for name in options(other) if name not in used}
    for flag in typed:
        if flag in unused:
            flag = "no_clean_forward" if flag == "clean_forward" else flag
            raise UserError(f"--method {typed['method']} does not use --{flag.replace('_', '-')}: leave it out")

    tiny = TINY if typed["dataset"] == "tiny" else {}
    own = {name: value for name, value in method.items() if name not in ("step", "start", "where")}
    target = typed.get("target", {**PAPER, **tiny}["target"])
    for place in (typed["dataset"], target, typed["preset"]):
        own.update(method.get("where", {}).get(place, {}))
    defaults = {**PAPER, **own, **tiny}
    defaults = {name: value for name, value in defaults.items() if name not in unused}
    if typed["dataset"].startswith("cifar"):
        defaults["data_dir"] = "data"

    stretch = typed.get("epochs", defaults["epochs"]) / own["epochs"]
    scaled = lambda epoch: max(1, round(epoch * stretch)) if epoch > 1 else epoch  # the first epoch stays the first
    for name in defaults:
        if name in SCHEDULES:
            defaults[name] = [(scaled(first), value) for first, value in defaults[name]]
        elif name in EPOCHS:
            defaults[name] = scaled(defaults[name])
    settings = {"data_dir": None, **defaults, **typed}
    if "lr_milestones" in typed:
        drops = enumerate(sorted(typed["lr_milestones"]), start=1)
        settings["milestones"] = [(1, 1.0)] + [(first, 10.0**-drop) for drop, first in drops]

    name = "-".join([settings["method"], settings["dataset"], settings["target"], f"s{settings['seed']}"])
    for flag, value in explicit.items():
        if flag not in UNNAMED and value != {**RUN, **defaults}.get(flag):
            values = value if isinstance(value, list) else [value]
            name += f"-{flag.replace('_', '-')}-" + "-".join(v if isinstance(v, str) else f"{v:g}" for v in values)
    return settings, Path("runs") / name


def learning_rate(settings, epoch):
    """lr times the factor of the last milestone reached; epochs count from 1."""
    return settings["lr"] * [factor for first, factor in settings["milestones"] if first <= epoch][-1]


def train_epoch(networks, averaged, optimizer, images, settings, epoch, done, bar, stop):
    """The epoch's updates, `averaged` (or None) following the target; where a signal comes, those up to the next one.

    `done` is carried on: the "step"s done in this epoch, and of each figure that the step reports the "totals" over
    their images. Returns the first update whose loss was not finite, (), or infinity: on the device, as the totals, so
    that nothing waits for it.
    """
    method, totals = METHODS[settings["method"]], done["totals"]
    parameters = signature(method["step"]).parameters
    chosen = {name: settings[name] for name in options(method) if name != "guide"}
    if "epoch" in parameters:
        chosen["epoch"] = epoch
    bad = torch.full((), math.inf, device=images.x.device)
    for x, y, draws in train_batches(images, settings["batch_size"], settings["seed"], epoch, done["step"]):
        start = near_start(x, draws) if method["start"] == "near" else uniform_start(x, settings["epsilon"], draws)
        own = engine.own(len(y))  # of what was drawn for all processes; alone, everything
        if "noise" in parameters:
            chosen["noise"] = partial(normal_like, x, draws, own)
        with engine.global_gradient(optimizer, len(y[own]) / len(y)):
            _, figures = method["step"](**networks, optimizer=optimizer, x=x[own], y=y[own], start=start[own], **chosen)
        engine.average_statistics(networks)
        if averaged is not None:
            averaged.update_parameters(networks["target"])
        done["step"] += 1
        for name, value in figures.items():
            totals[name] = totals.get(name, 0) + value * len(y[own])
        bad = torch.where(figures["loss"].isfinite(), bad, bad.clamp(max=done["step"]))
        bar.update(len(y))
        if stop.asked():
            break
    return bad


def normal_like(x, draws, own, k):
    """N(0, 1) for the images `own` of the batch x and the k-th PGD step, from the update's generator."""
    return torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)[own]


def prepare_images(settings, device):
    """The run's images on the device: "train", "test" and, held out of the training images, "val"."""
    images = {split: load_images(settings["dataset"], split, settings["data_dir"]) for split in ("train", "test")}
    check_classes(images["train"].classes, images["test"].classes, "the training images have")
    if settings["val_images"]:
        images["val"], images["train"] = hold_out(images["train"], settings["val_images"], settings["seed"])
    if "train_images" in settings:
        images["train"] = subset(images["train"], settings["train_images"], settings["seed"])
    return {split: found.to(device) for split, found in images.items()}


def prepare_networks(settings, num_classes, device):
    """Target and, where the method has one, guide, each initialised from its own seed: the guide is the same whatever
    the target is. And one SGD over the weights of both."""
    networks = {}
    for role in ("target", "guide"):
        if role in settings:
            torch.manual_seed(generator("cpu", settings["seed"], role).initial_seed())
            model = build_model(settings[role], num_classes).to(device, memory_format=torch.channels_last)
            networks[role] = nn.SyncBatchNorm.convert_sync_batchnorm(model) if settings["sync_bn"] else model
    weights = [weight for model in networks.values() for weight in model.parameters()]
    hyper = {"momentum": settings["momentum"], "weight_decay": settings["weight_decay"]}
    return networks, torch.optim.SGD(weights, lr=settings["lr"], **hyper)


def measure(networks, images, settings):
    """Accuracies in eval mode: clean on the test images, clean and under PGD-10 on the held-out ones."""
    row = {"test_acc": accuracy(networks["target"], images["test"], "clean", settings)}
    if "guide" in networks:
        row["guide_test_acc"] = accuracy(networks["guide"], images["test"], "clean", settings)
    if "val" in images:
        row["val_clean"] = accuracy(networks["target"], images["val"], "clean", settings)
        row["val_pgd"] = accuracy(networks["target"], images["val"], "pgd10", settings)
    return row


def accuracy(model, images, attack, settings):
    """The share of the images classified as their label under `attack`, every process attacking its part of them."""
    own = torch.zeros(len(images.y), dtype=torch.bool)
    own[engine.own(len(own))] = True
    budget = {name: settings[name] for name in ("epsilon", "step_size", "seed")}
    stands = robust(model, images, attack, **budget, batch_size=256, found=begin(own))
    (hits,) = sum_over_processes((stands & own).sum())
    return int(hits) / len(own)


def train(settings, out, device, former=None):
    """Trains as `settings` say, an epoch at a time, into the folder `out`; `former` is its checkpoint to go on from.
    Returns the log, one dict per epoch.

    After each epoch, and after the update in which a signal comes, `last.pt` and then `log.jsonl` are replaced, each
    whole; `best.pt` is the `last.pt` with the best accuracy under PGD on the held-out images; at the end `weights.pt`
    is the target's state_dict. Raises Stopped after a signal.
    """
    images = engine.one_by_one(lambda: prepare_images(settings, device))
    classes, count, epochs = images["train"].classes, len(images["train"].y), settings["epochs"]
    updates = math.ceil(count / settings["batch_size"])
    engine.check_batches(count, settings["batch_size"])
    networks, optimizer = prepare_networks(settings, len(classes), device)
    fast = {role: Fast(model, settings["precision"] == "bf16", settings["compile"]) for role, model in networks.items()}
    averaged = None
    if settings["ema"]:
        averaged = AveragedModel(
            networks["target"], multi_avg_fn=get_ema_multi_avg_fn(settings["ema"]), use_buffers=True
        )
    log, done = [], {"step": 0, "totals": {}, "seconds": 0.0}
    write = lambda function, *args: engine.agree(lambda: function(*args), turn=engine.rank() == 0)
    sizes, origin = {split: len(found.y) for split, found in images.items()}, provenance(device)
    if former is None:
        config = {"settings": settings, "classes": classes, "images": sizes, "processes": engine.count(), **origin}
        write(write_text, out / "config.json", json.dumps(config, indent=1) + "\n")
    else:
        check_classes(former["classes"], classes, f"{out} was trained on")
        engine.restore(former, networks, averaged, optimizer)
        log, done = former["log"], {name: former[name] for name in done}
        # The totals are those of all processes: the first one takes them over.
        done["totals"] = {name: total.to(device) * (engine.rank() == 0) for name, total in done["totals"].items()}
        write(engine.write_log, out, log)

    print(f"{out}: {', '.join(f'{n} {split}' for split, n in sizes.items())} images, {origin['device']}")
    print("  ".join(f"{name} {_shown(value)}" for name, value in settings.items()))
    seen = count * len(log) + settings["batch_size"] * done["step"]
    bar = tqdm(total=epochs * count, initial=seen, unit="img", unit_scale=True, disable=None, smoothing=0.05)
    with bar, engine.Stop() as stop:
        for epoch in range(len(log) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            lr = optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch)
            began = time.perf_counter()
            with tf32(settings["precision"] == "tf32"):
                bad = train_epoch(fast, averaged, optimizer, images["train"], settings, epoch, done, bar, stop)
            engine.check_finite(bad, networks, epoch, done["step"])
            done["seconds"] += time.perf_counter() - began
            done["totals"] = dict(zip(done["totals"], sum_over_processes(*done["totals"].values()), strict=True))
            best = False
            if whole := done["step"] == updates:
                row = {"epoch": epoch, "lr": lr, **{name: float(t) / count for name, t in done["totals"].items()}}
                if epoch % settings["eval_every"] == 0 or epoch == epochs:
                    row.update(measure(networks, images, settings))
                best = "val_pgd" in row and row["val_pgd"] > max((past.get("val_pgd", -1) for past in log), default=-1)
                log.append({**row, "seconds": done["seconds"], "images_per_second": count / done["seconds"]})
                done = {"step": 0, "totals": {}, "seconds": 0.0}
            content = {**engine.state(networks, averaged, optimizer), "epoch": len(log), **done}
            write(engine.save, out, {**content, "settings": settings, "classes": classes, "log": log}, best)
            if whole:
                bar.write(report(log[-1], epochs))
            if stop.asked() and len(log) < epochs:
                where = f"after epoch {epoch}" if whole else f"after update {done['step']} of epoch {epoch}"
                raise Stopped(stop.signal, f"saved {where}; to go on, add --out {out} --resume")
    write(checkpoints.save, out / "weights.pt", networks["target"].state_dict())
    return log


def check_settings(own, path):
    """Raises UserError where the settings in the checkpoint `path` are not those that this program would train with."""
    method = str(own.get("method"))
    if method not in METHODS:
        raise UserError(f"{path} is of a method called {method}, which is not among {', '.join(METHODS)}")
    expected, _ = resolve({name: str(own.get(name)) for name in ("method", "dataset", "target", "preset")})
    kind = lambda value: object if value is None else (int, float) if isinstance(value, (int, float)) else type(value)
    if missing := checkpoints.lacking(own, {name: kind(value) for name, value in expected.items()}):
        raise UserError(f"{path} has no {', '.join(missing)} that this version of the program can use")
    for role in {"target", "guide"} & expected.keys():
        network_name(own[role])


def resume(former, out, typed):
    """The settings of the run in `out`; the epochs alone may be other ones, and then leave the rest of the schedule as
    it is. Raises UserError for any other typed flag that differs from the run's, and for epochs that are past."""
    own = former["settings"]
    check_settings(own, out / "last.pt")
    for name, value in typed.items():
        if name != "epochs" and own.get(name) != value:
            raise UserError(f"the run in {out} has {name} {own.get(name)}, not {value}: to resume, leave that flag out")
    epochs = typed.get("epochs", own["epochs"])
    if epochs < former["epoch"] + (former["step"] > 0):
        raise UserError(f"the run in {out} is beyond epoch {epochs}: to resume, give more --epochs")
    return {**own, "epochs": epochs}


def _shown(value):
    if isinstance(value, list):
        return " ".join(f"{item[1]:g}@{item[0]}" if isinstance(item, tuple) else str(item) for item in value)
    return f"{value:.5g}" if isinstance(value, float) else value


def report(row, epochs):
    """An epoch's figures as one line for people."""
    line = f"epoch {row['epoch']:3}/{epochs}  lr {row['lr']:<7.5g} loss {row['loss']:7.4f}"
    for name in ("label_acc", "adv_acc", "test_acc", "guide_test_acc"):
        if name in row:
            line += f"  {name} {row[name]:6.2%}"
    return line + f"  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"


def network_name(text):
    try:
        with torch.device("meta"):
            build_model(text, 10)
    except ValueError as error:
        raise UserError(str(error)) from None
    return text


def published(setting):
    """The methods' own defaults of a setting, for --help: read from METHODS, so that they cannot differ."""
    methods = {}
    for name, method in METHODS.items():
        places = {place: own[setting] for place, own in method.get("where", {}).items() if setting in own}
        places.pop("release", None)  # said once, not for every method
        if setting in method or places:
            value = f"{method[setting]:.3g}" if setting in method else ""
            value += "".join(f" ({place}: {special:.3g})" for place, special in places.items())
            methods.setdefault(value, []).append(name)
    return ", ".join(f"{' '.join(names)} {value}" for value, names in methods.items())


def parser():
    p = Parser(prog="train_dynat.py", description=__doc__)
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="default: cifar10; tiny is made up, no download")
    add("--data-dir", metavar="D", help="where CIFAR is or goes (default: data), or a folder with train/ and test/")
    add("--train-images", type=bounded(int, 2), metavar="N", help="a class-balanced subset (default: all)")
    add = p.add_argument_group("networks").add_argument
    add("--target", type=network_name, metavar="NAME", help=f"{NAMES} (default: wrn34-10, the paper; tiny: cnn)")
    add("--guide", type=network_name, metavar="NAME",
        help="default: resnet18, the paper; resnet18-lbgat, its release and LBGAT's; tiny: cnn")  # fmt: skip
    add = p.add_argument_group("method").add_argument
    add("--method", choices=METHODS, metavar="M",
        help=f"{', '.join(METHODS)} (default: dynat)")  # fmt: skip
    add("--preset", choices=("paper", "release"),
        help="whose settings, where the paper's text and its authors' release differ (default: paper)")  # fmt: skip
    add("--beta", type=bounded(number, 0),
        help="Eq. (6)'s weight of the target's loss (default: 1, the paper; its AWP rows: 0.2 on cifar100 and in the "
        "release)")  # fmt: skip
    add("--kl-weight", type=bounded(number, 0), metavar="W",
        help=f"of the KL term (default: {published('kl_weight')}; the releases)")  # fmt: skip
    add("--awp-gamma", type=bounded(number, 0), metavar="G",
        help=f"size of the weight perturbation, relative to the weights (default: {published('awp_gamma')}; the "
        "releases)")  # fmt: skip
    add("--awp-start", type=bounded(int, 1), metavar="EPOCH",
        help=f"the first with perturbed weights (default: {published('awp_start')}; the releases)")  # fmt: skip
    add("--burn-in", type=bounded(int, 0), metavar="N",
        help=f"epochs before instances are weighted (default: {published('burn_in')}; the paper, the "
        "releases)")  # fmt: skip
    add("--label-smoothing", type=bounded(number, 0, 1), metavar="A",
        help=f"of the target's labels (default: {published('label_smoothing')}; the paper)")  # fmt: skip
    add("--no-clean-forward", dest="clean_forward", action="store_false", default=None,
        help="keep clean images out of the target's BatchNorm (default: they enter it, the release)")  # fmt: skip
    add = p.add_argument_group("attack").add_argument
    add("--epsilon", type=bounded(number, 0, 1),
        help="radius in units of pixels in [0, 1] (default: 0.031, the paper; "
        f"{published('epsilon')}; the releases)")  # fmt: skip
    add("--step-size", type=bounded(number, 0, 1),
        help=f"default: 2/255, the paper; 0.007, its release; {published('step_size')}; the releases")  # fmt: skip
    add("--steps", type=bounded(int, 1, 1000), help="default: 10, the release")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=bounded(int, 1),
        help=f"default: {published('epochs')}; the releases; tiny: 10. Every epoch number of a schedule scales with "
        "it, unless typed")  # fmt: skip
    add("--batch-size", type=bounded(int, 1), help="default: 128, the paper; tiny: 32")
    add("--lr", type=bounded(number, 0), help=f"default: 0.1; {published('lr')}; the releases")
    add("--lr-milestones", type=bounded(int, 1), nargs="+", metavar="EPOCH",
        help="divide lr by 10 at each (default: dynat x0.2 in epoch 1, drops at 76 and 91; every method as its "
        "release; the run prints it)")  # fmt: skip
    add("--momentum", type=bounded(number, 0, 1), help="default: 0.9, the release")
    add("--weight-decay", type=bounded(number, 0),
        help=f"default: 2e-4; {published('weight_decay')}; the releases")  # fmt: skip
    add = p.add_argument_group("run").add_argument
    add("--seed", type=bounded(int, 0), help="of networks, order, crops, flips and starts (default: 1)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--deterministic", action=BooleanOptionalAction,
        help="same seed, same device, same bytes (default); --no-deterministic may be faster on a GPU")  # fmt: skip
    add("--precision", choices=("fp32", "tf32", "bf16"),
        help="of the networks in training; losses, images and what is measured stay float32 (default: "
        "fp32)")  # fmt: skip
    add("--compile", action="store_true", default=None,
        help="torch.compile, and on a GPU the attack as a CUDA graph: slow to start, fast then (default: "
        "off)")  # fmt: skip
    add("--sync-bn", action="store_true", default=None,
        help="under torchrun, on GPUs: BatchNorm over all processes' images (default: each over its own)")  # fmt: skip
    add("--eval-every", type=bounded(int, 1), metavar="N",
        help="test, and validate, after each N epochs and the last (default: 1)")  # fmt: skip
    add("--val-images", type=bounded(int, 0), metavar="N",
        help="hold out N training images, class-balanced, and keep best.pt by PGD-10 on them (default: 0)")  # fmt: skip
    add("--ema", type=bounded(number, 0, 1), metavar="DECAY",
        help="keep an average of the target's weights as well, 0.999 or so (default: 0, none)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: runs/<method>-<dataset>-<target>-s<seed>, and what differs")
    add("--resume", action="store_true", default=None,
        help="go on with the run in --out, or start it; other flags are the run's, --epochs may differ")  # fmt: skip
    return p


@command
def main(argv):
    typed = {name: value for name, value in vars(parser().parse_args(argv)).items() if value is not None}
    out, device, resuming = (typed.pop(name, None) for name in ("out", "device", "resume"))
    settings, named = resolve(typed)
    out = out or named
    with ExitStack() as stack:
        device = stack.enter_context(engine.processes(device))
        former = engine.from_first(lambda: stack.enter_context(engine.claimed(out, resuming)))
        if former is not None:
            settings = resume(former, out, typed)
        for flag, used, what in (
            ("--sync-bn", settings["sync_bn"], "torch's SyncBatchNorm"),
            ("--precision tf32", settings["precision"] == "tf32", "a mode of NVIDIA's"),
        ):
            if used and device.type != "cuda":
                raise UserError(f"{flag} is {what} that needs GPUs: leave it out")
        full_float32()
        deterministic(settings["deterministic"])
        try:
            train(settings, out, device, former)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"to go on after the last save, add --out {out} --resume") from None
        networks = ["--network", "target,guide"] if "guide" in settings else []
        print(f"\nThe target's weights are in {out / 'weights.pt'}. Attack what was trained with")
        print(shlex.join(["python", "evaluate.py", str(out / "last.pt"), *networks]))


if __name__ == "__main__":
    sys.exit(main())
