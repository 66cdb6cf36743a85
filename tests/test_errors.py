"""Hostile and broken input, through the command lines as a person types them: each mistake ends with one line that says
what is wrong, status 2, no traceback, nothing overwritten and no litter."""

import hashlib
import inspect
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import mutant
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision import datasets

import checkpoints
import cli
import data
import engine
import evaluate
import figures
import train_dynat

SHORT = "--dataset tiny --train-images 40 --epochs 1 --steps 1 --device cpu"
DECODED = ("photos/.decoded", "photos/.decoded/train.pt", "photos/.decoded/test.pt")  # kept for the next start
CUTS = (0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)  # shares of a file that was not copied to its end


class Case(NamedTuple):
    """A command line, as typed in a folder that holds a finished run, `run`; `says` its error line has to say.

    `spoil(patch)` is called before, in that folder; `leaves` may be there afterwards.
    """

    argv: str
    says: tuple
    spoil: object = None
    leaves: tuple = ()


def case(argv, *says, spoil=None, leaves=()):
    return Case(argv, says, spoil, leaves)


# How a file, a folder or the machine is spoiled


def file(path, content=b""):
    def spoil(_):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return spoil


def cut(share, path="run/last.pt"):
    def spoil(_):
        os.truncate(path, int(share * Path(path).stat().st_size))

    return spoil


def flip(path):
    """One bit of one weight is another one."""

    def spoil(_):
        content = bytearray(Path(path).read_bytes())
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            content[content.index(archive.read(largest)) + largest.file_size // 2] ^= 16
        Path(path).write_bytes(content)

    return spoil


def folder(path):
    def spoil(_):
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)

    return spoil


def saved(path, content):
    """torch.save of `content()`."""
    return lambda _: torch.save(content(), path)


def changed(change, path="run/last.pt"):
    """The checkpoint with `change(content)` done to it, or what that returns."""

    def spoil(_):
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)

    return spoil


def without(*keys):
    """The checkpoint without the entry content[key][key] ..."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return changed(change)


def put(*keys_and_value):
    """The checkpoint with another content[key][key] ..."""
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return changed(change)


def poisoned(role, value, path="run/last.pt"):
    """One weight of the network is not a number."""

    def change(content):
        content[role]["conv1.weight"][0, 0, 0, 0] = value

    return changed(change, path)


class Bomb:
    """Unpickled, it makes a folder, which the check finds."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def photos(*spoils, classes=("cat", "dog"), splits=("train", "test")):
    """Two images in each class of a folder data set, `photos`, then spoiled."""

    def spoil(patch):
        for split in splits:
            for name in classes:
                for number in range(2):
                    image(f"photos/{split}/{name}/{number}.png")(patch)
        for further in spoils:
            further(patch)

    return spoil


def trained_on_photos(*spoils):
    """A run in `own`, trained on `photos`, which are then spoiled."""

    def spoil(patch):
        photos()(patch)
        argv = "--dataset folder --data-dir photos --target cnn --guide cnn --epochs 1 --steps 1 --device cpu --out own"
        assert train_dynat.main(argv.split()) == 0
        shutil.rmtree("photos/.decoded")
        for further in spoils:
            further(patch)

    return spoil


def remove(path):
    return lambda _: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def image(path):
    def spoil(_):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)

    return spoil


def rename(old, new):
    return lambda _: Path(old).rename(new)


def jpeg(share):
    """A photo that was not copied to its end."""

    def spoil(patch):
        path = "photos/train/cat/z.jpg"
        Image.effect_noise((64, 64), 50).save(path)
        cut(share, path)(patch)

    return spoil


def png_of(width, height):
    """A PNG that claims to be of this size and holds nothing."""
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def raising(owner, name, error):
    """Whoever calls owner.name gets the error."""

    def fail(*_, **__):
        raise error

    return lambda patch: patch.setattr(owner, name, fail)


def offline(patch):
    raising(datasets.cifar, "download_and_extract_archive", OSError("<urlopen error no route to host>"))(patch)


def no_memory(patch):
    patch.setattr(train_dynat, "build_model", lambda *_: torch.empty(1 << 60))


FOLDER = "--dataset folder --data-dir photos --target cnn --guide cnn --epochs 1 --steps 1 --device cpu"
RESUME = "--resume --out run --epochs 2 --device cpu"
BARE = "run/weights.pt --target cnn --dataset tiny --device cpu"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
REPORT = json.dumps(
    {
        "trained": {"settings": {"method": "dynat", "target": "cnn"}},
        "results": [{"network": "target", "name": "cnn", "attack": "cw", "n": 9, "accuracy": 1, "interval": [0, 1]}],
    }
).encode()

