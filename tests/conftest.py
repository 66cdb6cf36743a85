"""The project's modules are files beside this folder; tests run one thread and no download."""

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
    """`cifar_files(name)` writes 200 made-up images in the layout of cifar10 or cifar100 and makes torchvision
    accept their checksums. Returns the folder, the rows of 3072 bytes and the labels by split."""

    def write(name):
        reader, classes = getattr(datasets, name.upper()), int(name.removeprefix("cifar"))
        monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, _: Path(path).is_file())
        folder, raw, labels = tmp_path / reader.base_folder, {}, {}
        folder.mkdir()
        for split, size, listed in (("train", 150, reader.train_list), ("test", 50, reader.test_list)):
            raw[split] = np.random.default_rng(size).integers(0, 256, (size, 3072), dtype=np.uint8)
            labels[split] = [i * 7 % classes for i in range(size)]
            for n, (file, _) in enumerate(listed):
                rows = slice(n * size // len(listed), (n + 1) * size // len(listed))
                content = {"data": raw[split][rows], "labels": labels[split][rows], "fine_labels": labels[split][rows]}
                (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        names = [f"thing{label}" for label in range(classes)]
        (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}, protocol=2))
        return tmp_path, raw, labels

    return write
