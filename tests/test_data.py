"""Images of every source: how they are read, drawn, cropped and flipped."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
from cases import mutant
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as vision

import data
from cli import UserError
from data import Images, crop_and_flip, generator, load_images, pixels, subset, tiny, train_batches


def check_crop(crop):
    """All 81 crops, mirrored and not, equal torchvision's padding, crop and flip of the same image."""
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    top, left, flip = grid.T
    batch = crop(image.expand(len(grid), 3, 32, 32), top, left, flip.bool())
    for got, (t, le, f) in zip(batch, grid.tolist(), strict=True):
        expected = vision.crop(vision.pad(image, 4), t, le, 32, 32)
        assert torch.equal(got, vision.hflip(expected) if f else expected), (t, le, f)


def test_crop_and_flip_equals_torchvision_for_every_offset():
    check_crop(crop_and_flip)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width - 1 - columns, columns", "columns, width - 1 - columns"),
        ("+ left.unsqueeze(1)", "+ top.unsqueeze(1)"),
        ("(4, 4, 4, 4)", "(4, 4, 4, 4), value=128"),
    ],
)
def test_a_broken_crop_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_crop(mutant(crop_and_flip, (old, new)))


def numbered(count, classes=10):
    """Images whose every pixel tells their number."""
    numbers = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    return Images(numbers.expand(count, 3, 32, 32).contiguous(), torch.arange(count) % classes, list("abcdefghij"))


def check_epoch(batches, count, batch_size, seed):
    images = numbered(count)
    seen, sizes = [], []
    for x, y, _ in batches(images, batch_size, seed, epoch=1):
        number = (x.amax((1, 2, 3)) * 255).round().long()
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        assert torch.equal(number % 10, y)  # an image keeps its label
        seen += number.tolist()
        sizes.append(len(y))
    assert sorted(seen) == list(range(count))
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 5))
def test_an_epoch_holds_every_image_once_the_last_smaller_batch_included(count, batch_size, seed):
    check_epoch(train_batches, count, batch_size, seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [("torch.randperm(len(images.y),", "torch.randint(len(images.y), (len(images.y),),"),
     ("images.y[chosen], draws", "images.y[:len(chosen)], draws")],
)  # fmt: skip
def test_an_epoch_that_loses_images_is_rejected(old, new):
    with pytest.raises(AssertionError):
        check_epoch(mutant(train_batches, (old, new)), 100, 32, 0)


def first(seed, epoch, batches=train_batches, count=200):
    return [x for x, _, _ in batches(numbered(count), 32, seed, epoch)]


def check_draws(batches):
    same = first(1, 1, batches)
    assert all(torch.equal(a, b) for a, b in zip(same, first(1, 1, batches), strict=True))
    for other in (first(2, 1, batches), first(1, 2, batches)):
        assert not any(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_batches_depend_on_seed_and_epoch_alone():
    check_draws(train_batches)


@pytest.mark.parametrize(
    ("old", "new"),
    [('seed, "order", epoch', '"order"'), ('generator=generator("cpu", seed, "order", epoch)', "generator=None")],
)
def test_batches_that_ignore_the_seed_or_the_epoch_are_rejected(old, new):
    broken = mutant(train_batches, (old, new), ('seed, "step", epoch, step', "0"))
    with pytest.raises(AssertionError):
        check_draws(broken)


def test_generators_of_different_keys_draw_different_numbers():
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 1), ("1", "a")]
    draws = {torch.rand(1, generator=generator("cpu", *key)).item() for key in keys}
    assert len(draws) == len(keys)


@given(st.integers(1, 100), st.integers(0, 3))
def test_a_subset_is_class_balanced_and_without_repeats(count, seed):
    images = numbered(100, classes=7)._replace(classes=list("abcdefg"))
    chosen = subset(images, count, seed)
    numbers = chosen.x[:, 0, 0, 0].tolist()
    assert len(set(numbers)) == count
    per_class = torch.bincount(chosen.y, minlength=7)
    available = torch.bincount(images.y, minlength=7)
    assert (per_class.max() - per_class.min() <= 1) or (per_class == torch.minimum(per_class.max(), available)).all()
    assert chosen.y.tolist() == [n % 7 for n in numbers]


