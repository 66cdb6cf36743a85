"""DYNAT, Dynamic Label Adversarial Training. A guide is trained on clean images with the ground truth. A target is
trained from scratch at the same time: its images are adversarial, their labels are what the guide predicts.

    python train_dynat.py --dataset tiny                              a minute on a CPU, nothing to download
    python train_dynat.py --dataset cifar10 --target wrn34-10         the paper's main row
    python train_dynat.py --method dynat-inner ...                    Eq. (7), the dynamic inner maximisation
    python train_dynat.py --method trades --help                      another row of its tables, with its own defaults

One update is `dynat_step` below. The other methods' updates are in variants/. Then come the settings, the training
loop and the command line.
"""

import copy
import shlex
import sys
import textwrap
import time
from argparse import SUPPRESS, BooleanOptionalAction
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import distributed
from attacks import eval_mode, gaussian_start, linf_pgd, uniform_start
from cli import Parser, Progress, UserError, exit_status, in_range, numerics, parse_fraction, provenance
from data import DATASETS, check_classes, class_balanced_subset, hold_out, load_images, make_generator, train_batches
from losses import dynamic_labels, guide_loss, kl_divergence, target_loss
from models import NAMES, build_model
from robustness import still_correct
from speed import Fast, memory_format, tf32, update_ema
from variants import awp, fat, gairat, lbgat, mail, mart, pgd_at, sat, trades


def dynat_step(
    target, guide, optimizer, x, y, start, *,
    inner, epsilon, step_size, steps, beta, clean_forward=True, static_labels=False,
):  # fmt: skip
    """One update of DYNAT: min over both networks of CE(g(x), y) + beta * CE(f(x_adv), labels), Eq. (6).

    target          f, in train mode: images (B, 3, H, W) in [0, 1] to logits (B, C).
    guide           g, in train mode, the same.
    optimizer       holds the weights of both.
    x               clean images (B, 3, H, W) in [0, 1].
    y               ground truth (B,) int64.
    start           where the attack begins, of the shape of x.
    inner           False: x_adv maximises KL(f(x) || f(.)), as in LBGAT. True: CE(f(.), labels), Eq. (7).
    epsilon         radius of the attack; like `step_size` in units of pixels in [0, 1].
    steps           of the attack.
    beta            weight of the target's loss.
    clean_forward   whether BatchNorm of the target also sees the clean images, as in the release.
    static_labels   y in the place of the dynamic labels: the ablation of Eq. (3).

    Returns x_adv (B, 3, H, W) and a dict of metrics: scalars on the device, detached.
    Source: DYNAT, dynat.py. The release calls the guide in every PGD step. One call gives the same labels and weights,
    because in train mode the batch statistics are the same each time.
    """
    guide_logits = guide(x)  # (B, C)  train mode, once per update
    decisions = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else decisions

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
        "label_acc": (decisions == y).float().mean(),  # from weak to strong: the share of right dynamic labels
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


# A method: its "step"; where its attack begins, "gaussian" or "uniform"; "step_settings", keyword arguments of the step
# (beside epsilon, step_size and steps, which every step takes); "loop_arguments", those that the training loop computes
# (epoch, noise, all_reduce); "training", settings of the loop. "for_dataset", "for_target" and "for_preset" hold
# settings for one data set, target or preset. A schedule is [(first epoch, value)], epochs counted from 1.
DYNAT = {
    "step": dynat_step,
    "start": "gaussian",
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "clean_forward": True},
    "training": {
        "guide": "resnet18",
        "epochs": 100,
        "milestones": [(1, 0.2), (2, 1.0), (76, 0.1), (91, 0.01)],  # LBGAT's, with its warm-up epoch
    },
    "for_preset": {"release": {"guide": "resnet18-lbgat", "step_size": 0.007}},
}
METHODS = {
    "dynat": DYNAT,
    "dynat-inner": {**DYNAT, "step_settings": {**DYNAT["step_settings"], "inner": True}},
}
for variant in (awp, gairat, mail, pgd_at, trades, mart, fat, sat, lbgat):
    METHODS |= variant.METHODS

