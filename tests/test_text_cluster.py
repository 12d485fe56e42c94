"""The text pipeline on Slurm, which a script stands in for: the same bytes as here, and a failure that is told.

How to run on a real cluster: the recipes `web_slurm.yaml` and `web_ray.yaml`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from training.text_pipeline import slurm_executor
from training.text_pipeline.document_files import DocumentReader, DocumentWriter, read_documents
from training.text_pipeline.execution import ExecutionArguments, Phase, PhaseError, run_phases
from training.text_pipeline.pii import MaskPii, PiiArguments
from training.text_pipeline.reading import ReadArguments, ReadDocuments

SLURM = ExecutionArguments(executor="slurm", slurm_partition="main", slurm_environment="export MARK=set")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder in which the stand-in for Slurm takes down its jobs."""
    programs, folder = tmp_path / "bin", tmp_path / "cluster"
    programs.mkdir()
    folder.mkdir()
    for name in ("sbatch", "squeue"):
        (programs / name).write_text(
            f"#!{sys.executable} -I\n" + (Path(__file__).parent / "stand_in_slurm.py").read_text(encoding="utf-8")
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    # Jobs must find the code by themselves, from whatever folder they are submitted.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return folder


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    for part in range(3):
        rows = [{"text": f"Write to reader{part}{row}@some-library.net about page {row}."} for row in range(4)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def phases(pages: Path, work: Path, names=("0", "1", "2")) -> list[Phase]:
    arguments = ReadArguments(dataset=str(pages))
    read = ReadDocuments([[str(pages / f"{name}.jsonl")] for name in names], arguments)
    mask = [DocumentReader("read_again", work / "read"), MaskPii(PiiArguments()), DocumentWriter("write", work / "out")]
    return [
        Phase("read", [read, DocumentWriter("write_read", work / "read")], len(names)),
        Phase("mask", mask, len(names)),
    ]


def states(cluster: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(cluster.glob("*.state"))}


def documents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_slurm_writes_the_bytes_of_this_machine(cluster, pages, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    here, there = tmp_path / "here", Path("there")  # a relative folder is one of the submission's
    assert run_phases(phases(pages, here), ExecutionArguments(workers=1), here / "logs")
    # Two tasks a job, as where there are more tasks than Slurm takes in an array.
    monkeypatch.setattr(slurm_executor, "MAX_ARRAY_SIZE", 2)
    assert not run_phases(phases(pages, there), SLURM, there / "logs"), "submitted is not done"
    assert states(cluster) == {"1": "COMPLETED", "2": "COMPLETED"}
    assert documents(there / "out") == documents(here / "out")
    assert len(documents(there / "out")) == 3
    script = (cluster / "1.script").read_text()
    assert "#SBATCH --array=0-1" in script
    assert script.index("export MARK=set") < script.index("launch_pickled_pipeline")
    assert run_phases(phases(pages, there), SLURM, there / "logs"), "the same again finds all done"
    assert len(states(cluster)) == 2


def test_what_failed_on_slurm_is_told_and_goes_on(cluster, pages, tmp_path, capsys):
    good = (pages / "1.jsonl").read_text()
    (pages / "1.jsonl").write_text("{broken\n" * 30)
    run_phases(phases(pages, tmp_path, ("0", "1")), SLURM, tmp_path / "logs")
    assert states(cluster) == {"1": "FAILED", "2": "CANCELLED"}
    (pages / "1.jsonl").write_text(good)
    capsys.readouterr()
    run_phases(phases(pages, tmp_path, ("0", "1")), SLURM, tmp_path / "logs")
    told = capsys.readouterr().out
    assert "read: task 1 ended with: 30 of 30 records cannot be read" in told
    assert "read: job 3, 1 of 2 tasks" in told, "only what is not done is submitted"
    assert "mask: job 4, 2 of 2 tasks" in told
    texts = [doc.text for rank in range(2) for doc in read_documents(tmp_path / "out" / f"{rank:05d}.jsonl.zst")]
    assert len(texts) == 8


def test_jobs_that_are_queued_are_not_submitted_again(cluster, pages, tmp_path):
    slurm_executor.save_jobs(["1", "2"], tmp_path / "logs")
    (cluster / "queue").write_text("7\n1\n")
    with pytest.raises(ValueError, match="scancel 1` first"):
        run_phases(phases(pages, tmp_path), SLURM, tmp_path / "logs")


def test_what_slurm_refuses_is_told(cluster, pages, tmp_path):
    wrong = ExecutionArguments(executor="slurm", slurm_partition="nosuch")
    with pytest.raises(PhaseError, match="Slurm takes no job for read"):
        run_phases(phases(pages, tmp_path), wrong, tmp_path / "logs")


def test_without_slurm_or_ray_there_is_one_sentence(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="login node"):
        run_phases(phases(pages, tmp_path), SLURM, tmp_path / "logs")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="pip install"):
        run_phases(phases(pages, tmp_path), ExecutionArguments(executor="ray"), tmp_path / "logs")
