"""Tests run offline, from a fixed seed, on one thread, and with caches of their own.

`make test` runs as many at a time as there are cores, each process with such caches: one must not import the remote
code that another is copying.
"""

import gc
import os
import shutil
import tempfile

# Read when huggingface_hub and torch are imported, here and in the processes that tests start.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

pytest_plugins = ["local_hub"]  # the fixture of that name


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """Modules stay: every trainer has Accelerate collect garbage, which took half a second for looking through them."""
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
