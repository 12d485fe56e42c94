"""Checks a run folder as a stranger would, and puts it on the Hub.

    python -m hub_cards.publish runs/quickstart/chat --repo_id user/name --dry_run    # check, and list what would go
    python -m hub_cards.publish runs/quickstart/chat --repo_id user/name --private
    python -m hub_cards.publish runs/quickstart/chat --repo_id user/name --branch v2  # or --create_pr
    python -m hub_cards.publish runs/quickstart/chat_adapter --repo_id user/adapter --base_model user/base
    python -m hub_cards.publish runs/quickstart/chat --repo_id user/name --space      # and a page to try it

Takes models, adapters and tokenizers. First come the files: no pickles, no optimizer's states, no machine's paths, no
tokens, and in the code beside the weights no imports but torch, transformers, huggingface_hub and the standard library.
Then a process in another folder that cannot import hf_models opens the folder with every Auto class that it declares,
compares what the model computes with what the run recorded, and runs the card's Python snippets. Then everything goes
up in one commit. What was refused or failed left nothing published; the same command again goes on.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import stranger
from .build_card import build_card, is_as_built
from .folder_checks import WEIGHTS, list_files, problems_of
from .hub_upload import Destination, UploadError, patiently, sha256, upload

LONGEST_CHECK = 3600  # seconds, for loading and for the card's snippets
FILES_HEADING = "## Files"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CLIMBING = re.compile(r"\.\./\S+")


class PublishError(ValueError):
    """The folder is not fit to be published; the message has a line for each reason."""


class Checked(NamedTuple):
    """A folder that may go to the Hub as it lies here."""

    folder: Path
    files: list[str]
    left_out: dict[str, str]
    findings: dict[str, Any]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    space: bool = False,
    dry_run: bool = False,
    commit_message: str | None = None,
    delete: bool = True,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> str | None:
    """Checks `folder` and uploads it; returns the address of the commit, or of the pull request; None for a dry run.

    Args:
        folder: a run folder, or any folder with a model, an adapter or a tokenizer and its card (README.md).
        repo_id: `user/name` on the Hub; the card's snippets then name it.
        private: whether a repo that is made here is private; by default as the Hub's user or organisation has it.
        branch: to publish on; by default main.
        create_pr: open a pull request rather than commit.
        base_model: the Hub's id of what the model or adapter began with, where the run names it by a path.
        space: make a Space of the same name too, a page where people can try the model.
        dry_run: check and list, and do not ask the Hub for anything.
        delete: whether files that a former publication listed, and that are gone from the folder, go there too.
        token: the Hub's; by default the one that `hf auth login` stored.
        say: is told, line by line, what is done.

    Raises PublishError where the folder is not fit, and UploadError where the Hub refuses or cannot be reached. Nothing
    is published then.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"--repo_id {repo_id!r} is none that the Hub takes: give user/name.") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"--repo_id {repo_id!r} lacks the user or organisation: give user/name.")
    if branch and create_pr:
        raise PublishError("--branch and --create_pr exclude each other: a pull request has a branch of its own.")
    with checked(folder, repo_id, base_model, say) as ready:
        _say_what_goes(ready, repo_id, say)
        if dry_run:
            return None
        api = HfApi(token=token)
        if not (token or get_token()):
            raise UploadError(
                "You are not logged in to the Hub: `hf auth login`, or set HF_TOKEN. Nothing was published."
            )
        is_adapter = "adapter_config.json" in ready.files
        if (
            is_adapter
            and base_model
            and not patiently("asking for the base", lambda: api.repo_exists(base_model), base_model, say)
        ):
            raise UploadError(f"The base, {base_model}, is not on the Hub: publish it first. Nothing was published.")
        message = commit_message or f"Publish {folder.resolve().name}"
        destination = Destination(repo_id, branch=branch, create_pr=create_pr, private=private)
        address = upload(api, ready.folder, ready.files, destination, message, say, delete)
        say(f"Published: {address}")
        if space:
            try:
                _publish_space(api, ready.folder, repo_id, say)
            except ValueError as error:
                raise UploadError(f"The model is published, its page is not: {error}") from error
    return address


@contextmanager
def checked(
    folder: Path, repo_id: str, base_model: str | None = None, say: Callable[[str], None] = print
) -> Iterator[Checked]:
    """The folder as it would lie on the Hub, in a place that is gone afterwards; weights are linked, the rest copied.

    Raises PublishError where it is not fit.
    """
    listing = _listed(folder)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "folder" / folder.resolve().name
        for name in listing.files:
            _stage(folder / name, staged / name, folder)
        try:
            _shorten_paths(staged)
            base = _name_base(staged, folder, base_model)
            edited = _write_card(staged, folder, repo_id)
        except PublishError:
            raise
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise PublishError(
                f"{folder}: run.json or README.md is not as a run leaves it ({type(error).__name__}: {error}): restore "
                "it, or build the card anew with python -m hub_cards.build_card."
            ) from error
        if edited:
            say(f"{folder / 'README.md'} was edited, or built by an older version: it is kept as it is.")
        files = list_files(staged).files
        problems = list(problems_of(staged, files, folder))
        if problems:
            listed = "\n".join(f"- {problem}" for problem in problems)
            raise PublishError(f"{folder} is not fit to be published:\n{listed}")
        _list_files_in_card(staged, files)
        say(f"{folder}: {len(files)} files, no pickles, paths, tokens or foreign imports")
        findings = _met_by_a_stranger(staged, Path(scratch), repo_id, base)
        if findings["problem"]:
            raise PublishError(f"{folder}, opened where hf_models is not to be had: {findings['problem']}")
        yield Checked(staged, files, listing.left_out, findings)


