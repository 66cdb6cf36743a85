"""Images of every source: how they are read, drawn, cropped and flipped."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as vision

import checkpoints
import data
from cli import UserError
from data import Images, class_balanced_subset, crop_and_flip, load_images, make_generator, seed_of, train_batches


def numbered(count, classes=10):
    """Images whose every pixel is their number."""
    numbers = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    y = torch.arange(count) % classes
    return Images(numbers.expand(count, 3, 32, 32).contiguous(), y, [f"class{label}" for label in range(classes)])


def test_crop_and_flip_equals_torchvision_for_every_offset():
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    top, left, flip = grid.T
    batch = crop_and_flip(image.expand(len(grid), 3, 32, 32), top, left, flip.bool())
    for got, (t, le, f) in zip(batch, grid.tolist(), strict=True):
        expected = vision.crop(vision.pad(image, 4), t, le, 32, 32)
        assert torch.equal(got, vision.hflip(expected) if f else expected), (t, le, f)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 5))
def test_an_epoch_holds_every_image_once_the_last_smaller_batch_included(count, batch_size, seed):
    seen, sizes = [], []
    for x, y, _ in train_batches(numbered(count), batch_size, seed, epoch=1):
        number = (x.amax((1, 2, 3)) * 255).round().long()
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        assert torch.equal(number % 10, y)  # an image keeps its label
        seen += number.tolist()
        sizes.append(len(y))
    assert sorted(seen) == list(range(count))
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)


def test_batches_and_generators_depend_on_seed_and_epoch_alone():
    def draws(seed, epoch):
        for x, _, generator in train_batches(numbered(200), 32, seed, epoch):
            yield x.amax((1, 2, 3)), x, torch.rand(3, generator=generator)

    torch.manual_seed(5)
    first = list(draws(1, 1))
    torch.manual_seed(6)
    assert all(map(torch.equal, sum(first, ()), sum(draws(1, 1), ())))
    for other in (draws(2, 1), draws(1, 2), first[1:]):
        assert not any(map(torch.equal, sum(first, ()), sum(other, ())))


def test_generators_of_different_keys_draw_different_numbers():
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 1), ("1", "a")]
    assert len({torch.rand(1, generator=make_generator("cpu", *key)).item() for key in keys}) == len(keys)
    assert make_generator("cpu", 1, "train").initial_seed() == seed_of(1, "train") == 9144499915382780906


@given(st.integers(1, 100), st.integers(0, 3))
def test_a_subset_is_class_balanced_and_without_repeats(count, seed):
    images = numbered(100, classes=7)
    subset = class_balanced_subset(images, count, seed)
    numbers = subset.x[:, 0, 0, 0].tolist()
    assert len(set(numbers)) == count and subset.y.tolist() == [n % 7 for n in numbers]
    per_class, available = (torch.bincount(y, minlength=7) for y in (subset.y, images.y))
    assert (per_class.max() - per_class.min() <= 1) or (per_class == torch.minimum(per_class.max(), available)).all()


def test_a_subset_depends_on_its_seed_and_what_is_held_out_is_not_trained_on():
    images = numbered(100)
    subset = lambda seed: class_balanced_subset(images, 20, seed).x
    assert torch.equal(subset(1), subset(1)) and not torch.equal(subset(1), subset(2))
    pinned = class_balanced_subset(numbered(40, classes=3), 8, 1)  # runs made with other versions resume with it
    assert pinned.x[:, 0, 0, 0].tolist() == [5, 7, 8, 21, 30, 32, 33, 34]
    held_out, rest = data.hold_out(images, 20, 1)
    assert torch.equal(held_out.x, subset(1))
    assert sorted([*held_out.x[:, 0, 0, 0].tolist(), *rest.x[:, 0, 0, 0].tolist()]) == list(range(100))


def test_to_float_gives_exact_255ths():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(data.to_float(x)[0, 0].flatten(), torch.arange(256) / 255)


def test_tiny_is_the_same_every_time_and_balanced():
    train, test = data.tiny("train"), data.tiny("test")
    assert torch.equal(train.x, data.tiny("train").x) and not torch.equal(train.x[:1000], test.x)
    assert train.x.dtype == torch.uint8 and train.x.shape == (3000, 3, 32, 32) and test.x.shape == (1000, 3, 32, 32)
    assert torch.bincount(train.y).tolist() == [300] * 10 and torch.bincount(test.y).tolist() == [100] * 10


def test_the_checksum_knows_every_pixel_label_and_class_name_and_their_order():
    images = numbered(20)
    x, y = images.x.clone(), images.y.clone()
    x[3, 2, 1, 0] += 1
    y[3] = 0
    others = [images._replace(x=x), images._replace(y=y), images._replace(classes=images.classes[::-1])]
    others += [images.select(slice(19)), images.select(torch.arange(20).roll(1)), images]
    assert len({other.sha256() for other in others}) == len(others)
    assert numbered(20).sha256() == images.sha256()


@pytest.fixture
def photos(tmp_path):
    """Two classes in every kind of file that people have."""
    grey = np.full((32, 32), 128 * 256 + 7, dtype=np.uint16)
    for name, colour in {"cat": (200, 30, 30), "dog": (30, 30, 200)}.items():
        place = tmp_path / "train" / name
        (place / "nested").mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(place / "a.png")
        Image.new("RGB", (64, 40), colour).save(place / "b.JPG")
        Image.new("L", (20, 50), 77).save(place / "c.bmp")
        Image.new("RGBA", (32, 32), (*colour, 0)).save(place / "d.png")
        Image.fromarray(grey).save(place / "e.tif")
        Image.frombytes("I;16B", (32, 32), grey.astype(">u2").tobytes()).save(place / "f.tif")  # big-endian
        Image.new("P", (40, 32)).save(place / "g.gif")
        (place / "photo.heic").write_text("of a telephone")
        (place / ".hidden.png").write_text("not an image")
    return tmp_path


def test_a_folder_of_any_images_is_read_with_one_note_for_each_thing_that_is_left_out(photos, capsys):
    images = load_images("folder", "train", photos)
    assert images.classes == ["cat", "dog"] and images.x.shape == (14, 3, 32, 32)
    assert images.y.tolist() == [0] * 7 + [1] * 7
    assert images.x[0, :, 5, 5].tolist() == images.x[3, :, 5, 5].tolist() == [200, 30, 30]  # lossless, byte for byte
    assert (images.x[1].float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 4
    assert images.x[4].unique().tolist() == images.x[5].unique().tolist() == [128]  # 16 bits keep their brightness
    assert capsys.readouterr().err.splitlines() == [
        f"note: 4 entries below {photos / 'train'} are not images that Pillow reads: skipped",
        f"note: 2 images below {photos / 'train'} store transparency: it is ignored",
    ]


def test_an_image_is_cut_to_its_centre_square_and_turned_as_its_camera_says(tmp_path):
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 255  # the centre is white, the sides are black
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert data._decode(tmp_path / "wide.png")[0][:, :, 2:-2].unique().tolist() == [255]
    lying = np.zeros((32, 32, 3), dtype=np.uint8)
    lying[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: white on top
    Image.fromarray(lying).save(tmp_path / "lying.png", exif=exif)
    turned, _ = data._decode(tmp_path / "lying.png")
    assert turned[:, :15].min() == 255 and turned[:, 17:].max() == 0


def test_a_second_start_decodes_nothing_and_a_changed_file_is_seen(photos, monkeypatch):
    fresh = load_images("folder", "train", photos)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", None)
        assert load_images("folder", "train", photos).sha256() == fresh.sha256()
    changed = photos / "train" / "dog" / "c.bmp"
    before = changed.stat()
    Image.new("L", (20, 50), 99).save(changed)  # of the same size
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load_images("folder", "train", photos).x[9].unique().tolist() == [99]


def test_a_damaged_foreign_or_unwritable_cache_costs_only_time(photos, monkeypatch, capsys):
    fresh = load_images("folder", "train", photos)
    cache = photos / ".decoded" / "train.pt"
    content = checkpoints.load(cache)
    for x in (content["x"][:3], content["x"].float(), torch.zeros(14, 3, 64, 64, dtype=torch.uint8), "x"):
        checkpoints.save(cache, {**content, "x": x})
        assert load_images("folder", "train", photos).sha256() == fresh.sha256()
    cache.write_text("no checkpoint")
    monkeypatch.setattr(checkpoints, "save", Mock(side_effect=UserError("full")))
    assert load_images("folder", "train", photos).sha256() == fresh.sha256()
    assert "cannot be written, so the images are decoded at every start" in capsys.readouterr().err


@given(st.sampled_from(["a.png", "b.JPG", "c.bmp", "d.webp", "e.tif", "f.gif"]), st.randoms(use_true_random=False))
def test_a_damaged_image_is_read_or_named(tmp_path_factory, name, draws):
    """Any bytes of it may be other ones, and its end may be missing."""
    damaged = tmp_path_factory.mktemp("damaged") / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(damaged)
    content = bytearray(damaged.read_bytes())
    for _ in range(draws.randrange(1, 8)):
        content[draws.randrange(len(content))] = draws.randrange(256)
    damaged.write_bytes(content[: draws.choice([len(content), draws.randrange(len(content))])])
    try:
        assert data._decode(damaged)[0].shape == (3, 32, 32)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_offline_says_what_to_do(name, tmp_path, monkeypatch):
    offline = Mock(side_effect=OSError("<urlopen error no route to host>"))
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(UserError, match=f"{name} is not in .* no route to host.*cifar-{name[5:]}-python.tar.gz"):
        load_images(name, "train", tmp_path)
