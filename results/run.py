"""Trains and attacks the rows of a plan, one after another, and keeps what was measured.

    python results/run.py tiny                            every method on the made-up set, on a CPU
    python results/run.py labels --list                   only prints the commands of the rows
    python results/run.py labels --out results/jpeg -- --dataset folder --data-dir D --target cnn --guide cnn
    python results/run.py my-plan.txt --attacks clean,pgd50   your own plan: in each line the flags of one row

What stands after -- is added to every training command. The runs are in runs/; the folder --out keeps what was measured
and small weights, and a page with all rows that have results. After a stop at any moment the same command goes on.
Several calls may run side by side. The exit status is 0 if all rows are measured.
"""

import csv
import json
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are in the folder above

import figures  # noqa: E402
from checkpoints import lock  # noqa: E402
from cli import Parser, UserError, atomic_write, exit_status, write_text  # noqa: E402
from evaluate import attack_names  # noqa: E402
from train_dynat import METHODS  # noqa: E402

EACH_METHOD = [f"--method {method}" for method in METHODS]
PAIRS = [f"--method {m} --seed {seed}{static}" for seed in (1, 2, 3) for m in ("dynat", "dynat-inner")
         for static in ("", " --static-labels")]  # fmt: skip
GUIDES = [f"--method dynat-inner --guide {guide}" for guide in ("cnn", "cnn-2", "cnn-4", "resnet18", "wrn34-10")]
PLANS = {  # (flags of all rows, which flags after -- override; flags that set each row apart)
    # Does every method become robust?
    "tiny": ("--dataset tiny", EACH_METHOD),
    # Are dynamic labels better than static ones, how do they grow, does the guide stay ahead? Does Inner help?
    "labels": ("", [*PAIRS, "--method dynat-awp --seed 1", "--method dynat-inner-awp --seed 1"]),
    # Which method is best on clean images? Do dynamic labels improve GAIRAT and MAIL?
    "methods": ("--epochs 20", EACH_METHOD),
    # Is cross-entropy on hard labels better than the MSE to the guide? Does a guide of any size serve?
    "guides": ("--guide resnet18 --epsilon 0.031 --step-size 2/255", ["--method dynat", "--method lbgat", *GUIDES]),
    # Do dynamic labels mitigate robust overfitting? So few images that it happens, one schedule, decay and attack.
    "overfitting": (
        "--target cnn-4 --guide cnn-4 --train-images 250 --val-images 1000 --epochs 300 --lr-milestones 226 271 "
        "--batch-size 32 --eval-every 5 --weight-decay 2e-4 --epsilon 0.031 --step-size 2/255",
        ["--method dynat-inner", "--method dynat-inner --static-labels", "--method pgd-at"],
    ),
    # Do the answers to the questions above depend on how long one trains?
    "long": (
        "--epochs 50",
        [
            *PAIRS[:4],  # seed 1
            "--method lbgat --seed 1 --epsilon 0.031 --step-size 2/255",  # dynat's attack
            "--method trades --seed 1",
            # dynat's attack, weight decay and schedule, but for its warm-up epoch
            "--method pgd-at --seed 1 --lr-milestones 38 46 --weight-decay 2e-4 --epsilon 0.031 --step-size 2/255",
            "--method fat --seed 1",
        ],
    ),
    # The rows of the paper's Tables 1 to 4, see below.
    "paper": ("", []),
}


def paper_rows():
    """The flags of the paper's rows. A row of two tables is one here."""
    rows = []
    for row in csv.DictReader((ROOT / "results" / "paper.csv").read_text(encoding="utf-8").splitlines()):
        names = [name for name in ("method", "dataset", "target", "guide", "kl_weight") if row[name]]
        rows.append(" ".join(f"--{name.replace('_', '-')} {row[name]}" for name in names))
    return list(dict.fromkeys(rows))


def read_plan(plan):
    """(a plan's name, the flags of all its rows, {name of a row: its flags}). A row's name is its flags, joined.
    Raises UserError unless `plan` is one of PLANS or a text file with the flags of one row in each line."""
    name, file = Path(plan).stem, Path(plan)
    if plan in PLANS:
        shared, rows = PLANS[plan] if plan != "paper" else ("", paper_rows())
    elif file.is_file() and name not in PLANS:
        shared, rows = "", filter(str.strip, file.read_text(encoding="utf-8", errors="replace").splitlines())
    else:
        raise UserError(f"{plan} is no plan: choose from {', '.join(PLANS)}, or a text file with another name")
    named = {}
    for row in rows:
        words = row.split()
        if " ".join(words[:2]) not in EACH_METHOD:
            raise UserError(f"{plan}: '{row}' does not start with --method and one of its names")
        named["-".join(word.lstrip("-").replace("/", "-") for word in words[1:])] = row
    return name, shared, named


def evaluations(plan, flags, attacks):
    """How a row is attacked: {name of the evaluation: checkpoint and flags}. `attacks` stand in for the plan's."""
    method = flags.split()[1]
    if plan == "paper":
        return {"last": f"last.pt --protocol paper --attacks {attacks or 'clean,pgd10,pgd20,pgd50,pgd100,apgd,cw,aa'}"}
    if plan == "overfitting":
        return {name: f"{name}.pt --attacks {attacks or 'clean,pgd10,pgd20,cw'}" for name in ("last", "best")}
    last = f"last.pt --attacks {attacks or 'clean,pgd20,cw'}"
    if plan == "tiny" and "guide" in METHODS[method]["training"]:
        last += " --network target,guide"
    # AutoAttack takes by far the longest: only the rows that a question compares, for one seed.
    compared = ("pgd-at", "trades", "gairat", "mail", "dynat-inner-gairat", "dynat-inner-mail")
    asked = plan == "long" or (plan == "labels" and "--seed 1" in flags) or (plan == "methods" and method in compared)
    if asked and not attacks:
        return {"last": last, "aa": "last.pt --attacks aa --images 1000"}
    return {"last": last}


