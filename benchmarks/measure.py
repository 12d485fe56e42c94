"""What the benchmarks share: fair timing, peak memory of a step, a table, a JSON file.

Candidates are timed in turn, round after round, so that what else the machine does falls on all of them; what is
reported is the median of the ratio by round, with its quartiles as the spread.
"""

import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from training.run_record import hardware

RESULTS = Path(__file__).parent / "results"
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def interleave(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds that each candidate took in each round, after `warmup` rounds that do not count."""
    seconds = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(-warmup, rounds):
        # In alternating order: the one that comes second inherits warm caches or a throttled clock.
        for name in names if i % 2 else reversed(names):
            start = time.perf_counter()
            candidates[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(candidates: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Median seconds of each candidate in a few rounds: enough to choose one, too few to report."""
    return {name: statistics.median(times) for name, times in interleave(candidates, rounds, warmup=1).items()}


def speedup(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster `fast` is than `slow`: quartiles of the ratio by round, `ratio` being the median."""
    lower, ratio, upper = statistics.quantiles([s / f for s, f in zip(slow, fast, strict=True)], n=4)
    return {"ratio": ratio, "lower": lower, "upper": upper}


def peak_memory(build: Callable[..., Callable[[], object]], *arguments) -> int:
    """Bytes by which a step's peak exceeds what was resident before it, in a fresh process (Linux).

    `build(*arguments)` returns the step; it is pickled by name, so it is a module's function.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_here, (torch.get_num_threads(), build, *arguments))


def _peak_memory_here(threads: int, build: Callable[..., Callable[[], object]], *arguments) -> int:
    torch.set_num_threads(threads)
    step = build(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to what is resident now
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def matmul_flops(dtype: torch.dtype, size: int = 2048) -> tuple[Callable[[], object], float]:
    """A product of two square matrices to time as this machine's peak, and its floating-point operations."""
    left, right = torch.randn(2, size, size).to(dtype)
    return lambda: left @ right, 2.0 * size**3


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def save(name: str, results: dict, libraries: tuple[str, ...] = ("torch", "transformers", "tokenizers")) -> None:
    """Writes `results`, the machine that they come from and versions to `benchmarks/results/NAME.json`."""
    origin = {
        "hardware": hardware(on_cpu=True),
        "libraries": {package: version(package) for package in libraries},
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(origin | results, indent=2) + "\n")
    print(f"\nwritten to {os.path.relpath(file)}")
