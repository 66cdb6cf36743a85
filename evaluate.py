"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K, C&W and AutoAttack, with 95 % intervals.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw,aa

The attacks are the table of `robustness.py` (see also --help); pgd<steps> and cw are those of the paper's tables
(auto_attack_eval1.py in its release), which have no FGSM. AutoAttack is by Croce and Hein (2020), from the package
pyautoattack; what its own checks find is printed as warnings. All attacks run in float32 and in eval mode. On the same
device a command gives the same figures again, except for AutoAttack on a GPU, where FAB's `cumsum` varies.

The result is one boolean matrix, images by attacks: which images are still classified as their label. An image that is
misclassified without any attack is not attacked. After each batch its masks go to a progress file, from which --resume
continues. With --json FILE.json the matrix is kept in FILE.npz.

--protocol standard  every attack with epsilon 8/255 on the whole test set
--protocol paper     as the release: AutoAttack with epsilon 0.031 on the first 1,000 test images, the rest as above
"""

# Of this project it imports `checkpoints`, `cli`, `data`, `robustness` and `speed`.

import json
import math
import os
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
from data import DATASETS, check_classes, class_balanced_mask, load_images, print_class_order
from robustness import ATTACKS, STAGES, attack_columns, collect_warnings, find_attack, plan_columns, read_masks
from speed import memory_format

DEFAULT_ATTACKS = "clean,pgd10,pgd20,pgd50,cw"
ALL = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1 is the mean over these
NORMALISE = "mean and std that the network expects, as 0.49,0.48,0.45 0.25,0.24,0.26 (default: the file's)"
REPORTED = ("network", "attacks", "dataset", "weights", "normalise", "epsilon", "step_size", "batch_size", "seed")
MAY_DIFFER = ("command", "checkpoint", "python", "commit")  # when an evaluation is continued


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


def result_row(name, places, columns, masks, seconds, step_size, num_classes):
    """What the JSON says of the attack `name`. Its columns are those at `places`, the clean one first."""
    attack, last = find_attack(name), columns[places[-1]]
    row = {"network": last.network, "attack": name, **accuracy_row(masks[places[-1]][: last.n])}
    row["seconds"] = sum(seconds[place] for place in places[1:] or places)
    if name != "clean":
        row["epsilon"] = last.epsilon
    if attack.function and attack.takes_step_size:
        row["step_size"] = step_size
    row |= attack.settings
    if attack.stages:
        row["stages"] = []
        attacked = last.n
        for place in places:
            stage = {"attack": columns[place].attack, **STAGES.get(columns[place].attack, {})}
            if "targets" in stage:
                stage["targets"] = min(stage["targets"], num_classes - 1)
            correct = int(masks[place][: last.n].sum())
            row["stages"].append({**stage, "attacked": attacked, "correct": correct, "seconds": seconds[place]})
            attacked = correct
    return row


def worst_case(rows, masks):
    """Accuracy over attacks of equal network, epsilon and images: an image counts if it is correct under each. Of the
    JSON's rows and a mask (n,) bool for each; a dict per group of several attacks."""
    groups = {}
    for row, mask in zip(rows, masks, strict=True):
        if "epsilon" in row:  # a clean mistake counts as one under every attack already
            groups.setdefault((row["network"], row["epsilon"], row["n"]), {})[row["attack"]] = mask
    worst_cases = []
    for (role, epsilon, _), group in groups.items():
        if len(group) > 1:
            robust = torch.stack([*group.values()]).all(0)
            worst_cases.append({"network": role, "attacks": [*group], "epsilon": epsilon, **accuracy_row(robust)})
    return worst_cases


def table(rows, worst_cases):
    """Results and worst cases of the JSON, a line each. "All" is there if each of its five attacks was measured."""
    lines = ["network  attack      accuracy     95 % interval           n  epsilon   seconds"]
    for row in rows + [{"attack": "worst case", **case} for case in worst_cases]:
        low, high = row["interval"]
        line = f"{row['network']:7}  {row['attack']:10}  {row['accuracy']:8.2%}  {low:7.2%} to {high:7.2%}"
        line += f"  {row['n']:6}"
        line += f"  {row['epsilon']:8.5f}" if "epsilon" in row else " " * 10
        line += f"  {row['seconds']:8.1f}" if "seconds" in row else ""
        lines.append(line.rstrip())
    for role in dict.fromkeys(row["network"] for row in rows):
        found = {row["attack"]: row["accuracy"] for row in rows if row["network"] == role}
        if found.keys() >= set(ALL):
            lines.append(f"{role:7}  All         {sum(found[name] for name in ALL) / len(ALL):8.2%}")
    return "\n".join(lines)