def _listed(folder: Path):
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder: give the output folder of a run.")
    run = _read_json(folder / "run.json")
    if run.get("status", "finished") != "finished":
        raise PublishError(f"{folder} holds a run that is not finished ({run['status']!r}): let it end first.")
    listing = list_files(folder)
    if not any(name in listing.files for name in ("config.json", "adapter_config.json", "tokenizer.json")):
        raise PublishError(f"{folder} holds no model, adapter or tokenizer: give the output folder of a run.")
    if "config.json" in listing.files and not any(name.endswith(WEIGHTS) for name in listing.files):
        raise PublishError(f"{folder} has a config.json and no weights as safetensors: save the model again.")
    if not {"run.json", "README.md"} & set(listing.files):
        raise PublishError(f"{folder} has neither a run.json to make a card of nor a README.md: write that first.")
    return listing


def _stage(source: Path, target: Path, folder: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        target.symlink_to(source)  # a link to nothing, or no file at all: the checks name it
        return
    place = source.resolve()
    # In a download of the Hub's every file is a link into `blobs`.
    if not place.is_relative_to(folder.resolve()) and place.parent.name != "blobs":
        raise PublishError(f"{source} is a link to a file outside the folder: put a copy in its place, or remove it.")
    if source.name.endswith(WEIGHTS):
        target.symlink_to(place)
    else:
        shutil.copyfile(source, target)


def _shorten_paths(staged: Path) -> None:
    """Of a path in run.json that climbs out of the working folder, and so tells of the machine, the last part stays."""
    run = _read_json(staged / "run.json")
    if not run:
        return

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shortened(item) for name, item in value.items()}
        if isinstance(value, list):
            return [shortened(item) for item in value]
        return Path(value).name if isinstance(value, str) and CLIMBING.fullmatch(value) else value

    short = shortened(run)
    if isinstance(short.get("command"), str):
        words = (word.rpartition("=") for word in shlex.split(short["command"]))
        short["command"] = shlex.join(f"{field}{equals}{shortened(value)}" for field, equals, value in words)
    if short != run:
        _write_run(staged, short)


def _name_base(staged: Path, folder: Path, base_model: str | None) -> tuple[str, Path] | None:
    """Puts the Hub's name of the base in the place of its path; returns that name and where the base lies here."""
    run, adapter = _read_json(staged / "run.json"), _read_json(staged / "adapter_config.json")
    model = run.get("data", {}).get("model", {})
    path = adapter.get("base_model_name_or_path") or model.get("path")
    is_path = path is not None and (Path(path).is_dir() or model.get("source") not in (None, "hub"))
    if base_model is None:
        if adapter and is_path:
            raise PublishError(
                f"{folder / 'adapter_config.json'} names its base by a path, {path}, which nobody else has: publish "
                "the base first and give its --base_model user/name, or publish the merged model "
                "(training.merge_adapter)."
            )
        return None
    if path is None:
        raise PublishError(f"--base_model is for what began with another model, and {folder} names none: leave it off.")
    if adapter:
        (staged / "adapter_config.json").write_text(
            json.dumps(adapter | {"base_model_name_or_path": base_model}, indent=2) + "\n", encoding="utf-8"
        )
    if model:
        run["data"]["model"] = model | {"path": base_model, "source": "hub"}
        _write_run(staged, run)
    if not adapter:
        return None
    if not Path(path).is_dir():
        raise PublishError(f"The adapter's base is not at {path}, seen from here: run the command where it is.")
    return base_model, Path(path).resolve()


def _write_card(staged: Path, folder: Path, repo_id: str) -> bool:
    """Writes the card with the repo's name in it; returns whether the folder's was edited, and was kept for that."""
    run, card = _read_json(staged / "run.json"), staged / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if run and (not text or is_as_built(text)):
        build_card(staged, hub_id=repo_id)
        return False
    places = {json.dumps(place) for place in (f"./{staged.name}", run.get("arguments", {}).get("output_dir")) if place}

    def opens_the_repo(snippet: re.Match) -> str:
        code = snippet[0]
        for place in places if run else ():
            code = code.replace(place, json.dumps(repo_id))
        return code

    card.write_text(SNIPPET.sub(opens_the_repo, text), encoding="utf-8")
    return bool(run)


