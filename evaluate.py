"""Attacks a trained network: accuracy on clean images and under FGSM, PGD-K, C&W and AutoAttack, with 95 % intervals.

    python evaluate.py runs/dynat-cifar10-wrn34-10-s1/last.pt --attacks clean,pgd10,pgd20,pgd50,cw,aa

The attacks are the table of `robustness.py` (see also --help); pgd<steps> and cw are those of the paper's tables
(auto_attack_eval1.py in its release), which have no FGSM. AutoAttack is by Croce and Hein (2020), from the package
pyautoattack; what its own checks find is printed as warnings. All attacks run in float32 and in eval mode. On the same
device a command gives the same figures again, except for AutoAttack on a GPU, where FAB's `cumsum` varies.

The result is one boolean matrix, images by attacks: which images are still classified as their label. An image that is
misclassified without any attack is not attacked. After each batch its masks go to a progress file, from which --resume
continues. With --json FILE.json the matrix is kept in FILE.npz. Several processes share the batches out, to the same
figures: torchrun --nproc-per-node 4 evaluate.py ...

--protocol standard  every attack with epsilon 8/255 on the whole test set
--protocol paper     as the release: AutoAttack with epsilon 0.031 on the first 1,000 test images, the rest as above
"""

# Of this project it imports `checkpoints`, `cli`, `data`, `distributed`, `robustness`, `saved_images` and `speed`.

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
from torch import nn

import checkpoints
import cli
import distributed
from cli import Parser, Progress, UserError, exit_status, in_range, numerics, parse_fraction, provenance
from data import DATASETS, Images, check_classes, class_balanced_mask, load_images, print_class_order
from robustness import ATTACKS, STAGES, attack_columns, collect_warnings, find_attack, plan_columns, read_masks
from saved_images import SavedImages
from speed import memory_format

DEFAULT_ATTACKS = "clean,pgd10,pgd20,pgd50,cw"
ALL = ("pgd10", "pgd20", "pgd50", "cw", "aa")  # "All" of the paper's Table 1 is the mean over these
NORMALISE = "mean and std that the network expects, as 0.49,0.48,0.45 0.25,0.24,0.26 (default: the file's)"
REPORTED = ("network", "attacks", "dataset", "weights", "normalise", "epsilon", "step_size", "batch_size", "seed")
MAY_DIFFER = ("command", "checkpoint", "python", "commit", "processes")  # when an evaluation is continued


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


def table(report):
    """Results and worst cases of the JSON, a line each. "All" is there if each of its five attacks was measured."""
    rows, worst_cases = report["results"], report["worst_case"]
    lines = ["network  attack      accuracy     95 % interval           n  epsilon   seconds"]
    for row in [*rows, *({"attack": "worst case", **case} for case in worst_cases)]:
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


@numerics(deterministic=False)
def attack_network(model, x, y, attacks, *, epsilon=8 / 255, step_size=2 / 255, batch_size=256, seed=0):
    """Attacks your own network as evaluate.py attacks its own: (what the JSON says, for `table`; {attack: which images
    are still correct, (N,) bool}).

    model       any nn.Module in eval mode, images to logits (B, C). A layer that normalises images belongs in it.
    x, y        images (N, channels, height, width) of floats in [0, 1], labels (N,) int64 below C.
    attacks     names as after --attacks: "clean,pgd20,cw,aa". aa and aa-fast need C >= 4.
    epsilon     radius of the ball; like `step_size` in units of pixels in [0, 1].

    All randomness comes from `seed`, so batches and images have the starts that the command line gives them. Raises
    UserError for anything else than that."""
    attacks = attack_names(attacks)
    num_classes = check_network(model, x, y, epsilon)
    check_auto_attack(attacks, num_classes)
    device = next(model.parameters(), x).device
    images = Images(x.float(), y, list(range(num_classes))).to(device)
    columns, places = plan_columns(["network"], {name: (len(y), epsilon) for name in attacks}, len(y))
    records, batches = [], torch.arange(len(y)).split(batch_size)
    networks = {"network": FloatLogits(model)}
    attack_batches(networks, columns, places, images, batches, records, step_size=step_size, seed=seed)
    report, masks = results(columns, places, records, step_size, num_classes)
    return report, {name: masks[f"network {name}"] for name in attacks}


