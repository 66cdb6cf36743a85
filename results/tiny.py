"""Trains every method on `tiny` at equal budget, attacks it, and writes the table results/tiny.md.

    python results/tiny.py          half an hour on two cores; after an interruption, the same command goes on

Each row is two plain commands, printed as they run and kept in the table. What is finished is kept, a run in its folder
under runs/tiny, its attacks in evaluation.json there; what is not goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_dynat import METHODS, options  # noqa: E402  (the scripts are in the folder above)

ATTACKS = ("clean", "pgd20", "cw")


def commands(run, method, train_images):
    """The command that trains a row into the folder `run`, and the one that attacks what it trained."""
    train = ["python", "train_dynat.py", "--dataset", "tiny", "--method", method, "--out", str(run), "--resume"]
    if train_images:
        train += ["--train-images", str(train_images)]
    networks = "target,guide" if "guide" in options(METHODS[method]) else "target"
    evaluate = ["python", "evaluate.py", str(run / "last.pt"), "--network", networks]
    return train, [*evaluate, "--attacks", ",".join(ATTACKS), "--json", str(run / "evaluation.json")]


def execute(command):
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)


def measure(run, method, train_images):
    """Trains and attacks what is not yet there. Returns the evaluation's report and the row's commands."""
    train, evaluate = commands(run, method, train_images)
    if not (run / "weights.pt").exists():
        execute(train)
    if not (run / "evaluation.json").exists():
        execute(evaluate)
    return json.loads((run / "evaluation.json").read_text()), [train, evaluate]


def accuracies(report, network):
    """{attack: (accuracy, (low, high))} of the report's target or guide; empty if there is none."""
    rows = [row for row in report["results"] if row["network"] == network]
    return {row["attack"]: (row["accuracy"], row["interval"]) for row in rows}


def cells(found):
    if not found:
        return [""] * len(ATTACKS)
    return [f"{found[name][0]:.1%} ({found[name][1][0]:.1%} to {found[name][1][1]:.1%})" for name in ATTACKS]


def table(reports, lines):
    """The page: a row per method, standard training among them, and the commands behind each."""
    standard = accuracies(reports["dynat"], "guide")
    first = reports["dynat"]
    settings, n = first["trained"]["settings"], first["results"][0]["n"]
    images = settings.get("train_images", "all")
    page = [
        "# Every method on tiny, at equal budget",
        "",
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, a {settings['target']} as target and as guide, "
        f"{images} training images, one run each, seed {settings['seed']}; every schedule scaled to these epochs. "
        f"Accuracy after the last epoch on {n} test images, with its 95 % interval; PGD-20 and C&W with epsilon 8/255, "
        "step size 2/255, one start. tiny is made up: this shows that each method works, not which is best.",
        "",
        "Standard training is the guide of the `dynat` run: clean images and ground truth alone, Eq. (4).",
        "",
        "| method | clean | PGD-20 | C&W | guide: clean | PGD-20 | C&W | commit | device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    origin = [str(first["commit"])[:8], first["device"]]
    page.append("| " + " | ".join(["standard training", *cells(standard), "", "", "", *origin]) + " |")
    for method, report in reports.items():
        found = cells(accuracies(report, "target")) + cells(accuracies(report, "guide"))
        page.append("| " + " | ".join([method, *found, str(report["commit"])[:8], report["device"]]) + " |")
    page += ["", f"torch {first['torch']}. Written by `python results/tiny.py`, which ran", "", "```", *lines, "```"]
    return "\n".join(page) + "\n"


def weaker(reports):
    """The methods that are not clearly more robust than standard training: whose intervals overlap with its own."""
    standard = accuracies(reports["dynat"], "guide")
    return [
        f"{method} under {attack}"
        for method, report in reports.items()
        for attack in ("pgd20", "cw")
        if accuracies(report, "target")[attack][1][0] <= standard[attack][1][1]
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="where the runs go (default: runs/tiny)")
    p.add_argument("--page", type=Path, default=ROOT / "results" / "tiny.md", help="default: results/tiny.md")
    p.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all; always with dynat"
    )
    p.add_argument("--train-images", type=int, metavar="N", help="a class-balanced subset (default: all)")
    args = p.parse_args()

    reports, lines = {}, []
    for method in dict.fromkeys(["dynat", *args.methods]):
        reports[method], row = measure(args.runs / method, method, args.train_images)
        lines += [shlex.join(command) for command in row]
    args.page.write_text(table(reports, lines))
    print(f"written: {args.page}")
    for found in weaker(reports):
        print(f"not clearly more robust than standard training: {found}")
    return 1 if weaker(reports) else 0


if __name__ == "__main__":
    sys.exit(main())
