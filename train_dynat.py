"""DYNAT, Dynamic Label Adversarial Training. A guide is trained on clean images with the ground truth. A target is
trained from scratch at the same time: its images are adversarial, their labels are what the guide predicts.

    python train_dynat.py --dataset tiny                              a minute on a CPU, nothing to download
    python train_dynat.py --dataset cifar10 --target wrn34-10         the paper's main row
    python train_dynat.py --method dynat-inner ...                    Eq. (7), the dynamic inner maximisation
    python train_dynat.py --method trades --help                      another row of its tables, with its own defaults

One update is `dynat_step` below; the other methods' updates are in variants/, all settings in settings.py. Then come
the registry of methods, the training loop and the command line.
"""

# Of this project it imports `attacks`, `checkpoints`, `cli`, `data`, `distributed`, `losses`, `models`, `robustness`,
# `settings`, `speed` and `variants`.

import copy
import shlex
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import distributed
from attacks import eval_mode, gaussian_start, linf_pgd, uniform_start
from cli import Progress, UserError, exit_status, numerics, provenance
from data import check_classes, class_balanced_subset, hold_out, load_images, seed_of, train_batches
from losses import dynamic_labels, guide_loss, kl_divergence, target_loss
from models import build_model
from robustness import correct_under_attack
from settings import ATTACK, learning_rate, parse, resolve, resumed_settings, run_name, skipped_rates
from speed import FastNetwork, memory_format, tf32, update_ema
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
    guide_labels = dynamic_labels(guide_logits)  # (B,)    Eq. (3), no gradient
    labels = y if static_labels else guide_labels

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
        "label_acc": (guide_labels == y).float().mean(),  # from weak to strong: the share of right dynamic labels
        "adv_acc": (adv_logits.argmax(1) == y).float().mean(),
    }


