"""Kills runs at random moments, resumes them, and compares what they end in with runs that nobody stopped.

    python benchmarks/kills.py                  a hundred kills over all methods

A run survives if the bytes of weights.pt, the networks in best.pt, the rows of log.jsonl without their times and the
names of all files are those of the undisturbed run.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_dynat
from cli import PARTIAL, Parser, UserError, exit_status, in_range, provenance

RUN = ["--dataset", "tiny", "--train-images", "128", "--batch-size", "16", "--epochs", "3", "--steps", "2"]
RUN += ["--ema", "0.9", "--val-images", "32", "--device", "cpu"]
KINDS = ("SIGKILL in a save", "SIGKILL", "SIGTERM", "SIGINT")  # one after the other
KILLED = (-signal.SIGKILL, -signal.SIGTERM, 130)


def train(argv, output):
    """What the process of a run does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with open(output, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        sys.exit(train_dynat.main(argv))


def run(method, run_dir, kind=None, moment=0.0):
    """Trains in a process that is killed after `moment` seconds; in a save: then as soon as a file is being written.
    Returns its exit status, negative where a signal ended it, its output, and how long it took."""
    began, output = time.perf_counter(), run_dir.with_name("output.txt")
    argv = [*RUN, "--method", method, "--resume", "--out", str(run_dir)]
    process = multiprocessing.get_context("fork").Process(target=train, args=(argv, output))  # torch is imported once
    process.start()
    if kind is not None:
        time.sleep(moment)
        while "save" in kind and process.is_alive() and not list(run_dir.glob(f".*{PARTIAL}")):
            pass
        if process.is_alive():
            os.kill(process.pid, getattr(signal, kind.split()[0]))
    process.join()
    return process.exitcode, output.read_text(), time.perf_counter() - began


def ending(run_dir):
    """What a run ended in. A kill in the first write leaves an unfinished config.json: the folder is no run's yet."""
    best = torch.load(run_dir / "best.pt", weights_only=True)
    networks = [best[role] for role in ("target", "guide", "ema") if role in best]
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    return {
        "weights.pt": (run_dir / "weights.pt").read_bytes(),
        "best.pt": [value.numpy().tobytes() for state_dict in networks for value in state_dict.values()],
        "log.jsonl": [{**json.loads(line), "seconds": None, "images_per_second": None} for line in lines],
        "names of files": {file.name for file in run_dir.iterdir() if not file.match(f".config.json.*{PARTIAL}")},
    }


def survive(method, kinds, folder, moments):
    """Trains `method` undisturbed, and once more with kills of these kinds. Returns what differs."""
    kinds, whole, cut = list(kinds), folder / "whole", folder / "cut"
    status, output, seconds = run(method, whole)
    while status in (0, *KILLED):
        kind = kinds[0] if kinds else None
        status, output, taken = run(method, cut, kind, moments.uniform(0.1, 0.8) * seconds)
        if status in KILLED:
            kinds.pop(0)
        elif status == 0:  # it ended before it was hit
            differing = [name for name, value in ending(whole).items() if value != ending(cut)[name]]
            if differing or not kinds:
                return differing
            cut, seconds = Path(tempfile.mkdtemp(dir=folder)), taken
    return [f"exit status {status}: {output}"]


@exit_status
def main(argv):
    p = Parser(prog="benchmarks/kills.py", description=__doc__)
    p.add_argument("--kills", type=in_range(int, 1), default=100, help="in all")
    p.add_argument("--methods", nargs="+", choices=train_dynat.METHODS, default=[*train_dynat.METHODS], metavar="M")
    args = p.parse_args(argv)
    print("  ".join(f"{name} {value}" for name, value in provenance(torch.device("cpu")).items()))
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # makes MKL load its code, which a signal would disturb
    moments, broken, n = random.Random(0), 0, len(args.methods)
    for i, method in enumerate(args.methods):
        kinds = [KINDS[j % len(KINDS)] for j in range(args.kills * i // n, args.kills * (i + 1) // n)]
        with tempfile.TemporaryDirectory() as folder:
            differing = survive(method, kinds, Path(folder), moments)
        broken += bool(differing)
        outcome = f"DIFFERS: {', '.join(differing)}" if differing else "same"
        print(f"{method:20} {', '.join(kinds)}: {outcome}", flush=True)
    if broken:
        raise UserError(f"{broken} of {n} runs did not end as undisturbed ones")


if __name__ == "__main__":
    sys.exit(main())