TRAIN = {
    # flags and choices
    "an unknown flag": case("--learning-rate 0.1", "unrecognized arguments: --learning-rate"),
    "an abbreviated flag": case("--epoch 3", "unrecognized arguments: --epoch"),
    "a stray word": case(f"{SHORT} stray", "unrecognized arguments: stray"),
    "a flag without its value": case("--epochs", "--epochs: expected one argument"),
    "an unknown data set": case("--dataset cifar11", "--dataset: invalid choice: 'cifar11'", "cifar10"),
    "an unknown method": case("--method dynamo", "--method: invalid choice: 'dynamo'", "dynat"),
    "an unknown preset": case("--preset authors", "--preset: invalid choice: 'authors'"),
    "a guide for a method without one": case("--method trades --guide cnn", "--method trades does not use --guide"),
    "a clean forward for another method": case(
        "--method trades --no-clean-forward", "--method trades does not use --no-clean-forward"
    ),
    "a kl weight for dynat": case("--kl-weight 6", "--method dynat does not use --kl-weight: leave it out"),
    # numbers
    "a division by zero": case("--epsilon 8/0", "--epsilon: '8/0' is not a number like 0.031 or 8/255"),
    "two divisions": case("--epsilon 1/2/3", "--epsilon: '1/2/3' is not a number"),
    "half a division": case("--epsilon 8/", "--epsilon: '8/' is not a number"),
    "a number in words": case("--epsilon eight", "--epsilon: 'eight' is not a number"),
    "an expression": case("--lr __import__('os').mkdir('ran')", "--lr: '__import__(os).mkdir(ran)' is not a number"),
    "no number": case("--lr ''", "--lr: '' is not a number"),
    "a blank": case("--lr ' '", "--lr: ' ' is not a number"),
    "not a number": case("--lr nan", "--lr: 'nan' is not a number"),
    "infinity": case("--lr inf", "--lr: 'inf' is not a number"),
    "more than a float holds": case("--lr 1e999", "--lr: '1e999' is not a number"),
    "a quotient that no float holds": case(f"--lr 1{'0' * 400}/3", "--lr: '1000", "is not a number"),
    "hexadecimal": case("--lr 0x1", "--lr: '0x1' is not a number"),
    "a decimal comma": case("--lr 0,1", "--lr: '0,1' is not a number"),
    "a number with its unit": case("--epsilon 8/255px", "--epsilon: '8/255px' is not a number"),
    "a negative number": case("--lr -1", "--lr: -1 is out of range: it must be at least 0"),
    "a negative quotient": case("--step-size=-2/255", "--step-size: -2/255 is out of range"),
    "an epsilon in pixels": case("--epsilon 8", "--epsilon: 8 is out of range: it must be between 0 and 1"),
    "a momentum above 1": case("--momentum 1.1", "--momentum: 1.1 is out of range"),
    "no epochs": case("--epochs 0", "--epochs: 0 is out of range: it must be at least 1"),
    "half an epoch": case("--epochs 1.5", "--epochs: '1.5' is not a whole number"),
    "a whole number in e": case("--epochs 1e2", "--epochs: '1e2' is not a whole number"),
    "a whole number in superscript": case("--epochs ²", "--epochs: '²' is not a whole number"),
    "epochs beyond any float": case(f"{SHORT} --epochs 1{'0' * 400}", "--epochs: 1000", "out of range"),
    "epochs of five thousand digits": case(f"--epochs {'9' * 5000}", "--epochs", "not a whole number"),
    "an empty batch": case("--batch-size 0", "--batch-size: 0 is out of range"),
    "no steps": case("--steps 0", "--steps: 0 is out of range"),
    "too many steps": case("--steps 1001", "--steps: 1001 is out of range: it must be between 1 and 1000"),
    "a negative seed": case("--seed -1", "--seed: -1 is out of range"),
    "drops in epoch 0": case("--lr-milestones 0", "--lr-milestones: 0 is out of range"),
    "drops nowhere": case("--lr-milestones", "--lr-milestones: expected at least one argument"),
    "an average that never moves": case("--ema 1.5", "--ema: 1.5 is out of range"),
    # networks
    "a depth that is none": case("--target wrn33-10", "'wrn33-10' is no wide ResNet: the depth is 10, 16"),
    "no width": case("--target wrn34-0", "'wrn34-0' is no wide ResNet", "the width at least 1"),
    "a depth of six digits": case("--guide wrn999999-1", "unknown network 'wrn999999-1': choose from resnet18"),
    "a name with a blank": case("--target 'resnet18 '", "unknown network 'resnet18 ': choose from"),
    "a name in capitals": case("--target ResNet18", "unknown network 'ResNet18': choose from"),
    "a name of two lines": case("--target 'cnn\nresnet18'", "unknown network 'cnn resnet18': choose from"),
    "a path for a name": case("--target ../run/weights.pt", "unknown network '../run/weights.pt': choose from"),
    "no name": case("--guide ''", "unknown network '': choose from"),
    "a network that no memory holds": case(SHORT, "memory", "--batch-size", spoil=no_memory),
    "a network that no GPU holds": case(
        SHORT,
        "out of memory (CUDA out of memory. Tried to allocate 2 GiB.)",
        "--batch-size",
        spoil=raising(
            train_dynat, "build_model", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0")
        ),
    ),
    # devices
    **(
        {}
        if torch.cuda.is_available()
        else {"a GPU where there is none": case(f"{SHORT} --device cuda", "device 'cuda' cannot")}
    ),
    "an unknown device": case(f"{SHORT} --device abacus", "device 'abacus' cannot be used here"),
    "no device": case(f"{SHORT} --device ''", "device '' cannot be used here"),
    "the hundredth GPU": case(f"{SHORT} --device cuda:99", "device 'cuda:99' cannot be used here"),
    "a device without numbers": case(f"{SHORT} --device meta", "device 'meta' cannot be used here"),
    "BatchNorm over processes on a CPU": case(f"{SHORT} --sync-bn", "--sync-bn", "needs GPUs: leave it out"),
    # images
    "more training images than there are": case(f"{SHORT} --train-images 201", "201 images are asked for", "only 200"),
    "one training image": case(f"{SHORT} --train-images 1", "--train-images: 1 is out of range"),
    "all images held out": case(f"{SHORT} --val-images 200", "200 images held out of 200 leave none to train on"),
    "more held out than there are": case(f"{SHORT} --val-images 201", "201 images are asked for", "only 200"),
    "more to train on than held out leaves": case(f"{SHORT} --val-images 180", "40 images are asked for", "only 20"),
    "no folder named": case("--dataset folder", "--dataset folder needs --data-dir"),
    "no such folder": case(FOLDER, "there is no folder photos/train: --data-dir must hold train/<class>/"),
    "a file for a folder": case(FOLDER, "there is no folder photos/train", spoil=file("photos", b"a list")),
    "no training images": case(FOLDER, "there is no folder photos/train", spoil=photos(splits=["test"])),
    "no test images": case(FOLDER, "there is no folder photos/test", spoil=photos(splits=["train"]), leaves=DECODED),
    "no classes": case(FOLDER, "photos/train holds 0 class folders", spoil=folder("photos/train")),
    "one class": case(FOLDER, "photos/train holds 1 class folders", spoil=photos(classes=["cat"])),
    "an empty class": case(FOLDER, "photos/train/emu holds no images", spoil=photos(folder("photos/train/emu"))),
    "a class that is not tested": case(
        FOLDER,
        "3 classes, but these images have 2",
        spoil=photos(image("photos/train/emu/0.png")),
        leaves=DECODED,
    ),
    "classes of other names in the test": case(
        FOLDER, "'dog' there is 'emu' here", spoil=photos(rename("photos/test/dog", "photos/test/emu")), leaves=DECODED
    ),
    "a text called .png": case(
        FOLDER, "photos/train/cat/z.png cannot be read as an image", spoil=photos(file("photos/train/cat/z.png", b"no"))
    ),
    "an image of no bytes": case(
        FOLDER,
        "photos/test/dog/z.jpg cannot be read as an image",
        spoil=photos(file("photos/test/dog/z.jpg")),
        leaves=DECODED,
    ),
    "half a photo": case(FOLDER, "z.jpg cannot be read as an image", "mend or remove it", spoil=photos(jpeg(0.5))),
    "a photo's header": case(FOLDER, "z.jpg cannot be read as an image", spoil=photos(jpeg(0.01))),
    "an image that claims a terabyte": case(
        FOLDER,
        "z.png cannot be read as an image",
        "decompression bomb",
        spoil=photos(file("photos/train/cat/z.png", png_of(600_000, 600_000))),
    ),
    "an image that claims 100 megapixels": case(
        FOLDER,
        "z.png cannot be read as an image",
        spoil=photos(file("photos/train/cat/z.png", png_of(10_000, 10_000))),
    ),
    "a folder called .png": case(FOLDER, "z.png", "no file", spoil=photos(folder("photos/train/cat/z.png"))),
    "a link to nothing": case(
        FOLDER, "z.png", "no file", spoil=photos(lambda _: os.symlink("nowhere", "photos/train/cat/z.png"))
    ),
    "a pipe for an image": case(
        FOLDER, "z.png", "no file", spoil=photos(lambda _: os.mkfifo("photos/train/cat/z.png"))
    ),
    "CIFAR, offline": case(
        "--dataset cifar10", "cifar10 is not in 'data'", "no route to host", "cifar-10-python.tar.gz", spoil=offline
    ),
    "a damaged CIFAR, offline": case(
        "--dataset cifar100 --data-dir c",
        "cifar100 is not in 'c'",
        "no route to host",
        "cifar-100-python.tar.gz",
        spoil=lambda patch: (offline(patch), file("c/cifar-100-python/train", b"\x80\x02")(patch)),
    ),
    "an error without words": case(
        "--dataset cifar10",
        "cifar10 is not in 'data'",
        "EOFError",
        spoil=raising(datasets.cifar, "download_and_extract_archive", EOFError()),
    ),
    # the run's folder
    "a folder in use": case(f"{SHORT} --out run", "run exists already: go on with --resume, or choose another folder"),
    "a file in use": case(f"{SHORT} --out run/log.jsonl", "run/log.jsonl exists already"),
    "the folder one is in": case(f"{SHORT} --out ''", "exists already"),
    "a folder under a file": case(f"{SHORT} --out run/log.jsonl/a", "run/log.jsonl/a", "Not a directory", "--out"),
    "a folder where none can be made": case(f"{SHORT} --out /proc/a/b", "/proc/a", "--out"),
    "a folder in one that is read-only": case(
        f"{SHORT} --out a/b",
        "a",
        "Permission denied",
        "--out",
        spoil=raising(Path, "mkdir", PermissionError(13, "Permission denied", "a/b")),
    ),
    "a name that is too long": case(f"{SHORT} --out {'a' * 300}", "File name too long"),
    "a run resumed in a file": case(f"{SHORT} --resume --out run/log.jsonl", "run/log.jsonl", "--out"),
    "somebody's configuration": case(
        f"{SHORT} --resume --out mine",
        "mine/config.json",
        "--out",
        spoil=file("mine/config.json", b'{"model": "bert"}'),
    ),
    "somebody's weights": case(
        f"{SHORT} --resume --out mine", "mine/weights.pt", "--out", spoil=file("mine/weights.pt", b"precious")
    ),
    "a loss that is not finite": case(
        f"{SHORT} --lr 1e30 --out a", "not finite", "update", "of epoch 1", "--lr", leaves=("a", "a/config.json")
    ),
    # going on
    "another beta": case(f"{RESUME} --beta 2", "the run in run has beta 1.0, not 2.0", "leave that flag out"),
    "another method": case(f"{RESUME} --method trades", "the run in run has method dynat, not trades"),
    "fewer epochs": case(
        f"{RESUME} --epochs 1",
        "the run in run is beyond epoch 1",
        "more --epochs",
        spoil=changed(lambda content: content.update(epoch=2, log=2 * content["log"])),
    ),
    "an empty checkpoint": case(RESUME, "run/last.pt is empty", spoil=file("run/last.pt")),
    "a checkpoint of zeros": case(RESUME, "run/last.pt is no checkpoint", spoil=file("run/last.pt", bytes(9999))),
    "a folder called last.pt": case(RESUME, "run/last.pt is a folder", spoil=folder("run/last.pt")),
    **{
        f"{share:.1%} of a checkpoint": case(RESUME, "run/last.pt is no checkpoint", "truncated", spoil=cut(share))
        for share in CUTS
    },
    "a flipped bit": case(RESUME, "run/last.pt is damaged", "checksum", spoil=flip("run/last.pt")),
    "bare weights": case(
        RESUME,
        "run/last.pt is not a run's checkpoint",
        spoil=lambda _: shutil.copy("run/weights.pt", "run/last.pt"),
    ),
    "an evaluation": case(
        RESUME,
        "run/last.pt is not a run's checkpoint",
        spoil=saved("run/last.pt", lambda: {"identity": {}, "known": {}}),
    ),
    "a list": case(RESUME, "run/last.pt is not a run's checkpoint", spoil=saved("run/last.pt", lambda: [1, 2])),
    "a checkpoint that runs code": case(
        RESUME,
        "run/last.pt holds more than tensors",
        "refused",
        spoil=changed(lambda content: {**content, "log": Bomb()}),
    ),
    "a pickle that runs code": case(
        RESUME, "run/last.pt holds more than tensors", "refused", spoil=file("run/last.pt", pickle.dumps(Bomb()))
    ),
    "no guide": case(RESUME, "the checkpoint has no guide", spoil=without("guide")),
    "no optimizer": case(RESUME, "run/last.pt is not a run's checkpoint", spoil=without("optimizer")),
    "an optimizer without groups": case(
        RESUME, "the checkpoint's optimizer is of other networks", spoil=without("optimizer", "param_groups")
    ),
    "an optimizer of another network": case(
        RESUME,
        "the checkpoint's optimizer is of other networks",
        "momentum",
        spoil=put("optimizer", "state", 0, "momentum_buffer", torch.ones(3)),
    ),
    "an optimizer of fewer weights": case(
        RESUME,
        "the checkpoint's optimizer is of other networks",
        spoil=changed(lambda content: content["optimizer"]["param_groups"][0]["params"].pop() and None),
    ),
    "weights of another shape": case(
        RESUME,
        "target is of another network",
        "linear.weight (3, 64) instead of (10, 64)",
        spoil=put("target", "linear.weight", torch.ones(3, 64)),
    ),
    "weights that are numbers": case(RESUME, "target", "linear.bias", spoil=put("target", "linear.bias", 3)),
    "weights that are a list": case(RESUME, "the checkpoint has no guide", spoil=put("guide", [1])),
    "a log that is a number": case(RESUME, "run/last.pt is not a run's checkpoint", "log", spoil=put("log", 3)),
    "a log of numbers": case(RESUME, "run/last.pt is not a run's checkpoint", "log", spoil=put("log", [3])),
    "sums that are numbers": case(
        RESUME, "run/last.pt is not a run's checkpoint", "totals", spoil=put("totals", {"loss": 3.0})
    ),
    "an optimizer's state that is a number": case(
        RESUME, "the checkpoint's optimizer is of other networks", spoil=put("optimizer", "state", 0, 3)
    ),
    "an epoch in words": case(RESUME, "run/last.pt is not a run's checkpoint", "epoch", spoil=put("epoch", "one")),
    "settings that are a list": case(
        RESUME, "run/last.pt is not a run's checkpoint", "settings", spoil=put("settings", [])
    ),
    "a setting less": case(RESUME, "run/last.pt", "beta", spoil=without("settings", "beta")),
    "a learning rate in words": case(RESUME, "run/last.pt", "lr", spoil=put("settings", "lr", "fast")),
    "a setting of a network that is none": case(
        RESUME, "unknown network 'vgg'", spoil=put("settings", "target", "vgg")
    ),
    "a method that is none": case(RESUME, "run/last.pt", "dynamo", spoil=put("settings", "method", "dynamo")),
    "classes of other names": case(
        RESUME, "'class9' here", spoil=put("classes", [f"class{n}" for n in range(9)] + ["x"])
    ),
    "another class count": case(RESUME, "9 classes, but these images have 10", spoil=put("classes", list("abcdefghi"))),
    "a target that is not finite": case(
        RESUME, "the loss is not finite in update 1 of epoch 2", spoil=poisoned("target", float("nan"))
    ),
    "a guide that is not finite": case(
        RESUME, "the loss is not finite in update 1 of epoch 2", spoil=poisoned("guide", float("inf"))
    ),
    "images that are gone": case(
        "--resume --out own --epochs 2", "there is no folder photos/train", spoil=trained_on_photos(remove("photos"))
    ),
    "images of another class": case(
        "--resume --out own --epochs 2",
        "'dog' there is 'emu' here",
        spoil=trained_on_photos(*(rename(f"photos/{split}/dog", f"photos/{split}/emu") for split in ("train", "test"))),
        leaves=DECODED,
    ),
}