def test_a_subset_depends_on_its_seed_and_refuses_more_than_there_are():
    images = numbered(100)
    assert torch.equal(subset(images, 20, 1).x, subset(images, 20, 1).x)
    assert not torch.equal(subset(images, 20, 1).x, subset(images, 20, 2).x)
    with pytest.raises(UserError, match="only 100"):
        subset(images, 101, 1)


def test_pixels_are_exact_255ths():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(pixels(x)[0, 0].flatten(), torch.arange(256) / 255)


def test_tiny_is_the_same_every_time_and_balanced():
    train, test = tiny("train"), tiny("test")
    assert torch.equal(train.x, tiny("train").x) and not torch.equal(train.x[:1000], test.x)
    assert train.x.dtype == torch.uint8 and train.x.shape == (3000, 3, 32, 32) and test.x.shape == (1000, 3, 32, 32)
    assert torch.bincount(train.y).tolist() == [300] * 10 and torch.bincount(test.y).tolist() == [100] * 10


# folder: a person's own images


@pytest.fixture
def photos(tmp_path):
    """Two classes in every kind of file that people have."""
    colours = {"cat": (200, 30, 30), "dog": (30, 30, 200)}
    for split in ("train", "test"):
        for name, colour in colours.items():
            place = tmp_path / split / name
            place.mkdir(parents=True)
            Image.new("RGB", (32, 32), colour).save(place / "a.png")
            Image.new("RGB", (64, 40), colour).save(place / "b.JPG")
            Image.new("L", (20, 50), 77).save(place / "c.bmp")
            Image.new("RGBA", (32, 32), (*colour, 255)).save(place / "d.webp")
            Image.fromarray(np.full((32, 32), 128 * 256, dtype=np.uint16)).save(place / "e.tif")
            Image.new("P", (40, 32)).save(place / "f.gif")
            (place / "notes.txt").write_text("not an image")
            (place / ".hidden.png").write_text("not an image either")
    return tmp_path


