"""The page on which people try a model: run here, or written as a Hugging Face Space.

python -m hub_cards.space runs/quickstart/chat
python -m hub_cards.space runs/quickstart/chat --output_dir runs/space --repo_id user/name
"""

import argparse
import json
import os
import re
import runpy
import socket
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .space_folder import build_space


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub_cards.space", description="A page on which people try a model, in their browser."
    )
    parser.add_argument("model", help="a finished run folder, an adapter's, a tokenizer's, or a Hub id")
    parser.add_argument("--port", type=int, help="of the page on this machine; by default a free one from 7860 on")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with a model from the Hub"
    )
    parser.add_argument("--output_dir", type=Path, help="write the Space's files there, and start nothing")
    parser.add_argument("--repo_id", help="under which the model is published, user/name; for --output_dir")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="space_") as temporary:
        try:
            app = prepare(arguments, Path(temporary) / "space")
        except ValueError as error:
            parser.error(str(error))
        if app is not None:
            runpy.run_path(str(app), run_name="__main__")  # until it is interrupted


def prepare(arguments: argparse.Namespace, temporary: Path) -> Path | None:
    """Writes the Space: where the user wants it, or into `temporary`, and then returns its app, which is to be run.

    Raises ValueError where something is amiss with the arguments or the model.
    """
    if arguments.output_dir is not None:
        if arguments.port is not None:
            raise ValueError("--port is of a page that runs here: leave off it or --output_dir.")
        folder, hub_id = find_model(arguments.model)
        print(build_space(folder, arguments.output_dir, arguments.repo_id or hub_id))
        return None
    if arguments.repo_id is not None:
        raise ValueError("--repo_id is of a Space that is written: give --output_dir too.")
    check_port(arguments.port)
    folder, hub_id = find_model(arguments.model)
    space = build_space(folder, temporary, hub_id)
    needs_trust = json.loads((space / "space.json").read_text(encoding="utf-8"))["trust_remote_code"]
    if hub_id and needs_trust and not arguments.trust_remote_code:
        raise ValueError(
            f"{hub_id} comes with code of its own, which this would run: read it, then give --trust_remote_code."
        )
    # The model of the folder is shown, also where its run says under which name it is published.
    os.environ["MODEL"] = str(folder.resolve())
    if arguments.port is not None:
        os.environ["GRADIO_SERVER_PORT"] = str(arguments.port)
    return space / "app.py"


def find_model(name: str) -> tuple[Path, str | None]:
    """The model's folder, and its id where it comes from the Hub. Raises ValueError where there is none."""
    if Path(name).is_dir():
        return Path(name), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"There is no folder {name}, and no Hub id is spelt so: give a finished run folder.")
    try:
        # Of what others publish, nothing that is opened by unpickling.
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.py", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns)), name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"There is no folder {name}, and it cannot be had from the Hub: {reason}") from error


def check_port(port: int | None) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port} cannot be used ({error}): give another one, or none.") from error


if __name__ == "__main__":
    main()
