"""Runs the phases of a pipeline with datatrove's executors: on this machine, on Slurm or on Ray.

A phase is a list of steps that `tasks` tasks go through; the next one begins when all tasks of this one are done. Each
task that is done leaves a mark, and only those without are run when the same pipeline is started again. How many tasks
there are depends on the input alone, so neither the number of workers nor an interruption changes what is written.
"""

import contextlib
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from .local_executor import LocalExecutor, start_fork_server
from .ray_executor import RayExecutor, connect_to_ray
from .slurm_executor import SlurmExecutor, check_no_job_left, save_jobs

# A line that a traceback ends with; datatrove's own lines begin with a date.
ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*: (?P<message>.+)")


@dataclass
class ExecutionArguments:
    executor: str = field(default="local", metadata={"help": "What runs the tasks: local, slurm or ray."})
    workers: int = field(
        default=0, metadata={"help": "Tasks that run at the same time; 0 for one a core (local), or no limit."}
    )
    slurm_partition: str | None = field(default=None, metadata={"help": "Slurm partition to submit to."})
    slurm_time: str = field(
        default="10:00:00",
        metadata={"help": "Slurm time limit of a job: of a task, or of N for N * 1001 tasks, of which it runs N."},
    )
    slurm_qos: str | None = field(
        default=None, metadata={"help": "Slurm quality of service, where the cluster asks one."}
    )
    slurm_environment: str | None = field(
        default=None,
        metadata={
            "help": "Shell command that a Slurm job begins with, such as `module load gcc`. Jobs run this Python."
        },
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
        for name in ("memory_per_task", "cores_per_task"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more.")


@dataclass
class Phase:
    name: str
    steps: list[PipelineStep]
    tasks: int


class PhaseError(RuntimeError):
    """A task failed: in one sentence, with the place of its log, which has the traceback."""


def run_phases(phases: list[Phase], arguments: ExecutionArguments, logs: Path) -> bool:
    """Runs what is not done yet, and returns whether all is done by then.

    With Slurm, submits the jobs, each waiting for the one before, and returns False unless there were none to submit.

    Raises:
        PhaseError: a task failed; what is done by then stays done.
        ValueError: jobs of an earlier start are on Slurm still.
        ImportError: there is no Ray.
    """
    if arguments.executor == "slurm":
        return _submit_phases(phases, arguments, logs)
    if arguments.executor == "ray":
        connect_to_ray()
    elif arguments.workers != 1:
        start_fork_server()
    for phase in phases:
        with _quiet():
            executor = _executor(phase, arguments, logs / phase.name)
        missing = executor.get_incomplete_ranks()
        if not missing:
            continue
        print(
            f"{phase.name}: {len(missing)} of {phase.tasks} tasks, {min(executor.workers, len(missing))} at a time",
            flush=True,
        )
        started = time.monotonic()
        try:
            with _quiet():
                executor.run()
        except Exception as error:
            raise PhaseError(f"{phase.name} failed: {error} (its tasks' logs: {logs / phase.name / 'logs'})") from error
        if left := executor.get_incomplete_ranks():
            raise PhaseError(f"{phase.name} failed: {_last_words(left[0], logs / phase.name)}")
        print(f"{phase.name}: {time.monotonic() - started:.1f} s", flush=True)
    return True


def _executor(phase: Phase, arguments: ExecutionArguments, logs: Path) -> PipelineExecutor:
    options = {"tasks": phase.tasks, "logging_dir": str(logs)}
    if arguments.executor == "local":
        workers = min(arguments.workers or len(os.sched_getaffinity(0)), phase.tasks)
        return LocalExecutor(phase.steps, workers=workers, **options)
    options |= {
        "workers": arguments.workers or -1,
        "cpus_per_task": arguments.cores_per_task,
        "mem_per_cpu_gb": math.ceil(arguments.memory_per_task / arguments.cores_per_task),
    }
    if arguments.executor == "ray":
        return RayExecutor(phase.steps, **options)
    return SlurmExecutor(
        phase.steps,
        time=arguments.slurm_time,
        partition=arguments.slurm_partition,
        qos=arguments.slurm_qos,
        env_command=arguments.slurm_environment,
        job_name=phase.name,
        **options,
    )


def _submit_phases(phases: list[Phase], arguments: ExecutionArguments, logs: Path) -> bool:
    check_no_job_left(logs)
    jobs: list[str] = []
    for phase in phases:
        folder = logs / phase.name
        executor = _executor(phase, arguments, folder)
        missing = executor.get_incomplete_ranks()
        if not missing:
            continue
        if failed := [rank for rank in missing if _log_file(rank, folder).exists()]:
            print(f"{phase.name}: {_last_words(failed[0], folder)}", flush=True)
        if jobs:
            executor.depends_job_id = jobs[-1]
        try:
            with _quiet():
                executor.launch_job()
        except subprocess.CalledProcessError as error:
            raise PhaseError(
                f"Slurm takes no job for {phase.name}, for the reason that `sbatch` gives: mend the --slurm_ field."
            ) from error
        jobs.append(executor.job_id)
        save_jobs(jobs, logs)
        print(f"{phase.name}: job {executor.job_id}, {len(missing)} of {phase.tasks} tasks", flush=True)
    return not jobs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps datatrove's log from the terminal: what is of use in it is in the log files and in what is raised."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        logger.remove()
        yield


def _log_file(rank: int, logs: Path) -> Path:
    return logs / "logs" / f"task_{rank:05d}.log"


def _last_words(rank: int, logs: Path) -> str:
    """How a task ended that is not done, by its log."""
    file = _log_file(rank, logs)
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    if error := ERROR_LINE.match(last):
        return f"task {rank} ended with: {error['message']} (its log: {file})"
    return f"task {rank} was killed, as for too little memory or time (its log: {file})"