@contextmanager
def open_progress(path, report, columns, batches, resume):
    """Locks a progress file inside the `with`, which gets the list of finished batches and a function that writes one
    more. A file without a batch is removed at the end. Raises UserError if another evaluation is at work on the file
    or if it is not of this one, which has this `report`, number of `columns` and `batches` of indices."""

    def append(line):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    if path.exists():
        cli.check_file(path)
    elif resume:
        print(f"note: there is no {path} to continue from: starting the evaluation")
    path.touch()
    with checkpoints.lock(path, f"another evaluation is at work on {path}: wait for it, or choose another --json"):
        content = path.read_bytes()
        if content and not content.startswith(b'{"evaluation": '):
            raise UserError(f"{path} is not of an evaluation: rename it")
        content = content[: content.rfind(b"\n") + 1]  # a kill may leave half a line
        if content.count(b"\n") < 2:  # no batch
            content = b""
        if content and not resume:
            raise UserError(f"{path} is of an interrupted evaluation: continue it with --resume, or delete it")
        records = read_records(content, path, report, columns, batches) if content else []
        try:
            os.truncate(path, len(content))
            if not content:
                append({"evaluation": report})
            yield records, append
        finally:
            if not records:
                path.unlink(missing_ok=True)


def read_records(content, path, report, columns, batches):
    """The batches in a progress file's content. Raises UserError if they are damaged or of another evaluation."""
    try:
        head, *records = map(json.loads, content.splitlines())
        for name, value in json.loads(json.dumps(report)).items():  # as it was written: tuples are lists
            was = head["evaluation"].get(name)
            if was != value and name not in MAY_DIFFER:
                raise UserError(f"{name.replace('_', ' ')} was {was}, is {value}: use {was}, or delete {path}")
        for record, batch in zip(records, batches[: len(records)], strict=True):
            sound = len(record["masks"]) == len(record["seconds"]) == columns
            sound &= all(len(mask) == len(batch) and set(mask) <= {"0", "1"} for mask in record["masks"])
            sound &= all(0 <= value < math.inf for value in record["seconds"])
            sound &= all(isinstance(sentence, str) for sentence in record["warnings"])
            if not sound:
                raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path} is damaged: delete it") from None
    return records


def load_test_images(args, content):
    """(the test images, their indices in the test set) that the flags `args` ask for, of the data set that the network
    in the checkpoint `content` was trained on if they name none. Raises UserError if its classes were others."""
    trained_on = content["settings"].get("dataset")
    dataset, data_dir = args.dataset or trained_on, args.data_dir
    if data_dir is None and dataset == trained_on:
        data_dir = content["settings"].get("data_dir")
    if data_dir is None and dataset.startswith("cifar"):
        data_dir = "data"
    images = load_images(dataset, "test", data_dir)
    if content["classes"] is None:  # bare weights
        print_class_order(images.classes)
    else:
        check_classes(content["classes"], images.classes, f"{args.checkpoint} was trained on")
    mask = class_balanced_mask(images, args.images or len(images.y), args.seed)
    return images.select(mask), mask.nonzero().squeeze(1)


