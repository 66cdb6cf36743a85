"""Images of every source: how they are read, drawn, cropped and flipped."""

import hashlib
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torchvision import datasets
from torchvision.transforms import functional as vision

import data
import evaluate
import image_files
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
        assert torch.equal(x.amax((1, 2, 3)), number / 255) and x.min() >= 0
        assert torch.equal(number % 10, y)  # an image keeps its label
        seen += number.tolist()
        sizes.append(len(y))
    assert sorted(seen) == list(range(count))
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)


def test_batches_and_generators_depend_on_seed_and_epoch_alone():
    def first_draws(seed, epoch):
        x, _, generator = next(train_batches(numbered(200), 32, seed, epoch))
        return torch.cat([x.flatten(), torch.rand(3, generator=generator)])

    first = first_draws(1, 1)
    torch.manual_seed(6)
    assert torch.equal(first, first_draws(1, 1))
    for other in (first_draws(2, 1), first_draws(1, 2)):
        assert not torch.equal(first[:-3], other[:-3]) and not torch.equal(first[-3:], other[-3:])


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
    per_class = torch.bincount(subset.y, minlength=7)
    assert per_class.max() - per_class.min() <= 1


def test_a_subset_depends_on_its_seed_and_what_is_held_out_is_not_trained_on():
    images = numbered(100)
    subset = lambda seed: class_balanced_subset(images, 20, seed).x
    assert torch.equal(subset(1), subset(1)) and not torch.equal(subset(1), subset(2))
    pinned = class_balanced_subset(numbered(40, classes=3), 8, 1)  # runs made with other versions resume with it
    assert pinned.x[:, 0, 0, 0].tolist() == [5, 7, 8, 21, 30, 32, 33, 34]
    held_out, rest = data.hold_out(images, 20, 1)
    assert torch.equal(held_out.x, subset(1))
    assert sorted([*held_out.x[:, 0, 0, 0].tolist(), *rest.x[:, 0, 0, 0].tolist()]) == list(range(100))


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
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "cat" * 2**20, zip=True)
    for name, colour in {"cat": (200, 30, 30), "dog": (30, 30, 200)}.items():
        place = tmp_path / "train" / name
        place.mkdir(parents=True)
        (place / "up").symlink_to(place)  # would never end
        Image.new("RGB", (32, 32), colour).save(place / "a.png")
        Image.new("RGB", (64, 40), colour).save(place / "b.JPG")
        Image.new("L", (20, 50), 77).save(place / "c.bmp")
        Image.new("RGBA", (32, 32), (*colour, 0)).save(place / "d.png")
        Image.new("RGBA", (32, 32), (*colour, 255)).save(place / "e.png")  # opaque
        Image.fromarray(grey).save(place / "f.tif")
        Image.frombytes("I;16B", (32, 32), grey.astype(">u2").tobytes()).save(place / "g.tif")  # big-endian
        Image.new("L", (32, 32), 99).save(place / "h.png", pnginfo=text)
        for foreign in ("a.eps", "a.h5", "a.heic", "a.mpg", "a.pdf", "a.wmf", "noname", ".hidden.png"):
            (place / foreign).write_text("not an image")
    return tmp_path


def test_a_folder_of_any_images_is_read_with_one_note_for_each_thing_that_is_left_out(photos, capsys):
    images = load_images("folder", "train", photos)
    assert images.classes == ["cat", "dog"] and images.y.tolist() == [0] * 8 + [1] * 8
    assert images.x.shape == (16, 3, 32, 32)
    for lossless in (0, 3, 4):
        assert images.x[lossless, :, 5, 5].tolist() == [200, 30, 30]
    assert (images.x[1].float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 4
    assert images.x[5:7].unique().tolist() == [128]  # 16 bits keep their brightness
    assert images.x[7].unique().tolist() == [99]
    root = photos / "train"
    assert capsys.readouterr().err.splitlines() == [
        f"note: 14 files below {root} are not images that Pillow reads: skipped, such as {root / 'cat' / 'a.eps'}",
        f"note: 2 images below {root} have transparent pixels: transparency is ignored",
        f"note: 16 images below {root} are almost black or of one colour, such as {root / 'cat' / 'a.png'}",
    ]


def test_sub_folders_are_read_in_the_order_of_torchvision(tmp_path):
    for number, name in enumerate(("b/2.png", "a/x/y/1.png", "a/10.png", "b/z/0.png", "a/x/3.png")):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 40 * number).save(file)
    theirs = datasets.ImageFolder(tmp_path / "train", transform=vision.pil_to_tensor)
    for hidden in (".h", "a/.h"):
        shutil.copytree(tmp_path / "train" / "b", tmp_path / "train" / hidden)
    ours = load_images("folder", "train", tmp_path)
    assert ours.classes == theirs.classes and ours.y.tolist() == theirs.targets
    assert torch.equal(ours.x, torch.stack([x for x, _ in theirs]))


def test_a_deeper_range_in_a_wider_type_is_noted(tmp_path, capsys):
    grey = np.linspace(0, 14 * 256, 32 * 32).reshape(32, 32).astype(np.uint16)
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(grey).save(tmp_path / "test" / name / "scan.tif")
    load_images("folder", "test", tmp_path)
    assert re.search(r"no pixel .* above 14 of 255(?s:.*)2 images .* almost black", capsys.readouterr().err)


