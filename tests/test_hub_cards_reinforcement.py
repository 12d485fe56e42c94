"""The cards of GRPO and of the R1 road: what run.json says and nothing else, with intervals, working as written.

The runs are made up for these tests: their figures are of no model.
"""

import copy
import math
import re
from pathlib import Path

import pytest
from card_runs import card_text, pictures, python_snippets, run_as_stranger, write_run
from huggingface_hub import ModelCard
from PIL import Image
from transformers import GenerationConfig

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe
from hub_cards.build_card import build_card

QUESTION = "State the final answer to the following arithmetic problem: 4 + 3 - 1 + 6 - 1 ="
TEMPLATE = "Question: {question}\nAnswer:"
RIGHT = "<think>4+3=7 7-1=6 6+6=12 12-1=11</think><answer>11</answer>"
WRONG = "The answer is 9."
CHANCE = 0.05  # Half the width of the made-up intervals.
EVALUATIONS = {0: (0.112, 0.270), 30: (0.431, 0.520), 60: (0.715, 0.748), 90: (0.802, 0.806)}
PROBLEMS = {
    "dataset": "reasoning_gym:chain_sum",
    "fingerprint": "0123456789abcdef",
    "source": "generator",
    "difficulty": {"min_terms": 4, "max_terms": 6},
    "seed": 0,
    "info": {
        "name": "reasoning-gym, chain_sum",
        "license": "Apache-2.0",
        "origin": "https://github.com/open-thought/reasoning-gym",
    },
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


def interval(mean: float, half: float = CHANCE) -> dict[str, float]:
    return {"mean": mean, "low": max(mean - half, 0.0), "high": min(mean + half, 1.0)}


def figures(strict: float, lenient: float) -> dict[str, float]:
    """What an evaluation logs."""
    entries = {"eval_format": min(strict + 0.15, 1.0), "eval_ended": 0.99, "eval_tokens": 20 + 30 * strict}
    for name, mean in (("pass@1", strict), ("pass@8", 0.6 + 0.35 * strict), ("lenient_pass@1", lenient)):
        ends = interval(mean)
        entries |= {f"eval_{name}": mean, f"eval_{name}_low": ends["low"], f"eval_{name}_high": ends["high"]}
    return entries


def grpo_run(**changes) -> dict:
    """A finished run as training/grpo.py records it."""
    history = []
    for step in range(91):
        done = 1 - math.exp(-step / 30)
        if step and step % 2 == 0:
            history.append(
                {
                    "step": step,
                    "loss": 0.001 * math.sin(step),
                    "learning_rate": 2e-4,
                    "reward": 0.2 + 0.9 * done + 0.05 * math.sin(1.7 * step),
                    "reward_std": 0.4,
                    "rewards/accuracy/mean": 0.12 + 0.7 * done + 0.04 * math.sin(1.7 * step),
                    "rewards/format/mean": 0.4 + 0.55 * done + 0.02 * math.sin(1.1 * step),
                    "entropy": 1.2 - done,
                    "completions/mean_length": 25 + 22 * done + math.sin(step),
                    "completions/clipped_ratio": 0.2 * (1 - done),
                    "frac_reward_zero_std": 0.1 + 0.5 * done,
                    "tokens_seen": 9000 * step,
                }
            )
        if step in EVALUATIONS:
            history.append({"step": step} | figures(*EVALUATIONS[step]))
    samples = []
    for step, text, right in ((0, WRONG, False), (60, "Not yet.", False), (90, RIGHT, True)):
        samples.append({"step": step, "prompt": QUESTION, "text": text, "right": right})
        samples.append({"step": step, "prompt": "2 + 2 =", "text": f"``` at {step}", "right": False})
    before = {f"{name}_before": value for name, value in figures(*EVALUATIONS[0]).items()}
    return {
        "task": "grpo",
        "status": "finished",
        "arguments": {
            "model": "runs/base",
            "prompt_template": TEMPLATE,
            "apply_chat_template": False,
            "num_eval_problems": 300,
            "output_dir": "runs/zero",
        },
        "data": {
            "train": PROBLEMS | {"split": "train", "rows": 2000},
            "eval": PROBLEMS | {"split": "test", "rows": 300},
            "model": {"path": "runs/base", "fingerprint": "0123456789abcdef"},
        },
        "command": "python -m training.grpo --config r1_demo/zero.yaml",
        "git_revision": "0123abcd",
        "libraries": {"torch": "2.14.1", "trl": "1.16.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "accelerators": [], "processes": 1},
        "wall_time_seconds": 222.0,
        "model": {
            "parameters": 921728,
            "trainable_parameters": 921728,
            "config": SHAPE | {"model_type": "llama_style", "auto_map": {"AutoConfig": "configuration.Config"}},
        },
        "training": {
            "seed": 42,
            "precision": "fp32",
            "num_generations": 8,
            "max_completion_length": 72,
            "beta": 0.0,
            "loss_type": "dapo",
            "temperature": 1.0,
            "rewards": {"accuracy": 1.0, "format": 0.3},
            "reward_model": None,
        },
        "counts": {"train": {"rows": 2000, "left_out": 0}},
        "base_run": {
            "path": "runs/base",
            "task": "pretrain_lm",
            "data": "worked sums and prose",
            "license": "cc-by-sa-4.0",
            "metrics": {"tokens_seen": 7300000},
        },
        "metrics": figures(*EVALUATIONS[90]) | before | {"tokens_seen": 810000, "tokens_per_second": 3600.0},
        "history": history,
        "samples": samples,
        "warnings": [{"step": 84, "kind": "entropy_collapse", "text": "the entropy_x of the policy *fell*."}],
    } | changes


STAGES = {
    "base": ("Base", 0.112, 0.270, 0.727),
    "zero": ("R1-Zero: GRPO on the base", 0.702, 0.716, 0.790),
    "sft": ("SFT of the base on Zero's verified samples", 0.731, 0.735, 0.793),
    "final": ("GRPO with the reward model", 0.812, 0.815, 0.861),
    "small": ("Smaller base", 0.051, 0.133, 0.402),
    "distilled": ("SFT of the smaller base on the final model's verified samples", 0.543, 0.548, 0.601),
}


def road_report() -> dict:
    """A report as training/r1.py writes it."""
    seeds = ["0", "1", "2"]
    stages = {}
    for name, (title, strict, lenient, greedy) in STAGES.items():
        stages[name] = {
            "title": title,
            "folder": f"runs/r1/{name}",
            "pass@1": interval(strict, 0.021),
            "pass@8": interval(min(strict + 0.2 if strict > 0.4 else 5 * strict, 0.95), 0.018),
            "lenient_pass@1": interval(lenient, 0.022),
            "greedy_strict": interval(greedy - 0.01, 0.026),
            "greedy_lenient": interval(greedy, 0.026),
            "format": min(0.25 + strict, 0.99),
            "ended": 0.991,
            "tokens": 31.42,
            "problems": 1000,
            "samples": 8,
            "seeds": [0, 1, 2],
            "seconds": 240.0,
        }
    own = {"dataset": "reasoning_gym:chain_sum", "difficulty": {"min_terms": 3, "max_terms": 5}, "problems": 500}
    own |= {"samples": 8, "before": interval(0.2, 0.03), "after": interval(0.85, 0.02), "difference": interval(0.65)}
    steps = range(0, 91, 10)
    examples = [
        {"stage": stage, "question": question, "answer": "11", "reply": RIGHT if right else WRONG, "strict": right}
        for stage, right in (("final", True), ("base", False), ("zero", True))
        for question in (QUESTION, "1 + 10 =", "5 + 6 =", "a fourth problem")
    ]
    return {
        "problems": {name: PROBLEMS[name] for name in ("dataset", "difficulty", "fingerprint")}
        | {"rows": 1000, "in_training_data": {"zero": 0, "zero_samples": 0}},
        "seeds": [0, 1, 2],
        "max_new_tokens": 72,
        "stages": stages,
        "own_tasks": {"zero": own, "final": own | {"difficulty": {"min_terms": 5, "max_terms": 8}}},
        "targets": {
            "doubled": {"text": "strict pass@1 at least doubles from base to final", "met": True, "factor": 7.25},
            "lenient": {
                "text": "lenient greedy accuracy rises significantly",
                "met": False,
                "difference": interval(0.02, 0.03) | {"low": -0.01},
            },
        },
        "collected": {
            "zero": {"problems": 1500.0, "samples": 6000.0, "accepted": 4206.7, "acceptance": 0.70112, "solved": 1390.3}
        },
        "response_length": {
            stage: {seed: [[step, 20 + i + step / 5] for step in steps] for i, seed in enumerate(seeds)}
            for stage in ("zero", "final")
        },
        "accuracy_by_step": {
            stage: {
                seed: [[step, first + (last - first) * (1 - math.exp(-step / 30)) + 0.01 * i] for step in steps]
                for i, seed in enumerate(seeds)
            }
            for stage, first, last in (("zero", 0.11, 0.72), ("final", 0.55, 0.7))
        },
        "examples": examples,
    }


def r1_run(**changes) -> dict:
    """A finished run as training/r1.py records it."""
    run = grpo_run()
    kept = ("status", "command", "git_revision", "libraries", "hardware", "wall_time_seconds")
    run = {name: run[name] for name in kept} | {"task": "r1", "report": road_report()}
    return run | {"arguments": {"seeds": [0, 1, 2], "output_dir": "runs/r1"}, "data": {}} | changes


def full_runs() -> dict[str, dict]:
    return {
        "zero": grpo_run(),
        "final": grpo_run(
            road=road_report(),
            arguments={"model": "runs/base", "apply_chat_template": True, "output_dir": "runs/final"},
        ),
        "r1": r1_run(),
    }


def without_pictures(run: dict) -> dict:
    """They take most of a card's time."""
    return {name: section for name, section in run.items() if name != "history"}


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of the text of a card that has a road."""
    for draw in ("draw_stages", "draw_road_by_step"):
        monkeypatch.setattr(f"hub_cards.build_card.{draw}", lambda report, folder: {})


def rows_of(card: str, beginning: str) -> list[list[str]]:
    """The cells of the table's rows that begin so."""
    return [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith(f"| {beginning}")]


@pytest.mark.parametrize("name", full_runs())
def test_the_card_is_whole_and_its_tables_and_pictures_are_sound(tmp_path, name):
    card = card_text(tmp_path / name, full_runs()[name])
    headings = ["Samples", "Results", "Training", "Limits", "Reproduce", "Citation"]
    if name == "r1":
        headings += ["Targets", "Reinforcement learning", "Collected", "Stages"]
    else:
        headings += ["Use", "Warnings", "Rewards", "What it began with", "Model", "Data and licence"]
        headings += ["The road to this model"] * (name == "final")
    assert sorted(re.findall("^## (.*)", card, flags=re.MULTILINE)) == sorted(headings)
    for heading in headings:
        assert f"\n\n## {heading}\n\n" in card
    assert str(tmp_path) not in card
    assert "\n\n\n" not in card
    for word in ("None", "{'", "nan"):
        assert word not in card
    assert not re.search(
        r"\d\.\d{5}", re.sub("https?://[^)]*|arXiv.*", "", card.split("---\n", 2)[2])
    )  # too long to read
    for table in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()} == {table.split("\n")[1].count("|")}
        assert re.fullmatch(r"\|(:?-+:?\|)+", table.split("\n")[1])
    assert len(pictures(card)) == {"zero": 6, "final": 7, "r1": 3}[name]
    for picture in pictures(card):
        Image.open(tmp_path / name / picture).verify()
        assert (tmp_path / name / picture).stat().st_size <= 100_000


@pytest.mark.parametrize(
    ("name", "section"),
    [(name, section) for name in ("final", "r1") for section in sorted(full_runs()[name].keys() - {"task", "history"})],
)
def test_no_section_leans_on_another(tmp_path, undrawn, name, section):
    run = without_pictures(full_runs()[name])
    del run[section]
    if section in ("report", "model"):
        with pytest.raises(ValueError, match="lacks what a card of"):
            build_card(write_run(tmp_path / "run", run))
        return
    card = card_text(tmp_path / "run", run)
    assert "\n\n\n" not in card
    assert "None" not in card


def test_missing_sections_vanish(tmp_path):
    card = card_text(tmp_path / "grpo", {"task": "grpo", "model": {"parameters": 1000}})
    assert re.findall("^## (.*)", card, flags=re.MULTILINE) == ["Use", "Model", "Limits", "Citation"]
    assert "model-index" not in card
    card = card_text(tmp_path / "r1", {"task": "r1", "report": {}, "status": "running"})
    assert re.findall("^## (.*)", card, flags=re.MULTILINE) == ["Limits", "Citation"]
    assert "This run is not finished" in card
    for text in (card, (tmp_path / "grpo" / "README.md").read_text(encoding="utf-8")):
        assert "%" not in text


def test_results_stand_with_their_intervals_and_with_what_was_before(tmp_path):
    card = card_text(tmp_path / "run", without_pictures(grpo_run()))
    for row in (
        "| On held-out problems: reasoning-gym, chain_sum, test (300) | Now | Before |",
        "| **Strict pass@1** | **80.2%** (75.2%–85.2%) | 11.2% (6.2%–16.2%) |",
        "| Lenient pass@1 | 80.6% (75.6%–85.6%) | 27.0% (22.0%–32.0%) |",
        "| Tokens a reply | 44.1 | 23.4 |",
        "| reasoning-gym, chain_sum, train (training) | 2,000 | `min_terms` 4, `max_terms` 6 |",
    ):
        assert row in card
    assert "Strict pass@1 changed by +69.0 points, lenient by +53.6" in card
    run = without_pictures(grpo_run())
    run["metrics"] = {"eval_pass@1": 0.5, "eval_pass@4": 0.75}
    card = card_text(tmp_path / "run", run)
    assert rows_of(card, "Strict pass@4") == [["Strict pass@4", "75.0%"]]
    assert "Before" not in card
    assert "interval" not in card
    assert "changed by" not in card


def test_rewards_are_those_of_the_first_and_the_last_log_line(tmp_path):
    run = grpo_run()
    run["training"]["rewards"] |= {"reward_model": 0.5, "my_reward": 2}
    run["training"]["reward_model"] = "runs/reward"
    run["history"] = [entry for entry in run["history"] if entry["step"] in (2, 90)]
    run["history"][0] |= {"rewards/accuracy/mean": 0.15, "rewards/my_reward/mean": float("nan")}
    card = card_text(tmp_path / "run", run)
    assert rows_of(card, "`accuracy`")[0][-2:] == ["0.150", f"{run['history'][-2]['rewards/accuracy/mean']:.3f}"]
    assert "the score of a reward model, `runs/reward` |" in card
    assert rows_of(card, "`my_reward`")[0][:2] == ["`my_reward`", "2"]
    assert "nan" not in card


def test_warnings_are_told_once_a_kind_with_their_steps(tmp_path):
    warning = {"kind": "equal_rewards", "text": "in every group | all *rewards* are the same."}
    run = without_pictures(grpo_run(warnings=[warning | {"step": step} for step in (10, 1200)]))
    card = card_text(tmp_path / "run", run)
    assert "- First at step 10, 2 times, the last at step 1,200: in every group \\| all \\*rewards\\* are" in card
    assert "- At step 84: the entropy_x of the policy \\*fell\\*." in card_text(tmp_path / "one", grpo_run(history=[]))


def test_samples_show_the_first_and_the_last_reply_to_a_prompt(tmp_path):
    card = card_text(tmp_path / "run", without_pictures(grpo_run()))
    before, after = f"At step 0 (wrong):\n\n```text\n{WRONG}\n```", f"At step 90 (right):\n\n```text\n{RIGHT}\n```"
    assert f"Prompt `{QUESTION}`\n\n{before}\n\n{after}\n" in card
    assert "Not yet." not in card
    only = without_pictures(grpo_run(samples=grpo_run()["samples"][-2:]))
    assert "At step 0" not in card_text(tmp_path / "only", only)


def test_the_road_stands_in_its_own_card_and_in_the_final_model_s(tmp_path, undrawn):
    report = road_report()
    for name in ("r1", "final"):
        card = card_text(tmp_path / name, without_pictures(full_runs()[name]))
        assert rows_of(card, "Base | 11.2") == [
            ["Base", "11.2 (9.1–13.3)", "56.0 (54.2–57.8)", "27.0 (24.8–29.2)", "71.7 (69.1–74.3)",
             "72.7 (70.1–75.3)"]
        ]  # fmt: skip
        # 93.1 ± 1.8 and 95.0 ± 1.8 overlap.
        assert rows_of(card, "SFT | Final")[0][2:] == ["**+8.1**", "+1.9", "**+8.0**", "**+6.8**", "**+6.8**"]
        assert "strict pass@1 changed by **+70.0** points, lenient greedy accuracy by **+13.4**" in card
        assert f"{report['problems']['rows']:,} held-out problems of `reasoning_gym:chain_sum`" in card
        assert "over problems and seeds" in card
        assert "| SFT | SFT of the base on Zero's verified samples | `runs/r1/sft` | 4&nbsp;min |" in card
        assert "none of which is in the data of any stage" in card
    leaking = full_runs()["r1"]
    leaking["report"]["problems"]["in_training_data"]["zero_samples"] = 3
    assert "none of which" not in card_text(tmp_path / "leaking", without_pictures(leaking))


def test_the_road_s_card_is_honest_about_what_it_is_and_what_was_missed(tmp_path):
    card = card_text(tmp_path / "r1", r1_run())
    metadata = ModelCard.load(tmp_path / "r1" / "README.md").data
    assert (metadata.library_name, metadata.pipeline_tag, metadata.license) == (None, None, None)
    assert "holds no model of its own.** The final model of the first seed lies in `runs/r1/final`" in card
    assert python_snippets(card) == ""
    assert "| strict pass@1 at least doubles from base to final | 7.2 times | yes |" in card
    assert "| lenient greedy accuracy rises significantly | +2.0 (−1.0&nbsp;to&nbsp;+5.0) | **no** |" in card
    assert rows_of(card, "R1-Zero | `reasoning_gym")[0][3:] == [
        "20.0% (17.0–23.0)", "85.0% (83.0–87.0)", "+65.0 (+60.0&nbsp;to&nbsp;+70.0)",
    ]  # fmt: skip
    assert "| R1-Zero | 1,500 | 1,390 | 6,000 | 4,207 (70.1%) |" in card
    assert "a fourth problem" not in card
    first = card.split("### ")[1]
    assert first.index("Base (not right") < first.index("R1-Zero (right)") < first.index("Final (right)")


def test_stages_that_were_skipped_are_not_in_the_road_s_card(tmp_path):
    run = r1_run()
    for name in ("sft", "final", "small", "distilled"):
        del run["report"]["stages"][name]
    run["report"] |= {"seeds": [0], "own_tasks": {}, "targets": {}, "collected": {}, "examples": []}
    for section in ("response_length", "accuracy_by_step"):
        run["report"][section] = {"zero": {"0": run["report"][section]["zero"]["0"]}}
    card = card_text(tmp_path / "r1", run)
    assert "Distilled" not in card
    assert len(rows_of(card, "Base | R1-Zero")) == 1
    assert "There was one seed" in card
    assert len(pictures(card)) == 3


def licence(folder: Path, run: dict) -> tuple[str | None, str]:
    card = ModelCard.load(build_card(write_run(folder, without_pictures(run))))
    return card.data.license, " ".join(card.text.split())


def test_drawn_problems_leave_the_licence_to_the_base(tmp_path):
    run = grpo_run()
    assert licence(tmp_path, run)[0] == "cc-by-sa-4.0"
    assert "The weights are under `cc-by-sa-4.0`, the licence of `runs/base`" in licence(tmp_path, run)[1]
    prompts = {"dataset": "chats", "split": "train", "rows": 50, "info": {"name": "Chats", "license": "mit"}}
    run["data"]["prompts"] = prompts
    license, text = licence(tmp_path, run)
    assert license is None
    assert "prompts that the reward model judged are under `mit`" in text
    assert "| Chats, train (training, scored by the reward model) | 50 |" in text
    run["data"]["prompts"] = prompts | {"info": {"name": "Chats", "license": "CC-BY-SA-4.0"}}
    assert licence(tmp_path, run)[0] == "cc-by-sa-4.0"
    run = grpo_run()
    del run["base_run"]
    assert licence(tmp_path, run)[0] is None
    run["data"]["train"] = copy.deepcopy(PROBLEMS) | {"split": "train", "rows": 9, "source": None}
    assert licence(tmp_path, run)[0] is None


def test_a_run_on_a_reward_model_alone_speaks_of_prompts(tmp_path):
    prompts = {"dataset": "chats", "split": "train", "rows": 50, "info": {"name": "Chats", "license": "cc-by-sa-4.0"}}
    run = without_pictures(grpo_run(arguments={"reward_model": "runs/reward"}))
    run["data"] |= {"train": prompts, "prompts": prompts, "eval": prompts | {"split": "test", "rows": 20}}
    run["metrics"] = {"eval_reward_model": 1.25, "eval_reward_model_low": 1.0, "eval_reward_model_high": 1.5}
    card = card_text(tmp_path, run)
    assert "trained by reinforcement learning (GRPO) with a reward model on 50 prompts of Chats" in card
    assert "| **Score by the reward model** | **1.250** (1.000–1.500) |" in card
    assert card.count("| Chats, ") == 2
    assert "verif" not in card
    assert "pass@" not in card
    assert "2203.02155" in card


@pytest.mark.parametrize(("loss", "paper"), [("grpo", None), ("dapo", "2503.14476"), ("dr_grpo", "2503.20783")])
def test_the_loss_that_was_used_is_cited(tmp_path, loss, paper):
    run = without_pictures(grpo_run())
    run["training"]["loss_type"] = loss
    found = set(re.findall(r"arXiv ([\d.]+)", card_text(tmp_path, run)))
    assert "2402.03300" in found
    assert found & {"2503.14476", "2503.20783"} == ({paper} if paper else set())


def test_the_snippet_asks_as_the_model_was_asked_in_training(tmp_path):
    text = python_snippets(card_text(tmp_path, without_pictures(grpo_run())))
    assert "apply_chat_template" not in text
    assert text.count('prompt = "Question: {question}\\nAnswer:".replace("{question}", question)\n') == 2
    assert text.count('question = "State the') == 2
    chat = python_snippets(card_text(tmp_path, without_pictures(grpo_run(arguments={}))))
    assert chat.count('"content": "State the final') == 2
    assert "replace" not in chat
    arguments = {"prompt_template": "Solve: {question}"}
    both = python_snippets(card_text(tmp_path, without_pictures(grpo_run(arguments=arguments))))
    assert both.count('prompt = "Solve: {question}".replace(') == both.count('"content": prompt}') == 2
    for snippets in (text, chat, both):
        compile(snippets, "card", "exec")


@pytest.mark.slow
def test_snippets_run_where_our_packages_are_not(tmp_path):
    tokenizer = train_bpe([QUESTION, RIGHT] * 3, vocab_size=275)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaStyleForCausalLM(LlamaStyleConfig(vocab_size=len(tokenizer), **SHAPE, **special))
    cards = ""
    for name, arguments in {"text": grpo_run()["arguments"], "chat": {"prompt_template": "Solve: {question}"}}.items():
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        cards += card_text(tmp_path / name, without_pictures(grpo_run(arguments=arguments)))
    assert run_as_stranger(cards, tmp_path).count("\n") >= 4
