"""datatrove's executor for one machine, with a pool that notices when a worker is killed.

datatrove's own waits for ever for what such a worker should have done. All processes end with the driver, however that
one ends.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from multiprocessing import forkserver

from datatrove.executor import LocalPipelineExecutor
from loguru import logger


class TaskError(RuntimeError):
    """What ended a task, in words: any other exception could be one that cannot be sent from process to process."""


class LocalExecutor(LocalPipelineExecutor):
    def run(self) -> None:
        """Raises TaskError at the first task that fails; the others are stopped, and what they began is not used."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self._run_task(rank)
            return
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), context, begin_worker) as pool:
            try:
                with interrupts_held():
                    tasks = [pool.submit(self._run_task, rank) for rank in ranks]
                for task in as_completed(tasks):
                    task.result()
            except BrokenProcessPool:
                raise TaskError(
                    "a worker was killed, most likely since memory ran out: the same command goes on, and takes less "
                    "memory with fewer --workers"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.kill()

    def _run_task(self, rank: int) -> None:
        steps = self.pipeline
        # A worker has its own copy of the steps for each task, and so has a driver that is the only worker.
        self.pipeline = deepcopy(steps)
        # What is written there is in the task's log file too, and an error is raised in the driver.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            try:
                self._run_for_rank(rank, local_rank=rank)
            except Exception as error:
                known = isinstance(error, OSError | ValueError | RuntimeError) and str(error)
                raise TaskError(str(error) if known else f"{type(error).__name__}: {error}") from error
            finally:
                self.pipeline = steps
                logger.remove()  # it goes on writing to what is closed by then


def prepare_process() -> None:
    """Settings of the driver's process, for all that it starts."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is one core
    # pyarrow imports pandas at the first table that it is asked for: once for all workers.
    multiprocessing.set_forkserver_preload(["pandas", "training.text_pipeline.source_phases"])


def start_fork_server() -> None:
    """It and all workers ignore Ctrl-C, which is for the driver: that stops them."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C within waits for the end: a worker that is half started could not be stopped."""
    came = []
    former = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if came:
            signal.raise_signal(signal.SIGINT)


def begin_worker() -> None:
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    """A task must not go on writing after `kill -9` of the driver: it would be run again beside it."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)