EVALUATE = {
    # the checkpoint
    "no checkpoint": case("run/none.pt", "there is no file run/none.pt"),
    "no name": case("''", "is a folder"),
    "a folder": case("run", "run is a folder: name a checkpoint in it, such as run/last.pt"),
    "an empty file": case("a.pt", "a.pt is empty", spoil=file("a.pt")),
    "a web page": case(
        "a.pt", "a.pt is a web page, not a checkpoint: download the file itself", spoil=file("a.pt", HTML)
    ),
    "a pointer of git-lfs": case("a.pt", "a.pt is a git-lfs pointer", "git lfs pull", spoil=file("a.pt", LFS)),
    "a device file": case("/dev/zero", "/dev/zero is no file"),
    "a pipe": case("pipe", "pipe is no file", spoil=lambda _: os.mkfifo("pipe")),
    "a log": case("run/log.jsonl", "run/log.jsonl is no checkpoint"),
    "noise": case("a.pt", "a.pt is no checkpoint", spoil=file("a.pt", bytes(n * n % 251 for n in range(9999)))),
    "another zip archive": case(
        "a.zip", "a.zip is no checkpoint", spoil=lambda _: shutil.make_archive("a", "zip", "run")
    ),
    **{
        f"{share:.1%} of a checkpoint": case(
            "run/last.pt", "run/last.pt is no checkpoint", "truncated", spoil=cut(share)
        )
        for share in CUTS
    },
    **{
        f"{share:.1%} of bare weights": case(
            BARE, "run/weights.pt is no checkpoint", "truncated", spoil=cut(share, "run/weights.pt")
        )
        for share in CUTS[::3]
    },
    "a flipped bit": case("run/last.pt", "run/last.pt is damaged", "checksum", spoil=flip("run/last.pt")),
    "a pickle that runs code": case("a.pt", "could run code: refused", spoil=file("a.pt", pickle.dumps(Bomb()))),
    "a checkpoint that runs code": case(
        "run/last.pt", "could run code: refused", spoil=changed(lambda content: {**content, "target": Bomb()})
    ),
    "an old checkpoint that runs code": case(
        "a.pt",
        "could run code: refused",
        spoil=lambda _: torch.save(Bomb(), "a.pt", _use_new_zipfile_serialization=False),
    ),
    "a pickled network": case("a.pt", "could run code: refused", spoil=saved("a.pt", lambda: nn.Linear(1, 1))),
    "a list": case("a.pt --target cnn --dataset tiny", "holds no state_dict", spoil=saved("a.pt", lambda: [1])),
    "numbers": case("a.pt --target cnn --dataset tiny", "'epoch' is a int", spoil=saved("a.pt", lambda: {"epoch": 3})),
    "a tensor": case(
        "a.pt --target cnn --dataset tiny", "holds no state_dict", spoil=saved("a.pt", lambda: torch.ones(3))
    ),
    "bare weights, unnamed": case("run/weights.pt", "holds bare weights: say --target NAME and --dataset NAME"),
    "bare weights without their network": case("run/weights.pt --dataset tiny", "say --target NAME"),
    "bare weights without their images": case("run/weights.pt --target cnn", "--dataset NAME"),
    "bare weights of another network": case(
        "run/weights.pt --target wrn10-1 --dataset tiny", "the target in run/weights.pt is of another network"
    ),
    "bare weights of no network": case("run/weights.pt --target vgg --dataset tiny", "unknown network 'vgg'"),
    "bare weights and a guide": case(f"{BARE} --network guide", "run/weights.pt holds no guide"),
    "bare weights with one missing": case(
        BARE,
        "1 missing (conv2.weight)",
        spoil=changed(lambda state: state.pop("conv2.weight") is None or None, "run/weights.pt"),
    ),
    "bare weights with one too many": case(
        BARE, "1 unexpected (more)", spoil=changed(lambda state: {**state, "more": torch.ones(1)}, "run/weights.pt")
    ),
    "bare weights of another shape": case(
        BARE,
        "linear.bias (3,) instead of (10,)",
        spoil=changed(lambda state: {**state, "linear.bias": torch.ones(3)}, "run/weights.pt"),
    ),
    "bare weights of complex numbers": case(
        BARE,
        "linear.bias",
        spoil=changed(lambda state: {**state, "linear.bias": torch.ones(10) * 1j}, "run/weights.pt"),
    ),
    "bare weights of another class count": case(
        "run/weights.pt --target cnn --dataset folder --data-dir photos",
        "linear.weight (10, 64) instead of (2, 64)",
        spoil=photos(),
        leaves=DECODED,
    ),
    "another target": case("run/last.pt --target wrn10-1", "the target of run/last.pt is cnn, not wrn10-1"),
    "weights that are numbers": case("run/last.pt", "target", spoil=put("target", {"conv1.weight": 3})),
    "weights that are a list": case("run/last.pt", "target", spoil=put("target", [1])),
    "settings without the network": case("run/last.pt", "run/last.pt", "target", spoil=without("settings", "target")),
    "settings without the data set": case(
        "run/last.pt", "run/last.pt", "dataset", spoil=without("settings", "dataset")
    ),
    "classes that are a number": case("run/last.pt", "run/last.pt", "classes", spoil=put("classes", 10)),
    "weights that are not a number": case(
        "run/last.pt --attacks clean --device cpu", "not finite", "damaged", spoil=poisoned("target", float("nan"))
    ),
    "weights that are infinite": case(
        "run/last.pt --attacks pgd1 --device cpu", "not finite", "damaged", spoil=poisoned("target", float("inf"))
    ),
    "averaged weights of a run without": case(
        "run/last.pt --weights ema", "holds no averaged weights: train with --ema"
    ),
    "unknown weights": case("run/last.pt --weights best", "--weights: invalid choice: 'best'"),
    "an unknown role": case("run/last.pt --network teacher", "--network teacher: it is target, guide or target,guide"),
    "no role": case("run/last.pt --network ''", "it is target, guide or target,guide"),
    # images
    "an unknown data set": case("run/last.pt --dataset mnist", "--dataset: invalid choice: 'mnist'"),
    "images of another class count": case(
        "run/last.pt --dataset folder --data-dir photos",
        "was trained on 10 classes, but these images have 2",
        spoil=photos(),
        leaves=DECODED,
    ),
    "images that are not there": case("run/last.pt --dataset folder --data-dir none", "there is no folder none/test"),
    "no folder of images": case("run/last.pt --dataset folder", "--dataset folder needs --data-dir"),
    "no images": case("run/last.pt --images 0", "--images: 0 is out of range: it must be at least 1"),
    "too many images": case("run/last.pt --images 41", "41 images are asked for", "only 40"),
    # attacks
    "a misspelt attack": case("run/last.pt --attacks clean,pdg20", "unknown attack 'pdg20': choose from clean"),
    "no attack": case("run/last.pt --attacks ,", "--attacks names no attack"),
    "an empty list": case("run/last.pt --attacks ''", "--attacks names no attack"),
    "an attack of no steps": case("run/last.pt --attacks pgd0", "unknown attack 'pgd0'"),
    "an attack of fewer steps": case("run/last.pt --attacks pgd-1", "unknown attack 'pgd-1'"),
    "an attack of a million steps": case("run/last.pt --attacks pgd999999", "unknown attack 'pgd999999'"),
    "an attack of two lines": case("run/last.pt --attacks 'pgd10\npgd20'", "unknown attack 'pgd10 pgd20'"),
    "an epsilon in pixels": case("run/last.pt --epsilon 8", "--epsilon: 8 is out of range: it must be between 0 and 1"),
    "an epsilon below 0": case("run/last.pt --epsilon -0.1", "--epsilon: -0.1 is out of range"),
    "an epsilon that is none": case("run/last.pt --epsilon 8/x", "--epsilon: '8/x' is not a number"),
    "a step that is infinite": case("run/last.pt --step-size inf", "--step-size: 'inf' is not a number"),
    "the paper's protocol, changed": case(
        "run/last.pt --protocol paper --epsilon 0.1 --images 9", "leave out --epsilon 0.1 and --images 9"
    ),
    "the paper's protocol on a folder": case(
        "own/last.pt --protocol paper",
        "the first classes",
        spoil=trained_on_photos(),
        leaves=DECODED,
    ),
    "targeted attacks among two classes": case(
        "own/last.pt --attacks aa",
        "aa needs at least four classes",
        "with 2, use apgd",
        spoil=trained_on_photos(),
        leaves=DECODED,
    ),
    # the rest
    "an unknown flag": case("run/last.pt --eps 8/255", "unrecognized arguments: --eps"),
    "an abbreviated flag": case("run/last.pt --attack clean", "unrecognized arguments: --attack"),
    "two checkpoints": case("run/last.pt run/weights.pt", "unrecognized arguments: run/weights.pt"),
    "nothing": case("", "the following arguments are required: checkpoint"),
    "a device": case("run/last.pt --device tpu9", "device 'tpu9' cannot be used here"),
    "a batch of no images": case("run/last.pt --batch-size 0", "--batch-size: 0 is out of range"),
    "a batch beyond all numbers": case(f"run/last.pt --batch-size 1{'0' * 30}", "--batch-size: 1000", "out of range"),
    "no folder for the figures": case("run/last.pt --json none/figures.json", "there is no folder none for --json"),
    "a folder for the figures": case("run/last.pt --json run", "--json run", ".json"),
    "a folder called .json": case("run/last.pt --json a.json", "a.json is a folder", spoil=folder("a.json")),
    "figures over the checkpoint": case(
        "run/last.pt --json run/last.pt --attacks clean", "--json run/last.pt", ".json"
    ),
    "figures where none can be": case(
        "run/last.pt --attacks clean --json a.json",
        "cannot write a.json: Permission denied",
        spoil=raising(evaluate, "TemporaryFile", PermissionError(13, "Permission denied")),
    ),
    "an interrupted evaluation": case(
        "run/last.pt",
        "run/last.pt.progress is of an interrupted evaluation: continue it with --resume, or delete it",
        spoil=file("run/last.pt.progress", b"precious"),
    ),
    "a damaged interrupted evaluation": case(
        "run/last.pt --resume", "run/last.pt.progress is no checkpoint", spoil=file("run/last.pt.progress", b"half")
    ),
    "a run for an evaluation": case(
        "run/last.pt --resume",
        "run/last.pt.progress is not of an interrupted evaluation",
        spoil=lambda _: shutil.copy("run/last.pt", "run/last.pt.progress"),
    ),
    "an evaluation of another": case(
        "run/last.pt --resume",
        "is of an evaluation with another sha256",
        spoil=saved("run/last.pt.progress", lambda: {"identity": {}, "known": {}}),
    ),
    "an evaluation of numbers": case(
        "run/last.pt --resume",
        "run/last.pt.progress is not of an interrupted evaluation",
        spoil=saved("run/last.pt.progress", lambda: {"identity": 1, "known": 2}),
    ),
}

