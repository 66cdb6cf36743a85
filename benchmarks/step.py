"""How long an update takes, where the time goes, and its memory, beside an update of the method's release.

    python benchmarks/step.py --target resnet18 --method dynat-inner --json step.json
    for n in 1 5 10 20; do python benchmarks/step.py --target wrn10-2 --guide cnn --steps $n; done

Takes the flags of train_dynat.py that change an update. Ours is `train()` itself; after each of its epochs the release
(release.py) makes one, in float32 and NCHW. Weights are perturbed and instances weighted from the first epoch on.
"""

import copy
import gc
import io
import json
import os
import shlex
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from statistics import median
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints lines of its own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

import models
import train_dynat
from benchmarks import release
from cli import Parser, UserError, exit_status, in_range, numerics, pick_device, provenance, write_text
from data import class_balanced_subset, load_images, to_float
from speed import tf32


def train(settings, images, steps):
    """The log of train_dynat.train() on `images`, with another step in each epoch. It measures and saves nothing."""
    method, rest = train_dynat.METHODS[settings["method"]], iter(steps)

    def measure(*_):
        method["step"] = next(rest, None)
        return {}

    with (
        tempfile.TemporaryDirectory() as run_dir,
        redirect_stdout(io.StringIO()),
        mock.patch.dict(method, step=next(rest)),
        mock.patch.object(train_dynat, "prepare_images", lambda *_: {"train": images}),
        mock.patch.object(train_dynat, "measure", measure),
        mock.patch.object(train_dynat.checkpoints, "save_run"),
    ):
        return train_dynat.train({**settings, "epochs": len(steps), "eval_every": 1}, Path(run_dir), images.x.device)


def release_step(settings, images):
    """The release's update of networks and an optimizer of its own, with the arguments of the project's step."""
    networks, optimizer = train_dynat.prepare_networks(settings, len(images.classes), images.x.device)
    for model in networks.values():
        model.to(memory_format=torch.contiguous_format)
    if "awp" in settings["method"]:
        networks["proxy"] = copy.deepcopy(networks["target"])
    names = {*train_dynat.ATTACK, *train_dynat.METHODS[settings["method"]]["step_settings"]}
    chosen = {name: settings[name] for name in names - {"static_labels", "awp_start"}}
    # The releases' ResNets activate into new memory, their WRN in place.
    relu = F.relu if settings["target"].startswith("resnet") else models.relu

    def step(x, y, start, **_):
        batch = {"x": x.contiguous(), "y": y, "start": start.contiguous()}
        with tf32(False), mock.patch.object(models, "relu", relu):
            release.RELEASES[settings["method"]](**networks, optimizer=optimizer, **batch, **chosen)
        return None, {"loss": torch.zeros((), device=x.device)}

    return step


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
    device, updates = images.x.device, len(images.y) / settings["batch_size"]
    batch = images.select(slice(settings["batch_size"]))
    x, steps = to_float(batch.x), [train_dynat.METHODS[settings["method"]]["step"]]
    # Two updates from nothing: in the second one the momentum is there.
    two_updates = {"ours": lambda: train(settings, batch, steps[:1] * 2)}
    if settings["method"] in release.RELEASES and not settings.get("static_labels"):
        steps.append(release_step(settings, images))
        two_updates["release"] = lambda: [step(x, batch.y, x) for step in [release_step(settings, images)] * 2]
    log = train(settings, images, steps * (repeats + 1))[len(steps) :]
    found = {}
    for i, (side, run) in enumerate(two_updates.items()):
        seconds = [row["seconds"] / updates for row in log[i :: len(steps)]]
        peak = peak_bytes(run, device)
        found[side] = {"seconds_per_update": median(seconds), "seconds_per_update_all": seconds, "peak_bytes": peak}
        print(f"{side:8} {median(seconds):.4f} s/update  peak {peak / 2**20:.0f} MiB")
    if "release" in found:
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(log[::2], log[1::2], strict=True)]
        found |= {"speedup": median(ratios), "speedup_all": ratios}
        print(f"speed-up {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return found


def parts(settings, images):
    """Our seconds per update: all PGD steps, the guide's forward, the rest of the step, and the rest of the loop, which
    is above all the batches. A GPU is waited for after each, so their sum may exceed an update's time."""
    step = train_dynat.METHODS[settings["method"]]["step"]
    attacks = {name: step.__globals__[name] for name in ("linf_pgd", "counting_pgd") if name in step.__globals__}

    class Part(record_function):
        def __exit__(self, *error):
            torch.get_device_module(images.x.device).synchronize()
            super().__exit__(*error)

    def recorded_step(**arguments):
        if "guide" in arguments:
            arguments["guide"] = Part("guide")(arguments["guide"])
        recorded = {name: Part("attack")(attack) for name, attack in attacks.items()}
        with mock.patch.dict(step.__globals__, recorded), Part("step"):
            return step(**arguments)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _, row = train(settings, images, [step, recorded_step])  # the first epoch warms up
    seconds = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    attack, guide, whole = (seconds.get(name, 0.0) for name in ("attack", "guide", "step"))
    found = {"attack": attack, "guide": guide, "update": whole - attack - guide, "data": row["seconds"] - whole}
    found = {name: total * settings["batch_size"] / len(images.y) for name, total in found.items()}
    print("  ".join(f"{name} {seconds:.4f} s" for name, seconds in found.items()))
    return found


@exit_status
def main(argv):
    p = Parser(prog="benchmarks/step.py", description=__doc__)
    p.add_argument("--updates", type=in_range(int, 1), default=5, metavar="N", help="timed together")
    p.add_argument("--repeats", type=in_range(int, 1), default=5, metavar="N", help="of ours and the release, in turn")
    p.add_argument("--json", type=Path, metavar="FILE", help="keep the figures there, with command, commit and device")
    args, rest = p.parse_known_args(argv)
    settings, first, _ = train_dynat.parse(rest)
    if first.out or first.resume:
        raise UserError("a benchmark keeps no run: leave out --out and --resume")
    device = pick_device(first.device)
    train_dynat.check_device(settings, device)
    settings |= {name: epoch for name, epoch in {"awp_start": 1, "burn_in": 0}.items() if name in settings}
    images = class_balanced_subset(load_images("tiny", "train"), args.updates * settings["batch_size"], 1).to(device)
    found = {"command": shlex.join(["python", "benchmarks/step.py", *argv]), **provenance(device)}
    print(f"{found['device']}, torch {found['torch']}, commit {found['commit']}")
    with numerics(deterministic=settings["deterministic"], benchmark=not settings["deterministic"]):
        found |= compare(settings, images, args.repeats)
        found["parts"] = parts(settings, images)
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
