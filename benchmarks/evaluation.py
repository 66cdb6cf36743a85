"""Seconds per 1,000 images under attack, evaluate.py's against the plain call, on one checkpoint in one run.

    python benchmarks/evaluation.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks pgd20,cw,apgd --images 1000

plain     each batch as a whole for all its steps, fooled images masked but computed, NCHW, as the authors' release;
          AutoAttack (apgd, aa-fast, aa) as its package runs on the whole set
evaluate  images still classified correctly alone, in a batch that is refilled, channels_last

Both in float32, in turn, each `--repeats` times after one batch to warm up; medians count. pgdK and cw start both at
the same points and have to judge the images alike, up to one in a thousand, where float32 rounds differently in another
batch or layout. AutoAttack draws its starts per batch, so there the two accuracies are near, not equal.
"""

import copy
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are in the folder above

import evaluate
from cli import Parser, UserError, bounded, command, full_float32, pick_device, provenance, write_text
from data import DATASETS

BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255}


def plain(model, images, name, batch_size, seed):
    """Which images stand against the plain call: (N,) bool. `model` and its images in NCHW."""
    if name in evaluate.AUTO_ATTACK:
        from pyautoattack import AutoAttack

        x, y = evaluate.chosen(images, torch.arange(len(images.y)))
        stages = list(evaluate.AUTO_ATTACK[name][1:])
        adversary = AutoAttack(
            model, norm="Linf", eps=BUDGET["epsilon"], version="standard", seed=seed, device=x.device
        )
        adversary.attacks_to_run = stages
        targets = min(evaluate.TARGETS, len(images.classes) - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        x_adv, _ = adversary.run_standard_evaluation(x.contiguous(), y, batch_size=batch_size)
        batches = zip(x_adv.split(batch_size), y.split(batch_size), strict=True)
        with torch.no_grad():
            return torch.cat([evaluate.correct(model, *batch) for batch in batches]).cpu()
    stands = []
    for places in torch.arange(len(images.y)).split(batch_size):
        x, y = evaluate.chosen(images, places)
        x_adv = evaluate.attack_batch(model, name, x.contiguous(), y, places, **BUDGET, seed=seed)
        with torch.no_grad():
            stands.append(evaluate.correct(model, x_adv, y))
    return torch.cat(stands).cpu()


def refilled(model, images, name, batch_size, seed):
    """The same by evaluate.py, stage by stage where it is a version of AutoAttack."""
    stands = torch.ones(len(images.y), dtype=torch.bool)
    for stage in evaluate.AUTO_ATTACK.get(name, (name,)):
        found = evaluate.begin(stands)
        stands = evaluate.robust(model, images, stage, **BUDGET, batch_size=batch_size, seed=seed, found=found)
    return stands


def compare(model, images, name, batch_size, seed, repeats):
    """Times both in turn. Returns a row of the report; raises UserError where they judge the images differently."""
    nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    ways = {"plain": (plain, nchw), "evaluate": (refilled, model)}
    few = images._replace(x=images.x[:batch_size], y=images.y[:batch_size])
    for way, network in ways.values():
        way(network, few, "pgd1", batch_size, seed)
    seconds, stands = {label: [] for label in ways}, {}
    for _ in tqdm(range(repeats), desc=name, disable=None, leave=False):
        for label, (way, network) in ways.items():
            began = time.perf_counter()
            stands[label] = way(network, images, name, batch_size, seed)  # on the CPU, so the device is done
            seconds[label].append((time.perf_counter() - began) / len(images.y) * 1000)
    differing = int((stands["plain"] != stands["evaluate"]).sum())
    if evaluate.iterated(name) and differing > max(1, len(images.y) // 1000):
        raise UserError(f"{name}: {differing} of {len(images.y)} images are judged differently")
    row = {"attack": name, **BUDGET, "differing": differing}
    for label in ways:
        row[label] = {
            "correct": int(stands[label].sum()),
            "seconds_per_1000": statistics.median(seconds[label]),
            "repeats": seconds[label],
        }
    row["speedup"] = row["plain"]["seconds_per_1000"] / row["evaluate"]["seconds_per_1000"]
    return row


def parser():
    p = Parser(prog="benchmarks/evaluation.py", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    p.add_argument("--network", choices=("target", "guide"), default="target", help="default: target")
    p.add_argument("--target", metavar="NAME", help="what a file with bare weights is (default: the run's)")
    p.add_argument("--dataset", choices=DATASETS, help="default: the run's")
    p.add_argument("--data-dir", metavar="D", help="default: the run's, else 'data'")
    p.add_argument("--attacks", default="pgd20,cw", metavar="LIST", help="default: pgd20,cw")
    p.add_argument("--images", type=bounded(int, 1), default=1000, metavar="N",
                   help="a class-balanced subset of the test images (default: 1000)")  # fmt: skip
    p.add_argument("--repeats", type=bounded(int, 1), default=3, metavar="R", help="default: 3")
    p.add_argument("--batch-size", type=bounded(int, 1), default=256, metavar="B", help="default: 256")
    p.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    p.add_argument("--seed", type=bounded(int, 0), default=0, metavar="S", help="of starts and subset (default: 0)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return p


@command
def main(argv):
    args = parser().parse_args(argv)
    attacks = evaluate.attack_names(args.attacks)
    device = pick_device(args.device)
    full_float32()
    torch.backends.cudnn.deterministic = True
    content = evaluate.load_checkpoint(args.checkpoint, args.target, args.dataset)
    images = evaluate.load_test_images(args, content).to(device)
    versions = evaluate.check_auto_attack(attacks, len(images.classes))
    model = evaluate.load_network(content, args.network, args.checkpoint, len(images.classes)).to(device)
    report = {
        "command": shlex.join(["python", "benchmarks/evaluation.py", *argv]),
        **provenance(device),
        **versions,
        "network": content["settings"][args.network],
        "images": len(images.y),
        "batch_size": args.batch_size,
        "results": [],
    }
    print(f"{report['network']}, {len(images.y)} images, batches of {args.batch_size}, {report['device']}, "
          f"torch {report['torch']}, commit {report['commit']}")  # fmt: skip
    for name in attacks:
        row = compare(model, images, name, args.batch_size, args.seed, args.repeats)
        report["results"].append(row)
        shown = "   ".join(
            f"{label} {row[label]['seconds_per_1000']:.2f} s ({row[label]['correct'] / len(images.y):.2%})"
            for label in ("plain", "evaluate")
        )
        print(f"{name:7} {shown}   {row['speedup']:.2f} times as fast, {row['differing']} images judged differently",
              flush=True)  # fmt: skip
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
