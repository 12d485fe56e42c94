"""Runs `python -m MODULE` in processes that have the libraries imported already.

To import them takes most of the time of a command that is cut to a step or two. Python's forkserver imports them once;
each command is a fork of it, in which the module runs as the main program.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

LIBRARIES = [
    "datasets",
    "lm_eval.evaluator",
    "matplotlib.pyplot",
    "peft",
    "timm",
    "transformers.pipelines",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.sft_trainer",
]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CONTEXT = multiprocessing.get_context("forkserver")


def run_words(words: list[str], folder: Path, seconds: float = 600) -> CompletedProcess:
    """What `subprocess.run(words, cwd=folder, capture_output=True, text=True)` returns for PYTHON -m MODULE ..."""
    with tempfile.TemporaryDirectory() as logs:
        logs = Path(logs)
        process = _start(_as_main, (words[2], words[3:]), folder, logs / "stdout", logs / "stderr")
        code = _end(process, seconds)
        out, err = ((logs / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    return CompletedProcess(words, code, out, err)


def run_module(module: str, arguments: list[str], folder: Path, seconds: float = 600) -> tuple[int | None, str]:
    """What `python -m module arguments`, with `folder` as the working folder, exits with and prints."""
    return _run_logged(_as_main, (module, arguments), folder, seconds)


def run_code(code: str, folder: Path, seconds: float = 600) -> tuple[int | None, str]:
    """The same for `python -c code`."""
    return _run_logged(exec, (code, {"__name__": "__main__"}), folder, seconds)


def _run_logged(function, arguments, folder, seconds):
    log = folder / "output.log"
    code = _end(_start(function, arguments, folder, log, log), seconds)
    return code, log.read_text(encoding="utf-8", errors="replace")


def _start(function, arguments, folder, out, err):
    os.environ |= ENVIRONMENT  # the forkserver's, which is started at the first call
    CONTEXT.set_forkserver_preload(LIBRARIES)
    # A test may have changed the environment since the forkserver began.
    process = CONTEXT.Process(target=_in_folder, args=(function, arguments, folder, dict(os.environ), out, err))
    process.start()
    return process


def _end(process, seconds):
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _in_folder(function, arguments, folder, environment, out, err):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(out, "w") as output, open(err, "a") as errors, open(os.devnull) as nothing:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno() if err == out else errors.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0)  # noqa: SIM115 (multiprocessing has closed the former)
    function(*arguments)


def _as_main(module, arguments):
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
