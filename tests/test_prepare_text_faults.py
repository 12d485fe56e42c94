"""`training.prepare_text` under hard use: killed, stopped, on another's folder, on input that changed or is damaged."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from training import prepare_text, run_record
from training.text_pipeline.execution import ExecutionArguments, Phase, PhaseError, run_phases
from training.text_pipeline.stage import FolderStage

REPOSITORY = Path(__file__).parents[1]
SECONDS_TO_END = 30  # for processes of a machine that is busy


def text(seed: int) -> str:
    """Passes the rules: sentences of common words, no two texts alike."""
    words = ["river", "mountain", "village", "history", "market", "bridge", "castle", "forest", "harbour", "railway"]
    name = "".join("bdfgklmnrs"[int(digit)] + "a" for digit in str(seed))  # CCNet takes all digits for the same
    return " ".join(
        f"In the year {1500 + 7 * seed + line} the people of the {words[(seed + line) % 10]} built that old "
        f"{words[(seed * line + 3) % 10]} with stones from the {words[(seed // 3 + 2 * line) % 10]} of {name}."
        for line in range(6)
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for part in range(3):
        rows = [{"text": text(100 * part + row)} for row in range(40)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(dataset: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--dataset", str(dataset), "--output_dir", str(output), "--task_bytes", "1000", "--quality_rules", "off"),
        *("--near_duplicates", "false", "--line_dedup_partitions", "2", *more),
    ]


def prepare(monkeypatch, dataset: Path, output: Path, *more: str) -> int:
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["prepare_text", *words(dataset, output, "--workers", "1", *more)])
    try:
        prepare_text.main()
    except SystemExit as end:
        return end.code
    return 0


def start(dataset: Path, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "training.prepare_text", *words(dataset, output, "--workers", "2")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (output / "documents").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        assert prepare(patch, shards, output) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["extract", "filter"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_no_process_and_completes_to_the_same_bytes(
    shards, undisturbed, tmp_path, monkeypatch, phase, end
):
    output = tmp_path / "run"
    driver = start(shards, output)
    for line in driver.stdout:
        if line.startswith(f"{phase}: 3 of 3"):
            break
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(end)
    _, told = driver.communicate()
    if end == signal.SIGINT:
        assert (driver.returncode, told) == (130, "Stopped: the same command goes on.\n")
    assert not psutil.wait_procs(family, timeout=SECONDS_TO_END)[1]
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where a process has the folder still
    os.close(descriptor)
    assert prepare(monkeypatch, shards, output) == 0
    assert written(output) == written(undisturbed)
    assert len(written(output)) == 3
    reports = [json.loads((folder / "report.json").read_text()) for folder in (output, undisturbed)]
    for report in reports:
        for name in ("timing", "name", "command", "arguments"):  # of the folder's name, and of the time
            report.pop(name, None)
    assert reports[0] == reports[1]


class Killed(FolderStage):
    """A worker for which memory runs out."""

    name = "killed"

    def work(self, rank: int, world_size: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path):
    with pytest.raises(PhaseError, match="a worker was killed, most likely since memory ran out"):
        run_phases([Phase("crowded", [Killed()], 3)], ExecutionArguments(workers=2), tmp_path)


class FullDisk(FolderStage):
    name = "full_disk"

    def work(self, rank: int, world_size: int) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"text")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told(tmp_path, workers):
    with pytest.raises(PhaseError, match=r"full failed: .*No space left on device"):
        run_phases([Phase("full", [FullDisk()], 2)], ExecutionArguments(workers=workers), tmp_path)


def test_what_a_killed_writer_left_is_removed(shards, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setattr(prepare_text, "finish", lambda asked, record: sys.exit(9))  # killed at the last moment
    assert prepare(monkeypatch, shards, output) == 9
    monkeypatch.undo()
    run_record.let_go(output)
    (output / "documents" / ".00001.parquet.4242.partial").write_bytes(b"half")
    assert prepare(monkeypatch, shards, output) == 0
    assert written(output) == written(undisturbed)


def change(folder: Path) -> None:
    with (folder / "1.jsonl").open("a") as file:
        file.write("\n")


@pytest.mark.parametrize("alter", [change, lambda folder: (folder / "1.jsonl").unlink()], ids=["changed", "vanished"])
def test_input_that_changed_is_refused(shards, tmp_path, monkeypatch, capsys, alter):
    dataset, output = tmp_path / "data", tmp_path / "run"
    dataset.mkdir()
    for file in shards.iterdir():
        (dataset / file.name).write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_text, "run_phases", lambda *_: sys.exit(9))
        assert prepare(patch, dataset, output) == 9
    run_record.let_go(output)
    alter(dataset)
    assert prepare(monkeypatch, dataset, output) == 2
    assert "holds another run: dataset was" in one_sentence(capsys)


def test_an_evaluation_set_that_changed_is_refused(shards, tmp_path, monkeypatch, capsys):
    items, output = tmp_path / "items.txt", tmp_path / "run"
    items.write_text("one item of an evaluation that has more than eight words\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_text, "run_phases", lambda *_: sys.exit(9))
        assert prepare(patch, shards, output, "--decontaminate", str(items)) == 9
    run_record.let_go(output)
    items.write_text("another item of an evaluation, and it has more than eight words\n")
    assert prepare(monkeypatch, shards, output, "--decontaminate", str(items)) == 2
    assert "holds another run: models and evaluation sets was" in one_sentence(capsys)


def test_two_drivers_are_not_in_one_folder(shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_text, "run_phases", lambda *_: sys.exit(9))
        assert prepare(patch, shards, output) == 9
    run_record.let_go(output)
    monkeypatch.setattr(run_record, "SECONDS_FOR_THE_FOLDER", 0)
    with locked(output):
        assert prepare(monkeypatch, shards, output) == 2
    assert "Another process is at work" in one_sentence(capsys)


@contextlib.contextmanager
def locked(folder: Path):
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def one_sentence(capsys) -> str:
    told = capsys.readouterr().err
    assert told.startswith("Error: ")
    assert told.count("\n") == 1
    return told


def test_nothing_left_is_a_finished_run(tmp_path, monkeypatch):
    (tmp_path / "short.jsonl").write_text('{"text": "Too short."}\n')
    assert prepare(monkeypatch, tmp_path / "short.jsonl", tmp_path / "run") == 0
    assert written(tmp_path / "run") == {}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["documents_in"], report["documents_out"]) == (1, 0)


def test_too_much_bad_input_stops_and_goes_on_with_a_larger_share(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text(row)}) + "\n{broken\n" for row in range(20)))
    assert prepare(monkeypatch, data, tmp_path / "run") == 2
    assert "20 of 40 records cannot be read (not JSON: 20)" in one_sentence(capsys)
    assert prepare(monkeypatch, data, tmp_path / "run", "--max_bad_share", "0.6") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["documents_in"] == 40
