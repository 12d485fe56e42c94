"""What a finished model computes, taken down with the run: whoever opens it later compares."""

import sys
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from hub_cards.stranger import reference_outputs


def recorded_outputs(folder: str | Path) -> dict[str, Any] | None:
    """`reference_outputs` of the saved folder, opened anew; None where that fails, which is told and ends no run."""
    if is_deepspeed_zero3_enabled():  # it would part the model that is opened here among all processes
        return None
    try:
        return reference_outputs(folder)
    except Exception as error:
        print(f"note: {folder} could not be opened again for reference outputs: {error}", file=sys.stderr)
        return None
