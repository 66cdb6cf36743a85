"""How long an update takes and how much memory, beside an update of the method's release.

    python benchmarks/step.py --target resnet18 --method dynat-inner --json step.json
    for n in 1 5 10 20; do python benchmarks/step.py --target wrn10-2 --guide cnn --steps $n; done

Takes the flags of train_dynat.py that change an update. It times the method's step alone, on batches that are drawn
before; the release (release.py) gets the same batches, in float32 and NCHW. Weights are perturbed and instances
weighted from the first update on.
"""

import copy
import gc
import json
import os
import shlex
import sys
import time
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints lines of its own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import models
import train_dynat
from attacks import gaussian_start, uniform_start
from benchmarks import release
from cli import Parser, UserError, exit_status, in_range, numerics, pick_device, provenance, write_text
from data import class_balanced_subset, load_images, train_batches
from distributed import all_reduce
from settings import ATTACK, parse, resolve
from speed import FastNetwork, memory_format, tf32


def draw_batches(settings, images):
    """The batches of the first epoch as the training loop draws them: (x, y, where the attack begins)."""
    layout = memory_format(images.x.device, settings["precision"])
    gaussian = train_dynat.METHODS[settings["method"]]["start"] == "gaussian"
    batches = []
    for x, y, generator in train_batches(images, settings["batch_size"], settings["seed"], 1, layout):
        start = gaussian_start(x, generator) if gaussian else uniform_start(x, settings["epsilon"], generator)
        batches.append((x, y, start))
    return batches


def step_settings(settings):
    """The settings that a method's step takes."""
    names = [*ATTACK, *train_dynat.METHODS[settings["method"]]["step_settings"]]
    return {name: settings[name] for name in names}


def our_update(settings, networks, optimizer):
    """This project's update of `networks`, a function of x, y and start."""
    method = train_dynat.METHODS[settings["method"]]
    bf16 = settings["precision"] == "bf16"
    fast = {role: FastNetwork(model, bf16, settings["compile"]) for role, model in networks.items()}

    def update(x, y, start):
        offered = {"epoch": 1, "all_reduce": all_reduce, "noise": lambda k: torch.randn_like(x)}
        needed = {name: offered[name] for name in method.get("needs", ())}
        with tf32(settings["precision"] == "tf32"):
            method["step"](**fast, optimizer=optimizer, x=x, y=y, start=start, **step_settings(settings), **needed)

    return update


def release_update(settings, networks, optimizer):
    """The release's update of `networks`, a function of x, y and start."""
    for model in networks.values():
        model.to(memory_format=torch.contiguous_format)
    if "awp" in settings["method"]:
        networks = {**networks, "proxy": copy.deepcopy(networks["target"])}
    unused = ("static_labels", "awp_start")
    arguments = {name: value for name, value in step_settings(settings).items() if name not in unused}
    # The releases' ResNets activate into new memory, their WRN in place.
    relu = F.relu if settings["target"].startswith("resnet") else models.relu

    def update(x, y, start):
        batch = {"x": x.contiguous(), "y": y, "start": start.contiguous()}
        with tf32(False), mock.patch.object(models, "relu", relu):
            release.RELEASES[settings["method"]](**networks, optimizer=optimizer, **batch, **arguments)

    return update


def run_all(update, batches):
    """Makes an update with each batch. Returns the seconds per update."""
    began = time.perf_counter()
    for batch in batches:
        update(*batch)
    torch.get_device_module(batches[0][0].device).synchronize()
    return (time.perf_counter() - began) / len(batches)


def peak_bytes(run, device):
    """The most bytes of tensors at once during run(), on top of those before it."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def compare(settings, images, repeats):
    """The figures of ours and, if it is written down, of the release. They are timed in turn, after a warm-up."""
    device = images.x.device
    sides = {"ours": our_update}
    if settings["method"] in release.RELEASES and not settings.get("static_labels"):
        sides["release"] = release_update
    prepare = partial(train_dynat.prepare_networks, settings, len(images.classes), device)
    batches = draw_batches(settings, images)
    updates = {side: make(settings, *prepare()) for side, make in sides.items()}
    seconds = {side: [] for side in sides}
    for _ in range(repeats + 1):
        for side, update in updates.items():
            seconds[side].append(run_all(update, batches))
    found = {}
    for side, make in sides.items():
        # Two updates from nothing: in the second one the momentum is there.
        peak = peak_bytes(lambda make=make: run_all(make(settings, *prepare()), batches[:1] * 2), device)
        del seconds[side][0]  # the warm-up
        middle = median(seconds[side])
        found[side] = {"seconds_per_update": middle, "seconds_per_update_all": seconds[side], "peak_bytes": peak}
        print(f"{side:8} {middle:.4f} s/update  peak {peak / 2**20:.0f} MiB")
    if "release" in sides:
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["release"], strict=True)]
        found.update(speedup=median(ratios), speedup_all=ratios)
        print(f"speed-up {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return found


@exit_status
def main(argv):
    p = Parser(prog="benchmarks/step.py", description=__doc__)
    p.add_argument("--updates", type=in_range(int, 1), default=5, metavar="N", help="timed together")
    p.add_argument("--repeats", type=in_range(int, 1), default=5, metavar="N", help="of ours and the release, in turn")
    p.add_argument("--json", type=Path, metavar="FILE", help="keep the figures there, with command, commit and device")
    args, rest = p.parse_known_args(argv)
    typed, where, flags = parse(rest, train_dynat.METHODS)
    if where["out"] or where["resume"]:
        raise UserError("a benchmark keeps no run: leave out --out and --resume")
    settings = resolve(typed, train_dynat.METHODS, flags)
    device = pick_device(where["device"])
    train_dynat.check_device(settings, device)
    settings |= {name: first for name, first in (("awp_start", 1), ("burn_in", 0)) if name in settings}
    images = class_balanced_subset(load_images("tiny", "train"), args.updates * settings["batch_size"], 1).to(device)
    found = {"command": shlex.join(["python", "benchmarks/step.py", *argv]), **provenance(device)}
    print(f"{found['device']}, torch {found['torch']}, commit {found['commit']}")
    with numerics(deterministic=settings["deterministic"], benchmark=not settings["deterministic"]):
        found |= compare(settings, images, args.repeats)
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
