"""Kills runs at random moments, resumes them, and compares what they end in with runs that were never stopped.

    python benchmarks/kills.py                              a hundred kills over all methods
    python benchmarks/kills.py --kills 3 --methods dynat    as the test suite does
    python benchmarks/kills.py --processes 2                each run by two processes, killed together

A kill is SIGKILL at a random moment or in the middle of a save, SIGTERM or Ctrl-C. A run survives if the bytes of
weights.pt and best.pt and the rows of log.jsonl, but for the times in them, are those of the undisturbed run.
"""

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_dynat
from cli import PARTIAL, Parser, UserError, bounded, command, provenance

RUN = ["--dataset", "tiny", "--train-images", "128", "--batch-size", "16", "--epochs", "3", "--steps", "2"]
RUN += ["--ema", "0.9", "--val-images", "32", "--device", "cpu"]
KINDS = ("SIGKILL in a save", "SIGKILL", "SIGTERM", "SIGKILL in a save", "SIGKILL", "SIGINT")  # one after the other
TIMES = ("seconds", "images_per_second")


def start(argv, count, errors):
    """Runs train_dynat.py in `count` new processes, whose standard error goes to the file `errors`; returns their
    numbers. They are forked, so that torch is imported once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            torch.set_num_threads(1)
            if count > 1:  # what torchrun says to its processes
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in own.items()})
            status = 1
            try:
                status = train_dynat.main(argv)
            finally:
                os._exit(status)
        children.append(child)
    return children


def end(children):
    """Waits for the processes; returns the first one's exit status, negative where a signal ended it."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return statuses[0]


def strike(children, kind, moment, out):
    """Kills the processes after `moment` seconds or, in a save, as soon as one is under way after it. Returns the exit
    status, 0 where they were done before."""
    deadline = time.perf_counter() + moment
    while time.perf_counter() < deadline or (kind == "SIGKILL in a save" and not list(out.glob(f".*{PARTIAL}"))):
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0 if kind == "SIGKILL in a save" else 0.005)
    for child in children:
        os.kill(child, getattr(signal, kind.split()[0]))
    return end(children)


def ending(out):
    """What a run ended in: the bytes of its weights and of its best checkpoint's weights, and its log's rows."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    best = torch.load(out / "best.pt", weights_only=True)["target"]
    return {
        "weights.pt": (out / "weights.pt").read_bytes(),
        "best.pt": [value.numpy().tobytes() for value in best.values()],
        "log.jsonl": [{name: value for name, value in row.items() if name not in TIMES} for row in rows],
    }


def torment(method, kinds, processes, folder, draws):
    """Trains `method` undisturbed, and again with kills of these `kinds`. Returns how many hit and what differs."""
    whole, cut, errors = folder / "whole", folder / "cut", folder / "errors.txt"
    argv = [*RUN, "--method", method]
    began = time.perf_counter()
    if end(start([*argv, "--out", str(whole)], processes, errors)) != 0:
        raise UserError(f"{method} does not train at all: {errors.read_text()}")
    seconds = time.perf_counter() - began
    hits = 0
    while hits < len(kinds):
        children = start([*argv, "--out", str(cut), "--resume"], processes, errors)
        status = strike(children, kinds[hits], draws.uniform(0, 0.7 * seconds), cut)
        if status == 0:  # done before it was hit: the next run begins anew
            if differing := compare(whole, cut):
                return hits, differing
            cut = cut.with_name(cut.name + "-again")
        elif status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143):
            hits += 1
        else:
            return hits, [f"exit status {status}: {errors.read_text()}"]
    if end(start([*argv, "--out", str(cut), "--resume"], processes, errors)) != 0:
        return hits, [f"no end after the last kill: {errors.read_text()}"]
    return hits, compare(whole, cut)


def compare(whole, cut):
    """The names of what differs between two runs' endings, and of files that only the killed one has."""
    a, b = ending(whole), ending(cut)
    left = {file.name for file in cut.iterdir()} - {file.name for file in whole.iterdir()}
    return [name for name in a if a[name] != b[name]] + sorted(left)


@command
def main(argv):
    p = Parser(prog="benchmarks/kills.py", description=__doc__)
    p.add_argument("--kills", type=bounded(int, 1), default=100, help="in all (default: 100)")
    p.add_argument("--methods", nargs="+", choices=train_dynat.METHODS, default=list(train_dynat.METHODS))
    p.add_argument("--processes", type=bounded(int, 1), default=1, help="of each run (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of moments and kinds (default: 0)")
    args = p.parse_args(argv)
    draws, kinds, broken = random.Random(args.seed), [KINDS[i % len(KINDS)] for i in range(args.kills)], 0
    print("  ".join(f"{name} {value}" for name, value in provenance(torch.device("cpu")).items()))
    for i, method in enumerate(args.methods):
        own = kinds[args.kills * i // len(args.methods) : args.kills * (i + 1) // len(args.methods)]
        with tempfile.TemporaryDirectory() as folder:
            hits, differing = torment(method, own, args.processes, Path(folder), draws)
        broken += bool(differing)
        outcome = f"DIFFERS: {', '.join(differing)}" if differing else "same"
        print(f"{method:20} {hits:3} kills  {outcome}", flush=True)
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(KINDS))
    survived = f"{len(args.methods) - broken} of {len(args.methods)} runs ended in the same bytes"
    print(f"{args.kills} kills ({counts}), {survived}")
    if broken:
        raise UserError("a killed run did not end as an undisturbed one")


if __name__ == "__main__":
    sys.exit(main())
