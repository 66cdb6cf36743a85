"""Checkpoints that are whole or absent, loaded safely and strictly.

A run's `last.pt` is a dict of tensors, numbers and strings: `target`, `guide` and `ema` (state_dicts, where there are),
`optimizer`, `epoch` (whole ones done), `step`, `totals` and `seconds` (of the next epoch, as far as it is), `log`,
`settings` (every resolved flag), `classes` (their names, in label order).
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from cli import UserError, first_line, written_whole

DEAD_PREFIX = "sub_block1."  # 61 entries of the releases' WRN-34-10 which its forward never calls
WRAPPERS = ("state_dict", "model", "net")  # keys under which other projects keep the weights
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and by torch.compile
# What torch and zipfile raise where a file is cut off or no checkpoint at all.
UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError, zipfile.BadZipFile)
NORMALISATIONS = (("mu", "sigma"), ("mean", "std"))  # buffers of other projects' networks that normalise images


def save(path, content):
    """`content` in the file `path`, whole or not at all: written aside, flushed to the disk, renamed.

    Raises UserError where it cannot be written; what was at `path` is then still there.
    """
    try:
        with written_whole(path) as aside, open(aside, "wb") as file:  # given a name, torch would store it in the file
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {first_line(error)}") from None


def load(path):
    """What `save` or another project's `torch.save` put into `path`, on the CPU.

    Only tensors, numbers, strings and containers are read: a file that would run code is refused. Raises UserError for
    it, and for a file that is missing, truncated, damaged or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a checkpoint in it, such as {path / 'last.pt'}")
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if not path.is_file():  # a pipe or a device might never end
        raise UserError(f"{path} is no file")
    with open(path, "rb") as file:
        beginning = file.read(512).lstrip().lower()
    if not beginning:
        raise UserError(f"{path} is empty")
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not a checkpoint: download the file itself")
    if beginning.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not a checkpoint: fetch the file itself with git lfs pull")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the reader gets one line, below
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
                    written = any(entry.CRC for entry in archive.infolist())  # or left at 0, as torch can be told
                    damaged = written and archive.testzip()
                if damaged:
                    raise UserError(f"{path} is damaged: its entry {damaged} does not match its checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # A pickle begins with 0x80, alone or in a zip archive. Any other file is no code either, only unreadable.
        if beginning.startswith((b"\x80", b"pk")) and re.search("GLOBAL|Unsupported", str(error)):
            raise UserError(f"{path} holds more than tensors and numbers and could run code: refused") from None
        raise UserError(f"{path} is no checkpoint, or a damaged one") from None
    except UNREADABLE:
        raise UserError(f"{path} is no checkpoint, or a truncated one") from None


def lacking(content, kinds):
    """The names, of those in `kinds`, under which `content` holds nothing of that kind; all, if it is no dict."""
    return [
        name for name, kind in kinds.items() if not (isinstance(content, dict) and isinstance(content.get(name), kind))
    ]


def bare_state_dict(content):
    """The state_dict inside `content` with this project's keys: wrappers, prefixes and dead entries taken off.

    Raises UserError where there is none, or where two entries get the same key.
    """
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UserError("the file holds no state_dict")
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"the file holds no state_dict: {key!r} is a {type(value).__name__}, not a tensor")
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if key in state:
            raise UserError(f"the file holds {key} twice, with and without a prefix: which one counts?")
        if not key.startswith(DEAD_PREFIX):
            state[key] = value
    return state


class Normalised(nn.Module):
    """model((x - mean) / std): images x (B, 3, H, W) in [0, 1], mean and std (1, 3, 1, 1) per channel."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


def take_normalisation(state_dict):
    """Parts a bare state_dict into the network's own entries and its normalisation, (mean, std) or None.

    Raises UserError where mean and std are not those of images in [0, 1].
    """
    for names in NORMALISATIONS:
        if all(name in state_dict for name in names):
            mean, std = (state_dict[name].float() for name in names)
            sizes = {mean.numel(), std.numel()}
            if not sizes <= {1, 3} or not ((mean >= 0) & (mean <= 1)).all() or not ((std > 0) & (std <= 1)).all():
                shown = " and ".join(f"{name} {state_dict[name].flatten()[:3].tolist()}" for name in names)
                raise UserError(f"the file's normalisation is not one of RGB images in [0, 1]: {shown}")
            rest = {key: value for key, value in state_dict.items() if key not in names}
            return rest, tuple(value.flatten().expand(3).reshape(1, 3, 1, 1).clone() for value in (mean, std))
    return state_dict, None


def load_weights(model, state_dict, what="checkpoint"):
    """Loads `state_dict` into `model`, every key and every shape, or raises UserError with what differs and loads
    nothing."""
    own = model.state_dict()
    if not isinstance(state_dict, dict):
        raise UserError(f"{what} is no state_dict")
    for key in own.keys() & state_dict.keys():
        if not isinstance(state_dict[key], torch.Tensor) or state_dict[key].is_complex():
            raise UserError(f"{what} is damaged: {key} is no tensor of real numbers")
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    reshaped = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
    lists = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in found if keys]
    if lists:
        raise UserError(f"{what} is of another network: {'; '.join(lists)}")
    model.load_state_dict(state_dict)


def _some(keys, shown=3):
    return ", ".join(keys[:shown]) + (" ..." if len(keys) > shown else "")