def test_a_folder_of_any_images_is_read_with_classes_in_alphabetical_order(photos):
    images = load_images("folder", "train", photos)
    assert images.classes == ["cat", "dog"] and images.x.shape == (12, 3, 32, 32)
    assert images.y.tolist() == [0] * 6 + [1] * 6
    assert images.x[0, :, 5, 5].tolist() == [200, 30, 30]  # a.png, lossless, byte for byte
    assert images.x[4].unique().tolist() == [128]  # 16-bit grey keeps its brightness
    assert (images.x[1].float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 4


def test_an_image_is_cut_to_its_centre_square_and_turned_as_its_camera_says(photos):
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 255  # the centre is white, the sides are black
    Image.fromarray(wide).save(photos / "train" / "cat" / "a.png")
    lying = np.zeros((32, 32, 3), dtype=np.uint8)
    lying[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: white on top
    Image.fromarray(lying).save(photos / "train" / "cat" / "d.webp", exif=exif, lossless=True)
    images = load_images("folder", "train", photos)
    assert images.x[0, :, :, 2:-2].unique().tolist() == [255]
    assert images.x[3, :, :15].min() == 255 and images.x[3, :, 17:].max() == 0


def check_cache(loader, photos, monkeypatch):
    fresh = loader(photos, "train")
    with monkeypatch.context() as patch:
        patch.setattr(data.Image, "open", None)  # whoever decodes now fails
        again = loader(photos, "train")
    assert torch.equal(fresh.x, again.x) and torch.equal(fresh.y, again.y) and fresh.classes == again.classes
    changed = photos / "train" / "dog" / "a.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    os.utime(changed, (1, 1))
    assert loader(photos, "train").x[6, :, 0, 0].tolist() == [1, 2, 3]


def test_a_second_start_decodes_nothing_and_a_changed_file_is_seen(photos, monkeypatch):
    check_cache(data.folder, photos, monkeypatch)


@pytest.mark.parametrize("new", ["file.name", "time.time_ns()"])
def test_a_cache_that_never_or_always_decodes_is_rejected(photos, monkeypatch, new):
    monkeypatch.setattr(data, "time", time, raising=False)
    broken = mutant(data.folder, ("(file.parent.name, file.name, status.st_size, status.st_mtime_ns)", new))
    with pytest.raises((AssertionError, UserError)):
        check_cache(broken, photos, monkeypatch)


def test_a_damaged_or_unwritable_cache_costs_only_time(photos, monkeypatch, capsys):
    fresh = load_images("folder", "train", photos)
    cache = photos / ".decoded" / "train.pt"
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(load_images("folder", "train", photos).x, fresh.x)
    cache.unlink()
    monkeypatch.setattr(data.checkpoints, "save", lambda *_: (_ for _ in ()).throw(UserError("full")))
    assert torch.equal(load_images("folder", "train", photos).x, fresh.x)
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "train" / "cat" / "a.png").write_text("no"), r"a\.png cannot be read"),
        (lambda d: (d / "train" / "cat" / "z.png").write_bytes(b""), r"z\.png cannot be read"),
        (lambda d: (d / "train" / "cat" / "z.png").mkdir(), r"z\.png is no file"),
        (lambda d: (d / "train" / "cat" / "z.png").symlink_to("nowhere"), r"z\.png is no file"),
        (lambda d: os.mkfifo(d / "train" / "cat" / "z.png"), r"z\.png is no file"),
        (lambda d: (d / "train").rename(d / "Train"), "there is no folder"),
        (lambda d: [f.unlink() for f in (d / "train" / "cat").glob("*.*")], "cat holds no images"),
        (lambda d: (d / "train" / "cat").rename(d / "cat"), "1 class folders"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(photos, spoil, said):
    spoil(photos)
    with pytest.raises(UserError, match=said):
        load_images("folder", "train", photos)


@given(st.sampled_from(["a.png", "b.JPG", "c.bmp", "d.webp", "e.tif", "f.gif"]), st.randoms(use_true_random=False))
def test_a_damaged_image_is_read_or_named(tmp_path_factory, name, draws):
    """Any bytes of it may be other ones, and its end may be missing."""
    damaged = tmp_path_factory.mktemp("damaged") / name
    Image.effect_noise((40, 40), 60).save(damaged)
    content = bytearray(damaged.read_bytes())
    for _ in range(draws.randrange(1, 8)):
        content[draws.randrange(len(content))] = draws.randrange(256)
    damaged.write_bytes(content[: draws.choice([len(content), draws.randrange(len(content))])])
    try:
        assert data._decode(damaged).shape == (3, 32, 32)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)


def test_an_unknown_data_set_is_named():
    with pytest.raises(UserError, match="unknown data set 'mnist': choose from cifar10"):
        load_images("mnist", "train")


def test_a_folder_data_set_needs_its_directory():
    with pytest.raises(UserError, match="--data-dir"):
        load_images("folder", "train", None)


# cifar10 and cifar100 in their published layout: see test_training.py for whole runs


def test_cifar_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    for name, archive in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")):
        with pytest.raises(UserError, match=f"{name} is not in .* no route to host.*{archive}"):
            load_images(name, "train", tmp_path)


def test_cifar_images_are_laid_out_as_they_were_published(tmp_path, cifar_files):
    root, raw, labels = cifar_files("cifar10")
    images = load_images("cifar10", "train", root)
    assert torch.equal(images.x, torch.from_numpy(raw["train"]).view(-1, 3, 32, 32))
    assert images.y.tolist() == labels["train"]
    assert images.classes[3] == "cat" and len(images.classes) == 10
    assert pickle.loads((root / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"].shape == (30, 3072)
