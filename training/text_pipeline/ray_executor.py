"""datatrove's executor for Ray: tasks run in the working folder of the driver, which all nodes must see."""

import logging
import os
from pathlib import Path

from datatrove.executor import RayPipelineExecutor
from datatrove.utils.stats import PipelineStats

ROOT = Path(__file__).resolve().parents[2]  # of the package `training`


class RayExecutor(RayPipelineExecutor):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.working_folder = os.getcwd()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        os.chdir(self.working_folder)  # a worker begins in a folder of Ray's
        return super()._run_for_rank(rank, local_rank, node_rank)


def connect_to_ray() -> None:
    """To the cluster that RAY_ADDRESS names or that this machine is part of; else starts one on this machine.

    Raises ImportError where Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--executor ray needs Ray: `pip install ray`.") from error
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ray.init(
        ignore_reinit_error=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
