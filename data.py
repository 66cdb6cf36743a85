"""Images: cifar10 and cifar100 (torchvision), folder (a person's own), tiny (made here, no download).

Every set lives on the device as uint8 (N, 3, 32, 32); batches are cropped, flipped and turned into [0, 1] there.
All random draws come from `make_generator(device, seed, ...)`: they depend on the seed, the epoch and the step alone.
Of this project it imports `checkpoints` and `cli`.
"""

import contextlib
import hashlib
import sys
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import checkpoints
from cli import UserError, check_file, first_line

DATASETS = ("cifar10", "cifar100", "folder", "tiny")
SIDE = 32  # pixels
TINY_SIZE = {"train": 3000, "test": 1000}  # images


class Images(NamedTuple):
    """x (N, 3, 32, 32) uint8, y (N,) int64, and the classes' names in label order."""

    x: torch.Tensor
    y: torch.Tensor
    classes: list

    def to(self, device):
        return Images(self.x.to(device), self.y.to(device), self.classes)

    def select(self, indices):
        """The images at `indices`: a slice, a (M,) int64 or a (N,) bool tensor."""
        return Images(self.x[indices], self.y[indices], self.classes)

    def sha256(self):
        """The checksum of all pixels, labels and class names, by which a run and an evaluation know their images."""
        digest = hashlib.sha256(repr((tuple(self.x.shape), self.classes)).encode())
        for tensor in (self.x, self.y):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def seed_of(*key):
    """A seed in 0 .. 2^63 - 1 that depends on `key` alone, such as (seed, "train", epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(device, *key):
    """A random generator on `device` whose stream depends on `key` alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def to_float(x, memory_format=torch.channels_last):
    """x / 255: uint8 images (B, 3, H, W) as floats of torch's default type in [0, 1]."""
    return x.to(torch.get_default_dtype(), memory_format=memory_format).div_(255)


def crop_and_flip(x, top, left, flip):
    """The releases' RandomCrop(32, padding=4) and RandomHorizontalFlip, per image: zero-pads uint8 images
    (B, 3, 32, 32) by 4, crops 32x32 at (top, left), each (B,) in 0..8, and mirrors where flip (B,)."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    columns = torch.arange(width, device=x.device).expand(batch, width)
    columns = torch.where(flip.unsqueeze(1), width - 1 - columns, columns) + left.unsqueeze(1)  # (B, W)
    rows = torch.arange(height, device=x.device) + top.unsqueeze(1)  # (B, H)
    image = torch.arange(batch, device=x.device).view(batch, 1, 1)
    cropped = padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)


def train_batches(images, batch_size, seed, epoch, memory_format=torch.channels_last):
    """One epoch: every image once, in an order drawn from (seed, epoch). The last, smaller batch is kept. Yields
    x (B, 3, 32, 32) in [0, 1], cropped and flipped, y (B,), and the generator of the step's other draws."""
    device = images.x.device
    order = torch.randperm(len(images.y), generator=make_generator("cpu", seed, "order", epoch)).to(device)
    for step, indices in enumerate(order.split(batch_size), start=1):
        generator = make_generator(device, seed, "step", epoch, step)
        top, left = torch.randint(0, 9, (2, len(indices)), generator=generator, device=device)
        flip = torch.rand(len(indices), generator=generator, device=device) < 0.5
        x = crop_and_flip(images.x[indices], top, left, flip)
        yield to_float(x, memory_format), images.y[indices], generator


def class_balanced_mask(images, count, seed):
    """(N,) bool: which images are the class-balanced subset. The images and the classes are shuffled; then each class
    in turn gives one image."""
    total = len(images.y)
    if count > total:
        raise UserError(f"{count} images are asked for, but there are only {total}")
    generator = make_generator("cpu", seed, "subset")
    shuffled = torch.randperm(total, generator=generator)
    class_order = torch.randperm(len(images.classes), generator=generator)
    y = images.y.cpu()[shuffled]
    members = [shuffled[y == label].tolist() for label in class_order.argsort()]
    chosen = []
    for one_of_each in zip_longest(*members):  # a class without images left has None there
        chosen += [index for index in one_of_each if index is not None]
    mask = torch.zeros(total, dtype=torch.bool)
    mask[chosen[:count]] = True
    return mask.to(images.x.device)


def class_balanced_subset(images, count, seed):
    """`count` of the images, drawn from `seed`, with class sizes as equal as can be, in the set's own order. Raises
    UserError if there are fewer images."""
    return images.select(class_balanced_mask(images, count, seed))


def hold_out(images, count, seed):
    """(the class-balanced subset of `count` images, all others). Raises UserError if no others are left."""
    mask = class_balanced_mask(images, count, seed)
    if mask.all():
        raise UserError(f"{count} images held out of {len(mask)} leave none to train on")
    return images.select(mask), images.select(~mask)


def check_classes(expected, found, source):
    """Raises UserError unless both lists of class names are equal; `source` says what has the expected ones."""
    if len(expected) != len(found):
        raise UserError(f"{source} has {len(expected)} classes, but these images have {len(found)}")
    for before, now in zip(expected, found, strict=True):
        if before != now:
            raise UserError(f"{source} has other classes: '{before}' there is '{now}' here")


