"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K, C&W and AutoAttack, with 95 % intervals.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw,aa

fgsm     one step of epsilon on CE, no random start
pgdK     K steps on CE from a uniform start; an image once fooled stays fooled
cw       20 such steps on C&W's margin, max_{c != y} z_c - z_y, kappa = 0
apgd     AutoAttack's first attack alone: Auto-PGD on CE, 100 steps, one restart
aa-fast  its first two, Auto-PGD on CE and on the targeted DLR loss
aa       AutoAttack "standard": these two, targeted FAB and Square with 5,000 queries

fgsm, pgdK and cw are the evaluations of the paper's tables (auto_attack_eval1.py in its release). AutoAttack is by
Croce and Hein (2020), from the package pyautoattack; what its own checks find is printed as warnings. All attacks run
in float32 and in eval mode. On the same device a command gives the same figures again, except for AutoAttack on a GPU:
FAB uses `cumsum`, which is not deterministic there.

The result is one boolean matrix, images by attacks: which images are still classified as their label. An image that is
misclassified without any attack is not attacked. After each batch its rows go to a progress file, from which --resume
continues. With --json FILE.json the matrix is kept in FILE.npz.

--protocol standard  every attack with epsilon 8/255 on the whole test set
--protocol paper     as the release: AutoAttack with epsilon 0.031 on the first 1,000 test images, the rest as above
"""

# Of this project it imports `checkpoints`, `cli`, `data`, `robustness` and `speed`.

import json
import math
import os
import re
import shlex
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import checkpoints
import cli
from cli import Parser, Progress, UserError, exit_status, in_range, numerics, parse_fraction, pick_device, provenance
from data import DATASETS, check_classes, class_balanced_subset, load_images
from robustness import AUTO_ATTACK, SETTINGS, TARGETS, attack_columns, collect_warnings, matrix_of, plan_columns
from speed import memory_format

DEFAULT_ATTACKS = "clean,pgd10,pgd20,pgd50,cw"
ALL = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1 is the mean over these
FLAGS = ("network", "attacks", "dataset", "weights", "epsilon", "step_size", "batch_size", "seed")


# Results


def wilson(hits, n):
    """The 95 % confidence interval of a fraction, `hits` of `n` (Wilson, 1927): (low, high)."""
    z = 1.959964
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_row(mask):
    """n, correct, accuracy and interval of a mask (n,) bool."""
    n, hits = len(mask), int(mask.sum())
    return {"n": n, "correct": hits, "accuracy": hits / n, "interval": wilson(hits, n)}


def result_row(role, name, chain, masks, seconds, step_size, num_classes):
    """What the JSON says of an attack on a network. `chain` are its columns; `masks` and `seconds` are by column."""
    n, stages = chain[-1].n, []
    for column in chain:
        settings = dict(SETTINGS.get(column.attack, {}))
        if column.attack.startswith("pgd"):
            settings = {"steps": int(column.attack.removeprefix("pgd")), "restarts": 1}
        if "targets" in settings:
            settings["targets"] = min(TARGETS, num_classes - 1)
        attacked = stages[-1]["correct"] if stages else n
        count = {"attacked": attacked, "correct": int(masks[column][:n].sum()), "seconds": seconds[column]}
        stages.append({"attack": column.attack, **settings, **count})
    row = {"network": role, "attack": name, **accuracy_row(masks[chain[-1]][:n])}
    row["seconds"] = sum(stage["seconds"] for stage in stages[1:] or stages)
    if name != "clean":
        row["epsilon"] = chain[-1].epsilon
    if name == "cw" or name.startswith("pgd"):
        row["step_size"] = step_size
    return row | ({"stages": stages} if name in AUTO_ATTACK else settings)


def worst_case(rows, masks):
    """Accuracy over attacks of equal network, epsilon and images: an image counts if it is correct under each. A row of
    the JSON and a mask (n,) bool per attack; returns a dict for each group of several attacks."""
    groups = {}
    for row, mask in zip(rows, masks, strict=True):
        if "epsilon" in row:  # a clean mistake counts as one under every attack already
            groups.setdefault((row["network"], row["epsilon"], row["n"]), []).append((row["attack"], mask))
    cells = []
    for (role, epsilon, _), members in groups.items():
        if len(members) > 1:
            robust = torch.stack([mask for _, mask in members]).all(0)
            names = [name for name, _ in members]
            cells.append({"network": role, "attacks": names, "epsilon": epsilon, **accuracy_row(robust)})
    return cells


def table(rows, cells):
    """Results and worst cases of the JSON, a line each. "All" is there if each of its five attacks was measured."""
    lines = ["network  attack      accuracy     95 % interval           n  epsilon   seconds"]
    for row in [*rows, *({"attack": "worst case", **cell} for cell in cells)]:
        low, high = row["interval"]
        line = f"{row['network']:7}  {row['attack']:10}  {row['accuracy']:8.2%}  {low:7.2%} to {high:7.2%}"
        line += f"  {row['n']:6}"
        for name, digits in (("epsilon", 5), ("seconds", 1)):
            line += f"  {row[name]:8.{digits}f}" if name in row else " " * 10
        lines.append(line.rstrip())
    for role in dict.fromkeys(row["network"] for row in rows):
        found = {row["attack"]: row["accuracy"] for row in rows if row["network"] == role}
        if found.keys() >= set(ALL):
            lines.append(f"{role:7}  All         {sum(found[name] for name in ALL) / len(ALL):8.2%}")
    return "\n".join(lines)


# Files


@contextmanager
def open_progress(path, report, chains, parts, resume):
    """Locks a progress file inside the `with`, which gets the finished batches, a list as of `attack_columns`, and a
    function that writes one more. A file without a batch is removed at the end. `report` describes the evaluation,
    `chains` its columns, `parts` the indices of its batches. Raises UserError if another evaluation is at work on the
    file, or if it is there and not of this evaluation."""

    def append(line):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    if path.exists():
        cli.check_file(path)
    if resume and not path.exists():
        print(f"note: there is no {path} to continue from: starting the evaluation")
    path.touch()
    with checkpoints.lock(path, f"another evaluation is at work on {path}: wait for it, or choose another --json"):
        content = path.read_bytes()
        if content and not content.startswith(b'{"evaluation": '):
            raise UserError(f"{path} is not of an evaluation: rename it")
        content = content[: content.rfind(b"\n") + 1]  # a kill may leave half a line
        begun = content.count(b"\n") > 1
        if begun and not resume:
            raise UserError(f"{path} is of an interrupted evaluation: continue it with --resume, or delete it")
        batches = read_batches(content, path, report, chains, parts) if begun else []
        try:
            os.truncate(path, len(content) if batches else 0)
            if not batches:
                append({"evaluation": report})
            yield batches, append
        finally:
            if not batches:
                path.unlink(missing_ok=True)


def read_batches(content, path, report, chains, parts):
    """The batches in a progress file's content. Raises UserError if they are damaged or of another evaluation."""
    try:
        head, *batches = map(json.loads, content.splitlines())
        for name, value in report.items():
            was = head["evaluation"].get(name)
            if was != value and name not in ("command", "checkpoint", "python", "commit"):
                raise UserError(f"{name.replace('_', ' ')} was {was}, is {value}: use {was}, or delete {path}")
        _, seconds = matrix_of(chains, batches)
        fits = [len(batch["rows"]) for batch in batches] == [len(part) for part in parts[: len(batches)]]
        fits &= all(len(row) == len(seconds) and set(row) <= {"0", "1"} for batch in batches for row in batch["rows"])
        fits &= all(0 <= value < math.inf for value in seconds.values())
        fits &= all(isinstance(sentence, str) for batch in batches for sentence in batch["warnings"])
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged: delete it")
    return batches


