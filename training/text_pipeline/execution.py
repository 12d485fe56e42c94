"""Runs the phases of a pipeline with datatrove's executors: on this machine, on Slurm or on Ray.

A phase is a list of steps that `tasks` tasks go through; the next one begins when all tasks of this one are done. Each
task that is done leaves a mark, and only those without are run when the same pipeline is started again. How many tasks
there are depends on the input alone, so neither the number of workers nor an interruption changes what is written.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass
class ExecutionArguments:
    executor: str = field(default="local", metadata={"help": "What runs the tasks: local, slurm or ray."})
    workers: int = field(
        default=0, metadata={"help": "Tasks that run at the same time; 0 for one a core (local), or no limit."}
    )
    slurm_partition: str | None = field(default=None, metadata={"help": "Slurm partition to submit to."})
    slurm_time: str = field(default="10:00:00", metadata={"help": "Slurm time limit of a task."})
    slurm_qos: str | None = field(
        default=None, metadata={"help": "Slurm quality of service, where the cluster asks one."}
    )
    slurm_environment: str | None = field(
        default=None, metadata={"help": "Shell command that a Slurm job begins with: `source .venv/bin/activate`."}
    )
    memory_per_task: int = field(default=4, metadata={"help": "Memory that a task on Slurm or Ray is given, in GB."})
    cores_per_task: int = field(default=1, metadata={"help": "Cores that a task on Slurm or Ray is given."})

    def __post_init__(self):
        if self.executor not in ("local", "slurm", "ray"):
            raise ValueError(f"--executor is {self.executor!r}: take local, slurm or ray.")
        if self.executor == "slurm" and not self.slurm_partition:
            raise ValueError("--executor slurm needs --slurm_partition: `sinfo` lists the cluster's.")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}: give 1 or more, or 0 for one a core.")


@dataclass
class Phase:
    name: str
    steps: list[PipelineStep]
    tasks: int


class PhaseError(RuntimeError):
    """A task failed: in one sentence, with the place of its log, which has the traceback."""


def run_phases(phases: list[Phase], arguments: ExecutionArguments, logs: Path) -> None:
    """Runs what is not done yet. With Slurm, submits the jobs, each waiting for the one before, and returns.

    Raises PhaseError where a task failed; what is done by then stays done.
    """
    if arguments.executor == "local":
        for phase in phases:
            try:
                _run_here(phase, arguments.workers, logs)
            except Exception as error:
                raise PhaseError(
                    f"{phase.name} failed: {error} (its tasks' logs: {logs / phase.name / 'logs'})"
                ) from error
        return
    executor = None
    for phase in phases:
        executor = _cluster_executor(phase, arguments, logs, executor)
    executor.run()


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, whose tasks end with the driver, and tell what they do in their log files only."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        if multiprocess.parent_process() is not None:
            die_with_parent()
        # An error is raised in the driver too.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()  # it goes on writing to what is closed by then


def _run_here(phase: Phase, workers: int, logs: Path) -> None:
    workers = min(workers or len(os.sched_getaffinity(0)), phase.tasks)
    executor = LocalExecutor(phase.steps, tasks=phase.tasks, workers=workers, logging_dir=str(logs / phase.name))
    missing = len(executor.get_incomplete_ranks())
    if not missing:
        return
    started = time.monotonic()
    print(f"{phase.name}: {missing} of {phase.tasks} tasks, {workers} at a time", flush=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), _unknown_main_module():
        logger.remove()
        executor.run()
    print(f"{phase.name}: {time.monotonic() - started:.1f} s", flush=True)


@contextlib.contextmanager
def _unknown_main_module() -> Iterator[None]:
    """Workers import the main module before anything else: a command's would bring torch and TRL, of no use to them."""
    main = sys.modules["__main__"]
    known = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(known)


def prepare_process() -> None:
    """Settings of the driver's process, for all that it starts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is one core
    # What this process forks, such as the manager of datatrove's queue, must not outlive it: it would keep the lock of
    # the output folder.
    os.register_at_fork(after_in_child=die_with_parent)
    # pyarrow imports pandas at the first table that it is asked for: once for all workers.
    multiprocess.set_forkserver_preload(["pandas", "training.text_pipeline.source_phases"])


def die_with_parent() -> None:
    """A task must not go on writing after `kill -9` of the driver: it would be run again beside it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _cluster_executor(phase: Phase, arguments: ExecutionArguments, logs: Path, depends):
    options = {
        "tasks": phase.tasks,
        "workers": arguments.workers or -1,
        "logging_dir": str(logs / phase.name),
        "depends": depends,
        "cpus_per_task": arguments.cores_per_task,
    }
    if arguments.executor == "ray":
        return RayPipelineExecutor(phase.steps, mem_per_cpu_gb=arguments.memory_per_task, **options)
    return SlurmPipelineExecutor(
        phase.steps,
        time=arguments.slurm_time,
        partition=arguments.slurm_partition,
        qos=arguments.slurm_qos,
        env_command=arguments.slurm_environment,
        mem_per_cpu_gb=arguments.memory_per_task,
        job_name=phase.name,
        slurm_logs_folder=str(logs / phase.name / "slurm"),
        mail_type="NONE",
        **options,
    )
