"""What the command lines share: errors of one line, numbers, exact float32, atomic files, where a figure comes from.

Of this project it imports nothing.
"""

import argparse
import functools
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from textwrap import shorten

import torch
import torchvision
from tqdm import tqdm

PARTIAL = ".partial"  # how the name of an unfinished file ends
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class UserError(Exception):
    """A person's mistake: the message says in one line what is wrong and how to mend it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which clusters end a program: whoever catches Ctrl-C catches it as well."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's true default, if it has one that can be shown."""

    def _get_help_string(self, action):
        text, default = action.help, action.default
        if not action.option_strings or "default" in text:
            return text
        if default is None or isinstance(default, bool) or default == argparse.SUPPRESS:
            return text
        if isinstance(default, float):
            default = f"{default:.4g}"
        return f"{text} (default: {default})".replace("%", "%%")


def home_path(text):
    """The path `text`; ~ at its beginning is the person's home."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors. Flags are typed in full, so that a typo is never another flag. In
    a flag with type=Path, ~ at the beginning is the person's home, also after =, where no shell expands it."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.register("type", Path, home_path)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def first_line(error):
    """The first line of a library's error message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def under_torchrun():
    """Whether torchrun started this process: only its whole set of variables counts."""
    return all(name in os.environ for name in TORCHRUN)


def prints():
    """Whether this process prints: it is the only one, or rank 0 under torchrun."""
    return not under_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def sigterm_raises():
    """Inside the `with`, the first SIGTERM raises Terminated, later ones are ignored. Ranks that do not print die of it
    at once, so that rank 0 waits for none. Nothing changes in a thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread() or not prints():
        yield
        return

    def handle(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(main):
    """Makes `main(argv)` return an exit status: 0, 2 after one line about a person's mistake, 130 after Ctrl-C, 143
    after SIGTERM. Under torchrun, rank 0 prints the line; every rank prints its own lack of memory."""

    @functools.wraps(main)
    @sigterm_raises()
    def wrapped(argv=None):
        if isinstance(argv, str):
            raise TypeError("main takes a list of words, such as ['--dataset', 'tiny']")
        if argv is None:
            argv = sys.argv[1:]
        for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            os.environ.pop(name, None)  # with both, torch.load refuses every file; files are read with True here
        open_closed_streams()
        speaks = prints()
        status = 2
        try:
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they would have been
                main(argv)
            sys.stdout.flush()
            return 0
        except BrokenPipeError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else Python complains once more at its end)
            line = "error: nobody reads standard output any more"
            if not error.errno:  # raised again by a main, which says what it has kept
                line += f": {error}"
        except UserError as error:
            line = f"error: {error}"
        except OSError as error:  # a full disk, a folder that cannot be written
            line = f"error: {error}"
            if error.errno and not error.filename:
                line = f"error: standard output: {error}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            line = f"error: out of memory ({first_line(error)}): "
            line += "try a smaller --batch-size or, in training, --precision bf16"
            speaks = True
        except KeyboardInterrupt as stop:
            line, status = "interrupted", 143 if isinstance(stop, Terminated) else 130
            if stop.args:  # a main says what it has kept
                line += f": {stop}"
        if speaks:
            print_error(line)
        elif status == 2:  # of all ranks: if this one ended first, torchrun would end rank 0 before it has printed
            time.sleep(2)
        return status

    return wrapped


def open_closed_streams():
    """After this, standard output and error can be written to: the shell may have closed them, as 2>&- does, and a
    name that the terminal cannot show is shown in escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_out_of_memory(error):
    """Whether torch or Python raised `error` because the memory of the GPU or of the machine is full."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "you tried to allocate" in str(error)  # torch's words for the CPU's memory


def print_error(line):
    """`line` on standard error. Names of files and weights may hold line breaks and a terminal's commands."""
    printable = "".join(letter if letter.isprintable() else " " for letter in line)
    try:
        print(printable, file=sys.stderr)
    except BrokenPipeError:  # as in 2>&1 | head
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def check_file(path):
    """Raises UserError unless there is a file at `path`. A pipe or a device might never end."""
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file")