class FloatLogits(nn.Module):
    """A network whose logits are float32 or more: in bf16 losses are blunt, and pyautoattack's Square fails."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_network(model, x, y, epsilon):
    """The number of classes of a network. Raises UserError unless `attack_network` can attack it."""
    if any(module.training for module in model.modules()):
        raise UserError("the network is in train mode: call model.eval() first")
    if not (x.dim() == 4 and len(x) and x.is_floating_point()):
        raise UserError(f"x is {x.dtype} {tuple(x.shape)}: it must be floats of shape (N, channels, height, width)")
    if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
        raise UserError(
            f"x has pixels from {x.min():.4g} to {x.max():.4g}: they must be in [0, 1]; divide by 255, or move the "
            "normalisation into the network"
        )
    if not 0 <= epsilon <= 1:
        raise UserError(f"epsilon is {epsilon:g}, for pixels in [0, 1]: 8/255, for example")
    with torch.no_grad():
        logits = model(x[:1].float().to(next(model.parameters(), x).device))
    if logits.dim() != 2:
        raise UserError(f"the network gives {tuple(logits.shape)} for one image: it must be logits (1, C)")
    num_classes = logits.shape[1]
    if y.shape != x.shape[:1] or y.dtype != torch.int64 or not 0 <= y.min() <= y.max() < num_classes:
        raise UserError(
            f"y is {y.dtype} {tuple(y.shape)} from {y.min()} to {y.max()}: for {len(x)} images and {num_classes} "
            f"logits it must be int64, ({len(x)},), from 0 to {num_classes - 1}"
        )
    return num_classes


@contextmanager
def open_progress(path, report, columns, batches, resume, outputs=(), image_file=None):
    """Locks a progress file inside the `with`, which gets the list of finished batches. The file, and with it the raw
    one of `image_file`, is removed at the end if it has none. Raises UserError if another evaluation is at work on it,
    if it is not of this one, which has this `report`, number of `columns` and `batches` of indices, or if one of the
    `outputs` would be overwritten."""
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
            for output in outputs:
                if output.exists() and len(records) < len(batches):
                    raise UserError(f"{output} exists already: choose another name, or delete it")
            if image_file:
                image_file.open(resumed=len(records) > 0)
            os.truncate(path, len(content))
            if not content:
                append(path, {"evaluation": report})
            yield records
        finally:
            if not records:
                path.unlink(missing_ok=True)
                if image_file:
                    image_file.discard()


def append(path, line):
    """Adds a line to a progress file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


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
    add("--batch-size", type=in_range(int, 1), default=256, metavar="B", help="a kill loses the batches at work")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--seed", type=in_range(int, 0), default=0, metavar="S", help="of starts, AutoAttack and subset")
    add("--json", type=Path, metavar="FILE", help="write the figures there, and the matrix in an .npz beside it")
    text = "write the adversarial images there, float32, as attacked: NETWORK ATTACK images, indices and y"
    add("--save-images", type=Path, metavar="FILE.npz", help=text)
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


def attack_batches(
    networks, columns, places, images, batches, records, *, step_size, seed, write=lambda record: None, keep=None
):
    """Attacks the batches that `records` does not have yet, shared out among the processes, and adds them to it in
    order, on rank 0, each after a call of `write`. `keep` gets a batch's indices and its x_adv per column."""
    done = sum(len(batch) for batch in batches[: len(records)])

    def attack(i):
        record, x_advs = attack_columns(networks, columns, images, batches[i], step_size=step_size, seed=seed)
        if keep is not None:
            keep(batches[i], x_advs)
        return record

    with Progress(len(images.y), done) as bar:
        for record in distributed.in_order(attack, range(len(records), len(batches))):
            size = len(record["masks"][0])
            write(record)
            records.append(record)
            done += size
            accuracies = []
            for (role, name), behind in places.items():
                hits = sum(record["masks"][behind[-1]].count("1") for record in records)
                accuracies.append(f"{role} {name} {hits / min(done, columns[behind[-1]].n):.1%}")
            bar.advance(size, "  ".join(accuracies))


def results(columns, places, records, step_size, num_classes):
    """What the JSON says of all batches, and {"network attack": its mask (n,) bool}."""
    masks = read_masks(records)
    seconds = np.sum([record["seconds"] for record in records], 0).tolist()
    rows, found = [], {}
    for (role, name), behind in places.items():
        row = result_row(name, behind, columns, masks, seconds, step_size, num_classes)
        rows.append(row)
        found[f"{role} {name}"] = masks[behind[-1]][: row["n"]]
    warnings = collect_warnings(columns, places, masks, records)
    return {"warnings": warnings, "results": rows, "worst_case": worst_case(rows, found.values())}, found


