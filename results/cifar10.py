"""Trains the rows of a plan on CIFAR-10 one after another within a time budget, attacks each as soon as it is trained,
and writes what was measured.

    python results/cifar10.py --plan short --data-dir D --budget 540        D/train/<class>/*, D/test/<class>/*
    python results/cifar10.py --plan short --budget 0                       restores the run folders, writes the page

Each row is a few plain commands, printed as they run and kept. Two files hold all that was measured, and are written
anew after each command: results/cifar10-<plan>.json (settings, logs, evaluations, commands, commit, device of every
row) and results/cifar10-<plan>.md, the tables. No weights are needed later.

Stopped at any moment, the same command goes on: a row whose evaluations are there is left alone, also where its weights
are gone; one in training goes on after its last epoch; one whose weights were lost before they were attacked is trained
anew. At the end of the budget the command that runs is told to end (SIGTERM), so give a minute less than there is.

AutoAttack comes after the other attacks of all rows: it takes longer than all the rest of an evaluation, and its
interval on 1,000 images is three times as wide as theirs on 10,000, so that another row says more. --rows chooses the
rows that get theirs first.
"""

import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are in the folder above

from tables import page, row_name  # noqa: E402

import engine  # noqa: E402
import evaluate  # noqa: E402
import figures  # noqa: E402
import train_dynat  # noqa: E402
from cli import Parser, UserError, bounded, command, write_text  # noqa: E402

# A row is a method and the flags that set it apart. Flags that a plan gives to all rows stand beside them; `ema` is for
# the rows whose labels are dynamic, `weights` are what is attacked after training.
PLANS = {
    "short": {
        "about": "Every method, its schedule scaled to few epochs.",
        "target": "resnet18",
        "epochs": 20,
        "weights": ("last",),
        "ema": 0.999,
        "flags": [],
        "rows": [
            "dynat",
            "dynat-inner",
            "dynat-inner-awp",
            "dynat-awp --kl-weight 0",
            "dynat-awp",
            "pgd-at",
            "trades",
            "lbgat",
            "at-awp",
            "mart",
            "gairat",
            "dynat-inner-gairat",
            "mail",
            "dynat-inner-mail",
            "fat",
            "sat",
            "dynat --no-clean-forward",
            "dynat-inner --no-clean-forward",
            "dynat-gairat",
            "dynat-mail",
            "mail-mse",
            "trades-awp",
        ],
    },
    "overfitting": {
        "about": "Robust overfitting over a whole schedule: the best epoch, chosen on held-out training images, and "
        "the last, each attacked on the test images.",
        "target": "resnet18",
        "epochs": 100,
        "weights": ("last", "best"),
        "ema": 0,
        "flags": ["--val-images", "1000"],
        "rows": ["dynat-inner-awp", "pgd-at", "dynat-inner", "at-awp"],
    },
    "wrn": {
        "about": "The paper's network, for as many epochs as --epochs says; the schedule scales.",
        "target": "wrn34-10",
        "epochs": 10,
        "weights": ("last",),
        "ema": 0,
        "flags": [],
        "rows": ["dynat-inner-awp"],
    },
}
GRACE = 60  # seconds that a command has to end after it was told to


class Row(NamedTuple):
    """A row's words in its plan, its folder, the command that trains it, and those that attack what it trained, by the
    JSON that each leaves: AutoAttack's apart."""

    words: str
    folder: Path
    epochs: int
    train: list
    attacks: dict
    auto_attacks: dict


class BudgetEnd(Exception):
    """The time given is over."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unlike Ctrl-C reaches this process alone."""