ATTACK = {"epsilon": 0.031, "step_size": 2 / 255, "steps": 10}  # the paper's
PAPER = {"target": "wrn34-10", "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4, **ATTACK}
TINY = {"target": "cnn", "guide": "cnn", "epochs": 10, "batch_size": 32}  # about a minute on two cores


def default_settings(method, dataset, preset, target=None, epochs=None, schedule_epochs=None):
    """What these flags decide where nothing else is typed: the paper's settings, then the method's own, those for this
    data set, target and preset, then those of `tiny`. The schedule is scaled to `schedule_epochs`, else to `epochs`."""
    choice = METHODS[method]
    settings = {**PAPER, **choice["step_settings"], **choice["training"]}
    tiny = {name: value for name, value in TINY.items() if dataset == "tiny" and name in settings}
    target = target or {**PAPER, **tiny}["target"]
    for kind, name in (("for_dataset", dataset), ("for_target", target), ("for_preset", preset)):
        settings.update(choice.get(kind, {}).get(name, {}))
    own_epochs = settings["epochs"]
    settings.update(tiny)
    settings["data_dir"] = "data" if dataset.startswith("cifar") else None
    settings["schedule_epochs"] = epochs or settings["epochs"]
    scale_schedule(settings, schedule_epochs or settings["schedule_epochs"], own_epochs)
    return settings


def scale_schedule(settings, epochs, own_epochs):
    """Moves the schedule of a method's own epochs to a run of `epochs`, in place: an epoch e > 1 becomes
    1 + (e - 1) * epochs / own_epochs, rounded, at least 2. So one epoch trains at the schedule's first rate."""
    moved = lambda epoch: max(2, round(1 + (epoch - 1) * epochs / own_epochs)) if epoch > 1 else epoch
    for name in ("milestones", "tau_milestones"):
        if name in settings:
            settings[name] = [(moved(first), value) for first, value in settings[name]]
    for name in ("awp_start", "easy_until", "hardest_from"):
        if name in settings:
            settings[name] = moved(settings[name])
    if "burn_in" in settings:
        settings["burn_in"] = moved(settings["burn_in"] + 1) - 1  # the epoch after it is the first with weights


def learning_rate(settings, epoch):
    """lr times the factor of the last milestone that `epoch` has reached."""
    return settings["lr"] * [factor for first, factor in settings["milestones"] if first <= epoch][-1]


def prepare_images(settings, device):
    """The run's images on the device by split: "train", "test", and "val" if some training images are held out."""
    images = {split: load_images(settings["dataset"], split, settings["data_dir"]) for split in ("train", "test")}
    check_classes(images["train"].classes, images["test"].classes, "the training set")
    total, held_out, wanted = len(images["train"].y), settings["val_images"], settings["train_images"]
    left = total - held_out
    if wanted and held_out and left < wanted:
        raise UserError(f"--train-images {wanted}: only {left} of {total} are left after --val-images {held_out}")
    if held_out:
        images["val"], images["train"] = hold_out(images["train"], held_out, settings["seed"])
    if wanted:
        images["train"] = class_balanced_subset(images["train"], wanted, settings["seed"])
    return {split: found.to(device) for split, found in images.items()}


def prepare_networks(settings, num_classes, device):
    """Target and, if the method has one, guide, each initialised from its own seed, so that the guide does not depend
    on the target. And one SGD over the weights of both."""
    networks = {}
    layout = memory_format(device, settings["precision"])
    for role in ("target", "guide"):
        if role in settings:
            torch.manual_seed(make_generator("cpu", settings["seed"], role).initial_seed())
            model = build_model(settings[role], num_classes).to(device, memory_format=layout)
            networks[role] = nn.SyncBatchNorm.convert_sync_batchnorm(model) if settings["sync_bn"] else model
    weights = [weight for model in networks.values() for weight in model.parameters()]
    sgd = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    return networks, torch.optim.SGD(weights, **sgd)


def train(settings, run_dir, device, checkpoint=None):
    """Trains as `settings` say, from `checkpoint` on if there is one, and saves into `run_dir` after every epoch. Gives
    the log, a dict per epoch. Raises UserError if a loss or weight is not finite; that epoch is not saved."""
    method, layout = METHODS[settings["method"]], memory_format(device, settings["precision"])
    images = distributed.first_rank_first(lambda: prepare_images(settings, device))
    classes, count, epochs = images["train"].classes, len(images["train"].y), settings["epochs"]
    distributed.check_batch_size(count, settings["batch_size"])
    networks, optimizer = prepare_networks(settings, len(classes), device)
    fast = {role: Fast(model, settings["precision"] == "bf16", settings["compile"]) for role, model in networks.items()}
    ema = copy.deepcopy(networks["target"]) if settings["ema"] else None
    models = networks if ema is None else {**networks, "ema": ema}
    gradients = distributed.GradientReducer(optimizer)
    identity = {"settings": settings, "classes": classes, "images": {s: found.sha256() for s, found in images.items()}}
    sizes = {split: len(found.y) for split, found in images.items()}
    config = {"settings": settings, "classes": classes, "images": sizes, "world_size": distributed.world_size()}
    config |= provenance(device)
    log = []
    if checkpoint is not None:
        check_same_images(checkpoint, identity)
        checkpoints.load_state(checkpoint, models, optimizer)
        log = checkpoint["log"]
        distributed.run_on_rank0(checkpoints.write_from_checkpoint, run_dir, checkpoint)
    else:
        distributed.run_on_rank0(checkpoints.write_config, run_dir, config)
    print_start(settings, images, run_dir, config)

    settings_of_step = {name: settings[name] for name in (*ATTACK, *method["step_settings"])}
    with Progress(total=epochs * count, done=len(log) * count) as progress:
        for epoch in range(len(log) + 1, epochs + 1):
            began, history = time.perf_counter(), []
            lr = optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch)
            batches = train_batches(images["train"], settings["batch_size"], settings["seed"], epoch, layout)
            with tf32(settings["precision"] == "tf32"):
                for x, y, generator in batches:
                    if method["start"] == "gaussian":
                        start = gaussian_start(x, generator)
                    else:
                        start = uniform_start(x, settings["epsilon"], generator)
                    shard = distributed.shard(len(y))  # of what was drawn for the batches of all ranks
                    gradients.weight = len(y[shard]) / len(y)
                    noise = partial(normal_noise, x, generator, shard)
                    from_loop = {"epoch": epoch, "noise": noise, "all_reduce": distributed.all_reduce}
                    from_loop = {name: from_loop[name] for name in method.get("loop_arguments", ())}
                    _, metrics = method["step"](
                        **fast, optimizer=optimizer, x=x[shard], y=y[shard], start=start[shard],
                        **settings_of_step, **from_loop,
                    )  # fmt: skip
                    distributed.average_buffers(networks)
                    if ema is not None:
                        first_update = epoch == 1 and not history
                        update_ema(ema, networks["target"], 0.0 if first_update else settings["ema"])
                    history.append(len(y[shard]) * torch.stack([*metrics.values()]))  # stays on the device
                    progress.advance(len(y), f"epoch {epoch}/{epochs}")

            (history,) = distributed.all_reduce(torch.stack(history))  # (updates, metrics), sums over images
            history = history.cpu().double()  # the first read from the device in this epoch
            check_finite(history[:, 0], networks, epoch)
            seconds = time.perf_counter() - began
            row = {"epoch": epoch, "lr": lr, **dict(zip(metrics, (history.sum(0) / count).tolist(), strict=True))}
            if epoch % settings["eval_every"] == 0 or epoch == epochs:
                row.update(measure(networks, images, settings))
            row.update(seconds=seconds, images_per_second=count / seconds)
            log.append(row)
            state = {name: part.state_dict() for name, part in {**models, "optimizer": optimizer}.items()}
            content = {**state, **identity, "epoch": epoch, "log": log, "config": config}
            distributed.run_on_rank0(checkpoints.save_run, run_dir, content)
            progress.write(report(row, epochs))
    return log


