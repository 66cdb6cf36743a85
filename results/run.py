"""Trains and attacks the rows of a plan, one after another, and keeps what was measured.

    python results/run.py tiny                            every method on the made-up set, on a CPU
    python results/run.py labels --list                   only prints the commands of the rows
    python results/run.py labels --out results/jpeg -- --dataset folder --data-dir D --target cnn --guide cnn

What stands after -- is added to every training command. The runs are in runs/; the folder --out keeps what was measured
and small weights, and a page with all rows of the plan. After a stop at any moment the same command goes on. Several
calls may run side by side. The exit status is 0 if all rows are measured.
"""

import csv
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are in the folder above

import figures  # noqa: E402
from checkpoints import lock  # noqa: E402
from cli import Parser, UserError, atomic_write, exit_status, write_text  # noqa: E402
from train_dynat import METHODS  # noqa: E402

EACH_METHOD = [f"--method {method}" for method in METHODS]
PAIRS = [f"--method {m} --seed {seed}{static}" for seed in (1, 2, 3) for m in ("dynat", "dynat-inner")
         for static in ("", " --static-labels")]  # fmt: skip
GUIDES = [f"--method dynat-inner --guide {guide}" for guide in ("cnn", "cnn-2", "cnn-4", "resnet18", "wrn34-10")]
TABLES = csv.reader((ROOT / "results" / "paper.csv").read_text(encoding="utf-8").splitlines())
_, *NAMES = next(TABLES)[:6]  # method ... kl_weight
PAPER = [" ".join(f"--{n.replace('_', '-')} {v}" for n, v in zip(NAMES, row[1:6], strict=True) if v) for row in TABLES]
PLANS = {  # (flags of all rows, which flags after -- override; flags that set each row apart)
    # Does every method become robust?
    "tiny": ("--dataset tiny", EACH_METHOD),
    # Are dynamic labels better than static ones, how do they grow, does the guide stay ahead? Does Inner help?
    "labels": ("", [*PAIRS, "--method dynat-awp --seed 1", "--method dynat-inner-awp --seed 1"]),
    # Which method is best on clean images? Do dynamic labels improve GAIRAT and MAIL?
    "methods": ("--epochs 20", EACH_METHOD),
    # Is cross-entropy on hard labels better than the MSE to the guide? Does a guide of any size serve?
    "guides": ("--guide resnet18 --epsilon 0.031 --step-size 2/255", ["--method dynat", "--method lbgat", *GUIDES]),
    # Do dynamic labels mitigate robust overfitting? Few images, many epochs, one schedule, decay and attack.
    "overfitting": (
        "--train-images 5000 --val-images 1000 --epochs 100 --lr-milestones 76 91 --weight-decay 2e-4 "
        "--epsilon 0.031 --step-size 2/255",
        ["--method dynat-inner", "--method dynat-inner --static-labels", "--method pgd-at"],
    ),
    # Do the answers to the questions above depend on how long one trains?
    "long": (
        "--epochs 50",
        [
            "--method dynat --seed 1",
            "--method dynat --seed 1 --static-labels",
            "--method dynat-inner --seed 1",
            "--method dynat-inner --seed 1 --static-labels",
            "--method lbgat --seed 1 --epsilon 0.031 --step-size 2/255",  # dynat's attack
            "--method trades --seed 1",
            # dynat's attack, weight decay and schedule, but for its warm-up epoch
            "--method pgd-at --seed 1 --lr-milestones 38 46 --weight-decay 2e-4 --epsilon 0.031 --step-size 2/255",
            "--method fat --seed 1",
        ],
    ),
    # The rows of the paper's Tables 1 to 4; a row of two tables is one here.
    "paper": ("", list(dict.fromkeys(PAPER))),
}


def row_name(flags):
    """What the folder of a row is called: its flags without --method, joined by hyphens."""
    return "-".join(word.lstrip("-").replace("/", "-") for word in flags.split()[1:])


