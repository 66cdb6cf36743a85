"""What both command lines share: one-line errors, exact numbers, and the facts a measured figure carries."""

import argparse
import functools
import io
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
import torchvision


class UserError(Exception):
    """A person's mistake: the message says in one line what is wrong and how to mend it."""


class Stopped(Exception):
    """A signal, `number`, ended a run after its state was saved; the message says where and how to go on."""

    def __init__(self, number, message):
        super().__init__(message)
        self.status = 128 + number  # as the shell counts: 130 after Ctrl-C, 143 after SIGTERM


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors; flags are typed in full, so that a typo is never another flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def first_line(error):
    """The first line of what a library's error says, or its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def command(main):
    """Makes `main(argv)` return an exit status: 0, 2 after one line about a person's mistake, 130 after Ctrl-C, 143
    after SIGTERM. Of several processes the first one says the line; its memory, each one for itself."""

    @functools.wraps(main)
    def with_status(argv=None):
        heard = os.environ.get("RANK", "0") == "0"  # torchrun's number of the process
        if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is shown in escapes
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(sys.argv[1:] if argv is None else argv)
            return 0
        except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
            line, status = f"error: {error}", 2
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not full and "you tried to allocate" not in str(error):  # as torch says it of the CPU's memory
                raise
            line, status, heard = f"error: out of memory ({first_line(error)}): try a smaller --batch-size", 2, True
            line += " or, in training, --precision bf16"
        except Stopped as stop:
            line, status = f"stopped: {stop}", stop.status
        except KeyboardInterrupt as stop:
            line, status = ": ".join(["interrupted", *stop.args]), 130
        if heard:  # names, as of files and of weights, may hold line breaks and a terminal's commands
            print("".join(c if c.isprintable() else " " for c in line), file=sys.stderr)
        return status

    return with_status


def number(text):
    """'8/255' or '0.031' as the nearest float. Raises ValueError for anything else, infinities included."""
    try:
        value = float(Fraction(text) if "/" in text else text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is not a number like 0.031 or 8/255")
    return value


def bounded(convert, low, high=math.inf):
    """An argparse type: `convert` and then low <= value <= high, and no whole number that the machine has not."""
    high = min(high, sys.maxsize) if convert is int else high

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            kind = "a whole number" if convert is int else "a number like 0.031 or 8/255"
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind}") from None
        if not low <= value <= high:
            limits = f"at least {low}" if high >= sys.maxsize and value < low else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    return parse


def pick_device(name):
    """The torch.device called `name`, by default the GPU if there is one. Raises UserError where it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{name}' cannot be used here: {first_line(error)}") from None
    return device


def full_float32():
    """float32 means float32: TF32, torch's default in cuDNN's convolutions, is switched off."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def deterministic(wanted):
    """Where `wanted`, the same seed gives the same bytes on the same device; else the device's faster ways are free."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS, too, asks for it before its first product
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help against bugs that costs a pass over all
    torch.backends.cudnn.benchmark = not wanted


def provenance(device):
    """What a figure carries: versions, commit of this repository (with '+' where files differ from it), device."""
    here = Path(__file__).resolve().parent
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),  # a plain string, that a checkpoint may hold
        "torchvision": torchvision.__version__,
        "commit": _git(here, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"),
        "device": gpu or f"{device.type}, {torch.get_num_threads()} threads",
    }


def _git(folder, *arguments):
    # Only this project's own repository counts, not one that the files happen to be copied into.
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


PARTIAL = ".partial"


@contextmanager
def written_whole(path):
    """The path of a file to write beside `path`. At the end of the `with` it is flushed to the disk and takes the place
    of what was at `path`; after an error it is removed and nothing has changed. A process killed in between leaves a
    hidden file behind whose name ends with PARTIAL, and nothing has changed either."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    """`text` in the file `path`, whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")