FIGURES = {
    "nothing": case("", "the following arguments are required: FIGURE"),
    "an unknown figure": case("pie run --out a.png", "invalid choice: 'pie'"),
    "no run": case("clean none --out a.png", "none is no run directory"),
    "a file for a run": case("clean run/last.pt --out a.png", "run/last.pt is no run directory"),
    "a picture of no kind": case("clean run --out a.bmp", "--out a.bmp: it ends in .png, .pdf, .svg"),
    "a picture in no folder": case("clean run --out none/a.png", "there is no folder none for --out"),
    "a picture that is a folder": case("clean run --out a.png", "a.png", spoil=folder("a.png")),
    "a run without a log": case("clean run --out a.png", "cannot read run/log.jsonl", spoil=remove("run/log.jsonl")),
    "a run without an epoch": case("clean run --out a.png", "no finished epoch", spoil=file("run/log.jsonl")),
    "half a log": case("clean run --out a.png", "run/log.jsonl is not whole JSON", spoil=cut(0.5, "run/log.jsonl")),
    "a log of numbers": case("clean run --out a.png", "run/log.jsonl", "epoch", spoil=file("run/log.jsonl", b"1\n2\n")),
    "a log of words": case(
        "clean run --out a.png",
        "run/log.jsonl",
        "test_acc",
        spoil=file("run/log.jsonl", b'{"epoch": 1, "test_acc": "x"}'),
    ),
    "a log of bytes": case(
        "clean run --out a.png", "run/log.jsonl is not whole", spoil=file("run/log.jsonl", b"\xff\xfe")
    ),
    "a config of a list": case(
        "clean run --out a.png", "config.json has no 'settings'", spoil=file("run/config.json", b"[]")
    ),
    "a config of numbers": case(
        "clean run --out a.png", "config.json", spoil=file("run/config.json", b'{"settings": 3}')
    ),
    "nothing held out": case("overfitting run --out a.png", "has no val_pgd", "--val-images"),
    "one name for two": case("clean run run/../run --labels a --out a.png", "--labels gives 1 names to 2 files"),
    "two of one name": case("clean run run/../run --labels a a --out a.png", "2 of them are called 'a'"),
    "no evaluation": case("bars none.json --out a.png", "cannot read none.json: No such file"),
    "a checkpoint for an evaluation": case("table run/last.pt", "run/last.pt is not whole JSON"),
    "an evaluation of nothing": case("table a.json", "a.json has no 'trained'", spoil=file("a.json", b"{}")),
    "an evaluation of a list": case("table a.json", "a.json has no 'trained'", spoil=file("a.json", b"[]")),
    "a table over its source": case(
        "table a.json --out a.json", "--out a.json would overwrite what it is made of", spoil=file("a.json", REPORT)
    ),
    "images of no checkpoint": case("images none.pt --out a.png", "there is no file none.pt"),
    "images of two": case("images run/last.pt --images 2 --out a.png", "--images: 2 is out of range"),
    "images under no attack": case("images run/last.pt --attack aa --out a.png", "unknown attack 'aa'"),
}

