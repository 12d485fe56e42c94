"""`run.json`: what a run was asked to do, on what, with what, and what came of it.

The card is built from this file and nothing else, and a run is resumed only by the command that began it. The file is
replaced as a whole at every write, so a killed run leaves the last good one. Paths in it are relative to the working
folder. While a process works in a folder, another one is refused.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

FILE_NAME = "run.json"
# What is not installed (text needs no timm) is left out.
LIBRARIES = (
    "torch", "transformers", "tokenizers", "datasets", "accelerate", "trl", "peft", "bitsandbytes", "lm_eval",
    "torchvision", "timm", "hf_models",
)  # fmt: skip
# Fields that change neither what is trained nor on what: a run may be resumed with other values of these.
FREE_FIELDS = {
    "output_dir",
    "report_to",
    "run_name",
    "disable_tqdm",
    "save_total_limit",
    "compare_with",
    "sample_prompts",
    "per_device_eval_batch_size",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
}
# The entries of a record that are paths, unless they name something else (a sample, a Hub id).
PATH_FIELDS = {
    "adapter",
    "base",
    "chat_template_path",
    "compare_with",
    "config",
    "dataset",
    "decontaminate",
    "documents",
    "eval_dataset",
    "folder",
    "general_dataset",
    "language_model",
    "model",
    "negatives",
    "output_dir",
    "path",
    "perplexity_cutoffs",
    "perplexity_models",
    "positives",
    "prompt_dataset",
    "recipe",
    "recipes",
    "reference_model",
    "reward_model",
    "small",
    "tokenizer",
}


# A process that was killed may have workers that end only seconds after it.
SECONDS_FOR_THE_FOLDER = 15
# Folders that this process works in, and the descriptors that hold them, until the run is finished.
_held: dict[Path, int] = {}


class RunRecord:
    """The `run.json` of one run folder, as a dictionary in `content`."""

    def __init__(self, output_dir: str | Path, content: dict[str, Any], writes: bool = True):
        self.path = Path(output_dir) / FILE_NAME
        self.content = content
        self.writes = writes
        self._session_start = time.monotonic()

    @classmethod
    def start(
        cls, output_dir: str | Path, task: str, arguments: dict[str, Any], data: dict[str, Any], writes: bool = True
    ) -> "RunRecord":
        """Opens `output_dir` for this run: new, or the same one again after a stop. Writes nothing yet: `save` does.

        Args:
            task: the script's name, such as "pretrain_lm".
            arguments: what was asked for, the last thing that `parse_arguments` returns.
            data: a description of each data set read, with its `fingerprint`.
            writes: False in every process of a distributed run but the main one.

        Raises ValueError, before anything is written, where the folder holds another run or other files, or where
        another process is at work in it.
        """
        output_dir = Path(output_dir)
        # As many processes make another batch of the same arguments.
        arguments = arguments | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}
        asked = {"task": task, "arguments": portable(arguments), "data": portable(data)}
        if writes and output_dir.is_dir():
            hold(output_dir)
        try:
            previous = _read(output_dir)
            if previous is not None:
                _check_same_run(output_dir, previous, asked)
        except ValueError:
            let_go(output_dir)
            raise
        if previous is not None:
            content = previous | asked
        else:
            content = asked | {"metrics": {}, "history": [], "samples": [], "sessions": []}
        record = cls(output_dir, content, writes)
        if record.finished:
            let_go(output_dir)
        else:
            record.begin_session(on_cpu=bool(arguments.get("use_cpu")))
        return record

    @property
    def finished(self) -> bool:
        return self.content.get("status") == "finished"

    def begin_session(self, on_cpu: bool = False) -> None:
        """Takes down what works on the run from now on: the command, the code, the machine, the time."""
        self.content |= {
            "status": "running",
            "command": _command(),
            "git_revision": git_revision(),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES if find_spec(name)},
            "hardware": hardware(on_cpu),
        }
        self.content["sessions"].append({"started": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": 0.0})

    def save(self, **sections: Any) -> None:
        """Writes the file, with `sections` put in place of those of the same name."""
        self.content |= portable(sections)
        self.content["sessions"][-1]["seconds"] = round(time.monotonic() - self._session_start, 1)
        self.content["wall_time_seconds"] = round(sum(session["seconds"] for session in self.content["sessions"]), 1)
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        hold(self.path.parent)
        replace_file(self.path, json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")

    def finish(self, metrics: dict[str, Any], **sections: Any) -> None:
        self.save(metrics=metrics, status="finished", **sections)
        let_go(self.path.parent)


def let_go(folder: Path) -> None:
    if (held := _held.pop(folder.resolve(), None)) is not None:
        os.close(held)


def hold(folder: Path) -> None:
    """Keeps other processes out of a run folder until this one finishes the run, or ends in whatever way.

    Raises ValueError where another one is in it.
    """
    folder = folder.resolve()
    if folder in _held or fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + SECONDS_FOR_THE_FOLDER
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                raise ValueError(
                    f"Another process is at work in {portable(folder, 'folder')}: wait until it ends, or stop it."
                ) from None
            time.sleep(0.2)
        except OSError:
            return os.close(descriptor)  # a file system without locks
        else:
            _held[folder] = descriptor
            return


def replace_file(file: Path, text: str) -> None:
    """Writes the file beside its place first: a killed process leaves the former."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def portable(value: Any, name: str = "") -> Any:
    """`value` as JSON holds it, an absolute path (in an entry whose `name` says so) made relative."""
    if isinstance(value, dict):
        return {str(key): portable(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [portable(item, name) for item in value]
    if isinstance(value, bool | int | float | None):
        return value
    text = str(getattr(value, "value", value))  # an enum's value
    return os.path.relpath(text) if name in PATH_FIELDS and os.path.isabs(text) else text


def git_revision() -> str | None:
    """The commit of the code that runs, with `+changes` where the tree differs from it; None outside a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(on_cpu: bool) -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, and the accelerators that it may use."""
    import torch  # seconds, which workers that import a command's module have no use for

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": [] if on_cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _read(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / FILE_NAME
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not readable as JSON ({error}): restore it, or choose another --output_dir."
            ) from error
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: choose another --output_dir.")
    others = sorted(entry.name for entry in output_dir.iterdir()) if output_dir.is_dir() else []
    others = [name for name in others if name != FILE_NAME + ".partial"]
    if others:
        raise ValueError(
            f"{output_dir} holds files but no {FILE_NAME} ({', '.join(others[:3])}, ...): "
            "choose another --output_dir, or empty this one."
        )
    return None


def _check_same_run(output_dir: Path, previous: dict[str, Any], asked: dict[str, Any]) -> None:
    if previous["task"] != asked["task"]:
        differences = [f"it was made by {previous['task']}, this is {asked['task']}"]
    else:
        differences = [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for section in ("arguments", "data")
            for before, now in [(previous[section], asked[section])]
            for name in sorted(before.keys() | now.keys())
            if name not in FREE_FIELDS and before.get(name) != now.get(name)
        ]
    if differences:
        raise ValueError(
            f"{output_dir} holds another run: {'; '.join(differences[:3])}. "
            "Choose another --output_dir, delete this one, or give the arguments that began it."
        )


def _command() -> str:
    """The command as it can be pasted again: `python -m training.x ...` with relative paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else [portable(os.path.abspath(sys.argv[0]), "path")]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    program = (["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]) + program
    words = list(sys.argv[1:])
    last_field = ""
    for i, word in enumerate(words):
        field, equals, value = word.partition("=")
        if not field.startswith("--"):
            words[i] = portable(word, last_field)
            continue
        last_field = field.removeprefix("--")
        if equals:
            words[i] = f"{field}={portable(value, last_field)}"
    return shlex.join(program + words)
