"""Evaluation: figures equal those computed by hand, and are recorded in the run folder, where nothing else changes."""

import functools
import hashlib
import json
import math
import re
import sys
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from tiny_chat_model import ANSWERS, new_tiny_model, save_tiny_chat_model, tiny_tokenizer

from hf_models import LlamaStyleForCausalLM
from training.evaluate import main, summed_loss
from training.exact_match import generate_replies, given_answer, is_right, load_questions, prompt_ids
from training.language_models import load_tokenizer
from training.text_data import load_text_dataset

RUN = {
    "task": "pretrain_lm",
    "status": "finished",
    "arguments": {},
    "data": {},
    "metrics": {},
    "history": [],
    "samples": [],
    "model": {"parameters": 100_000, "config": {}},
    "training": {"block_size": 64},
    "wall_time_seconds": 3.5,
}
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: data/colours.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_tiny_chat_model(folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


@pytest.fixture
def model(trained):
    return LlamaStyleForCausalLM.from_pretrained(trained).eval()


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained)


@pytest.fixture(scope="module")
def indexed_once():
    """The harness's `TaskManager`, which reads its thousands of task files for the first that asks only."""
    return functools.cache(pytest.importorskip("lm_eval.tasks").TaskManager)


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Runs the command; returns what it wrote into its --output."""

    def run(**options):
        words = [word for name, value in options.items() for word in (f"--{name}", *map(str, _listed(value)))]
        monkeypatch.setattr(sys, "argv", ["evaluate", *words, "--output", str(tmp_path / "results.json")])
        main()
        return json.loads((tmp_path / "results.json").read_text())

    return run


def _listed(value):
    return value if isinstance(value, list) else [value]


def write_lines(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts_of(count):
    return load_text_dataset("wikipedia_leads", "test").select(range(count))


@torch.no_grad()
def log_probabilities(model, ids):
    """Of every token but the first, given those before it."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("block_size", [16, 256])
def test_loss_of_a_text_is_that_of_each_documents_pieces(model, tokenizer, block_size):
    texts = texts_of(5)
    expected, predicted = 0.0, 0
    for text in texts["text"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        document = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        predicted += len(document) - 1
        while len(document) > 1:
            expected -= log_probabilities(model, document[:block_size]).sum().item()
            document = document[block_size - 1 :]  # its last token is the next piece's first
    loss, tokens = summed_loss(model, tokenizer, texts, block_size, batch_size=3)
    assert tokens == predicted
    assert loss == pytest.approx(expected, rel=1e-6)


def test_without_a_bos_a_document_begins_with_eos(model):
    foreign = tiny_tokenizer()
    foreign.bos_token = None
    texts = texts_of(1)
    ids = foreign(texts[0]["text"], add_special_tokens=False)["input_ids"][:250]
    texts = texts.map(lambda row: {"text": foreign.decode(ids)})
    expected = -log_probabilities(model, [foreign.eos_token_id, *ids, foreign.eos_token_id]).sum().item()
    assert summed_loss(model, foreign, texts, 256, batch_size=1)[0] == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_count_the_bytes_of_utf8(evaluate, trained, model, tokenizer, tmp_path):
    documents = ["Zwölf größere Flüsse", "A lake is water."]
    file = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in documents])
    [result] = evaluate(model=trained, text=file)
    nats = -sum(
        log_probabilities(model, [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]).sum().item()
        for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]
    )
    size = sum(len(text.encode()) for text in documents)
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert (result["n"], result["data"]["bytes"]) == (2, size)


