"""Files of a run: saved completely or not at all, loaded safely and strictly; and the run directory. Of this project it
imports `cli` and `models` alone.

A run's `last.pt` is a dict of tensors, numbers and strings: `target`, `guide` and `ema` (state_dicts, where there are
such networks), `optimizer`, `epoch` (finished epochs), `log` (a dict per epoch), `settings` (every resolved flag),
`classes` (names in label order), `images` (a checksum per split) and `config` (versions, commit and device as well).
`log.jsonl`, `weights.pt` and `config.json` are written from it after it.
Of this project it imports `cli` and `models`.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import Normalize

from cli import PARTIAL, UserError, atomic_write, check_file, first_line, write_text
from models import build_model

DEAD_PREFIX = "sub_block1."  # 61 entries of the releases' WRN-34-10 that its forward never uses
WRAPPERS = ("state_dict", "model", "net")  # keys under which other projects keep the weights
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and by torch.compile
# Names under which other projects keep the normalisation of images: in the network, or in a layer before it.
NORMALISATIONS = (("mu", "sigma"), ("mean", "std"))
# What a checkpoint must hold to be evaluated, and to be continued; its settings, and each row of its log.
TRAINED = {"target": dict, "classes": list, "epoch": int, "settings": dict}
RUN = {**TRAINED, "optimizer": dict, "log": list, "images": dict, "config": dict}
SETTINGS = {"target": str, "dataset": str, "data_dir": (str, type(None))}
ROW = dict.fromkeys(("epoch", "lr", "loss", "seconds", "images_per_second"), (int, float))
OUR_FILE = r"(config\.json|log\.jsonl|(last|best|weights|epoch\d+)\.pt)"
OUR_PARTIAL = rf"\.{OUR_FILE}\.\d+\{PARTIAL}"


# Any file


def save(path, content):
    """`content` in the file `path`, complete or not at all. Raises UserError if it cannot be written; what was at
    `path` is then still there."""
    try:
        with atomic_write(path) as partial, open(partial, "wb") as file:  # a name would be stored in the file
            torch.save(content, file)
    except RuntimeError as error:  # torch reports a full disk so, in words of its own: "unexpected pos"
        reason = getattr(error.__context__, "strerror", None)  # the system's words
        raise UserError(f"cannot write {path}: {reason or first_line(error)}") from None


def load(path):
    """What `save` or another project's `torch.save` put into `path`, on the CPU. See `load_with_sha256`."""
    return load_with_sha256(path)[0]


