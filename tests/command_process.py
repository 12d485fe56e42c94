"""Runs `python -m MODULE` in processes that have the libraries imported already.

To import them takes most of the time of a command that is cut to a step or two. Python's forkserver imports them once;
each command is a fork of it, in which the module runs as the main program.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

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


def run_module(module: str, arguments: list[str], folder: Path, seconds: float = 600) -> tuple[int | None, str]:
    """What `python -m module arguments`, with `folder` as the working folder, exits with and prints."""
    return _run(_as_main, (module, arguments), folder, seconds)


def run_code(code: str, folder: Path, seconds: float = 600) -> tuple[int | None, str]:
    """The same for `python -c code`."""
    return _run(exec, (code, {"__name__": "__main__"}), folder, seconds)


def _run(function, arguments, folder, seconds):
    os.environ |= ENVIRONMENT  # the forkserver's, which is started at the first call
    CONTEXT.set_forkserver_preload(LIBRARIES)
    log = folder / "output.log"
    process = CONTEXT.Process(target=_in_folder, args=(function, arguments, folder, log))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _in_folder(function, arguments, folder, log):
    os.chdir(folder)
    with open(log, "w") as output, open(os.devnull) as nothing:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0)  # noqa: SIM115 (multiprocessing has closed the former)
    function(*arguments)


def _as_main(module, arguments):
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