def plan_rows(args):
    """The rows that `args` asks for, in the plan's order. Raises UserError where a row or a flag does not exist."""
    plan = PLANS[args.plan]
    names = {row_name(words): words for words in plan["rows"]}
    unknown = [name for name in args.rows or [] if name not in names]
    if unknown:
        raise UserError(f"plan {args.plan} has no row {unknown[0]}: its rows are {' '.join(names)}")
    rows = [plan_row(plan, words, name, args) for name, words in names.items() if name in (args.rows or names)]
    train, attacks, own = train_dynat.parser(), evaluate.parser(), ("out", "resume", "device")
    for row in rows:  # a mistake is said before anything runs
        typed = vars(train.parse_args(row.train[2:]))
        train_dynat.resolve({flag: value for flag, value in typed.items() if value is not None and flag not in own})
        for line in [*row.attacks.values(), *row.auto_attacks.values()]:
            attacks.parse_args(line[2:])
    return rows


def plan_row(plan, words, name, args):
    method, *own = words.split()
    folder, epochs = args.runs / args.plan / name, args.epochs or plan["epochs"]
    averaged = plan["ema"] and method.startswith("dynat")
    train = ["python", "train_dynat.py", "--method", method, *own]
    train += ["--dataset", "folder", "--data-dir", args.data_dir] if args.data_dir else ["--dataset", "cifar10"]
    train += ["--target", args.target or plan["target"]]
    if "guide" in train_dynat.options(train_dynat.METHODS[method]):
        train += ["--guide", args.guide]
    train += ["--epochs", str(epochs), *plan["flags"]]
    if averaged:
        train += ["--ema", str(plan["ema"])]
    train += [*args.train, "--out", str(folder), "--resume"]

    found = {True: {}, False: {}}
    for weights in [*plan["weights"], *(["ema"] if averaged else [])]:
        for auto, images in ((False, args.images), (True, args.aa_images)):
            attacks = [attack for attack in args.attacks if (attack in evaluate.AUTO_ATTACK) == auto]
            if attacks:
                report = folder / f"{weights}-{'-'.join(attacks)}.json"
                checkpoint = folder / ("best.pt" if weights == "best" else "last.pt")
                line = ["python", "evaluate.py", str(checkpoint)]
                line += ["--weights", "ema"] if weights == "ema" else []
                line += ["--attacks", ",".join(attacks), *(["--images", str(images)] if images else [])]
                found[auto][report] = [*line, *args.evaluate, "--json", str(report), "--resume"]
    return Row(words, folder, epochs, train, found[False], found[True])


def read(folder):
    """All that was measured in a row's folder, as the gathered file keeps it: its words and commands, why it failed,
    config, log and evaluations. Empty if the row was never begun."""
    if not (folder / "row.json").exists():
        return {}
    record = figures.read_json(folder / "row.json")
    for name, file in (("config", "config.json"), ("log", "log.jsonl")):
        if (folder / file).exists():
            record[name] = figures.read_json(folder / file)
    reports = sorted(set(folder.glob("*.json")) - {folder / "row.json", folder / "config.json"})
    return {**record, "evaluations": {report.stem: figures.read_json(report) for report in reports}}


def restore(record, folder):
    """What `read` returned, as files again, for figures.py and for going on; row.json last, so that a half restored
    folder counts as none."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{name}.json": report for name, report in record["evaluations"].items()}
    if "config" in record:
        contents["config.json"] = record["config"]
    if "log" in record:
        engine.write_log(folder, record["log"])
    contents["row.json"] = {name: record[name] for name in ("row", "train", "failed") if name in record}
    for file, content in contents.items():
        write_text(folder / file, json.dumps(content, indent=1) + "\n")


def check_same(row):
    """Raises UserError where the folder holds figures of another command: one table, one set of flags."""
    record = read(row.folder)
    kept = {row.folder / f"{name}.json": report["command"] for name, report in record.get("evaluations", {}).items()}
    pairs = [(record.get("train"), row.train)]
    pairs += [(kept.get(report), line) for report, line in {**row.attacks, **row.auto_attacks}.items()]
    for former, now in pairs:
        if former not in (None, shlex.join(now)):
            raise UserError(f"{row.folder} is of another command, '{former}': repeat its flags, or choose other --runs")


def trained(row):
    """Whether the row's weights are there, after its last epoch."""
    return (row.folder / "last.pt").exists() and len(read(row.folder).get("log", [])) >= row.epochs


