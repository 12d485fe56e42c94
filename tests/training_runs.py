"""Training commands as a user runs them, each in a process of its own: run, killed, and read from their run folder."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from command_process import run_words

REPOSITORY = Path(__file__).parent.parent
SECONDS = 600  # of patience: a machine may be busy with more than the tests


def command(module, options, launcher=()):
    """`python -m MODULE --field value ...`; a list is several values, and options that are None are left out."""
    given = {
        name: value if isinstance(value, list) else [value] for name, value in options.items() if value is not None
    }
    words = [str(word) for name, values in given.items() for word in (f"--{name}", *values)]
    return [sys.executable, *launcher, "-m", module, *words]


def two_processes():
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # at a free port


def accelerate_two_processes():
    """As `accelerate launch` starts them where there is no GPU: --multi_gpu means one process for each "device"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ("--multi_gpu", "--num_processes", "2", "--main_process_port", port, "--mixed_precision", "no")
    return ("-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no", "--num_machines", "1")


def is_plain(words):
    """Whether it is a command of ours without a launcher, and without workers, for which a fork waits for minutes."""
    return words[1] == "-m" and words[2].startswith("training.") and "--dataloader_num_workers" not in words


def run(words):
    if is_plain(words):
        return run_words(words, REPOSITORY, SECONDS)
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS)


def kill_when_there(words, awaited, delay=0.0):
    """Starts a command and kills it `delay` seconds after the path `awaited` appeared."""
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()  # for it alone: pipes would be held open by the workers that it leaves behind


def losses(folder):
    """Step, name and value of every loss that the run recorded, in training and held-out, and of the gradients."""
    history = json.loads((folder / "run.json").read_text())["history"]
    return [(e["step"], name, e[name]) for e in history for name in ("loss", "eval_loss", "grad_norm") if name in e]
