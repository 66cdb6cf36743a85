"""Images: cifar10 and cifar100 (torchvision), folder (a person's own), tiny (made here, no download).

Every set lives on the device as uint8 (N, 3, 32, 32); batches are cropped, flipped and turned into [0, 1] there.
All random draws come from `generator(device, seed, ...)`, so they depend on the seed, the epoch and the step alone.
"""

import contextlib
import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import checkpoints
from cli import UserError, first_line

DATASETS = ("cifar10", "cifar100", "folder", "tiny")
SIDE = 32  # pixels


class Images(NamedTuple):
    """x (N, 3, 32, 32) uint8, y (N,) int64, and the classes' names in label order."""

    x: torch.Tensor
    y: torch.Tensor
    classes: list

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device), self.classes)


def generator(device, *key):
    """A random generator on `device` whose stream depends on `key` alone, such as (seed, "train", epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pixels(x):
    """uint8 images as floats of torch's default type in [0, 1]: x / 255, (B, 3, H, W), laid out as convolutions read
    them fastest."""
    return x.to(torch.get_default_dtype(), memory_format=torch.channels_last).div_(255)


def crop_and_flip(x, top, left, flip):
    """Zero-pads uint8 images (B, 3, 32, 32) by 4, crops 32x32 at (top, left), each (B,) in 0..8, and mirrors where
    flip (B,).

    The releases' RandomCrop(32, padding=4) and RandomHorizontalFlip, per image, on the images' device.
    """
    batch, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    columns = torch.arange(width, device=x.device).expand(batch, width)
    columns = torch.where(flip.unsqueeze(1), width - 1 - columns, columns) + left.unsqueeze(1)  # (B, W)
    rows = torch.arange(height, device=x.device) + top.unsqueeze(1)  # (B, H)
    image = torch.arange(batch, device=x.device).view(batch, 1, 1)
    cropped = padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)


def train_batches(images, batch_size, seed, epoch, done=0):
    """One epoch, or what is left of it after `done` batches: every image once, in an order drawn from (seed, epoch),
    the last, smaller batch kept.

    Yields x (B, 3, 32, 32) in [0, 1], cropped and flipped, y (B,), and the step's generator, from which the caller
    draws whatever else this step needs.
    """
    device = images.x.device
    order = torch.randperm(len(images.y), generator=generator("cpu", seed, "order", epoch)).to(device)
    for step, chosen in enumerate(order[done * batch_size :].split(batch_size), start=done + 1):
        draws = generator(device, seed, "step", epoch, step)
        top, left = torch.randint(0, 9, (2, len(chosen)), generator=draws, device=device)
        flip = torch.rand(len(chosen), generator=draws, device=device) < 0.5
        yield pixels(crop_and_flip(images.x[chosen], top, left, flip)), images.y[chosen], draws


def drawn(images, count, seed):
    """Which images make a subset of `count`, drawn from `seed`, its classes as equal in number as can be: (N,) bool.

    Raises UserError if there are fewer.
    """
    total = len(images.y)
    if count > total:
        raise UserError(f"{count} images are asked for, but there are only {total}")
    draws = generator("cpu", seed, "subset")
    shuffled = torch.randperm(total, generator=draws)
    class_order = torch.randperm(len(images.classes), generator=draws)
    y = images.y.cpu()[shuffled]
    rank = torch.empty(total, dtype=torch.int64)  # how many images of its class were drawn before it
    for label in range(len(images.classes)):
        members = y == label
        rank[members] = torch.arange(int(members.sum()))
    round_robin = torch.argsort(rank * len(images.classes) + class_order[y], stable=True)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[shuffled[round_robin[:count]]] = True
    return chosen.to(images.x.device)


def subset(images, count, seed):
    """`count` of the images, class-balanced, drawn from `seed`, in the set's own order."""
    chosen = drawn(images, count, seed)
    return images._replace(x=images.x[chosen], y=images.y[chosen])


def hold_out(images, count, seed):
    """(the subset of `count` images, all the others). Raises UserError if none would be left."""
    chosen = drawn(images, count, seed)
    if chosen.all():
        raise UserError(f"{count} images held out of {len(chosen)} leave none to train on")
    return tuple(images._replace(x=images.x[part], y=images.y[part]) for part in (chosen, ~chosen))


def check_classes(expected, found, what):
    """Raises UserError unless both lists of class names are the same; `what` names where the expected ones come
    from."""
    if expected == found:
        return
    if len(expected) != len(found):
        raise UserError(f"{what} {len(expected)} classes, but these images have {len(found)}")
    differing = next((old, new) for old, new in zip(expected, found, strict=True) if old != new)
    raise UserError(f"{what} other classes: '{differing[0]}' there is '{differing[1]}' here")


def load_images(dataset, split, data_dir=None):
    """The "train" or "test" images of a data set, on the CPU. Raises UserError where they cannot be had."""
    if dataset not in DATASETS:  # as a checkpoint may say
        raise UserError(f"unknown data set '{dataset}': choose from {', '.join(DATASETS)}")
    if dataset == "tiny":
        return tiny(split)
    if dataset == "folder":
        return folder(data_dir, split)
    return cifar(dataset, split, data_dir)