COMMANDS = {train_dynat: TRAIN, evaluate: EVALUATE, figures: FIGURES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one epoch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TINY_SIZE", {"train": 200, "test": 40})
        assert train_dynat.main([*SHORT.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """The folder in which the command lines are typed; `run` in it is the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TINY_SIZE", {"train": 200, "test": 40})
    return tmp_path


def tree(root):
    """What lies in the folder: its files' checksums by name, None for whatever else there is."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return found


def check(main, case, here, patch, capfd):
    """Status 2, one line, on standard error, that says what it has to, and the folder as it was."""
    if case.spoil:
        case.spoil(patch)
    before = tree(here)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        status = main(shlex.split(case.argv))
    out, err = capfd.readouterr()
    assert status == 2, f"status {status}"
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in out + err
    assert all(words in err for words in case.says), err
    assert [str(warning.message) for warning in warned] == [], "a warning is a second line"
    after = tree(here)
    assert before.items() <= after.items(), "something was overwritten or removed"
    assert after.keys() - before.keys() <= set(case.leaves), "litter"


@pytest.mark.parametrize(
    ("module", "name"), [pytest.param(m, n, id=f"{m.__name__}: {n}") for m, found in COMMANDS.items() for n in found]
)
def test_a_mistake_ends_in_one_line_with_status_2_and_overwrites_nothing(module, name, here, monkeypatch, capfd):
    check(module.main, COMMANDS[module][name], here, monkeypatch, capfd)


@pytest.mark.parametrize("command", ["train_dynat.py", "evaluate.py run/last.pt"])
def test_a_mistake_at_a_shell_ends_in_one_line_with_status_2(command, here):
    script, *argv = command.split()
    command = [sys.executable, str(ROOT / script), *argv, "--device", "abacus"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: device 'abacus' cannot be used here: ")


FAULTS = {
    "two lines": ("a name of two lines", "print(", 'print("error:", file=sys.stderr), print('),
    "a name that breaks the line": ("a name of two lines", "c if c.isprintable()", "c if True"),
    "another status": ("a name of two lines", 'f"error: {error}", 2', 'f"error: {error}", 1'),
    "no status": ("a name of two lines", "return status", "return 0"),
    "a traceback": ("a name of two lines", "if heard:", 'if __import__("traceback").print_exc() is None:'),
    "no word of what is wrong": ("a name of two lines", 'f"error: {error}"', '"error: something is wrong"'),
    "no word of the memory": (
        "a network that no memory holds",
        "except (MemoryError, RuntimeError)",
        "except MemoryError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_command_that_ends_otherwise_is_rejected(fault, here, monkeypatch, capfd):
    name, *replacement = FAULTS[fault]
    main = mutant(cli.command, tuple(replacement))(inspect.unwrap(train_dynat.main))
    with pytest.raises((AssertionError, RuntimeError)):
        check(main, TRAIN[name], here, monkeypatch, capfd)


@pytest.mark.parametrize("module", [train_dynat, evaluate])
@pytest.mark.parametrize("name", ["a checkpoint that runs code", "a pickle that runs code"])
def test_a_loader_that_runs_code_is_rejected(name, module, here, monkeypatch, capfd):
    unsafe = mutant(checkpoints.load, ("weights_only=True", "weights_only=False"))
    monkeypatch.setattr(checkpoints, "load", unsafe)
    with pytest.raises((AssertionError, TypeError)):
        check(module.main, COMMANDS[module][name], here, monkeypatch, capfd)
    assert Path("ran").is_dir()


@pytest.mark.parametrize(
    ("name", "module", "function", "old", "new"),
    [
        ("a flipped bit", checkpoints, "load", "if damaged:", "if False:"),
        ("weights that are numbers", checkpoints, "load_weights", "own.keys() & state_dict.keys()", "()"),
        ("an image that claims a terabyte", data, "_decode", "except Exception", "except OSError"),
        ("an image that claims 100 megapixels", data, "_decode", 'simplefilter("ignore")', 'simplefilter("always")'),
        ("a folder called .png", data, "folder", "if not file.is_file():", "if False:"),
        ("a file in use", engine, "claimed", "if out.exists() and not resuming:", "if False:"),
        ("somebody's configuration", engine, "claimed", "check_unused(out)", "pass"),
        ("somebody's weights", engine, "check_unused", '"weights.pt"', '"weights"'),
        ("all images held out", engine, "_remove_empty", "folder.rmdir()", "pass"),
        ("a loss that is not finite", engine, "check_finite", "raise UserError(", "print("),
        ("an optimizer of another network", engine, "restore", "own.get(", "False and own.get("),
        ("a setting less", train_dynat, "resume", 'check_settings(own, out / "last.pt")', "pass"),
        ("figures over the checkpoint", evaluate, "check_json", 'path.suffix != ".json"', "False"),
    ],
)
def test_a_mistake_that_goes_unseen_is_rejected(name, module, function, old, new, here, monkeypatch, capfd):
    monkeypatch.setattr(module, function, mutant(getattr(module, function), (old, new)))
    command = next(command for command, cases in COMMANDS.items() if name in cases)
    with pytest.raises((AssertionError, KeyError, AttributeError, RuntimeError, Image.DecompressionBombError)):
        check(command.main, COMMANDS[command][name], here, monkeypatch, capfd)


def check_ascii(command, monkeypatch):
    """A terminal that knows no Greek gets the table all the same."""
    Path("a.json").write_bytes(REPORT)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command(inspect.unwrap(figures.main))(["table", "a.json"]) == 0
    terminal.flush()
    assert b"\\u03b5" in terminal.buffer.getvalue()


def test_what_the_terminal_cannot_show_does_not_end_a_command(here, monkeypatch):
    check_ascii(cli.command, monkeypatch)


def test_a_command_that_ends_at_a_letter_is_rejected(here, monkeypatch):
    broken = mutant(cli.command, ('sys.stdout.reconfigure(errors="backslashreplace")', "pass"))
    with pytest.raises(UnicodeEncodeError):
        check_ascii(broken, monkeypatch)