# A method is a dict such as this one. "for_dataset", "for_target" and "for_preset" may hold settings for one data set,
# target or preset. A schedule is [(first epoch, value)], epochs counted from 1.
DYNAT = {
    "step": dynat_step,
    "start": "gaussian",  # where the attack begins; or "uniform"
    "needs": (),  # what the training loop gives the step: some of "epoch", "noise", "all_reduce"; may be left out
    # Keyword arguments of the step, beside epsilon, step_size and steps, which every step takes:
    "step_settings": {"inner": False, "static_labels": False, "beta": 1.0, "clean_forward": True},
    "training": {  # settings of the loop
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
            torch.manual_seed(seed_of(settings["seed"], role))
            model = build_model(settings[role], num_classes).to(device, memory_format=layout)
            networks[role] = nn.SyncBatchNorm.convert_sync_batchnorm(model) if settings["sync_bn"] else model
    weights = [weight for model in networks.values() for weight in model.parameters()]
    sgd = {name: settings[name] for name in ("lr", "momentum", "weight_decay")}
    return networks, torch.optim.SGD(weights, **sgd)


def train_epoch(epoch, settings, images, networks, fast, ema, optimizer, gradients, progress):
    """One epoch of updates. Returns the names of the step's metrics and, per update, their sums over its images:
    (updates, metrics) float64 on the CPU. `images` are the training images, `fast` the networks as the step calls them.
    """
    method = METHODS[settings["method"]]
    settings_of_step = {name: settings[name] for name in (*ATTACK, *method["step_settings"])}
    layout = memory_format(images.x.device, settings["precision"])
    gaussian = method["start"] == "gaussian"
    sums = []  # stay on the device
    for x, y, generator in train_batches(images, settings["batch_size"], settings["seed"], epoch, layout):
        start = gaussian_start(x, generator) if gaussian else uniform_start(x, settings["epsilon"], generator)
        shard = distributed.shard(len(y))  # of what was drawn for the batches of all ranks
        gradients.weight = len(y[shard]) / len(y)
        noise = partial(normal_noise, x, generator, shard)
        offered = {"epoch": epoch, "noise": noise, "all_reduce": distributed.all_reduce}
        needed = {name: offered[name] for name in method.get("needs", ())}
        _, metrics = method["step"](
            **fast, optimizer=optimizer, x=x[shard], y=y[shard], start=start[shard], **settings_of_step, **needed
        )
        distributed.average_buffers(networks)
        if ema is not None:
            first_update = epoch == 1 and not sums
            update_ema(ema, networks["target"], 0.0 if first_update else settings["ema"])
        sums.append(len(y[shard]) * torch.stack([*metrics.values()]))
        progress.advance(len(y), f"epoch {epoch}/{settings['epochs']}")
    (sums,) = distributed.all_reduce(torch.stack(sums))
    return list(metrics), sums.cpu().double()  # the first read from the device in this epoch


def train(settings, run_dir, device, checkpoint=None):
    """Trains as `settings` say, from `checkpoint` on if there is one, and saves into `run_dir` after every epoch. Gives
    the log, a dict per epoch. Raises UserError if a loss or weight is not finite; that epoch is not saved."""
    images = distributed.first_rank_first(lambda: prepare_images(settings, device))
    classes, count, epochs = images["train"].classes, len(images["train"].y), settings["epochs"]
    distributed.check_batch_size(count, settings["batch_size"])
    networks, optimizer = prepare_networks(settings, len(classes), device)
    gradients = distributed.GradientReducer(optimizer)
    bf16 = settings["precision"] == "bf16"
    fast = {role: FastNetwork(model, bf16, settings["compile"]) for role, model in networks.items()}
    ema = copy.deepcopy(networks["target"]) if settings["ema"] else None
    models = {**networks, "ema": ema} if settings["ema"] else networks
    checksums = {split: found.sha256() for split, found in images.items()}
    facts = {  # of the run: config.json
        "settings": settings,
        "classes": classes,
        "images": {split: len(found.y) for split, found in images.items()},
        "world_size": distributed.world_size(),
        **provenance(device),
    }
    if checkpoint is None:
        log = []
        distributed.run_on_rank0(checkpoints.write_config, run_dir, facts)
    else:
        check_same_images(checkpoint, classes, checksums)
        checkpoints.load_state(checkpoint, models, optimizer)
        log = checkpoint["log"]
        distributed.run_on_rank0(checkpoints.write_from_checkpoint, run_dir, checkpoint)
    print_start(facts, images["train"].y, run_dir)

    with Progress(total=epochs * count, done=len(log) * count) as progress:
        for epoch in range(len(log) + 1, epochs + 1):
            began = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch)
            with tf32(settings["precision"] == "tf32"):
                names, sums = train_epoch(
                    epoch, settings, images["train"], networks, fast, ema, optimizer, gradients, progress
                )
            check_finite(sums[:, names.index("loss")], networks, epoch)
            seconds = time.perf_counter() - began
            means = (sums.sum(0) / count).tolist()
            row = {"epoch": epoch, "lr": lr, **dict(zip(names, means, strict=True))}
            if epoch % settings["eval_every"] == 0 or epoch == epochs:
                row.update(measure(networks, images, settings))
            row.update(seconds=seconds, images_per_second=count / seconds)
            log.append(row)
            content = {name: part.state_dict() for name, part in models.items()}
            content.update(optimizer=optimizer.state_dict(), epoch=epoch, log=log, config=facts)
            content.update(settings=settings, classes=classes, images=checksums)
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
    correct = correct_under_attack(model, images, indices, attack, **attack_settings, batch_size=256)
    (hits,) = distributed.all_reduce(correct.sum())
    return int(hits) / len(images.y)


def check_same_images(checkpoint, classes, checksums):
    """Raises UserError if the checkpoint's run had other classes or other images: `checksums` are by split."""
    check_classes(checkpoint["classes"], classes, "the run")
    for split, sha256 in checksums.items():
        if checkpoint["images"].get(split) != sha256:
            raise UserError(f"the {split} images are not those of the run: to resume, bring back the same files")


def print_start(facts, train_labels, run_dir):
    """Says where the run is, its images, device and settings, and warns of what is likely a mistake."""
    settings = facts["settings"]
    sizes = ", ".join(f"{n} {split}" for split, n in facts["images"].items())
    print(f"{run_dir}: {sizes} images, {facts['device']}")
    shown = {name: value for name, value in settings.items() if value is not None and not isinstance(value, list)}
    words = [f"{name}={value:.5g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()]
    print(textwrap.fill(", ".join(words), 100, break_on_hyphens=False))
    # Of several factors that a short schedule gives one epoch, the last counts.
    rates = {first: settings["lr"] * factor for first, factor in settings["milestones"] if first <= settings["epochs"]}
    print("lr " + ", ".join(f"{rate:.4g} from epoch {first}" for first, rate in rates.items()))
    if settings["lr_milestones"] is None and (skipped := skipped_rates(settings, METHODS)):
        words = ", ".join(f"{rate:.4g}" for rate in skipped)
        print(f"warning: in so few epochs none trains at lr {words} of the method's schedule")
    for epoch in settings["lr_milestones"] or ():
        if epoch > settings["epochs"]:
            print(f"warning: --lr-milestones {epoch} lies beyond the last epoch, {settings['epochs']}")
    class_sizes = train_labels.bincount(minlength=len(facts["classes"])).tolist()
    smallest = min(class_sizes)
    if smallest < 10:
        name = facts["classes"][class_sizes.index(smallest)]
        print(f"warning: class '{name}' has only {smallest} training images")


def report(row, epochs):
    """An epoch's metrics as one line of less than 100 columns."""
    line = f"epoch {row['epoch']:3}/{epochs}  lr {row['lr']:<6.4g}  loss {row['loss']:7.4f}"
    for name in ("label_acc" if "label_acc" in row else "adv_acc", "test_acc", "guide_test_acc"):
        if name in row:  # accuracies are not measured in every epoch
            line += f"  {name} {row[name]:6.2%}"
    return line + f"  {row['seconds']:.1f} s"


def check_device(settings, device):
    """Raises UserError for a flag that this device, or another flag, does not go with."""
    on_gpus = {"--sync-bn": settings["sync_bn"], "--precision tf32": settings["precision"] == "tf32"}
    for flag, given in on_gpus.items():
        if given and device.type != "cuda":
            raise UserError(f"{flag} needs an NVIDIA GPU: leave it out")
    if settings["sync_bn"] and settings["compile"]:
        raise UserError("--sync-bn synchronises the GPU in every forward, which --compile cannot capture: choose one")


def print_end(settings, run_dir):
    """Says what to do with the run now."""
    picture, networks = "clean", []
    if "guide" in settings:
        picture, networks = "weak-to-strong", ["--network", "target,guide"]
    print(f"\nThe target's weights are in {run_dir / 'weights.pt'}. Draw the run, attack its networks:")
    print(shlex.join(["python", "figures.py", picture, str(run_dir), "--out", "picture.svg"]))
    print(shlex.join(["python", "evaluate.py", str(run_dir / "last.pt"), *networks]))


@exit_status
def main(argv):
    typed, where, flags = parse(argv, METHODS, __doc__)
    run_dir = where["out"] or Path("runs", run_name(typed, METHODS, flags))
    claim = checkpoints.claim_run_dir(run_dir, where["resume"])
    with distributed.process_group(where["device"]) as device, distributed.on_rank0(claim) as checkpoint:
        if checkpoint is None:
            settings = resolve(typed, METHODS, flags)
        else:
            settings = resumed_settings(typed, checkpoint, run_dir, METHODS, flags)
        check_device(settings, device)
        if where["device"] is None and device.type == "cpu":
            print("no NVIDIA GPU found: training on the CPU")
        if where["resume"] and checkpoint is None:
            print(f"note: no run in {run_dir} yet: starting it")
        with numerics(deterministic=settings["deterministic"], benchmark=not settings["deterministic"]):
            try:
                train(settings, run_dir, device, checkpoint)
            except (KeyboardInterrupt, BrokenPipeError) as stop:
                raise type(stop)(checkpoints.what_is_saved(run_dir)) from None
        print_end(settings, run_dir)


if __name__ == "__main__":
    sys.exit(main())