def load_with_sha256(path):
    """(what `save` or another project's `torch.save` put into `path`, on the CPU; the file's SHA-256). Only tensors,
    numbers, strings and containers are read, and the file once. Raises UserError for a file that is missing, truncated,
    damaged or no checkpoint, or that could run code."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a checkpoint in it, such as {path / 'last.pt'}")
    check_file(path)
    content = path.read_bytes()
    beginning = content[:512].lstrip().lower()
    if not beginning:
        raise UserError(f"{path} is empty")
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not a checkpoint: download the file itself")
    if beginning.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not a checkpoint: fetch the file itself with git lfs pull")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the reader gets one line, below
            if zipfile.is_zipfile(io.BytesIO(content)):
                with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch does not look at the checksums
                    has_checksums = any(entry.CRC for entry in archive.infolist())
                    damaged = has_checksums and archive.testzip()
                if damaged:
                    raise UserError(f"{path} is damaged: its entry {damaged} does not match its checksum")
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            _check_plain(found, path)
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        # A pickle begins with 0x80, alone or in a zip archive. Any other file is no code either, only unreadable.
        if beginning.startswith((b"\x80", b"pk")) and re.search("GLOBAL|Unsupported", str(error)):
            raise UserError(f"{path} holds more than tensors and numbers and could run code: refused") from None
        raise UserError(f"{path} is not a checkpoint, or a damaged one") from None
    except Exception:  # a damaged file makes torch, pickle and zipfile raise anything
        raise UserError(f"{path} is not a checkpoint, or a truncated one") from None
    return found, hashlib.sha256(content).hexdigest()


def _check_plain(content, path):
    """Raises UserError if a tensor inside is not a plain one of real numbers in memory."""
    if isinstance(content, torch.Tensor):
        plain = content.layout == torch.strided and content.device.type == "cpu"
        if not plain or content.is_nested or content.is_quantized or content.is_complex():
            raise UserError(f"{path} holds a tensor that is sparse, nested, quantised, complex or without content")
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            _check_plain(value, path)


def invalid_keys(content, types):
    """The keys of `types`, {key: type}, under which `content` holds nothing of that type; all if it is not a dict."""
    if not isinstance(content, dict):
        return list(types)
    invalid = []
    for key, expected in types.items():
        value = content.get(key)
        if not isinstance(value, expected) or isinstance(value, bool):  # which Python counts as an int
            invalid.append(key)
    return invalid


# Networks


def bare_state_dict(content):
    """The state_dict inside `content` with this project's keys: without wrappers, prefixes and dead entries. Raises
    UserError if there is none, or if two entries get the same key."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UserError("the file holds no state_dict")
    state_dict = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"the file holds no state_dict: {key!r} is a {type(value).__name__}, not a tensor")
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if key in state_dict:
            raise UserError(f"the file holds {key} twice, with and without a prefix: which one counts?")
        if not key.startswith(DEAD_PREFIX):
            state_dict[key] = value
    if {key.split(".")[0] for key in state_dict} == {"0", "1"}:  # Sequential(normalisation, network)
        state_dict = {key.split(".", 1)[1]: value for key, value in state_dict.items()}
    return state_dict


def split_normalisation(state_dict):
    """Splits a bare state_dict into the network's own entries and a layer that normalises its images, or None. Raises
    UserError if mean and std are not those of images in [0, 1]."""
    for names in NORMALISATIONS:
        if all(name in state_dict for name in names):
            mean, std = (state_dict[name].float().flatten() for name in names)
            of_rgb = {len(mean), len(std)} <= {1, 3}
            in_range = ((mean >= 0) & (mean <= 1)).all() and ((std > 0) & (std <= 1)).all()
            if not of_rgb or not in_range:
                shown = " and ".join(f"{name} {state_dict[name].flatten()[:3].tolist()}" for name in names)
                raise UserError(f"the file's normalisation is not one of RGB images in [0, 1]: {shown}")
            rest = {key: value for key, value in state_dict.items() if key not in names}
            return rest, Normalize(mean.expand(3).tolist(), std.expand(3).tolist())
    return state_dict, None


def load_weights(model, state_dict, source="checkpoint"):
    """Loads `state_dict` into `model`, every key and every shape; or raises UserError with what differs and loads
    nothing. Only num_batches_tracked may be missing: no output depends on it."""
    if not isinstance(state_dict, dict):
        raise UserError(f"{source} is not a state_dict")
    expected = model.state_dict()
    uncounted = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state_dict = {**uncounted, **state_dict}
    check_tensors(state_dict, expected, source)
    model.load_state_dict(state_dict)


def check_tensors(found, expected, source):
    """Raises UserError unless the dict `found` has the keys of `expected`, with tensors of the same shapes, and finite
    where these are floating-point."""
    both = [key for key in expected if key in found]
    reshaped = []
    for key in both:
        if not is_finite(found[key], expected[key].dtype):
            raise UserError(f"{source} is damaged: {key} is not a tensor of finite numbers")
        if found[key].shape != expected[key].shape:
            reshaped.append(f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}")
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    differences = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if keys:
            differences.append(f"{len(keys)} {kind} ({first_three(keys)})")
    prefixes = {str(key).split(".")[0] for key in unexpected}
    if len(prefixes) == 1 and all(str(key).endswith("num_batches_tracked") for key in both):
        differences.append(f"all keys begin with '{prefixes.pop()}.'")
    if differences:
        raise UserError(f"{source} is of another network: {'; '.join(differences)}")