def normal_noise(x, generator, shard, k):
    """N(0, 1) of the shape of the batch x for its k-th PGD step, from the update's generator: this rank's part."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)[shard]


def check_finite(losses, networks, epoch):
    """Raises UserError if one of the epoch's losses (updates,), or a weight, is not finite."""
    bad = (~losses.isfinite()).nonzero().flatten()
    if len(bad):
        problem = f"the loss is not finite in update {int(bad[0]) + 1} of epoch {epoch}"
    elif not torch.stack([p.isfinite().all() for model in networks.values() for p in model.parameters()]).all():
        problem = f"a weight is not finite after epoch {epoch}"
    else:
        return
    raise UserError(f"{problem}: this epoch is not saved; try a smaller --lr, or --precision fp32")


def measure(networks, images, settings):
    """Accuracies in eval mode and float32: of each network on clean test images and on as many training images, not
    augmented; of the target on held-out images, clean and under PGD-10."""
    row = {}
    size = min(len(images["test"].y), len(images["train"].y))
    seen = class_balanced_subset(images["train"], size, settings["seed"])
    for role, prefix in (("target", ""), ("guide", "guide_")):
        if role in networks:
            row[f"{prefix}test_acc"] = accuracy(networks[role], images["test"], "clean", settings)
            row[f"{prefix}train_acc"] = accuracy(networks[role], seen, "clean", settings)
    if "val" in images:
        row["val_clean"] = accuracy(networks["target"], images["val"], "clean", settings)
        row["val_pgd"] = accuracy(networks["target"], images["val"], "pgd10", settings)
    return row


