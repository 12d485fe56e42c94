"""Tests run offline, from a fixed seed, and on one thread: `make test` runs as many at a time as there are cores."""

import gc
import os

# Read when huggingface_hub and torch are imported, here and in the processes that tests start.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch

pytest_plugins = ["local_hub"]  # the fixture of that name


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """Modules stay: every trainer has Accelerate collect garbage, which took half a second for looking through them."""
    gc.freeze()