def check_outputs(args):
    """The files that an evaluation writes. Raises UserError unless they have their names and folders."""
    if args.save_images and not args.json:
        raise UserError("--save-images goes with --json FILE.json, which says what made the images")
    outputs = []
    for flag, path, suffix in (("--json", args.json, ".json"), ("--save-images", args.save_images, ".npz")):
        if path:
            if not (path.suffix == suffix and path.parent.is_dir()):
                raise UserError(f"{flag} {path}: it is a name that ends in {suffix}, in a folder that exists")
            outputs.append(path)
    if args.json:
        outputs.append(args.json.with_suffix(".npz"))
        if args.save_images == outputs[-1]:
            raise UserError(f"--save-images {args.save_images}: the matrix goes there, choose another name")
    return outputs


def prepare(args, device):
    """(the networks by role, the test images on the device, their indices in the test set, the file's content and its
    SHA-256)."""
    content, sha256 = checkpoints.load_trained(args.checkpoint, args.target, args.dataset, args.weights, args.normalise)
    args.dataset = args.dataset or content["settings"]["dataset"]
    images, indices = load_test_images(args, content)
    networks, layout = {}, memory_format(device, "fp32")
    for role in args.network.split(","):
        model = checkpoints.load_network(content, role, args.checkpoint, len(images.classes), layout)
        networks[role] = model.to(device)
    return networks, images.to(device), indices, content, sha256


def evaluate(args, argv, device):
    """Attacks the networks that the flags name; rank 0 prints and writes the results."""
    outputs = check_outputs(args)
    networks, images, indices, content, sha256 = distributed.first_rank_first(lambda: prepare(args, device))
    total, num_classes = len(images.y), len(images.classes)
    protocol_name, planned = protocol(args, total)
    report = {
        "command": shlex.join(["python", "evaluate.py", *argv]),
        "checkpoint": str(args.checkpoint),
        "sha256": sha256,
        **provenance(device),
        "processes": distributed.world_size(),
        **check_auto_attack(args.attacks, num_classes),
        "trained": {"epoch": content.get("epoch"), "settings": content["settings"]},
        "protocol": protocol_name,
        **{name: getattr(args, name) for name in REPORTED},
        "save_images": args.save_images and str(args.save_images),
        "test_images": images.sha256(),
    }
    print(f"{args.checkpoint}: protocol {protocol_name}, {total} test images, seed {args.seed}")

    columns, places = plan_columns(networks, planned, total)
    batches = torch.arange(total).split(args.batch_size)
    if len(batches) < distributed.world_size():
        print(f"note: {len(batches)} batches for {distributed.world_size()} processes: try a smaller --batch-size")
    image_file = None
    if args.save_images:
        made = {f"{role} {name}": behind[-1] for (role, name), behind in places.items() if name != "clean"}
        image_file = SavedImages(args.save_images, made, total, images.x.shape[1:])
    progress_file = Path(f"{args.json or args.checkpoint}.progress")
    progress = open_progress(progress_file, report, len(columns), batches, args.resume, outputs, image_file)
    with distributed.on_rank0(progress) as records:
        try:
            attack_batches(
                networks, columns, places, images, batches, records, step_size=args.step_size, seed=args.seed,
                write=lambda record: append(progress_file, record), keep=image_file and image_file.write,
            )  # fmt: skip
            if distributed.rank() == 0:
                found, masks = results(columns, places, records, args.step_size, num_classes)
                settings = content["settings"]
                found["results"] = [{"name": settings[row["network"]], **row} for row in found["results"]]
                if args.json:
                    if image_file:
                        attacked = {f"{role} {name}": masks[f"{role} clean"] for role, name in places}
                        image_file.finish(attacked, indices, images.y.cpu())
                    with cli.atomic_write(args.json.with_suffix(".npz")) as partial, open(partial, "wb") as file:
                        np.savez_compressed(file, **masks, y=images.y.cpu(), indices=indices)
                    cli.write_text(args.json, json.dumps(report | found, indent=1) + "\n")
                    progress_file.unlink()
                    if image_file:
                        image_file.discard()
                for sentence in found["warnings"]:
                    print(f"warning: {sentence}", file=sys.stderr)
                print(table(found), flush=True)
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


@exit_status
@numerics(deterministic=False)
def main(argv):
    args = parser().parse_args(argv)
    if args.attacks is None:
        args.attacks = attack_names(DEFAULT_ATTACKS if args.protocol == "standard" else f"{DEFAULT_ATTACKS},aa")
    with distributed.process_group(args.device) as device:
        evaluate(args, argv, device)


if __name__ == "__main__":
    sys.exit(main())