def test_multiple_choice_is_the_likeliest_continuation(evaluate, trained, model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    words = ["river", "lake", "high mountain", "sea", "spring that flows"]
    rows = [
        {"question": question, "choices": words[i % 3 : i % 3 + 3], "label": i % 3}
        for i, question in enumerate(["What is", "Where is the", "A", "Water of", "The", "And", "Is it", "In the"])
    ]
    (tmp_path / "task.yaml").write_text(TASK)
    write_lines(tmp_path / "data" / "colours.jsonl", rows)
    [result] = evaluate(model=trained, tasks=tmp_path / "task.yaml", batch_size=3)

    right, right_by_length = [], []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context, whole = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
            scores.append(log_probabilities(model, whole)[len(context) - 1 :].sum().item())
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["label"])
        right_by_length.append(by_length.index(max(by_length)) == row["label"])
    share = sum(right) / 8
    assert result["metrics"]["acc"]["value"] == share
    assert result["metrics"]["acc"]["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert result["metrics"]["acc_norm"]["value"] == sum(right_by_length) / 8
    assert result["chance"] == pytest.approx(1 / 3)
    assert (result["name"], result["n"]) == ("colours", 8)


def test_our_own_tasks_need_no_network_and_ask_the_same_every_time(evaluate, trained):
    pytest.importorskip("lm_eval")
    names = ["wikipedia_leads_ending", "wikipedia_leads_title", "wikipedia_leads_topic"]
    first = evaluate(model=trained, tasks=names, limit=4)
    assert [result["name"] for result in first] == names
    [again] = evaluate(model=trained, tasks=names[:1], limit=4)
    assert {**first[0], "date": None} == {**again, "date": None}
    for result in first:
        assert result["chance"] == 0.25
        assert (result["n"], result["settings"]["limit"], result["settings"]["num_fewshot"]) == (4, 4, 0)


def test_the_questions_of_our_tasks_have_one_right_answer_each():
    from training.evaluation_tasks import wikipedia_choices

    leads = {row["title"]: row for row in load_dataset(str(wikipedia_choices.LEADS), split="test")}
    for questions, right in (
        (wikipedia_choices.titles(), lambda lead: lead["title"]),
        (wikipedia_choices.topics(), lambda lead: lead["topic"]),
        (wikipedia_choices.endings(), lambda lead: lead["text"]),
    ):
        assert not set(questions["test"]["title"]) & set(questions["train"]["title"])
        for row in questions["test"]:
            assert len(set(row["choices"])) == 4
            assert row["choices"][row["label"]] in right(leads[row["title"]])
            assert row["beginning"] == leads[row["title"]]["text"][: len(row["beginning"])]


@pytest.mark.parametrize(
    ("reply", "answer", "given", "right"),
    [
        ("Then 6+6 is 12.", "12", "12", True),
        ("12 - no, 13", "12", "13", False),
        ("<think>9-3=6</think><answer>6</answer> or 7", "6", "6", True),
        ("<answer>5</answer> wait <answer>6</answer>", "6", "6", True),
        ("<answer>none</answer> 6", "6", "", False),
        ("It is 1,000.50 in all", "1000.5", "1,000.50", True),
        ("1, 2,3", "3", "3", True),
        ("5-3=2", "2", "2", True),
        ("(7)-3", "-3", "3", False),
        ("x is -2.0", "-2", "-2.0", True),
        ("x is \N{MINUS SIGN}2", "-2", "-2", True),
        ("no number", "0", "", False),
        ("  paris!\n", "Paris", "paris!", True),
        ("It is Paris", "Paris", "It is Paris", False),
        ("So: <answer> New  York </answer>", "new york", "New  York", True),
        ("<think>Rome or Paris</think> Paris.", "Paris", "Paris.", True),
        ("", "Paris", "", False),
        ("?", "!", "?", False),
        ("It is .5", "0.5", ".5", True),
        ("It is -.5", ".5", "-.5", False),
        ("It is...5", "5", "5", True),
        ("<answer>-1/2</answer>", "1/2", "-1/2", False),
        ("<answer>(1/2).</answer>", "1/2", "(1/2).", True),
        ("-x", "x", "-x", False),
        ("[1, 2)", "(1, 2]", "[1, 2)", False),
        ("**(A)**", "a", "**(A)**", True),
        ("A)", "A", "A)", True),
        ("C", "C++", "C", False),
    ],
)
def test_the_rule_of_exact_match(reply, answer, given, right):
    assert given_answer(reply, answer) == given
    assert is_right(given, answer) is right


def test_replies_do_not_depend_on_the_batch():
    tokenizer = tiny_tokenizer()
    model = new_tiny_model(tokenizer)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)  # far from uniform: a wrong mask would show
    prompts = [[tokenizer.bos_token_id, *torch.randint(0, 250, (length,)).tolist()] for length in (3, 17, 8, 30, 1)]
    alone = [generate_replies(model, tokenizer, [prompt], 12, 1)[0] for prompt in prompts]
    assert generate_replies(model, tokenizer, prompts, 12, 5) == alone
    assert generate_replies(model, tokenizer, prompts, 12, 2) == alone
    assert len({reply["text"] for [reply] in alone}) > 1


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_that_end_leave_the_batch_and_change_no_other(model, tokenizer, cache):
    """Against `generate`, which goes on until all have ended; a static cache cannot lose rows."""
    asked = [{"prompt": prompt} for prompt in (*ANSWERS, "A lake is water", "And then, at the spring?")]
    prompts = prompt_ids(asked, tokenizer, apply_chat_template=True)
    with patch.object(model.generation_config, "cache_implementation", cache):
        replies = generate_replies(model, tokenizer, prompts, 50, 5)
    for ids, [reply] in zip(prompts, replies, strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=50, do_sample=False)[0, len(ids) :].tolist()
        assert reply["tokens"] == len(expected)
        assert tokenizer.decode(expected).removesuffix(tokenizer.eot_token) == reply["text"]
    assert len({reply["tokens"] for [reply] in replies}) > 2


