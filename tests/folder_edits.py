"""What tests do to a saved model folder before they open it."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def rewrite_config(folder: Path, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite_weights(folder: Path, change):
    """Lets `change` edit the dict of stored tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
