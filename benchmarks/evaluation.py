"""How much faster several processes evaluate a network than one: the median of five, side by side.

    python benchmarks/evaluation.py runs/dynat-tiny-cnn-s1/last.pt

The clock runs from the first line of the progress file, when all processes are ready, to the JSON file. Each process
has one thread. More flags of evaluate.py may follow.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
WORK = {
    "AutoAttack on 200 images": "--attacks clean,aa --images 200 --batch-size 25",
    "PGD-50 on 1,000 images": "--attacks clean,pgd50 --images 1000 --batch-size 50",
}


def seconds(processes, flags):
    """How long so many processes take to attack all images."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        progress = Path(f"{file}.progress")
        command = [*launcher, str(ROOT / "evaluate.py"), *flags, "--device", "cpu", "--json", str(file)]
        evaluation = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not (progress.exists() and progress.stat().st_size) and evaluation.poll() is None:
            time.sleep(0.01)
        began = time.time()
        printed, _ = evaluation.communicate()
        if evaluation.returncode:
            sys.exit(printed.decode())
        return file.stat().st_mtime - began


def main(flags):
    for name, attack in WORK.items():
        times = {1: [], 2: [], 4: []}
        for _ in range(REPEATS):
            for processes, found in times.items():
                found.append(seconds(processes, [*flags, *attack.split()]))
        alone = statistics.median(times[1])
        for processes, found in times.items():
            median = statistics.median(found)
            spread = f"{min(found):.1f} to {max(found):.1f}"
            print(f"{name}: {processes} processes {median:.1f} s ({spread}), {alone / median:.2f} times", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