def seconds_needed(row):
    """How long a row takes, from the rows already measured beside it, of its own method where there is one, else the
    slowest: (seconds, what they are estimated from), (0, None) if none is."""
    epochs, attacks = {}, [0]  # seconds
    for file in row.folder.parent.glob("*/row.json"):
        record = read(file.parent)
        if record.get("log"):
            epochs[record["row"]] = statistics.mean(line["seconds"] for line in record["log"])
        for report in record["evaluations"].values():
            if not evaluate.AUTO_ATTACK.keys() & {cell["attack"] for cell in report["results"]}:
                attacks.append(sum(cell["seconds"] for cell in report["results"]))
    if not epochs:
        return 0, None
    same = [words for words in epochs if words.split()[0] == row.words.split()[0]]
    slowest = max(same or epochs, key=epochs.get)
    why = f"{epochs[slowest]:.3g} s an epoch of {row_name(slowest)}{'' if same else ', the slowest so far'}"
    return row.epochs * epochs[slowest] + len(row.attacks) * max(attacks), why


def measure(rows, run, left):
    """Trains and attacks what is not there yet, then AutoAttack. `run(command)` returns None, or why it failed, or
    raises BudgetEnd; `left()` is the time left in seconds.

    A failed row is left as it is, and the next one begins. A row begins only if it fits into the time left, going by
    those before it; the first of a call always does.
    """
    begun = False
    for row in rows:
        if "failed" in read(row.folder) or all(report.exists() for report in row.attacks or row.auto_attacks):
            continue
        if not trained(row):
            if not (row.folder / "last.pt").exists():
                needed, why = seconds_needed(row)
                if begun and needed > left():
                    print(f"{row.folder.name} is not begun: {left():.0f} s are left, it takes about {needed:.0f} s "
                          f"({why})", flush=True)  # fmt: skip
                    continue
                if read(row.folder):  # what is there is of weights that are lost; a folder of somebody else's stays
                    shutil.rmtree(row.folder, ignore_errors=True)
                row.folder.mkdir(parents=True, exist_ok=True)
                write_text(row.folder / "row.json", json.dumps({"row": row.words, "train": shlex.join(row.train)}))
            begun = True
            if not succeeds(row, row.train, run):
                continue
        begun = True
        attack(row, row.attacks, run)
    for row in rows:
        if "failed" in read(row.folder) or not trained(row):
            continue  # weights that are lost are not worth training anew for AutoAttack alone: its cell stays blank
        attack(row, row.auto_attacks, run)


def attack(row, attacks, run):
    for report, line in attacks.items():
        if not report.exists() and not succeeds(row, line, run):
            return


def succeeds(row, line, run):
    """Runs a row's command; where it fails, keeps why. To try again, delete "failed" from the folder's row.json."""
    failure = run(line)
    if failure:
        record = figures.read_json(row.folder / "row.json")
        write_text(row.folder / "row.json", json.dumps({**record, "failed": f"{shlex.join(line)}: {failure}"}))
    return not failure


def execute(line, left, lock, keep):
    """Runs a command until it ends or the time is over. Returns None or, where it failed, its last line on standard
    error.

    Raises BudgetEnd, or KeyboardInterrupt, once the command has ended too; `keep()` is called in the end either way.
    """
    if left() <= 0:
        raise BudgetEnd
    print("$", shlex.join(line), flush=True)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # its lines appear as it prints them
    with tempfile.TemporaryFile("w+") as errors:
        arguments = [sys.executable, *line[1:]]
        child = subprocess.Popen(arguments, cwd=ROOT, stderr=errors, env=unbuffered, pass_fds=[lock])
        stopped = None
        try:
            child.wait(left())
        except subprocess.TimeoutExpired:
            stopped = BudgetEnd()
            child.terminate()
        except Terminated as signalled:
            stopped = signalled
            child.terminate()
        except KeyboardInterrupt as signalled:  # Ctrl-C has reached the command as well
            stopped = signalled
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read()
    print(said, end="", file=sys.stderr, flush=True)
    keep()
    if stopped is not None:
        raise stopped
    if child.returncode == 0:
        return None
    return (said.strip().splitlines() or ["it said nothing"])[-1] + f" (exit status {child.returncode})"


