#!/usr/bin/env python3
"""Stands in for Slurm's `sbatch` and `squeue`, by the name it is called by: runs a job at once, and to its end.

An array's tasks run one after the other, each a shell as Slurm starts it: in the working folder and with the
environment of the submission, and with SLURM_ARRAY_TASK_ID. A job whose dependency `afterok` failed is cancelled, as
Slurm does with `--kill-on-invalid-dep=yes`. SLURM_STAND_IN is a folder: `JOB.state` is COMPLETED, FAILED or CANCELLED,
`JOB.script` what was submitted; what is in the file `queue` is what squeue tells.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def squeue() -> None:
    queue = FOLDER / "queue"
    print(queue.read_text() if queue.exists() else "", end="")


def sbatch(words: list[str]) -> None:
    script = Path(words[-1]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    options |= dict(word.removeprefix("--").split("=", 1) for word in words[:-1])
    if options["partition"] != "main":
        sys.exit(f"sbatch: error: invalid partition specified: {options['partition']}")
    job = str(len(list(FOLDER.glob("*.state"))) + 1)
    (FOLDER / f"{job}.script").write_text(script)
    needed = re.findall(r"\d+", options.get("dependency", ""))
    if any((FOLDER / f"{other}.state").read_text() != "COMPLETED" for other in needed):
        assert options["kill-on-invalid-dep"] == "yes", "it would wait for ever"
        state = "CANCELLED"
    else:
        first, last = map(int, re.match(r"(\d+)-(\d+)", options["array"]).groups())
        codes = [run_task(job, task, script, options) for task in range(first, last + 1)]
        state = "FAILED" if any(codes) else "COMPLETED"
    (FOLDER / f"{job}.state").write_text(state)
    print(f"Submitted batch job {job}")


def run_task(job: str, task: int, script: str, options: dict[str, str]) -> int:
    exported = dict(entry.split("=") for entry in options["export"].split(",") if "=" in entry)
    environment = os.environ | exported | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node"}
    with open(options["output"].replace("%A", job).replace("%a", str(task)), "w") as output:
        shell = ["bash", "-c", script.replace("srun  -l -n 1", "")]
        return subprocess.run(shell, env=environment, stdout=output, stderr=output).returncode


if __name__ == "__main__":
    squeue() if Path(sys.argv[0]).name == "squeue" else sbatch(sys.argv[1:])
