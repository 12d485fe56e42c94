"""datatrove's executor for Slurm: a phase is a job array, which begins when that of the phase before has succeeded.

Jobs run the Python and the code that submitted them, in its working folder, which all nodes must see. Where a task
fails, Slurm cancels the jobs that wait for it; the same command submits what is not done.
"""

import getpass
import json
import math
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

from .tally import replace_file

# Jobs of an array that a Slurm cluster takes, unless its MaxArraySize is another. More tasks than that share jobs:
# datatrove would submit several arrays, and let the next phase wait for the last of them only.
MAX_ARRAY_SIZE = 1001
JOBS = "slurm_jobs.json"
ROOT = Path(__file__).resolve().parents[2]  # of the package `training`


class SlurmExecutor(SlurmPipelineExecutor):
    def __init__(
        self, steps: list[PipelineStep], tasks: int, logging_dir: str, env_command: str | None = None, **options
    ):
        """`env_command`: what a job's shell runs first; other `options` are datatrove's."""
        found = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
        found.append(f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}")
        super().__init__(
            steps,
            tasks=tasks,
            logging_dir=logging_dir,
            env_command="\n".join(found + ([env_command] if env_command else [])),
            slurm_logs_folder=str(Path(logging_dir) / "slurm"),
            max_array_size=MAX_ARRAY_SIZE,
            tasks_per_job=math.ceil(tasks / MAX_ARRAY_SIZE),
            # A job that waits for one that failed would wait for ever.
            sbatch_args={"kill-on-invalid-dep": "yes"},
            **options,
        )

    def launch_merge_stats(self) -> None:
        """Submits nothing: the report has the sums."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        steps = self.pipeline
        self.pipeline = deepcopy(steps)  # each task of a job begins with its own
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            self.pipeline = steps


def check_no_job_left(logs: Path) -> None:
    """Raises ValueError where there is no Slurm, or jobs that `save_jobs` took down are queued or running."""
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm finds no `sbatch` here: start the run on a login node of the cluster.")
    if not (logs / JOBS).exists():
        return
    jobs = json.loads((logs / JOBS).read_text(encoding="utf-8"))
    listed = subprocess.run(
        ["squeue", "--noheader", "--format=%F", "--user", getpass.getuser()], stdout=subprocess.PIPE, text=True
    )
    if listed.returncode:
        raise ValueError("`squeue` fails, so that jobs of this run may be queued: try again when Slurm answers.")
    if left := [job for job in jobs if job in listed.stdout.split()]:
        raise ValueError(
            f"Jobs of this run are queued or running still: wait until they end, or `scancel {' '.join(left)}` first."
        )


def save_jobs(jobs: list[str], logs: Path) -> None:
    replace_file(logs / JOBS, json.dumps(jobs).encode())