def test_all_cores_decode_what_one_decodes_and_name_what_they_cannot_read(tmp_path, monkeypatch):
    draws = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(5 * image_files.CHUNK + 7)]
    for file in files:
        Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    pixels, _ = image_files.decode_chunk(files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    random_state = torch.get_rng_state()
    decoded = [chunk for chunk, _ in image_files.decode_all(files)]
    assert len(decoded) == 6 and np.array_equal(np.concatenate(decoded), pixels)
    assert torch.equal(torch.get_rng_state(), random_state)
    files[100].write_text("no image")
    with pytest.raises(ValueError, match=r"100\.png cannot be read as an image"):
        list(image_files.decode_all(files))
    monkeypatch.setattr(image_files, "decode", lambda file: signal.raise_signal(signal.SIGKILL))
    with pytest.raises(ValueError, match=r"0\.png to .*166\.png cannot be read \(DataLoader worker"):
        list(image_files.decode_all(files))


def test_an_image_is_cut_to_its_centre_square_and_turned_as_its_camera_says(tmp_path):
    shown = np.zeros((32, 96, 3), dtype=np.uint8)
    shown[:16, 32:64] = 255  # the centre's upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(np.rot90(shown).copy()).save(tmp_path / "a.png", exif=exif)
    pixels, _ = image_files.decode(tmp_path / "a.png")
    assert pixels[:, :15, 2:-2].min() == 255 and pixels[:, 17:].max() == 0


@given(st.sampled_from(["a.png", "b.JPG", "c.bmp", "d.webp", "e.tif", "f.gif"]), st.randoms(use_true_random=False))
def test_a_damaged_image_is_read_or_named(tmp_path_factory, name, draws):
    """Any bytes of it may be other ones, and its end may be missing."""
    damaged = tmp_path_factory.mktemp("damaged") / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(damaged)
    content = bytearray(damaged.read_bytes())
    for _ in range(draws.randrange(1, 8)):
        content[draws.randrange(len(content))] = draws.randrange(256)
    damaged.write_bytes(content[: draws.choice([len(content), draws.randrange(len(content))])])
    found = image_files.decode_chunk([damaged])
    if isinstance(found, ValueError):
        assert name in str(found) and "\n" not in str(found)
    else:
        assert found[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_offline_says_what_is_there_and_what_to_do(name, tmp_path, monkeypatch):
    offline = Mock(side_effect=OSError("<urlopen error no route to host>"))
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", offline)
    reader = getattr(datasets, name.upper())
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(b"whole").hexdigest())
    archive, batch = tmp_path / reader.filename, tmp_path / reader.base_folder / reader.test_list[0][0]

    for file, content, says in (
        (None, "", f"{batch} is missing and could not be downloaded"),
        (batch, "other", f"{batch} is incomplete or another file: delete it and go online once, or put"),
        (archive, "half", f"{archive} is incomplete or another file: delete it"),
        (archive, "whole", f"{archive} could not be unpacked"),
    ):
        if file:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
        if content == "whole":
            batch.unlink()
        with pytest.raises(UserError, match=f"{says}.*no route to host"):
            load_images(name, "test", tmp_path)


def test_other_layouts_are_named_and_the_lines_of_readme_make_class_folders_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()
    x, y = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), np.arange(6) % 2
    np.save("x_train.npy", x)
    np.save("y_train.npy", y)
    table, frame = "id,label\n", []
    for number, label in enumerate(y):
        file = Path("train", f"{number}.png")
        Image.fromarray(x[number]).save(file)
        table += f"{number},{label}\n"
        frame.append(SimpleNamespace(image={"bytes": file.read_bytes()}, label=label))
    Path("trainLabels.csv").write_text(table)
    monkeypatch.setitem(sys.modules, "pandas", Mock(**{"read_parquet.return_value.itertuples.return_value": frame}))
    for split, says in (("train", "holds 0 class .* here is 0.png, 1.png"), ("test", "no folder test.* train, train")):
        with pytest.raises(UserError, match=f"{says}.*: see README"):
            load_images("folder", split, ".")
    page = (ROOT / "README.md").read_text().split("## Your own images")[1]
    lines = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    rows = re.findall(r"^\| `.*\| `(.*)` \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for pairs in rows:
        exec(lines.replace("pairs", pairs), {})
        images = load_images("folder", "train", "my-images")
        assert images.y.tolist() == [0] * 3 + [1] * 3
        assert torch.equal(images.x[1], torch.from_numpy(x[2]).permute(2, 0, 1))
        shutil.rmtree("my-images")


def test_the_order_of_classes_is_printed_and_numbers_sorted_as_words_are_noted(capsys):
    for names, noted in (["0", "10", "2"], 1), (["c1", "c10", "c2"], 1), (["01", "02", "10"], 0), (["a2", "b1"], 0):
        data.print_class_order(names)
        out, err = capsys.readouterr()
        assert out.startswith(f"labels: 0 = {names[0]}, 1 = {names[1]}") and err.count("sorted as words") == noted


def test_bare_weights_are_evaluated_with_the_order_of_classes_printed(capsys):
    args = SimpleNamespace(dataset="tiny", data_dir=None, images=10, seed=0, checkpoint="weights.pt")
    for classes, printed in ((None, 1), (data.tiny("test").classes, 0)):
        evaluate.load_test_images(args, {"classes": classes, "settings": {}})
        assert capsys.readouterr().out.count("labels: 0 = class0") == printed