def row_commands(plan, shared, flags, attacks, run_dir):
    """The commands of a row: {"train": its training, then its evaluations by name}. `shared` are all rows' flags, of
    which a method without a guide gets no --guide."""
    words = [*shared, *flags.split()]
    if "guide" not in METHODS[flags.split()[1]]["training"]:
        words = [word for before, word in pairwise(["", *words]) if "--guide" not in (before, word)]
    commands = {"train": ["python", "train_dynat.py", *words, "--out", run_dir, "--resume"]}
    for name, evaluation in evaluations(plan, flags, attacks).items():
        words = f"python evaluate.py RUN/{evaluation} --json RUN/{name}.json --resume".split()
        commands[name] = [word.replace("RUN", run_dir) for word in words]
    return commands


def last_typed(command):
    """{flag: its values} of a command line. Of a flag that is typed twice the last counts, as in the scripts."""
    flags = [words.partition(" ") for words in command.split(" --")]
    return {flag: values for flag, _, values in flags if flag != "images"}  # a test set may have fewer images


def execute(command):
    """Runs a command in the project's folder. Raises UserError if it fails."""
    print("$", shlex.join(command), flush=True)
    if status := subprocess.run([sys.executable, *command[1:]], cwd=ROOT).returncode:
        raise UserError(f"exit status {status} of {shlex.join(command)}")


def measure(commands, run_dir, kept, typed):
    """Runs what is left of a row's commands. Copies what is kept of its results into `kept`, an evaluation when it is
    there, its JSON last: weights only if they are small, and no folder of this machine."""
    reports = [f"{name}.json" for name in commands if name != "train"]
    written = kept / "commands.txt"
    if written.exists():
        before = [last_typed(line) for line in written.read_text(encoding="utf-8").splitlines()]
        if before != [last_typed(shlex.join(command)) for command in commands.values()]:
            raise UserError(f"{written} has other commands: type the same flags, or choose another --out")
    if all((kept / report).exists() for report in reports):
        return
    execute(commands["train"])
    if "aa" in commands:
        test_images = json.loads((run_dir / "config.json").read_bytes())["images"]["test"]
        commands["aa"][commands["aa"].index("1000")] = str(min(1000, test_images))
    write_text(written, "".join(shlex.join(command) + "\n" for command in commands.values()))
    where = Parser(add_help=False)  # --data-dir D or --data-dir=D
    where.add_argument("--data-dir", default="data")
    data_dir = where.parse_known_args(typed)[0].data_dir
    for report in reports:
        if not (run_dir / report).exists():
            execute(commands[report.removesuffix(".json")])
        for file in ("config.json", "log.jsonl", "weights.pt", report.replace(".json", ".npz"), report):
            content = (run_dir / file).read_bytes()
            if file.endswith(".json"):
                content = content.replace(str((ROOT / data_dir).resolve()).encode(), data_dir.encode())
            if file != "weights.pt" or len(content) <= 1_000_000:
                with atomic_write(kept / file) as partial:
                    partial.write_bytes(content)


@exit_status
def main(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    p = Parser(prog="results/run.py", description=__doc__)
    p.add_argument("plan", help=f"{', '.join(PLANS)}, or a text file with the flags of one row in each line")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these, called as their folders")
    p.add_argument("--attacks", type=attack_names, metavar="LIST", help="as of evaluate.py, instead of the plan's")
    p.add_argument("--out", type=Path, default="results", metavar="DIR", help="default: results")
    p.add_argument("--dataset-name", metavar="NAME", help="what the page calls the data set, as 'CIFAR-10, JPEG copy'")
    p.add_argument("--list", action="store_true", help="print the commands, run none")
    args, typed = p.parse_args(argv[:cut]), argv[cut + 1 :]
    plan, shared, rows = read_plan(args.plan)
    folder, runs = ROOT / args.out / plan, f"runs/{Path(args.out).name}/{plan}"
    if unknown := set(args.rows or rows) - rows.keys():
        raise UserError(f"plan {plan} has no row {', '.join(sorted(unknown))}: its rows are {', '.join(rows)}")
    naming = ["--dataset-name", args.dataset_name] if args.dataset_name else []
    attacks = ",".join(args.attacks or [])
    failed = False
    for name in args.rows or rows:
        commands = row_commands(plan, [*shared.split(), *typed], rows[name], attacks, f"{runs}/{name}")
        if args.list:
            print("\n".join(shlex.join(command) for command in commands.values()))
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            with lock(folder / name, "another call is at work on it: skipped"):
                measure(commands, ROOT / runs / name, folder / name, typed)
        except UserError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
        measured = [str(folder / row) for row in rows if (folder / row / "last.json").exists()]
        if measured:
            failed |= figures.main(["table", "--by-seed", *measured, *naming, "--out", f"{folder}.md"]) != 0
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