def cifar(dataset, split, data_dir):
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) through torchvision, downloaded into `data_dir` on first use."""
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    try:
        with contextlib.redirect_stdout(None):
            found = reader(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError, EOFError) as error:  # offline, an unwritable folder, a download cut short
        raise UserError(
            f"{dataset} is not in '{data_dir}' and could not be downloaded ({first_line(error)}): go online once, "
            f"or put {reader.filename} there"
        ) from None
    x = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32) uint8
    return Images(x, torch.tensor(found.targets), list(found.classes))


def folder(data_dir, split):
    """A person's own images, `data_dir`/`split`/<class>/*, any format that Pillow reads, classes in alphabetical order.

    An image is turned as its camera says, cut to its centre square, resized to 32x32 and made RGB. The decoded set is
    kept in `data_dir`/.decoded and read from there while no file's name, size or time has changed.
    Raises UserError where there are no images, or one cannot be read.
    """
    if data_dir is None:
        raise UserError("--dataset folder needs --data-dir: a folder with train/<class>/ and test/<class>/ in it")
    root = Path(data_dir) / split
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --data-dir must hold train/<class>/ and test/<class>/")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{root} holds {len(classes)} class folders: at least two are needed, {root}/<class>/*")
    suffixes = Image.registered_extensions()
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            file
            for file in (root / name).iterdir()
            if file.suffix.lower() in suffixes and not file.name.startswith(".")
        )
        if not found:
            raise UserError(f"{root / name} holds no images")
        files += found
        labels += [label] * len(found)
    stamp = hashlib.sha256()
    for file in files:
        if not file.is_file():  # a folder, a link to nothing, or a pipe, which might never end
            raise UserError(f"{file} is no file: mend or remove it")
        status = file.stat()
        stamp.update(repr((file.parent.name, file.name, status.st_size, status.st_mtime_ns)).encode())
    cache = Path(data_dir) / ".decoded" / f"{split}.pt"
    x = _cached(cache, stamp.hexdigest())
    if x is None:
        x = torch.stack([_decode(file) for file in tqdm(files, desc=f"decoding {root}", disable=None, leave=False)])
        _keep(cache, stamp.hexdigest(), x)
    return Images(x, torch.tensor(labels), classes)


def _decode(file):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size and metadata: what matters is whether there is an image
            with Image.open(file) as image:
                if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
                    image = image.point(lambda grey: grey / 256).convert("L")
                image = ImageOps.exif_transpose(image).convert("RGB")
                return pil_to_tensor(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BICUBIC))
    except Exception as error:  # a damaged image makes Pillow's many readers raise anything
        raise UserError(f"{file} cannot be read as an image ({first_line(error)}): mend or remove it") from None


def _cached(cache, stamp):
    with contextlib.suppress(UserError):
        kept = checkpoints.load(cache)
        if isinstance(kept, dict) and kept.get("stamp") == stamp:
            return kept["x"]
    return None


def _keep(cache, stamp, x):
    try:
        cache.parent.mkdir(exist_ok=True)
        checkpoints.save(cache, {"stamp": stamp, "x": x})
    except (UserError, OSError):
        print(f"note: {cache.parent} cannot be written, so the images are decoded at every start")


TINY_SIZE = {"train": 3000, "test": 1000}


def tiny(split):
    """Ten made-up classes in about a second, on which the paper's story can be watched.

    Each class has a large-scale pattern under large-scale noise, far stronger than any attack (a robust feature), and a
    faint pixel-scale code of amplitude 7/255, which an attack of 8/255 can rewrite (a feature that is not robust). A
    network trained on clean images reads the code and falls to PGD; one trained on adversarial images has to learn the
    pattern. One image in twelve is an even blend of its class with another one, so that no guide gets all of them
    right.
    """
    count = TINY_SIZE[split]
    draws = generator("cpu", "tiny", "classes")
    patterns = 0.18 * torch.randn(10, 3, 4, 4, generator=draws)
    codes = torch.randint(0, 2, (10, 3, 4, 4), generator=draws) * 2.0 - 1  # a tile, so that a crop only shifts it
    codes = 7 / 255 * (codes - codes.mean((2, 3), keepdim=True)).repeat(1, 1, 8, 8)  # (10, 3, 32, 32)

    draws = generator("cpu", "tiny", split)
    y = torch.arange(count) % 10
    other = (y + torch.randint(1, 10, (count,), generator=draws)) % 10
    blended = torch.rand(count, generator=draws) < 1 / 12
    share = torch.where(blended, 0.5, 1.0).view(-1, 1, 1, 1)
    coarse = share * patterns[y] + (1 - share) * patterns[other]
    coarse = coarse + 0.08 * torch.randn(coarse.shape, generator=draws)  # (N, 3, 4, 4)
    fine = share * codes[y] + (1 - share) * codes[other]
    fine = fine + 0.03 * torch.randn(fine.shape, generator=draws)  # (N, 3, 32, 32)
    x = 0.5 + F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear") + fine
    return Images(x.mul(255).round().clamp(0, 255).to(torch.uint8), y, [f"class{label}" for label in range(10)])
