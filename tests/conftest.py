"""Tests run offline, from a fixed seed, and on as many threads everywhere."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(2)
pytest_plugins = ["local_hub"]  # the fixture of that name


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """Modules stay: every trainer has Accelerate collect garbage, which took half a second for looking through them."""
    gc.freeze()