def load_test_images(args, content):
    """(the test images, their indices in the test set): all, or a class-balanced subset of `args.images`, drawn from
    `args.seed`. They are those of the run, whose checkpoint is `content`, unless `args.dataset` and `args.data_dir` say
    otherwise. Raises UserError if their classes are not those that the network was trained on."""
    trained_on = content["settings"].get("dataset")
    dataset, data_dir = args.dataset or trained_on, args.data_dir
    if data_dir is None and dataset == trained_on:
        data_dir = content["settings"].get("data_dir")
    if data_dir is None and dataset.startswith("cifar"):
        data_dir = "data"
    images = load_images(dataset, "test", data_dir)
    check_classes(content["classes"] or images.classes, images.classes, f"{args.checkpoint} was trained on")
    numbered = images._replace(x=torch.arange(len(images.y)))
    indices = class_balanced_subset(numbered, args.images or len(images.y), args.seed).x
    return images.select(indices), indices


# Command line


def attack_names(text):
    """An argparse type: the names in a list such as "clean,pgd20,aa"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"clean|fgsm|cw|apgd|aa|aa-fast|pgd[1-9]\d{0,3}", name):
            raise UserError(f"unknown attack '{name}': choose from clean, fgsm, pgd<steps>, cw, apgd, aa-fast, aa")
    if not names:
        raise UserError("--attacks names no attack")
    return list(dict.fromkeys(names))


def parser():
    p = Parser(prog="evaluate.py", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    add = p.add_argument_group("network").add_argument
    add("--network", choices=("target", "guide", "target,guide"), default="target", help="one or both")
    add("--weights", choices=("last", "ema"), default="last", help="ema: the target's average in a run with --ema")
    add("--target", metavar="NAME", help="what a file with bare weights is, as wrn34-10 (default: the run's)")
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="default: the run's")
    add("--data-dir", type=Path, metavar="D", help="default: the run's, else 'data'")
    add("--images", type=in_range(int, 1), metavar="N", help="class-balanced, drawn from --seed (default: all images)")
    add = p.add_argument_group("attack").add_argument
    add("--protocol", choices=("standard", "paper"), default="standard", help="see above")
    default = f"default: {DEFAULT_ATTACKS}; with --protocol paper also aa"
    add("--attacks", type=attack_names, metavar="LIST", help=f"as above, with commas between them ({default})")
    fraction = in_range(parse_fraction, 0, 1)
    add("--epsilon", type=fraction, default=8 / 255, metavar="E", help="radius for pixels in [0, 1] (default: 8/255)")
    add("--step-size", type=fraction, default=2 / 255, metavar="A", help="of pgd and cw (default: 2/255, the paper)")
    add = p.add_argument_group("run").add_argument
    add("--batch-size", type=in_range(int, 1), default=256, metavar="B", help="a kill loses one batch at most")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--seed", type=in_range(int, 0), default=0, metavar="S", help="of starts, AutoAttack and subset")
    add("--json", type=Path, metavar="FILE", help="write the figures there, and the matrix in an .npz beside it")
    beside = "FILE.progress, or that of the checkpoint, has its batches"
    add("--resume", action="store_true", help=f"continue an interrupted evaluation, to the same figures; {beside}")
    return p


def protocol(args, total):
    """What --protocol and the flags ask for: its name with the flags that differ from it, and for each attack its
    number of images and epsilon. Raises UserError if they contradict each other."""
    defaults = {"epsilon": 8 / 255, "step_size": 2 / 255, "images": None}
    typed = {name: getattr(args, name) for name, value in defaults.items() if getattr(args, name) != value}
    differing = [f"--{name.replace('_', '-')} {value:g}" for name, value in typed.items()]
    planned = {name: (total, args.epsilon) for name in args.attacks}
    if args.protocol == "paper":
        if differing:
            raise UserError(f"--protocol paper is a fixed set of attacks: leave out {' and '.join(differing)}")
        if args.dataset == "folder":
            raise UserError("--protocol paper takes the first 1,000 images, in a folder those of the first classes")
        planned |= {name: (min(1000, total), 0.031) for name in args.attacks if name in ("aa", "aa-fast")}
    return " ".join([args.protocol, *(["except for", *differing] if differing else [])]), planned


def check_auto_attack(attacks, num_classes):
    """{"pyautoattack": its version}, if an attack needs it. Raises UserError if an attack cannot run."""
    if not AUTO_ATTACK.keys() & set(attacks):
        return {}
    if num_classes < 4 and {"aa", "aa-fast"} & set(attacks):
        raise UserError(f"aa and aa-fast need four classes, for their targeted loss; with {num_classes}, use apgd")
    try:
        return {"pyautoattack": metadata.version("pyautoattack")}
    except metadata.PackageNotFoundError:
        raise UserError("AutoAttack is not installed: pip install pyautoattack") from None


@exit_status
@numerics(deterministic=False)
def main(argv):
    args = parser().parse_args(argv)
    if args.attacks is None:
        args.attacks = attack_names(DEFAULT_ATTACKS + (",aa" if args.protocol == "paper" else ""))
    if args.json and not (args.json.suffix == ".json" and args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: it is a name that ends in .json, in a folder that exists")
    outputs = [args.json, args.json.with_suffix(".npz")] if args.json else []
    beside = args.json or args.checkpoint
    progress_file = beside.with_name(beside.name + ".progress")

    device = pick_device(args.device)
    content, sha256 = checkpoints.load_trained(args.checkpoint, args.target, args.dataset)
    settings = content["settings"]
    args.dataset = args.dataset or settings["dataset"]
    if args.weights == "ema":
        if checkpoints.invalid_keys(content, {"ema": dict}):
            raise UserError(f"{args.checkpoint} holds no averaged weights: train with --ema")
        content["target"] = content["ema"]
    images, indices = load_test_images(args, content)
    images, total, num_classes = images.to(device), len(images.y), len(images.classes)
    networks, layout = {}, memory_format(device, "fp32")
    for role in args.network.split(","):
        networks[role] = checkpoints.load_network(content, role, args.checkpoint, num_classes, layout).to(device)
    protocol_name, planned = protocol(args, total)
    report = {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "checkpoint": str(args.checkpoint),
        "sha256": sha256,
        **provenance(device),
        **check_auto_attack(args.attacks, num_classes),
        "trained": {"epoch": content.get("epoch"), "settings": settings},
        "protocol": protocol_name,
        **{name: getattr(args, name) for name in FLAGS},
        "test_images": images.sha256(),
    }
    report = json.loads(json.dumps(report))  # as it is read from a progress file
    print(f"{args.checkpoint}: protocol {protocol_name}, {total} test images, seed {args.seed}")

    chains = plan_columns(networks, planned, total)
    parts = torch.arange(total).split(args.batch_size)
    with open_progress(progress_file, report, chains, parts, args.resume) as (batches, append):
        for path in outputs:
            if path.exists() and len(batches) < len(parts):
                raise UserError(f"{path} exists already: choose another --json, or delete it")
        done = sum(len(part) for part in parts[: len(batches)])
        try:
            with Progress(total, done) as bar:
                for part in parts[len(batches) :]:
                    batch = attack_columns(networks, chains, images, part, step_size=args.step_size, seed=args.seed)
                    append(batch)
                    batches.append(batch)
                    done += len(part)
                    masks, _ = matrix_of(chains, batches)
                    means = [masks[chain[-1]][: chain[-1].n].double().mean() for chain in chains.values()]
                    shown = [f"{' '.join(key)} {mean:.1%}" for key, mean in zip(chains, means, strict=True)]
                    bar.advance(len(part), "  ".join(shown))
            masks, seconds = matrix_of(chains, batches)
            report["warnings"] = collect_warnings(chains, masks, batches)
            report["results"] = [
                {"name": settings[role], **result_row(role, name, chain, masks, seconds, args.step_size, num_classes)}
                for (role, name), chain in chains.items()
            ]
            asked = {f"{role} {name}": masks[chain[-1]][: chain[-1].n] for (role, name), chain in chains.items()}
            report["worst_case"] = worst_case(report["results"], asked.values())
            if args.json:
                with cli.atomic_write(outputs[1]) as partial, open(partial, "wb") as file:
                    np.savez_compressed(file, **asked, y=images.y.cpu(), indices=indices)
                cli.write_text(args.json, json.dumps(report, indent=1) + "\n")
                progress_file.unlink()
            for sentence in report["warnings"]:
                print(f"warning: {sentence}", file=sys.stderr)
            print(table(report["results"], report["worst_case"]), flush=True)
            progress_file.unlink(missing_ok=True)
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            kept = f"{done} of {total} images are done; to go on, add --resume" if done else "nothing was saved yet"
            raise type(stop)(kept if progress_file.exists() else f"the figures are in {args.json}") from None


if __name__ == "__main__":
    sys.exit(main())
