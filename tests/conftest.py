"""The project's modules are files beside this folder; tests run one thread and no download."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
