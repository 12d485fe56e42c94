"""The command line of lm-evaluation-harness opens our folder, and gets the results of its native export."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tiny_chat_model import new_tiny_model, tiny_tokenizer

from hf_models.convert import convert
from training.text_data import load_text_dataset

CHOICE = """
task: lead_topics
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}\\nTopic:"
doc_to_choice: ["Arts", "Geography", "History", "People", "Technology"]
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: lead_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def measured(folder, where):
    """What `lm_eval` writes down of the model in `folder`, run in the folder `where`, with its tasks in `tasks`."""
    output = where / f"results_{folder.name}"
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--include_path", "tasks"]
    command += ["--tasks", "lead_topics,lead_texts", "--device", "cpu", "--batch_size", "8", "--output_path", output]
    environment = os.environ | OFFLINE | {"HF_HOME": str(where / "hf_home")}
    done = subprocess.run([sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [file] = output.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {
        f"{task} {metric}": value
        for task, row in results.items()
        for metric, value in row.items()
        if metric.endswith(",none") and isinstance(value, float)
    }


@pytest.mark.slow
def test_our_folder_and_its_native_export_get_the_same_results(tmp_path):
    """Two runs of 20 s. The model is untrained, but far from indifferent."""
    pytest.importorskip("lm_eval")
    tokenizer = tiny_tokenizer()
    model = new_tiny_model(tokenizer)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "native", "transformers")

    (tmp_path / "tasks").mkdir()
    texts = [text[:150] for text in load_text_dataset("wikipedia_leads", "test")["text"][:40]]
    file = tmp_path / "leads.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, task in (("topics", CHOICE), ("texts", TEXT)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(file=file))

    of_ours, of_native = (measured(tmp_path / name, tmp_path) for name in ("ours", "native"))
    assert {"lead_topics acc,none", "lead_topics acc_norm,none", "lead_texts bits_per_byte,none"} <= of_ours.keys()
    assert of_ours == pytest.approx(of_native, rel=1e-5)
    assert of_ours["lead_topics acc,none"] == of_native["lead_topics acc,none"]

    # What bits a byte are, by hand. The harness begins with a BOS, after which this tokenizer writes one of its own.
    nats = 0.0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1]
        nats -= logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert of_ours["lead_texts bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