def _list_files_in_card(staged: Path, files: list[str]) -> None:
    """Adds a table of every other file with its SHA-256 to the card, in the place of a former one."""
    card = staged / "README.md"
    text = card.read_text(encoding="utf-8").split(f"\n{FILES_HEADING}\n")[0].rstrip("\n")
    others = [name for name in files if name != "README.md"]
    rows = [f"| `{name}` | {(staged / name).stat().st_size:,} | `{sha256(staged / name)}` |" for name in others]
    lines = [
        text,
        "",
        FILES_HEADING,
        "",
        "With size in bytes and SHA-256, as they were checked before they were published.",
        "",
        f"<details><summary>{len(others)} files</summary>",
        "",
        "| File | Bytes | SHA-256 |",
        "|:---|---:|:---|",
        *rows,
        "",
        "</details>",
    ]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _met_by_a_stranger(staged: Path, scratch: Path, repo_id: str, base: tuple[str, Path] | None) -> dict[str, Any]:
    """What `stranger.py` finds, in a process of its own and a folder where `user/name` is this one, as on the Hub."""
    elsewhere = scratch / "elsewhere"
    for name, place in filter(None, ((repo_id, staged), base)):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).symlink_to(place)
    recorded = _read_json(staged / "run.json").get("outputs")
    job = scratch / "job.json"
    card = (staged / "README.md").read_text(encoding="utf-8")
    job.write_text(json.dumps({"folder": repo_id, "snippets": _snippets(card), "recorded": recorded}), encoding="utf-8")
    # No secrets, no GPU, no other process's rank, no cache in which something of ours might lie.
    kept = {name: value for name, value in os.environ.items() if not re.search(r"(?i)token|secret|passw|_key", name)}
    kept = {name: value for name, value in kept.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if base is not None or not (staged / "adapter_config.json").is_file():
        environment["HF_HOME"] = str(scratch / "home")  # an adapter's base may lie in the user's cache
    try:
        ended = subprocess.run(
            [sys.executable, "-P", stranger.__file__, str(job)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_CHECK,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"loading and the card's snippets took more than {LONGEST_CHECK // 60} minutes."}
    findings = json.loads(job.read_text(encoding="utf-8"))
    if ended.returncode != 0 or "problem" not in findings:
        last = ended.stderr.strip().splitlines()[-1:] or ["no word"]
        return {"problem": f"the process ended with code {ended.returncode} ({last[0]})."}
    return findings | {"recorded": recorded}


def _snippets(card: str) -> list[tuple[int, str]]:
    """Every block of Python in a card, with the line on which its code begins."""
    return [(card.count("\n", 0, block.start(1)) + 1, block[1]) for block in SNIPPET.finditer(card)]


def _say_what_goes(ready: Checked, repo_id: str, say: Callable[[str], None]) -> None:
    found = ready.findings
    say(f"opened by {', '.join(found['loaded'])}; {found['snippets']} snippets of the card ran")
    if found["recorded"]:
        say("outputs are those that the run recorded")
    else:
        say("outputs were not compared: run.json has none (the run is older than that, or there is no run.json)")
    say(f"To {repo_id}:")
    sizes = {name: (ready.folder / name).stat().st_size for name in ready.files}
    for name, size in sizes.items():
        say(f"  {size:>14,}  {name}")
    say(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
    for name, reason in ready.left_out.items():
        say(f"  left out: {name} ({reason})")


def _publish_space(api: HfApi, staged: Path, repo_id: str, say: Callable[[str], None]) -> None:
    from .space import build_space

    # A page shows what its model is: a private one's is private too.
    private = patiently("asking for the repo's state", lambda: api.repo_info(repo_id).private, repo_id, say)
    with tempfile.TemporaryDirectory() as scratch:
        page = build_space(staged, Path(scratch) / "space", repo_id)
        files = list_files(page).files
        destination = Destination(repo_id, repo_type="space", private=private or None, space_sdk="gradio")
        say(f"Published: {upload(api, page, files, destination, f'Page of {repo_id}', say)}")
    if private:
        say("To open a private model the Space needs a token that may read it, in its settings as the secret HF_TOKEN.")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PublishError(f"{file} is not readable as JSON ({error}): restore it.") from error
    if not isinstance(content, dict):
        raise PublishError(f"{file} holds no JSON object: restore it.")
    return content


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hub_cards.publish", description="Checks a run folder as a stranger would, and uploads it."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model, adapter or tokenizer, with its run.json")
    parser.add_argument("--repo_id", required=True, help="user/name, or organisation/name, on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private, if it is new")
    parser.add_argument("--branch", help="publish on this branch; by default main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request rather than commit")
    parser.add_argument("--base_model", help="the Hub's id of what it began with, where the run has a path")
    parser.add_argument("--space", action="store_true", help="make a page too, on which people can try it")
    parser.add_argument("--dry_run", action="store_true", help="check, list what would go, and stop")
    parser.add_argument("--commit_message", help="by default: Publish, and the folder's name")
    arguments = vars(parser.parse_args())
    try:
        publish(arguments.pop("folder"), **arguments)
    except (PublishError, UploadError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
