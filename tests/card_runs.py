"""Run folders as the training scripts leave them, for the tests of cards, and what a reader does with a card."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hub_cards.build_card import build_card

PYTHON_BLOCK = r"^```python\n(.*?)^```$"
# Stands before a card's snippets: a stranger's process has none of our packages.
STRANGER = "import sys\nfor ours in ('hf_models', 'training', 'hub_cards'):\n    sys.modules[ours] = None\n"


def write_run(folder: Path, run: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def card_text(folder: Path, run: dict) -> str:
    return build_card(write_run(folder, run)).read_text(encoding="utf-8")


def python_snippets(card: str) -> str:
    return "\n".join(re.findall(PYTHON_BLOCK, card, flags=re.MULTILINE | re.DOTALL))


def pictures(card: str) -> list[str]:
    return re.findall(r"!\[.*?\]\((.*?)\)", card) + re.findall(r'<img src="(.*?)"', card)


def run_as_stranger(cards: str, folder: Path) -> str:
    """What the cards' snippets print, each as if it were alone, in a process that has none of our packages and works in
    `folder`."""
    snippets = re.findall(PYTHON_BLOCK, cards, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", f"{STRANGER}for snippet in {snippets!r}:\n    exec(snippet, {{}})\n"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