def parse_fraction(text):
    """'8/255' or '0.031' as the nearest float. Raises ValueError for anything else, infinities included."""
    try:
        value = float(Fraction(text) if "/" in text else text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"'{text}' is not a number like 0.031 or 8/255")
    return value


def parse_fractions(text):
    """'0.49,0.48,0.45' as a list of floats. Raises ValueError if one is no number."""
    return [parse_fraction(word) for word in text.split(",")]


def in_range(convert, low, high=math.inf):
    """An argparse type: `convert`, then low <= value <= high. A whole number must also fit the machine."""
    high = min(high, sys.maxsize) if convert is int else high

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            kind = "a whole number" if convert is int else "a number like 0.031 or 8/255"
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind}") from None
        if not low <= value <= high:
            limits = f"between {low} and {high}"
            if value < low and high >= sys.maxsize:
                limits = f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    return parse


class Progress(tqdm):
    """A bar on a terminal. Elsewhere a line with the time left every minute."""

    def __init__(self, total, done):
        super().__init__(total=total, initial=done, unit="img", unit_scale=True, disable=None, smoothing=0.05)
        self.done_before = self.done = done  # images
        self.began = self.spoke = time.monotonic()

    def advance(self, images, text):
        """So many more images are done; `text` says where we are."""
        self.done += images
        self.set_description(text, refresh=False)
        self.update(images)
        if not self.disable:  # there is a terminal
            return
        now = time.monotonic()
        if now - self.spoke > 60:
            self.spoke = now
            per_image = (now - self.began) / (self.done - self.done_before)
            left = per_image * (self.total - self.done)
            print(f"{text}: about {self.format_interval(left)} left", flush=True)

    def write(self, line):
        """Prints a line above the bar, at once."""
        super().write(line)
        sys.stdout.flush()


def pick_device(name=None):
    """The torch.device called `name`; without a name the GPU if there is one. Raises UserError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device '{name}' cannot be used here: {shorten(first_line(error), 120)}") from None
    return device


@contextmanager
def numerics(*, deterministic, benchmark=False):
    """Inside the `with`, float32 means float32: TF32, the default of cuDNN's convolutions, is off.

    deterministic   the same seed gives the same bytes on the same device, or torch raises.
    benchmark       cuDNN may choose its algorithms by timing them.
    torch's global switches are put back at the end.
    """
    switches = [
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.conv, "fp32_precision", "ieee"),
        (torch.backends.cudnn, "deterministic", not benchmark),
        (torch.backends.cudnn, "benchmark", benchmark),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),  # finds bugs, but writes all memory twice
    ]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it before its first product
    with ExitStack() as undo:
        undo.callback(torch.use_deterministic_algorithms, was_deterministic, warn_only=warned_only)
        for owner, name, value in switches:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        torch.use_deterministic_algorithms(deterministic)
        yield


def provenance(device):
    """What a figure carries: versions, commit of this repository ('+' if files differ from it), device."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),  # a plain string, which a checkpoint may hold
        "torchvision": torchvision.__version__,
        "commit": _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"),
        "device": gpu or f"{device.type}, {torch.get_num_threads()} threads",
    }


def _git(*arguments):
    """What git says of this project's own repository; None if it has none, or if git fails, of which a note tells."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(here.parent)  # not a repository that this folder was copied into
    options = {"cwd": here, "env": environment, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(["git", *arguments], timeout=10, **options)
        if done.returncode == 0:
            return done.stdout.strip()
        reason = first_line(done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = first_line(error)
    print(f"note: the commit of this program is unknown, since git failed: {reason}", file=sys.stderr)
    return None


@contextmanager
def atomic_write(path):
    """The path of a file to write beside `path`. At the end of the `with` it is flushed to the disk and renamed to
    `path`; after an error it is removed. A process killed in between leaves only a hidden file that ends in PARTIAL."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or first_line(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """`text` in the file `path`, complete or not at all. Raises UserError if it cannot be written."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