def test_answers_learnt_by_heart_are_right_and_end(evaluate, trained, tmp_path):
    rows = [{"prompt": question, "answer": answer} for question, answer in ANSWERS.items()]
    rows[0]["prompt"] = [{"role": "user", "content": rows[0]["prompt"]}]
    rows[2]["answer"] = "A lake is a number."
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    [result] = evaluate(model=trained, exact_match=questions, apply_chat_template="true", max_new_tokens=40)
    assert result["metrics"]["exact_match"]["value"] == pytest.approx(2 / 3)
    assert result["metrics"]["exact_match"]["stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert result["metrics"]["ended"] == {"value": 1.0, "stderr": 0.0}
    replies = [json.loads(line) for line in (trained / "evaluations" / "questions_train.jsonl").open()]
    assert [reply["reply"] for reply in replies] == list(ANSWERS.values())
    assert [reply["right"] for reply in replies] == [True, True, False]


def test_results_go_into_the_run_and_its_card_and_nothing_else_changes(evaluate, trained, tmp_path):
    def others():
        ours = ("run.json", "README.md", "card_assets", "evaluations")
        files = [
            file for file in trained.rglob("*") if file.is_file() and file.relative_to(trained).parts[0] not in ours
        ]
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = others()
    file = write_lines(tmp_path / "rivers.jsonl", [{"text": "A river is water."}, {"text": "A lake."}])
    other = write_lines(tmp_path / "lakes.jsonl", [{"text": "A lake."}])
    evaluate(model=trained, text=other)
    [first] = evaluate(model=trained, text=file, limit=1)
    [second] = evaluate(model=trained, text=file)
    run = json.loads((trained / "run.json").read_text())
    assert {**run, "evaluations": None} == {**RUN, "evaluations": None}
    names = [result["name"] for result in run["evaluations"] if result["kind"] == "text"]
    assert names.count("rivers (train)") == names.count("lakes (train)") == 1
    recorded = next(result for result in run["evaluations"] if result["name"] == "rivers (train)")
    assert recorded == second
    assert recorded["data"]["fingerprint"] != first["data"]["fingerprint"]
    assert recorded["settings"] == {"block_size": 64, "dtype": "float32", "device": "cpu"}
    card = (trained / "README.md").read_text()
    assert f"| `rivers (train)` | bits per byte | {second['metrics']['bits_per_byte']['value']:.4g} |" in card
    assert others() == before


def test_an_adapter_is_evaluated_like_its_merged_model(evaluate, trained, tmp_path):
    adapted = get_peft_model(
        LlamaStyleForCausalLM.from_pretrained(trained),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(trained)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer = load_tokenizer(trained)
    for folder in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / folder)
    options = {"text": write_lines(tmp_path / "text.jsonl", [{"text": "A river is water that flows."}])}
    if "lm_eval" in sys.modules:  # imported by the tests of tasks
        options |= {"tasks": ["wikipedia_leads_title"], "limit": 4}
    of_adapter, of_merged, of_base = (
        [result["metrics"] for result in evaluate(model=path, **options)]
        for path in (tmp_path / "adapter", tmp_path / "merged", trained)
    )
    loss = of_merged[0]["loss"]["value"]
    assert of_adapter[0]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert of_adapter[1:] == of_merged[1:]
    assert abs(of_base[0]["loss"]["value"] - loss) > 0.01
    assert not (tmp_path / "adapter" / "run.json").exists()


QUESTION = {"prompt": "1+1", "answer": 2}


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, None, "nothing to evaluate: give --tasks"),
        ({"text": "nothing_here.txt"}, None, "no file or folder 'nothing_here.txt'"),
        ({"text": "ROWS"}, [{"text": ""}], "Every document of .* is empty"),
        ({"text": "ROWS", "block_size": 9999}, [{"text": "A"}], "does not fit the model's context of 256"),
        ({"tasks": ["nowhere.yaml"]}, None, "no task file 'nowhere.yaml'"),
        ({"tasks": ["wikipedia_leads_titel"]}, None, "did you mean 'wikipedia_leads_title'.*ours are wikipedia_leads_"),
        (
            {"tasks": ["hellaswag"]},
            None,
            "hellaswag cannot be loaded, and its data come from the Hub .*wikipedia_leads_",
        ),
        ({"exact_match": "ROWS"}, [QUESTION, {"prompt": "1+1"}], "line 2 has no field 'answer', only prompt"),
        ({"exact_match": "ROWS"}, [{"answer": 2}], "line 1 has no field 'prompt', only answer"),
        ({"exact_match": "ROWS"}, [{"prompt": [], "answer": 2}], "line 1 has no field 'prompt', or an empty one"),
        ({"exact_match": "ROWS"}, [{"prompt": 3, "answer": 2}], "line 1 has the prompt '3': give a text, or messages"),
        (
            {"exact_match": "ROWS"},
            [{"prompt": "1", "answer": [2]}],
            "line 1 has the answer .*: give a text or a number",
        ),
        ({"exact_match": "ROWS"}, [], "holds no questions"),
        ({"exact_match": "ROWS"}, [QUESTION], "Question 1 .* exceeds the model's context of 256"),
        ({"exact_match": "ROWS", "batch_size": 0}, [QUESTION], "--batch_size is 0: give 1 or more"),
    ],
)
def test_bad_input_is_told_in_one_line(
    evaluate, trained, tmp_path, capsys, monkeypatch, request, options, rows, message
):
    if "tasks" in options:
        monkeypatch.setattr("lm_eval.tasks.TaskManager", request.getfixturevalue("indexed_once"))
    file = write_lines(tmp_path / "rows.jsonl", rows or [])
    options = {name: file if value == "ROWS" else value for name, value in options.items()}
    with pytest.raises(SystemExit) as stopped:
        evaluate(model=trained, **options)
    assert stopped.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert re.search(message, told[0]), told[0]


def test_without_lm_eval_only_tasks_are_refused(evaluate, trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit):
        evaluate(model=trained, tasks="wikipedia_leads_title")
    assert "pip install 'hf_models[evaluate]'" in capsys.readouterr().err
    assert evaluate(model=trained, text="wikipedia_leads", limit=1)[0]["kind"] == "text"


def test_questions_are_read_from_parquet_as_from_lines(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    lines = write_lines(tmp_path / "lines.jsonl", rows)
    from_parquet, description = load_questions(str(tmp_path / "test.parquet"))
    from_lines, same = load_questions(str(lines))
    assert from_parquet == from_lines == rows
    assert description["fingerprint"] == same["fingerprint"]
