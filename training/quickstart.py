"""The main job on the sample data, start to finish, in minutes on two CPU cores: `make quickstart`.

Text -> tokenizer -> language model -> a folder that opens anywhere. Each stage is the command that a user would type,
with a recipe; its folder is the next one's input. A second call finds finished stages finished and goes on with the
rest. At the end the model is opened as a stranger would open it, where hf_models cannot be imported.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LANGUAGE = (
    ("training.train_tokenizer", "training/recipes/bpe_tokenizer/quickstart.yaml"),
    ("training.pretrain_lm", "training/recipes/llama_style/pretrain_quickstart.yaml"),
)
LANGUAGE_MODEL = Path("runs/quickstart/language_model")
PROMPTS = ("The river", "In mathematics,", "Marie Curie was")

# Run by a process that has never heard of us: the import is made to fail, and the folder's own code must do.
STRANGER = """
import sys
sys.modules["hf_models"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

folder, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.7, top_p=0.9)
    print("  " + " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split()))
"""


def main() -> None:
    start = time.perf_counter()
    for module, recipe in LANGUAGE:
        stage_start = time.perf_counter()
        print(f"\n== python -m {module} --config {recipe}", flush=True)
        ended = subprocess.run([sys.executable, "-m", module, "--config", recipe])
        if ended.returncode != 0:
            sys.exit(ended.returncode)
        print(f"== {time.perf_counter() - stage_start:.0f} s", flush=True)

    print(f"\n== Opening {LANGUAGE_MODEL} with AutoModelForCausalLM where hf_models is not to be had", flush=True)
    open_as_a_stranger(LANGUAGE_MODEL, PROMPTS)
    print(f"\n== Done in {time.perf_counter() - start:.0f} s. The card is {LANGUAGE_MODEL / 'README.md'}")


def open_as_a_stranger(folder: Path, prompts: tuple[str, ...]) -> None:
    """Prints a continuation of each prompt by the model in `folder`, generated in a clean process in another place."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", STRANGER, str(folder.resolve()), *prompts]
        subprocess.run(command, cwd=elsewhere, check=True)


if __name__ == "__main__":
    main()
