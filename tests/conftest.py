"""The project's modules are files beside this folder; tests run two threads and no download."""

import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torchvision import datasets

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

torch.set_num_threads(1)  # the networks are small, and a busy machine stalls on threads that wait for each other
# Fixed examples in every run: a property that fails does so for everybody.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("fixed")


def pytest_configure(config):
    """Tests, and the processes that they start, see no GPU. `pytest -n 0 -k gpu` runs the tests that need one."""
    if config.option.keyword != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """`cifar_files(name)` writes 200 made-up images in the published pickle layout of cifar10 or cifar100 (150 to train
    on, 50 to test) and replaces torchvision's checksums by theirs, nothing else. Returns the folder, the rows of 3072
    bytes and the labels by split."""

    def write(name):
        reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        count = {"cifar10": 10, "cifar100": 100}[name]
        label_key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        draws = np.random.default_rng(0)
        raw, labels = {"train": [], "test": []}, {"train": [], "test": []}

        def checksum(file, content):
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        def batch(file, split, size):
            rows = draws.integers(0, 256, (size, 3072), dtype=np.uint8)
            y = [(i * 7 + len(labels[split])) % count for i in range(size)]
            raw[split].append(rows)
            labels[split] += y
            return [file, checksum(file, {"data": rows, label_key: y, "filenames": [f"{i}.png" for i in range(size)]})]

        files = [file for file, _ in reader.train_list]
        monkeypatch.setattr(reader, "train_list", [batch(file, "train", 150 // len(files)) for file in files])
        monkeypatch.setattr(reader, "test_list", [batch(file, "test", 50) for file, _ in reader.test_list])
        published = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        names = published if name == "cifar10" else [f"thing{label}" for label in range(100)]
        meta = dict(reader.meta)
        meta["md5"] = checksum(meta["filename"], {meta["key"]: names})
        monkeypatch.setattr(reader, "meta", meta)
        return tmp_path, {split: np.concatenate(rows) for split, rows in raw.items()}, labels

    return write