def attack_names(text):
    """An argparse type: the names in a list such as "clean,pgd20,aa"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if find_attack(name) is None:
            raise UserError(f"unknown attack '{name}': choose from {', '.join(ATTACKS)}")
    if not names:
        raise UserError("--attacks names no attack")
    return list(dict.fromkeys(names))


def parser():
    p = Parser(prog="evaluate.py", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a run's last.pt, or a file with weights")
    add = p.add_argument_group("network").add_argument
    add("--network", choices=("target", "guide", "target,guide"), default="target", metavar="NAME",
        help="target, guide or target,guide (default: target)")  # fmt: skip
    add("--weights", choices=("last", "ema"), default="last", help="ema: the target's moving average in the file")
    add("--target", metavar="NAME", help="what a file with bare weights is, as wrn34-10 (default: the run's)")
    add("--normalise", nargs=2, type=cli.parse_fractions, metavar=("MEAN", "STD"), help=NORMALISE)
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="default: the run's")
    add("--data-dir", type=Path, metavar="D", help="default: the run's, else 'data'")
    add("--images", type=in_range(int, 1), metavar="N", help="class-balanced, drawn from --seed (default: all images)")
    listed = "\n".join(f"{name:10}  {attack.help}" for name, attack in ATTACKS.items())
    add = p.add_argument_group("attack", listed).add_argument
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
    file = "FILE.progress, or that of the checkpoint, has its batches"
    add("--resume", action="store_true", help=f"continue an interrupted evaluation, to the same figures; {file}")
    return p


def protocol(args, total):
    """The protocol's name, with the flags that differ from it, and {attack: (number of images, epsilon)}. Raises
    UserError if the flags contradict each other."""
    standard = {"epsilon": 8 / 255, "step_size": 2 / 255, "images": None}
    differing = []
    for name, value in standard.items():
        if getattr(args, name) != value:
            differing.append(f"--{name.replace('_', '-')} {getattr(args, name):g}")
    planned = {name: (total, args.epsilon) for name in args.attacks}
    if args.protocol == "standard":
        return " ".join(["standard except for", *differing]) if differing else "standard", planned
    if differing:
        raise UserError(f"--protocol paper is a fixed set of attacks: leave out {' and '.join(differing)}")
    if args.dataset == "folder":
        raise UserError("--protocol paper takes the first 1,000 images, in a folder those of the first classes")
    for name in {"aa", "aa-fast"} & planned.keys():
        planned[name] = (min(1000, total), 0.031)
    return "paper", planned


def check_auto_attack(attacks, num_classes):
    """{"pyautoattack": its version}, if an attack needs it. Raises UserError if an attack cannot run."""
    stages = {stage for name in attacks for stage in find_attack(name).stages}
    if not stages:
        return {}
    if num_classes < 4 and "apgd-t" in stages:
        raise UserError(f"aa and aa-fast need four classes, for their targeted loss; with {num_classes}, use apgd")
    try:
        return {"pyautoattack": metadata.version("pyautoattack")}
    except metadata.PackageNotFoundError:
        raise UserError("AutoAttack is not installed: pip install pyautoattack") from None


def attack_batches(networks, columns, places, images, batches, records, append, args):
    """Attacks the batches that `records` does not have yet and adds them to it, each written by `append` first."""
    done = sum(len(batch) for batch in batches[: len(records)])
    with Progress(len(images.y), done) as bar:
        for batch in batches[len(records) :]:
            record = attack_columns(networks, columns, images, batch, step_size=args.step_size, seed=args.seed)
            append(record)
            records.append(record)
            masks = read_masks(records)
            accuracies = []
            for (role, name), behind in places.items():
                n = columns[behind[-1]].n
                accuracies.append(f"{role} {name} {masks[behind[-1]][:n].double().mean():.1%}")
            bar.advance(len(batch), "  ".join(accuracies))


def add_results(report, columns, places, records, settings, step_size, num_classes):
    """Adds to the report what was measured. Returns {"network attack": its mask (n,) bool}."""
    masks = read_masks(records)
    seconds = np.sum([record["seconds"] for record in records], 0).tolist()
    report["warnings"] = collect_warnings(columns, places, masks, records)
    result_masks, report["results"] = {}, []
    for (role, name), behind in places.items():
        row = result_row(name, behind, columns, masks, seconds, step_size, num_classes)
        report["results"].append({"name": settings[role], **row})
        result_masks[f"{role} {name}"] = masks[behind[-1]][: row["n"]]
    report["worst_case"] = worst_case(report["results"], result_masks.values())
    return result_masks


@exit_status
@numerics(deterministic=False)
def main(argv):
    args = parser().parse_args(argv)
    if args.attacks is None:
        args.attacks = attack_names(DEFAULT_ATTACKS if args.protocol == "standard" else f"{DEFAULT_ATTACKS},aa")
    if args.json and not (args.json.suffix == ".json" and args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: it is a name that ends in .json, in a folder that exists")
    device = pick_device(args.device)
    content, sha256 = checkpoints.load_trained(args.checkpoint, args.target, args.dataset, args.weights, args.normalise)
    settings = content["settings"]
    args.dataset = args.dataset or settings["dataset"]
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
        **{name: getattr(args, name) for name in REPORTED},
        "test_images": images.sha256(),
    }
    print(f"{args.checkpoint}: protocol {protocol_name}, {total} test images, seed {args.seed}")

    columns, places = plan_columns(networks, planned, total)
    batches = torch.arange(total).split(args.batch_size)
    progress_file = Path(f"{args.json or args.checkpoint}.progress")
    outputs = [args.json, args.json.with_suffix(".npz")] if args.json else []
    with open_progress(progress_file, report, len(columns), batches, args.resume) as (records, append):
        for path in outputs:
            if path.exists() and len(records) < len(batches):
                raise UserError(f"{path} exists already: choose another --json, or delete it")
        try:
            attack_batches(networks, columns, places, images, batches, records, append, args)
            result_masks = add_results(report, columns, places, records, settings, args.step_size, num_classes)
            if args.json:
                with cli.atomic_write(outputs[1]) as partial, open(partial, "wb") as file:
                    np.savez_compressed(file, **result_masks, y=images.y.cpu(), indices=indices)
                cli.write_text(args.json, json.dumps(report, indent=1) + "\n")
                progress_file.unlink()
            for sentence in report["warnings"]:
                print(f"warning: {sentence}", file=sys.stderr)
            print(table(report["results"], report["worst_case"]), flush=True)
            progress_file.unlink(missing_ok=True)
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            done = sum(len(batch) for batch in batches[: len(records)])
            if not progress_file.exists():
                kept = f"the figures are in {args.json}"
            elif done:
                kept = f"{done} of {total} images are done; to go on, add --resume"
            else:
                kept = "nothing was saved yet"
            raise type(stop)(kept) from None


if __name__ == "__main__":
    sys.exit(main())