def accuracy(model, images, attack, settings):
    """The share of images that are classified as their label under `attack`. Each rank attacks its part of them."""
    indices = torch.arange(len(images.y))[distributed.shard(len(images.y))]
    attack_settings = {name: settings[name] for name in ("epsilon", "step_size", "seed")}
    correct = still_correct(model, images, indices, attack, **attack_settings, batch_size=256)
    (hits,) = distributed.all_reduce(correct.sum())
    return int(hits) / len(images.y)


def check_same_images(checkpoint, identity):
    """Raises UserError if the checkpoint's run had other classes or other images."""
    check_classes(checkpoint["classes"], identity["classes"], "the run")
    for split, sha256 in identity["images"].items():
        if checkpoint["images"].get(split) != sha256:
            raise UserError(f"the {split} images are not those of the run: to resume, bring back the same files")


def print_start(settings, images, run_dir, config):
    """Says where the run is, its images, device and settings, and warns of what is likely a mistake."""
    sizes = ", ".join(f"{n} {split}" for split, n in config["images"].items())
    print(f"{run_dir}: {sizes} images, {config['device']}")
    shown = {name: value for name, value in settings.items() if value is not None and not isinstance(value, list)}
    words = [f"{name}={value:.5g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()]
    print(textwrap.fill(", ".join(words), 100, break_on_hyphens=False))
    rates = {first: settings["lr"] * factor for first, factor in settings["milestones"] if first <= settings["epochs"]}
    print("lr " + ", ".join(f"{rate:.4g} from epoch {first}" for first, rate in rates.items()))
    for epoch in settings["lr_milestones"] or []:
        if epoch > settings["epochs"]:
            print(f"warning: --lr-milestones {epoch} lies beyond the last epoch, {settings['epochs']}")
    class_sizes = images["train"].y.bincount(minlength=len(config["classes"])).tolist()
    if min(class_sizes) < 10:
        smallest = config["classes"][class_sizes.index(min(class_sizes))]
        print(f"warning: class '{smallest}' has only {min(class_sizes)} training images")


def report(row, epochs):
    """An epoch's metrics as one line of less than 100 columns."""
    line = f"epoch {row['epoch']:3}/{epochs}  lr {row['lr']:<6.4g}  loss {row['loss']:7.4f}"
    for name in ("label_acc" if "label_acc" in row else "adv_acc", "test_acc", "guide_test_acc"):
        if name in row:
            line += f"  {name} {row[name]:6.2%}"
    return line + f"  {row['seconds']:.1f} s"


def network_name(text):
    """An argparse type: the name of a network that exists."""
    try:
        with torch.device("meta"):
            build_model(text, 10)
    except ValueError as error:
        raise UserError(str(error)) from None
    return text


def make_parser(defaults=None):
    """The parser of all flags. `defaults` are settings of a method; a flag that is not among them is hidden. Without
    them there is no --help: the parser only tells what is typed, which decides the defaults."""
    p = Parser(prog="train_dynat.py", description=__doc__, add_help=defaults is not None)
    whole, count = in_range(int, 0), in_range(int, 1)
    number, fraction = in_range(parse_fraction, 0), in_range(parse_fraction, 0, 1)
    add = p.add_argument_group("what is trained, and where").add_argument
    add("--method", choices=METHODS, metavar="M", default="dynat", help=", ".join(METHODS))
    add("--dataset", choices=DATASETS, default="cifar10", help="tiny is made up, no download")
    add("--target", type=network_name, metavar="NAME", help=NAMES)
    add("--preset", choices=("paper", "release"), default="paper", help="whose settings, where the two differ")
    add("--epochs", type=count, metavar="N", help="the schedule scales with it, unless typed")
    add("--out", type=Path, metavar="DIR", help="default: runs/<method>-<dataset>-<target>-s<seed>-<what differs>")
    add("--resume", action="store_true", help="continue --out, or start it; only --epochs and --data-dir may differ")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add = p.add_argument_group("data").add_argument
    absolute = lambda folder: str(Path(folder).resolve())
    add("--data-dir", type=absolute, metavar="D", help="where CIFAR is or goes, or a folder with train/ and test/")
    add("--train-images", type=in_range(int, 2), metavar="N", help="train on a class-balanced subset")
    add("--val-images", type=whole, metavar="N", default=0, help="hold out N images, keep best.pt by PGD-10 on them")
    methods_own = p.add_argument_group("method")
    add = methods_own.add_argument
    add("--guide", type=network_name, metavar="NAME", help="a network, as --target")
    add("--static-labels", action="store_true", help="the ground truth in the place of the dynamic labels")
    add("--beta", type=number, help="weight of the target's loss, Eq. (6)")
    add("--kl-weight", type=number, metavar="W", help="weight of the KL term")
    add("--awp-gamma", type=number, metavar="G", help="size of the weight perturbation, relative to the weights")
    add("--awp-start", type=count, metavar="EPOCH", help="the first with perturbed weights")
    add("--burn-in", type=whole, metavar="N", help="epochs before instances are weighted")
    add("--label-smoothing", type=fraction, metavar="A", help="of the target's labels")
    add("--no-clean-forward", dest="clean_forward", action="store_false", help="keep clean images out of BatchNorm")
    add = p.add_argument_group("attack").add_argument
    add("--epsilon", type=fraction, help="radius in units of pixels in [0, 1], as 8/255")
    add("--step-size", type=fraction, help="of PGD, in the same units")
    add("--steps", type=in_range(int, 1, 1000), help="of PGD")
    add = p.add_argument_group("optimisation").add_argument
    add("--batch-size", type=count, help="of all processes together")
    add("--lr", type=number, help="learning rate before the schedule's factors")
    add("--schedule-epochs", type=count, metavar="N", help="scale the schedule to N epochs, not to --epochs")
    add("--lr-milestones", type=count, nargs="+", metavar="EPOCH", help="divide lr by 10 at each: the whole schedule")
    add("--momentum", type=fraction, help="of SGD")
    add("--weight-decay", type=number, help="of all weights")
    add("--ema", type=fraction, metavar="DECAY", default=0.0, help="keep a moving average of the target; 0: none")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=whole, default=1, help="of networks, order, crops, flips and starts")
    add("--deterministic", action=BooleanOptionalAction, default=True,
        help="same seed, same device, same bytes (the default); --no-deterministic may be faster on a GPU")  # fmt: skip
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of the networks, in training alone")
    add("--compile", action="store_true", help="torch.compile, and on a GPU CUDA graphs: slow to start, fast then")
    add("--sync-bn", action="store_true", help="under torchrun on GPUs: BatchNorm over the images of all processes")
    add("--eval-every", type=count, metavar="N", default=1, help="measure after each N epochs and the last")
    add("--keep-from", type=count, metavar="N", help="keep the networks of each epoch from N on")
    if defaults is not None:
        p.set_defaults(**defaults)
        for action in methods_own._group_actions:
            if action.dest not in defaults:
                action.default = action.help = SUPPRESS
    return p


