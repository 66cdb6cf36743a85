"""Files of a run: saved completely or not at all, loaded safely and strictly; and the run directory.

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
import re
import sys
import warnings
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torchvision.transforms import Normalize

from cli import PARTIAL, UserError, atomic_write, check_file, first_line, write_text
from models import build_model

DEAD_PREFIX = "sub_block1."  # 61 entries of the releases' WRN-34-10 that its forward never uses
PREFERRED = {"state_dict", "model"}  # entries that count where several hold the network
AVERAGE = r"(?<![a-z])(ema|swa|avg|average)"  # how an entry with an average of the weights is called
MEANS, STDS = ("mean", "mu"), ("std", "sigma")  # names of the normalisation that other projects keep in the file
# What is in a file of another kind, in lower case: its beginning, or the names in its zip archive. What to do with it.
SAVE = "torch.save({name: tensor, ...}, 'w.pt')"
KINDS = {
    rb"\A(<!doctype|<html|<\?xml)": "a web page, not a checkpoint: download the file itself",
    rb"\Aversion https://git-lfs": "a git-lfs pointer, not a checkpoint: fetch the file itself with git lfs pull",
    rb"\A(\x1f\x8b|\xfd7zxz|bzh\d|\x28\xb5\x2f\xfd)": "compressed: unpack it with gunzip, unxz, bunzip2 or unzstd",
    rb"\A\x08[\x01-\x1f][\x12\x3a]": "an ONNX graph, with layers merged: save the state_dict of the network itself",
    rb"\A\x80(?!\x02\x8a\nl)": f"a pickle not by torch.save that could run code: refused; if you trust it, {SAVE}",
    rb"/constants\.pkl$": "a TorchScript archive: torch.save(torch.jit.load(FILE).state_dict(), 'w.pt')",
    rb"/archive_format$|^serialized_": "from torch.export: torch.save(torch.export.load(FILE).state_dict, 'w.pt')",
    rb"\.npy$": f"an archive of NumPy arrays: load it with numpy.load and {SAVE}",
}
# Classes of what other projects keep beside the weights. `Unread` stands for objects of these.
COMPANY = (
    "argparse.Namespace datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone numpy.dtype "
    "numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct "
    "numpy._core.multiarray._reconstruct pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath "
    "pathlib.PureWindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath"
)
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


class Unread:
    """Stands for an object beside the weights that nobody asks for: the class that the file names is never called."""

    def __init__(self, *ignored):
        pass

    __setstate__ = __init__


def load_with_sha256(path):
    """(what `save`, another project's `torch.save` or safetensors put into `path`, on the CPU; the file's SHA-256). Of
    a folder, the one .safetensors file in it. Only tensors, numbers, strings and containers are read, and the file
    once. Raises UserError for a file that is missing, truncated, damaged or of another kind, or that could run code."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            example = (files or [path / "last.pt"])[0]
            raise UserError(f"{path} is a folder: name a checkpoint in it, such as {example}")
        path = files[0]
    check_file(path)
    content = path.read_bytes()
    beginning = content[:512].lstrip().lower()
    if not beginning:
        raise UserError(f"{path} is empty")
    _check_kind(path, beginning)
    harmless = [(Unread, name) for name in COMPANY.split()]
    is_zip = zipfile.is_zipfile(io.BytesIO(content))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # about pickle protocols: the reader gets one line, below
            if is_zip:
                _check_zip(path, content)
            if content[8:10] == b'{"':
                found = safetensors.torch.load(content)
            else:
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True, mmap=False)
            _check_plain(found, path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes torch, pickle, zipfile and safetensors raise anything
        raise UserError(f"{path} {_refusal(error, content, is_zip)}") from None
    return found, hashlib.sha256(content).hexdigest()


def _check_kind(path, text):
    """Raises UserError if a file that begins so, or the names in a zip archive, are those of another kind of file."""
    for pattern, what in KINDS.items():
        if re.search(pattern, text, re.MULTILINE):
            raise UserError(f"{path} is {what}")


def _check_zip(path, content):
    """Raises UserError if a zip archive with this content is of another kind, or damaged: torch reads no checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        _check_kind(path, "\n".join(names).encode(errors="replace"))
        if not any(name.endswith("data.pkl") for name in names):
            raise UserError(f"{path} is a zip archive, not a checkpoint: unpack it")
        has_checksums = any(entry.CRC for entry in archive.infolist())
        damaged = has_checksums and archive.testzip()
    if damaged:
        raise UserError(f"{path} is damaged: its entry {damaged} does not match its checksum")


def _refusal(error, content, is_zip):
    """What to say of a file with this content, whose reading ended with `error`."""
    if "TORCH_FORCE" in str(error):
        return f"was not read: {first_line(error)}"
    is_pickle = is_zip or content.startswith(b"\x80")
    named = re.search(r"GLOBAL (\S+)|Unsupported operand|must be imported", str(error))
    if is_pickle and named:
        module = "a whole pickled module, " if b"_parameters" in content else ""
        return (
            f"holds {module}{named[1] or 'a newer pickle protocol'} and could run code: refused; if you trust it, "
            "torch.load it with weights_only=False and torch.save its state_dict alone"
        )
    if is_zip:  # whole, as far as its checksums say
        return "is not a checkpoint that torch reads safely: torch.save its state_dict alone"
    if is_pickle or content.startswith(b"PK") or content[8:10] == b'{"':
        return "is a damaged or truncated checkpoint"
    return f"is not a checkpoint: it begins with {content[:12]!r}"


def _check_plain(content, path):
    """Raises UserError if a tensor inside is not a plain one of real numbers in memory."""
    if isinstance(content, torch.Tensor):
        if content.is_quantized:
            raise UserError(f"{path} holds quantised tensors: save the network's state_dict before it is quantised")
        plain = content.layout == torch.strided and content.device.type == "cpu"
        if not plain or content.is_nested or content.is_complex():
            raise UserError(f"{path} holds a tensor that is sparse, nested, complex or without content")
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


class Candidate:
    """The tensors of a dict in a file whose keys begin with `prefix`, without it; the others; and where the dict is."""

    def __init__(self, tensors, prefix, where):
        self.prefix, self.where = prefix, where
        self.tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.others = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        self.name = "/".join(filter(None, (where, prefix))) or "bare tensors"
        self.is_average = "n_averaged" in tensors or bool(re.search(AVERAGE, self.name.lower()))
        self.is_preferred = not PREFERRED.isdisjoint(re.split("[/.]", self.name))

    def count(self, expected):
        """How many of the expected tensors are there, in their shape."""
        return sum(key in self.tensors and self.tensors[key].shape == expected[key].shape for key in expected)


def candidates(content, first, where=""):
    """Every place in `content`, at any depth, where a network whose first key is `first` might be."""
    if not isinstance(content, dict):
        return []
    tensors, found = {}, []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
        found += candidates(value, first, f"{where}/{key}" if where else str(key))
    prefixes = {key.removesuffix(first) for key in tensors if f".{key}".endswith(f".{first}")}
    return found + [Candidate(tensors, prefix, where) for prefix in sorted(prefixes)]


def choose(fitting, path, weights):
    """The one of several candidates that counts: an average only for `weights` "ema". Raises UserError if unclear."""
    chosen = [candidate for candidate in fitting if candidate.is_average == (weights == "ema")]
    if weights == "ema" and not chosen:
        raise UserError(f"{path} holds no averaged weights")
    chosen = chosen or fitting
    preferred = [candidate for candidate in chosen if candidate.is_preferred]
    if len(preferred) == 1:
        return preferred[0]
    if len(chosen) > 1:
        names = " and ".join(candidate.name for candidate in chosen)
        raise UserError(f"{path} holds {len(chosen)} networks that fit, {names}: save the one that counts alone")
    return chosen[0]


def find_weights(content, expected, path, weights="last", normalise=None):
    """The network in another project's file: (state_dict to compare with `expected`, the layer that normalises its
    images or None, what was taken and left out in words). `weights` "ema" takes an average. `normalise` is (mean, std)
    where the file holds none. Raises UserError if it is not clear what counts."""
    counted = {key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    first = next(iter(expected))
    found = candidates(content, first)
    if not found:
        raise UserError(f"{path} holds no state_dict of this network: no tensor in it is called {first}")
    fitting = [candidate for candidate in found if candidate.count(counted) == len(counted)]
    taken = max(found, key=lambda candidate: candidate.count(counted))  # load_weights says what is missing in it
    if fitting:
        taken = choose(fitting, path, weights)

    state_dict = {key: value for key, value in taken.tensors.items() if not key.startswith(DEAD_PREFIX)}
    company = {key: value for key, value in taken.others.items() if key != "n_averaged"}
    for key in sorted(state_dict.keys() - expected.keys()):
        if key.split(".")[-1] in (*MEANS, *STDS):
            company[key] = state_dict.pop(key)
    means = [key for key in company if key.split(".")[-1] in MEANS]
    stds = [key for key in company if key.split(".")[-1] in STDS]
    after_layers = re.search(r"(^|\.)[1-9]\d*\.$", taken.prefix)  # as in Sequential(normalisation, network)
    notes = []
    if len(means) == len(stds) == 1:
        if normalise:
            raise UserError(f"{path} has its own {means[0]} and {stds[0]}: leave out --normalise")
        normalise = company.pop(means[0]), company.pop(stds[0])
        notes.append(f"images normalised with its {means[0]} and {stds[0]}")
    elif not normalise and (means or stds or after_layers):
        raise UserError(
            f"{path}: another layer stands before '{taken.prefix}' and may normalise images, but how is not clear from "
            "the file: say it with --normalise MEAN STD (0,0,0 1,1,1 for not at all)"
        )
    if taken.where:
        notes.append(f"loaded from '{taken.where}'")
    if taken.prefix:
        notes.append(f"prefix '{taken.prefix}' dropped")
    others = [candidate for candidate in fitting if candidate is not taken]
    for other in others:
        advice = " (--weights ema takes it)" if other.is_average else ""
        notes.append(f"'{other.name}' fits as well{advice}")
    if company and not others:
        notes.append(f"left out {first_three([*company])}")
    layer = normalisation(*normalise, path) if normalise else None
    return state_dict, layer, ", ".join(notes)


def normalisation(mean, std, source):
    """The layer (x - mean) / std. Raises UserError if mean and std are not those of RGB images in [0, 1]."""
    mean, std = (torch.as_tensor(values).float().flatten() for values in (mean, std))
    of_rgb = {len(mean), len(std)} <= {1, 3}
    in_range = ((mean >= 0) & (mean <= 1)).all() and ((std > 0) & (std <= 1)).all()
    if not of_rgb or not in_range:
        shown = f"mean {mean[:3].tolist()} and std {std[:3].tolist()}"
        raise UserError(f"the normalisation of {source} is not one of RGB images in [0, 1]: {shown}")
    return Normalize(mean.expand(3).tolist(), std.expand(3).tolist())


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


def load_trained(path, target=None, dataset=None, weights="last", normalise=None):
    """(a run's checkpoint, or another project's weights under `foreign`; the file's SHA-256). The latter need the names
    of the network and of the data set; `weights` and `normalise` as in `find_weights`. Raises UserError if these do not
    fit the file."""
    content, sha256 = load_with_sha256(path)
    if isinstance(content, dict) and isinstance(content.get("settings"), dict) and "target" in content:
        check_run(content, path, TRAINED)
        if target not in (None, content["settings"]["target"]):
            raise UserError(f"the target of {path} is {content['settings']['target']}, not {target}")
        if normalise:
            raise UserError(f"{path} is of a run, which normalises no images: leave out --normalise")
        if weights == "ema":
            if invalid_keys(content, {"ema": dict}):
                raise UserError(f"{path} holds no averaged weights: train with --ema")
            content["target"] = content["ema"]
        return content, sha256
    if target is None or dataset is None:
        raise UserError(f"{path} holds bare weights: say --target NAME and --dataset NAME as well")
    foreign = {"content": content, "weights": weights, "normalise": normalise}
    return {"foreign": foreign, "settings": {"target": target}, "classes": None}, sha256


def load_network(content, role, path, num_classes, memory_format=torch.channels_last):
    """The `role`, target or guide, of what `load_trained` found, frozen and in eval mode. Raises UserError if it does
    not fit."""
    holder = "foreign" if "foreign" in content else role
    if invalid_keys(content["settings"], {role: str}) or invalid_keys(content, {holder: dict}):
        raise UserError(f"{path} holds no {role}")
    try:
        model = build_model(content["settings"][role], num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None
    state_dict, layer, notes = content[holder], None, ""
    if holder == "foreign":
        state_dict, layer, notes = find_weights(expected=model.state_dict(), path=path, **content["foreign"])
    load_weights(model, state_dict, f"the {role} in {path}")
    if notes:
        print(f"note: {path}: {notes}", file=sys.stderr)
    if layer:
        model = nn.Sequential(layer, model)
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
