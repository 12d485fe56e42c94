"""Tests run offline, from a fixed seed, and on as many threads everywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