def parse(argv, settings=None):
    """(every setting of the run, all that `argv` says, the parser that knows the defaults). The defaults are those of
    the method, or the `settings` of a run that is continued. Raises UserError for a flag that the method cannot use."""
    typed, _ = make_parser().parse_known_args(argv)
    if settings is None:
        deciding = (typed.method, typed.dataset, typed.preset, typed.target, typed.epochs, typed.schedule_epochs)
        settings = default_settings(*deciding)
    parser = make_parser(settings)
    settings = vars(parser.parse_args(argv))
    for name in settings:
        if parser.get_default(name) == SUPPRESS:
            flag = "no-clean-forward" if name == "clean_forward" else name.replace("_", "-")
            raise UserError(f"--method {settings['method']} does not use --{flag}: leave it out")
    for name in ("out", "resume", "device"):  # where it is trained, not what
        del settings[name]
    if settings["lr_milestones"] is not None:
        drops = enumerate(sorted(settings["lr_milestones"]), start=1)
        settings["milestones"] = [(1, 1.0)] + [(epoch, 10.0**-drop) for drop, epoch in drops]
    return settings, typed, parser


def as_flags(settings, show=str):
    """The words that give these settings on the command line. Some follow from others and have no flag."""
    words = []
    for action in make_parser()._actions:
        flag, value = action.option_strings[-1], settings.get(action.dest)
        if isinstance(value, bool):
            words += [flag] if value != action.default else []
        elif value is not None:
            words += [flag, *map(show, value)] if isinstance(value, list) else [f"{flag}={show(value)}"]
    return words