def load_images(dataset, split, data_dir=None):
    """The "train" or "test" images of a data set, on the CPU. Raises UserError where they cannot be had."""
    if dataset not in DATASETS:  # a checkpoint may say so
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
    """A person's own images, `data_dir`/`split`/<class>/*, in any format that Pillow reads; classes are sorted by name.

    An image is rotated as its camera says, cut to its centre square, resized to 32x32 and made RGB. The decoded set is
    kept in `data_dir`/.decoded and read from there until a file's name, size or time changes. Raises UserError if there
    are no images, or one cannot be read."""
    if data_dir is None:
        raise UserError("--dataset folder needs --data-dir: a folder with train/<class>/ and test/<class>/ in it")
    root = Path(data_dir) / split
    classes = _class_names(root)
    files, labels = _find_images(root, classes)
    stamp = _stamp(files)
    cache = Path(data_dir) / ".decoded" / f"{split}.pt"
    x = _read_cache(cache, stamp, len(files))
    if x is None:
        x = _decode_all(files, root)
        _write_cache(cache, stamp, x)
    return Images(x, torch.tensor(labels), classes)


def _visible(folder):
    """What is in a folder, hidden entries left out, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _class_names(root):
    """The names of the folders in `root`, one per class."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --data-dir must hold train/<class>/ and test/<class>/")
    names = [entry.name for entry in _visible(root) if entry.is_dir()]
    if len(names) < 2:
        raise UserError(f"{root} holds {len(names)} class folders: at least two are needed, {root}/<class>/*")
    return names


def _find_images(root, classes):
    """(the image files of all classes, their labels). Says how many other entries are skipped."""
    suffixes = Image.registered_extensions()
    files, labels, skipped = [], [], 0
    for label, name in enumerate(classes):
        entries = _visible(root / name)
        images = [entry for entry in entries if entry.suffix.lower() in suffixes]
        if not images:
            raise UserError(f"{root / name} holds no images")
        files += images
        labels += [label] * len(images)
        skipped += len(entries) - len(images)
    for file in files:
        check_file(file)
    if skipped:
        print(f"note: {skipped} entries below {root} are not images that Pillow reads: skipped", file=sys.stderr)
    return files, labels


def _stamp(files):
    """A checksum of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(repr((file.parent.name, file.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _decode_all(files, root):
    """The images of `files`, (N, 3, 32, 32) uint8. Says how many have transparency."""
    x = torch.empty(len(files), 3, SIDE, SIDE, dtype=torch.uint8)
    transparent = 0
    for index, file in enumerate(tqdm(files, desc=f"decoding {root}", disable=None, leave=False)):
        x[index], has_transparency = _decode(file)
        transparent += has_transparency
    if transparent:
        print(f"note: {transparent} images below {root} store transparency: it is ignored", file=sys.stderr)
    return x


def _decode(file):
    """(the image (3, 32, 32) uint8, whether it has transparency)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size and metadata; an image is still an image
            with Image.open(file) as image:
                if image.mode in ("I", "F"):  # Pillow would clip them to white or black
                    raise UserError(f"Pillow reads {file} with 32 bits per pixel: save it with 8 bits per channel")
                transparent = image.has_transparency_data
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
                return pil_to_tensor(image), transparent
    except UserError:
        raise
    except Exception as error:  # a damaged image makes Pillow's many readers raise anything
        raise UserError(f"{file} cannot be read as an image ({first_line(error)}): mend or remove it") from None


def _read_cache(cache, stamp, count):
    """The decoded images that `_write_cache` kept, or None if they are not these files' or cannot be read."""
    try:
        content = checkpoints.load(cache)
    except UserError:
        return None
    if checkpoints.invalid_keys(content, {"stamp": str, "x": torch.Tensor}):
        return None
    x = content["x"]
    if content["stamp"] != stamp or x.dtype != torch.uint8 or x.shape != (count, 3, SIDE, SIDE):
        return None
    return x


def _write_cache(cache, stamp, x):
    try:
        cache.parent.mkdir(exist_ok=True)
        checkpoints.save(cache, {"stamp": stamp, "x": x})
    except (UserError, OSError):
        print(f"note: {cache.parent} cannot be written, so the images are decoded at every start", file=sys.stderr)


def tiny(split):
    """Ten made-up classes, made in about a second, that show the paper's idea.

    Each class has a large-scale pattern under large-scale noise, far stronger than any attack (a robust feature), and a
    faint pixel-scale code of amplitude 7/255, which an attack of 8/255 can rewrite (a feature that is not robust). A
    network trained on clean images uses the code and loses its accuracy under PGD; one trained on adversarial images
    must use the pattern. One image in twelve is an even blend of two classes, so that no guide can be always right."""
    count = TINY_SIZE[split]
    generator = make_generator("cpu", "tiny", "classes")
    patterns = 0.18 * torch.randn(10, 3, 4, 4, generator=generator)
    codes = torch.randint(0, 2, (10, 3, 4, 4), generator=generator) * 2.0 - 1  # a tile, so that a crop only shifts it
    codes = 7 / 255 * (codes - codes.mean((2, 3), keepdim=True)).repeat(1, 1, 8, 8)  # (10, 3, 32, 32)

    generator = make_generator("cpu", "tiny", split)
    y = torch.arange(count) % 10
    other = (y + torch.randint(1, 10, (count,), generator=generator)) % 10
    blended = torch.rand(count, generator=generator) < 1 / 12
    share = torch.where(blended, 0.5, 1.0).view(-1, 1, 1, 1)
    coarse = share * patterns[y] + (1 - share) * patterns[other]
    coarse = coarse + 0.08 * torch.randn(coarse.shape, generator=generator)  # (N, 3, 4, 4)
    fine = share * codes[y] + (1 - share) * codes[other]
    fine = fine + 0.03 * torch.randn(fine.shape, generator=generator)  # (N, 3, 32, 32)
    x = 0.5 + F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear") + fine
    return Images(x.mul(255).round().clamp(0, 255).to(torch.uint8), y, [f"class{label}" for label in range(10)])
