"""Images: cifar10 and cifar100 (torchvision), folder (a person's own), tiny (made here, no download).

Every set lives on the device as uint8 (N, 3, 32, 32); batches are cropped, flipped and turned into [0, 1] there.
All random draws come from `make_generator(device, seed, ...)`: they depend on the seed, the epoch and the step alone.
Of this project it imports `cli` and `image_files`.
"""

import contextlib
import hashlib
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from cli import Progress, UserError, check_file, first_line
from image_files import SIDE, decode_all

DATASETS = ("cifar10", "cifar100", "folder", "tiny")
TINY_SIZE = {"train": 3000, "test": 1000}  # images
# Formats that Pillow registers, but which it cannot read by itself or which are no pictures.
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")


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
    windows = F.pad(x, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32), a view
    cropped = windows[torch.arange(len(x), device=x.device), :, top, left]
    return torch.where(flip.view(-1, 1, 1, 1), cropped.flip(3), cropped)


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
        lacking = [f"'{name}' is missing here" for name in expected if name not in found]
        unknown = [f"'{name}' is only here" for name in found if name not in expected]
        names = ", ".join((lacking + unknown)[:3])
        raise UserError(f"{source} has {len(expected)} classes, but these images have {len(found)}: {names}")
    for before, now in zip(expected, found, strict=True):
        if before != now:
            raise UserError(f"{source} has other classes: '{before}' there is '{now}' here")


def print_class_order(classes):
    """Prints which label is which class: weights that come without names must have been trained in that order."""
    print("labels: " + ", ".join(f"{label} = {name}" for label, name in enumerate(classes)))
    in_order = sorted(classes, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(20), name))
    if classes != in_order:
        _note("numbers in these names are sorted as words: 10 comes before 2")


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
        raise UserError(_why_no_cifar(reader, Path(data_dir), first_line(error))) from None
    x = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32) uint8
    return Images(x, torch.tensor(found.targets), list(found.classes))


def _why_no_cifar(reader, data_dir, reason):
    """What is wrong with the files that are there, or which is missing, and how to get it."""
    archive, folder = data_dir / reader.filename, data_dir / reader.base_folder
    published = [(reader.meta["filename"], reader.meta["md5"]), *reader.train_list, *reader.test_list]
    published = [(archive, reader.tgz_md5)] + [(folder / name, md5) for name, md5 in published]
    get_it = f"go online once, or put {archive.name} into {data_dir}"
    for file, md5 in published:
        if file.exists() and not check_integrity(file, md5):
            return f"{file} is incomplete or another file: delete it and {get_it} ({reason})"
    if archive.exists():
        return f"{archive} could not be unpacked ({reason})"
    missing = [file for file, _ in published if not file.exists()]
    return f"{missing[-1]} is missing and could not be downloaded ({reason}): {get_it}"


def folder(data_dir, split):
    """A person's own images, all below `data_dir`/`split`/<class>/, as `image_files.decode` reads them; classes are
    sorted by name. Raises UserError if there are no images, or one cannot be read."""
    if data_dir is None:
        raise UserError("--dataset folder needs --data-dir: a folder with train/<class>/ and test/<class>/ in it")
    data_dir = Path(data_dir)
    root = data_dir / split
    classes = _class_names(data_dir, split)
    files, labels = _find_images(root, classes)
    x = _decode(files, root)
    _note_odd_pixels(x, files, root)
    return Images(x, torch.tensor(labels), classes)


def _note(text):
    print(f"note: {text}", file=sys.stderr)


def _visible(folder):
    """What is in a folder, if it is one, hidden entries left out, sorted by name."""
    entries = folder.iterdir() if folder.is_dir() else []
    return sorted(entry for entry in entries if not entry.name.startswith("."))


def _class_names(data_dir, split):
    """The names of the folders in `data_dir`/`split`, one per class. Raises UserError, which says what is there
    instead, unless there are two."""
    root = data_dir / split
    names = [entry.name for entry in _visible(root) if entry.is_dir()]
    if len(names) >= 2:
        return names
    problem = f"there is no folder {root}"
    if root.is_dir():
        problem = f"{root} holds {len(names)} class folders: at least two are needed"
    seen = ", ".join(entry.name for entry in (_visible(root) or _visible(data_dir))[:5])
    layout = "--data-dir must hold train/<class>/* and test/<class>/*"
    raise UserError(f"{problem}. {layout}, here is {seen or 'nothing'}: see README, Your own images")


def _find_images(root, classes):
    """(the image files of all classes, their labels). Says how many other files are skipped."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in NO_IMAGES}
    files, labels, skipped = [], [], []
    for label, name in enumerate(classes):
        found = _files_below(root / name)
        images = [file for file in found if file.suffix.lower() in suffixes]
        if not images:
            raise UserError(f"{root / name} holds no images")
        files += images
        labels += [label] * len(images)
        skipped += [file for file in found if file.suffix.lower() not in suffixes]
    for file in files:
        check_file(file)
    if skipped:
        _note(f"{len(skipped)} files below {root} are not images that Pillow reads: skipped, such as {skipped[0]}")
    return files, labels


def _files_below(folder, above=()):
    """All files in a folder and its sub-folders, hidden ones left out."""
    real = folder.resolve()
    if real in above:  # a link to a folder that it is in
        return []
    entries = _visible(folder)
    files = [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            files += _files_below(entry, (*above, real))
    return files


def _decode(files, root):
    """The images of `files`, (N, 3, 32, 32) uint8. Says how many have transparent pixels."""
    x = torch.empty(len(files), 3, SIDE, SIDE, dtype=torch.uint8)
    transparent = 0
    try:
        with Progress(len(files), 0) as progress:
            progress.leave = False  # on a terminal the bar goes in the end
            for pixels, count in decode_all(files):
                x[progress.done : progress.done + len(pixels)] = torch.from_numpy(pixels)
                transparent += count
                progress.advance(len(pixels), f"decoding {root}")
    except ValueError as error:
        raise UserError(str(error)) from None
    if transparent:
        _note(f"{transparent} images below {root} have transparent pixels: transparency is ignored")
    return x


def _note_odd_pixels(x, files, root):
    """Says which images can hardly be what was meant."""
    brightest, darkest = x.amax((2, 3)), x.amin((2, 3))  # (N, 3)
    if brightest.max() < 128:
        _note(f"no pixel below {root} is above {brightest.max()} of 255: is their range another one?")
    flat = ((brightest - darkest).amax(1) < 16).nonzero()
    if len(flat):
        _note(f"{len(flat)} images below {root} are almost black or of one colour, such as {files[flat[0]]}")


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
