"""The R1 road: stages in order, each once; what is left out, made again or changed; the report from known counts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training import r1, r1_report, r1_road

ORDER = ["zero", "zero_samples", "sft", "reward", "final", "final_samples", "distilled"]


@pytest.fixture
def road(tmp_path, monkeypatch):
    """Runs `training.r1` with stages that only leave a finished folder, and models that solve a known share."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in r1_road.STAGES:
        content = {"dataset": "reasoning_gym:chain_sum", "num_problems": 20}
        content["difficulty"] = {"min_terms": 4 if name == "zero" else 6, "max_terms": 6, "max_digits": 1}
        content["reward_weights"] = [1.0, 0.3, 0.2]
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump(content))
    ran = []
    solved = {"base": 2, "zero": 5, "sft": 5, "final": 7, "small": 1, "distilled": 6}

    def stage(words, **kwargs):
        words = words[words.index("-m") :]
        folder = Path(words[words.index("--output_dir") + 1])
        ran.append(f"{folder.parent.name}/{folder.name}")
        if stage.fails == folder.name:
            return SimpleNamespace(returncode=2)
        folder.mkdir(parents=True, exist_ok=True)
        if "collect" in words[1]:
            counts = {"problems": 20, "accepted": 40, "acceptance": 0.5, "solved": 15}
            (folder / "info.json").write_text(json.dumps({"made_by": {"counts": counts}}))
            pq_rows(folder / "train.parquet")
        else:
            history = [{"step": 5, "completions/mean_length": 20.5, "eval_pass@1": 0.4}]
            run = {"status": "finished", "history": history, "words": words, "wall_time_seconds": 3.0}
            text = json.dumps(run)
            (folder / "run.json").write_text(text)
        return SimpleNamespace(returncode=0)

    stage.fails = None

    def evaluate(road, model, seed, file, problems, greedy):
        counts = [solved[model] if i % 2 else 8 for i in range(len(problems))]
        measured = {
            "per_problem": {"strict": counts, "lenient": counts},
            "samples": 8,
            "temperature": 1.0,
            "problems": len(problems),
            "format": 0.5,
            "ended": 1.0,
            "tokens": 10.0,
            "examples": [{"question": "?", "answer": "1", "reply": "1", "strict": False}],
        }
        if greedy:
            measured["per_problem"] |= {
                f"greedy_{kind}": [int(c > 4) for c in counts] for kind in ("strict", "lenient")
            }
        return measured

    monkeypatch.setattr(r1_road, "subprocess", SimpleNamespace(run=stage))
    monkeypatch.setattr(r1, "evaluate", evaluate)
    monkeypatch.setattr(r1_report, "build_card", lambda folder: None)

    def start(*words):
        ran.clear()
        given = ["--base", "B", "--small", "S", "--recipes", str(recipes), "--output_dir", str(tmp_path / "road")]
        difficulty = json.dumps({"min_terms": 6, "max_terms": 6, "max_digits": 1})
        given += ["--eval_difficulty", difficulty, "--num_eval_problems", "20"]
        monkeypatch.setattr("sys.argv", ["r1", *given, *words])
        r1.main()
        return list(ran)

    return SimpleNamespace(start=start, stage=stage, folder=tmp_path / "road", recipes=recipes, solved=solved)


def pq_rows(file):
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), file)


def words_of(road, stage):
    return json.loads((road.folder / "seed-0" / stage / "run.json").read_text())["words"]


def test_stages_run_once_in_their_order_and_read_each_other(road):
    assert road.start() == [f"seed-0/{name}" for name in ORDER]
    assert road.start() == []
    assert road.start("--seeds", "0", "1") == [f"seed-1/{name}" for name in ORDER]
    words = words_of(road, "final")
    assert words[words.index("--model") + 1].endswith("seed-0/sft")
    assert words[words.index("--reward_model") + 1].endswith("seed-0/reward")
    assert words_of(road, "sft")[words_of(road, "sft").index("--model") + 1] == "B"
    assert words_of(road, "distilled")[words_of(road, "distilled").index("--model") + 1] == "S"
    report = json.loads((road.folder / "report.json").read_text())
    assert report["seeds"] == [0, 1]
    assert report["stages"]["final"]["seeds"] == [0, 1]
    run = json.loads((road.folder / "run.json").read_text())
    assert run["command"].endswith("--seeds 0 1")
    assert len(run["sessions"]) == 3