def is_finite(value, dtype):
    """Whether `value` is a tensor that can stand for one of `dtype`: of finite numbers if that is floating-point."""
    if not isinstance(value, torch.Tensor):
        return False
    if not dtype.is_floating_point:
        return True
    return value.is_floating_point() and bool(value.to(dtype).isfinite().all())


def first_three(keys):
    """'a, b, c ...'"""
    return ", ".join(map(str, keys[:3])) + (" ..." if len(keys) > 3 else "")


def load_trained(path, target=None, dataset=None):
    """(a run's checkpoint, or bare weights in the same form; the file's SHA-256). Bare weights need the names of the
    network and of the data set. Raises UserError if these do not fit the file."""
    content, sha256 = load_with_sha256(path)
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        check_run(content, path, TRAINED)
        if target not in (None, content["settings"]["target"]):
            raise UserError(f"the target of {path} is {content['settings']['target']}, not {target}")
        return content, sha256
    if target is None or dataset is None:
        raise UserError(f"{path} holds bare weights: say --target NAME and --dataset NAME as well")
    return {"target": bare_state_dict(content), "settings": {"target": target}, "classes": None}, sha256


def load_network(content, role, path, num_classes, memory_format=torch.channels_last):
    """The `role`, target or guide, of what `load_trained` found, frozen and in eval mode. Raises UserError if it does
    not fit."""
    if invalid_keys(content, {role: dict}) or invalid_keys(content["settings"], {role: str}):
        raise UserError(f"{path} holds no {role}")
    try:
        model = build_model(content["settings"][role], num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    state_dict, normalisation = split_normalisation(content[role])
    load_weights(model, state_dict, f"the {role} in {path}")
    if normalisation:
        model = nn.Sequential(normalisation, model)
    return model.to(memory_format=memory_format).eval().requires_grad_(False)


# The run directory


@contextmanager
def claim_run_dir(run_dir, resume):
    """No other run uses `run_dir`, made if need be, inside the `with`, which gets the checkpoint in it or None. The
    lock ends with the process, however that ends. A directory that was made here and stays empty is removed. Raises
    UserError if the directory exists and `resume` is False, or if it is another run's or no run's."""
    if run_dir.exists() and not resume:
        raise UserError(f"{run_dir} exists already: continue it with --resume, or choose another folder with --out")
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run_dir} cannot be made ({error.strerror}): choose another --out") from None
        with lock(run_dir, f"another run is at work in {run_dir}: wait for it, or choose another --out"):
            checkpoint = load_run(run_dir / "last.pt")
            if checkpoint is not None or started_but_unsaved(run_dir):
                for file in run_dir.iterdir():
                    if re.fullmatch(OUR_PARTIAL, file.name):  # a killed run was writing it
                        file.unlink()
            yield checkpoint
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def lock(path, refusal):
    """Locks a file or folder inside the `with`. Raises UserError with `refusal` if another process has the lock."""
    with ExitStack() as stack:
        handle = os.open(path, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError:
            print(f"note: {path}: its file system has no locks, a second process would not be noticed", file=sys.stderr)
        yield


def started_but_unsaved(run_dir):
    """Whether `run_dir` is of a run that was stopped in its first epoch. Raises UserError if a run that starts here
    would overwrite anything else."""
    config = run_dir / "config.json"
    begun = config.is_file() and '"settings"' in config.read_text("utf-8", errors="replace")
    for file in sorted(run_dir.iterdir()):
        if re.fullmatch(OUR_FILE, file.name) and not (begun and file == config):
            raise UserError(f"{file} is there, but no last.pt to continue from: choose another --out")
    return begun


def load_run(path):
    """The checkpoint of a run, to continue it; None if there is none. Raises UserError if it is something else."""
    if not path.exists():
        return None
    try:
        checkpoint = load(path)
        check_run(checkpoint, path, RUN)
        return checkpoint
    except UserError as error:
        raise UserError(f"{error}; bring back a copy of it, or start anew with another --out") from None


def check_run(content, path, types):
    """Raises UserError unless `content`, from the file `path`, is a run's checkpoint with everything in `types`."""
    invalid = invalid_keys(content, types)
    if not invalid:
        invalid = invalid_keys(content["settings"], SETTINGS)
        try:
            json.dumps([content["settings"], content.get("config")], allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            invalid.append("settings and config of finite numbers and words")
        if not all(isinstance(name, str) for name in content["classes"]):
            invalid.append("names of classes")
        if "log" in types and not _is_log(content["log"], content["epoch"]):
            invalid.append("log of numbers for each epoch")
    if invalid:
        raise UserError(f"{path} is not a run's checkpoint: it has no {', '.join(invalid)}")


def _is_log(log, epochs):
    """Whether `log` has a row of finite numbers, accuracies between 0 and 1, for each epoch from 1 to `epochs`."""
    if not log or len(log) != epochs:
        return False
    for number, row in enumerate(log, 1):
        if invalid_keys(row, ROW) or row["epoch"] != number:
            return False
        for name, value in row.items():
            if not isinstance(name, str) or type(value) not in (int, float) or not abs(value) < math.inf:
                return False
            is_accuracy = name.endswith("_acc") or name.startswith("val_")
            if is_accuracy and not 0 <= value <= 1:
                return False
    return True


def load_state(checkpoint, models, optimizer):
    """Loads the networks, by role, and the optimizer from a run's checkpoint. Raises UserError if it is of others."""
    for role, model in models.items():
        load_weights(model, checkpoint.get(role), f"the checkpoint's {role}")
    load_momentum(optimizer, checkpoint["optimizer"])


def load_momentum(optimizer, saved):
    """Loads the momentum of each weight from the state_dict of an SGD. All else in it follows from the settings."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    expected = dict(enumerate(weights)) if optimizer.param_groups[0]["momentum"] else {}
    damaged = UserError("the checkpoint's momentum is damaged")
    if invalid_keys(saved, {"state": dict}):
        raise damaged
    momenta = {}
    for index, state in saved["state"].items():
        if invalid_keys(state, {"momentum_buffer": torch.Tensor}):
            raise damaged
        momenta[index] = state["momentum_buffer"]
    check_tensors(momenta, expected, "the checkpoint's momentum")
    state = {index: {"momentum_buffer": momentum.clone()} for index, momentum in momenta.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_run(run_dir, checkpoint):
    """Saves a finished epoch: `last.pt`, then what is written from it."""
    save(run_dir / "last.pt", checkpoint)
    write_from_checkpoint(run_dir, checkpoint)


def write_from_checkpoint(run_dir, checkpoint):
    """Writes what follows from `last.pt`, also after a kill between two files: log.jsonl, weights.pt and config.json;
    `best.pt` if this epoch is the best on held-out images so far; `epochNNN.pt` if this epoch is to be kept."""
    settings, log, epoch = (checkpoint[name] for name in ("settings", "log", "epoch"))
    write_text(run_dir / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    save(run_dir / "weights.pt", checkpoint["target"])
    write_config(run_dir, checkpoint["config"])
    best_before = max((row.get("val_pgd", -1) for row in log[:-1]), default=-1)
    if log[-1].get("val_pgd", -1) > best_before:
        save(run_dir / "best.pt", checkpoint)
    if settings["keep_from"] is not None and epoch >= settings["keep_from"]:
        networks_only = {name: value for name, value in checkpoint.items() if name != "optimizer"}
        save(run_dir / f"epoch{epoch:03}.pt", networks_only)


def write_config(run_dir, config):
    """Writes config.json: settings, classes, number of images, versions, commit, device."""
    write_text(run_dir / "config.json", json.dumps(config, indent=1) + "\n")


def what_is_saved(run_dir):
    """For somebody whose run ended early: what is kept, and how to go on."""
    log = run_dir / "log.jsonl"
    if not log.is_file():
        return "nothing was saved yet"
    epochs = log.read_text(encoding="utf-8").count("\n")
    return f"everything up to epoch {epochs} is saved; to go on, add --out {run_dir} --resume"