def default_run_dir(settings, parser):
    """runs/ and a name of what differs from the method's defaults."""
    left_out = ("method", "dataset", "target", "seed")  # they stand first
    left_out += ("data_dir", "eval_every", "keep_from", "deterministic")  # no weights depend on them
    differing = {name: value for name, value in settings.items() if value != parser.get_default(name)}
    differing = {name: value for name, value in differing.items() if name not in left_out}
    words = as_flags(differing, lambda value: value if isinstance(value, str) else f"{value:g}")
    first = [settings["method"], settings["dataset"], settings["target"], f"s{settings['seed']}"]
    return Path("runs") / "-".join([*first, *(word.lstrip("-").replace("=", "-") for word in words)])


def resumed_settings(checkpoint, argv, run_dir):
    """The settings of the run in `run_dir`, continued by the flags `argv`. Another --epochs leaves the schedule as it
    is. Raises UserError for any other flag that differs, for epochs that are past, and for settings that the command
    line of this version cannot give."""
    before, path = checkpoint["settings"], run_dir / "last.pt"
    try:
        found, _, _ = parse(as_flags(before))
    except UserError as error:
        raise UserError(f"{path} holds a setting that cannot be: {error}") from None
    if wrong := before.keys() ^ found.keys() | {name for name in found if before.get(name) != found[name]}:
        raise UserError(f"{path} has no {', '.join(sorted(map(str, wrong)))} that this version of the program can use")
    settings, _, _ = parse(argv, before)
    for name, value in settings.items():
        if name not in ("epochs", "data_dir") and value != before[name]:
            word = name.replace("_", " ")
            raise UserError(f"the {word} of the run in {run_dir} was {before[name]}, is {value}: leave that flag out")
    if settings["epochs"] < checkpoint["epoch"]:
        raise UserError(f"the run in {run_dir} has {checkpoint['epoch']} epochs already: give more --epochs")
    return settings


def check_device(settings, device):
    """Raises UserError for a flag that this device, or another flag, does not go with."""
    if device.type != "cuda":
        if settings["sync_bn"]:
            raise UserError("--sync-bn needs an NVIDIA GPU: leave it out")
        if settings["precision"] == "tf32":
            raise UserError("--precision tf32 needs an NVIDIA GPU: leave it out")
    if settings["sync_bn"] and settings["compile"]:
        raise UserError("--sync-bn synchronises the GPU in every forward, which --compile cannot capture: choose one")


@exit_status
def main(argv):
    typed, _ = make_parser().parse_known_args(argv)
    run_dir, settings = typed.out, None
    if not typed.resume or not run_dir:  # else the defaults may be those of a run, which is read under its lock
        settings, _, parser = parse(argv)
        run_dir = run_dir or default_run_dir(settings, parser)
        shorter = default_run_dir({**settings, "epochs": parser.get_default("epochs")}, parser)
        if typed.resume and not run_dir.exists() and shorter.exists():
            run_dir = shorter  # a run of the default number of epochs, which is to have more
    with ExitStack() as stack:
        device = stack.enter_context(distributed.process_group(typed.device))
        claim = checkpoints.claim_run_dir(run_dir, typed.resume)
        checkpoint = distributed.run_on_rank0(stack.enter_context, claim)
        if checkpoint is not None:
            settings = resumed_settings(checkpoint, argv, run_dir)
        elif settings is None:
            settings, _, _ = parse(argv)
        check_device(settings, device)
        if typed.device is None and device.type == "cpu":
            print("no GPU found: training on the CPU")
        if typed.resume and checkpoint is None:
            print(f"note: no run in {run_dir} yet: starting it")
        stack.enter_context(numerics(deterministic=settings["deterministic"], benchmark=not settings["deterministic"]))
        try:
            train(settings, run_dir, device, checkpoint)
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            raise type(stop)(checkpoints.what_is_saved(run_dir)) from None
        networks = ["--network", "target,guide"] if "guide" in settings else []
        picture = ["weak-to-strong" if "guide" in settings else "clean", str(run_dir), "--out", "picture.svg"]
        print(f"\nThe target's weights are in {run_dir / 'weights.pt'}. Draw the run, attack its networks:")
        print(shlex.join(["python", "figures.py", *picture]))
        print(shlex.join(["python", "evaluate.py", str(run_dir / "last.pt"), *networks]))


if __name__ == "__main__":
    sys.exit(main())