def test_report_counts(road, capsys):
    road.start()
    report = json.loads((road.folder / "report.json").read_text())
    assert report["stages"]["base"]["pass@1"]["mean"] == pytest.approx((1 + 2 / 8) / 2)
    assert report["stages"]["base"]["pass@8"]["mean"] == 1.0
    assert report["stages"]["final"]["greedy_lenient"]["mean"] == 1.0
    assert {"low", "high", "mean"} == report["stages"]["zero"]["pass@1"].keys()
    assert report["own_tasks"]["zero"]["difficulty"]["min_terms"] == 4
    assert report["own_tasks"]["final"]["difference"]["mean"] == pytest.approx(1 / 8)
    assert report["collected"]["zero"]["acceptance"] == 0.5
    assert report["problems"]["in_training_data"] == {"zero": 0, "zero_samples": 0, "final": 0, "final_samples": 0}
    assert not report["targets"]["doubled"]["met"]
    assert report["targets"]["own_task_zero"]["met"]
    out = capsys.readouterr().out
    assert "MISSED: Strict pass@1 at T=1 at least doubles" in out
    assert json.loads((road.folder / "seed-0" / "final" / "run.json").read_text())["road"] == report


def test_stopped_it_goes_on(road):
    road.stage.fails = "reward"
    with pytest.raises(SystemExit):
        road.start()
    road.stage.fails = None
    assert road.start() == [f"seed-0/{name}" for name in ORDER[3:]]


def test_skipped_stages_are_replaced_by_what_came_before(road):
    assert road.start("--skip", "zero", "reward", "small") == ["seed-0/zero_samples", "seed-0/sft", "seed-0/final"]
    info = json.loads((road.folder / "run.json").read_text())["stages"]["seed-0/zero_samples"]["command"]
    assert "--model B" in info
    words = words_of(road, "final")
    assert words[words.index("--reward_model") + 1] == words[words.index("--prompt_dataset") + 1] == ""
    assert words[words.index("--reward_weights") + 1 :][:2] == ["1.0", "0.3"]
    assert "small" not in json.loads((road.folder / "report.json").read_text())["stages"]


def test_again_from_any_stage(road):
    road.start()
    assert road.start("--again", "final") == [f"seed-0/{name}" for name in ORDER[4:]]


def test_a_recipe_that_changed(road, capsys):
    road.start()
    (road.recipes / "sft.yaml").write_text("dataset: x\n")
    with pytest.raises(SystemExit):
        road.start()
    assert "The recipe of" in (error := capsys.readouterr().err)
    assert "give --again sft, or undo it" in error
    assert road.start("--again", "sft") == [f"seed-0/{name}" for name in ORDER[2:]]


def test_what_was_made_from_a_folder_that_is_gone_is_not_taken_for_up_to_date(road, capsys):
    road.start()
    evaluation = road.folder / "seed-0" / "evaluations" / "distilled.json"
    evaluation.parent.mkdir()
    evaluation.write_text("{}")
    shutil.rmtree(road.folder / "seed-0" / "distilled")
    assert road.start() == ["seed-0/distilled"]
    assert not evaluation.exists()
    shutil.rmtree(road.folder / "seed-0" / "sft")
    with pytest.raises(SystemExit):
        road.start()
    assert "seed-0/reward, " in (error := capsys.readouterr().err)
    assert "give --again sft" in error


def test_a_stage_that_all_seeds_share_is_made_again_for_all(road):
    road.start("--seeds", "0", "1")
    again = r1.Road(SimpleNamespace(output_dir=road.folder, base=None, small=None, skip=[], seeds=[0]), None)
    again.remove_from("small")
    left = sorted(folder.name for seed in (0, 1) for folder in (road.folder / f"seed-{seed}").iterdir())
    assert left == sorted(2 * ORDER[:-1])
    again.remove_from("base")
    assert not [folder for seed in (0, 1) for folder in (road.folder / f"seed-{seed}").iterdir()]


def test_a_base_that_solves_nothing_ends_the_road(road, capsys):
    road.solved["base"] = 0
    with pytest.raises(SystemExit):
        road.start("--min_base_solved", "0.6")
    assert "solves 50.0% of Zero's problems in 8 tries" in capsys.readouterr().err
    assert road.start("--min_base_solved", "0.4") == [f"seed-0/{name}" for name in ORDER]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skip", "sft"], "--skip names sft: take from"),
        (["--again", "nought"], "--again is 'nought'"),
        (["--seeds", "1", "1"], "give at least one, and none twice"),
        (["--eval_dataset", "reasoning_gym:none"], "no generator 'none'"),
        (["--recipes", "nowhere"], "needs the recipe nowhere/zero.yaml"),
        (["--eval_dataset_split", "train"], "Some held-out problems are in the data of final: name another"),
    ],
)
def test_mistakes_are_told_in_one_line(road, capsys, words, message):
    with pytest.raises(SystemExit):
        road.start(*words)
    assert message in capsys.readouterr().err


def test_what_learnt_nothing_meets_no_target(road):
    road.solved.update(dict.fromkeys(road.solved, 0))
    road.start("--min_base_solved", "0")
    targets = json.loads((road.folder / "report.json").read_text())["targets"]
    assert not any(target["met"] for target in targets.values())


def test_what_is_given_is_not_made_again():
    assert "zero" in r1_road.made_from("texts")
    assert "zero" not in r1_road.made_from("texts", {"base": "B"})