def evaluations(plan, flags):
    """How a row is attacked: {name of the evaluation: checkpoint and flags}."""
    method = flags.split()[1]
    if plan == "paper":
        return {"last": "last.pt --protocol paper --attacks clean,pgd10,pgd20,pgd50,pgd100,apgd,cw,aa"}
    if plan == "overfitting":
        return {name: f"{name}.pt --attacks clean,pgd10,pgd20,cw" for name in ("last", "best")}
    last = "last.pt --attacks clean,pgd20,cw"
    if plan == "tiny" and "guide" in METHODS[method]["training"]:
        last += " --network target,guide"
    # AutoAttack takes by far the longest: only the rows that a question compares, for one seed.
    compared = ("pgd-at", "trades", "gairat", "mail", "dynat-inner-gairat", "dynat-inner-mail")
    if plan == "long" or (plan == "labels" and "--seed 1" in flags) or (plan == "methods" and method in compared):
        return {"last": last, "aa": "last.pt --attacks aa --images 1000"}
    return {"last": last}


def row_commands(plan, flags, typed, run_dir):
    """The commands of a row: {"train": its training, then its evaluations by name}. `typed` are the flags after --."""
    words = [*PLANS[plan][0].split(), *typed, *flags.split()]
    while "--guide" in words and "guide" not in METHODS[flags.split()[1]]["training"]:
        at = words.index("--guide")
        del words[at : at + 2]
    commands = {"train": ["python", "train_dynat.py", *words, "--out", run_dir, "--resume"]}
    for name, evaluation in evaluations(plan, flags).items():
        words = f"python evaluate.py RUN/{evaluation} --json RUN/{name}.json --resume".split()
        commands[name] = [word.replace("RUN", run_dir) for word in words]
    return commands


def execute(command):
    """Runs a command in the project's folder. Raises UserError if it fails."""
    print("$", shlex.join(command), flush=True)
    if status := subprocess.run([sys.executable, *command[1:]], cwd=ROOT).returncode:
        raise UserError(f"exit status {status} of {shlex.join(command)}")


def measure(commands, run_dir, kept, typed):
    """Runs what is left of a row's commands. Copies what is kept of its results into `kept`, an evaluation when it is
    there, its JSON last: weights only if they are small, and no folder of this machine."""
    reports = [f"{name}.json" for name in commands if name != "train"]
    text = "".join(shlex.join(command) + "\n" for command in commands.values())
    written = kept / "commands.txt"
    if written.exists() and written.read_text(encoding="utf-8") != text:
        raise UserError(f"{written} has other commands: type the same flags, or choose another --out")
    if all((kept / report).exists() for report in reports):
        return
    execute(commands["train"])
    write_text(written, text)
    data_dir = typed[typed.index("--data-dir") + 1] if "--data-dir" in typed else "data"
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
    p.add_argument("plan", choices=PLANS)
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these, called as their folders")
    p.add_argument("--out", default="results", metavar="DIR", help="default: results")
    p.add_argument("--dataset-name", metavar="NAME", help="what the page calls the data set, as 'CIFAR-10, JPEG copy'")
    p.add_argument("--list", action="store_true", help="print the commands, run none")
    args, typed = p.parse_args(argv[:cut]), argv[cut + 1 :]
    folder, runs = ROOT / args.out / args.plan, f"runs/{Path(args.out).name}/{args.plan}"
    names = {row_name(flags): flags for flags in PLANS[args.plan][1]}
    if unknown := set(args.rows or names) - names.keys():
        raise UserError(f"plan {args.plan} has no row {', '.join(sorted(unknown))}: its rows are {', '.join(names)}")
    naming = ["--dataset-name", args.dataset_name] if args.dataset_name else []
    missing = 0
    for name in args.rows or names:
        commands = row_commands(args.plan, names[name], typed, f"{runs}/{name}")
        if args.list:
            print("\n".join(shlex.join(command) for command in commands.values()))
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            with lock(folder / name, "another call is at work on it: skipped"):
                measure(commands, ROOT / runs / name, folder / name, typed)
                measured = [str(folder / name) for name in names if (folder / name / "last.json").exists()]
                figures.main(["table", *measured, *naming, "--out", f"{folder}.md"])
        except UserError as error:
            missing += 1
            print(f"{name}: {error}", file=sys.stderr)
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