@contextmanager
def alone(folder):
    """A lock on a folder of runs, which commands inherit: one that outlives a killed call still holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another call, or a command that outlived it, works in {folder}: wait for it") from None
        yield file.fileno()


def gather(args):
    """Writes the plan's two files from its run folders."""
    folders = {row_name(words): args.runs / args.plan / row_name(words) for words in PLANS[args.plan]["rows"]}
    records = {name: record for name, folder in folders.items() if (record := read(folder))}
    results = {"plan": args.plan, "rows": records}
    write_text(args.out / f"cifar10-{args.plan}.json", json.dumps(results) + "\n")
    write_text(args.out / f"cifar10-{args.plan}.md", page(results, PLANS[args.plan]))


def parser():
    p = Parser(prog="cifar10.py", description=__doc__)
    add = p.add_argument
    add("--plan", choices=PLANS, required=True, help="which rows; see results/README.md")
    add("--data-dir", metavar="D", help="a folder with CIFAR-10 as images (default: torchvision's, downloaded)")
    add("--budget", type=bounded(float, 0), default=math.inf, metavar="SECONDS", help="default: until all is done")
    add("--rows", nargs="+", metavar="ROW", help="default: all of the plan, in its order")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="of the two files (default: results)")
    add("--runs", type=Path, default=Path("runs/cifar10"), metavar="DIR", help="default: runs/cifar10")
    add("--target", metavar="NAME", help="default: the plan's")
    add("--guide", default="resnet18", metavar="NAME", help="of the rows that have one (default: resnet18)")
    add("--epochs", type=bounded(int, 1), help="default: the plan's")
    add("--attacks", type=evaluate.attack_names, default="clean,pgd20,cw,aa", metavar="LIST",
        help="default: clean,pgd20,cw,aa")  # fmt: skip
    add("--images", type=bounded(int, 1), metavar="N", help="to attack (default: all test images)")
    add("--aa-images", type=bounded(int, 1), default=1000, metavar="N",
        help="to attack with AutoAttack, a class-balanced subset (default: 1000)")  # fmt: skip
    add("--train", type=shlex.split, default=[], metavar="'FLAGS'",
        help="more flags of train_dynat.py, as --train='--train-images 5000'")  # fmt: skip
    add("--evaluate", type=shlex.split, default=[], metavar="'FLAGS'",
        help="more flags of evaluate.py, as --evaluate='--batch-size 500'")  # fmt: skip
    return p


def stop(number, frame):
    raise Terminated("the same command goes on")


@command
def main(argv):
    args = parser().parse_args(argv)
    began = time.monotonic()
    left = lambda: began + args.budget - time.monotonic()
    if Path.cwd() != ROOT:
        raise UserError(f"its commands name files from {ROOT}: start it there")
    rows, file = plan_rows(args), args.out / f"cifar10-{args.plan}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    with alone(args.runs / args.plan) as lock:
        if file.exists():
            for name, record in figures.field(figures.read_json(file), "rows", file).items():
                if not (args.runs / args.plan / name / "row.json").exists():
                    restore(record, args.runs / args.plan / name)
        if args.budget:
            evaluate.check_auto_attack(args.attacks, 10)
            for row in rows:
                check_same(row)
            try:
                measure(rows, partial(execute, left=left, lock=lock, keep=partial(gather, args)), left)
            except BudgetEnd:
                print(f"the budget of {args.budget:g} s is used up: the same command goes on", flush=True)
        gather(args)
    print(f"written: {file} and {file.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
