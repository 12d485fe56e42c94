"""`transformers serve` and `transformers chat` on a folder of ours, in processes that cannot import our packages."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from pseudo_terminal import Terminal
from tiny_chat_model import ANSWERS, save_tiny_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.chat import Chat, ChatArguments

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

QUESTIONS = list(ANSWERS)
# The command `transformers`, without our packages.
TRANSFORMERS = """
import sys
for ours in ("hf_models", "training", "hub_cards"):
    sys.modules[ours] = None
from transformers.cli.transformers import main
sys.argv[0] = "transformers"
main()
"""


def transformers_command(*words):
    return [sys.executable, "-c", TRANSFORMERS, *map(str, words)]


def stranger_environment(home):
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "tuned"
    save_tiny_chat_model(path)
    return path


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """Of a server that runs while the tests do."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = transformers_command("serve", folder, "--trust-remote-code", "--device", "cpu", "--port", port)
    with open(home / "log", "w") as log:
        server = subprocess.Popen(words, cwd=home, env=stranger_environment(home), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(server, f"http://localhost:{port}/health", home / "log")
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_until_healthy(server, url, log, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                assert response.status == 200
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    pytest.fail(f"The server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def completions(address, folder):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def create(messages, **options):
        return client.chat.completions.create(model=str(folder), messages=messages, temperature=0, **options)

    return create


def asked(*messages, system=None):
    roles = ["user", "assistant"] * len(messages)
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + chat


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_reply_over_http_is_whole_and_ends_at_its_end_of_turn(completions, question):
    choice = completions(asked(question)).choices[0]
    assert choice.message.content == ANSWERS[question]
    assert choice.finish_reason == "stop"


def test_a_streamed_reply_comes_in_pieces(completions):
    chunks = list(completions(asked(QUESTIONS[0]), stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == ANSWERS[QUESTIONS[0]]
    assert len(pieces) > 5
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_reply_that_is_cut_says_so(completions):
    cut = completions(asked(QUESTIONS[0]), max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3
    assert ANSWERS[QUESTIONS[0]].startswith(cut.choices[0].message.content)


def test_the_server_answers_as_our_chat_does(completions, folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    system = "You know about water."
    chat = Chat(model, tokenizer, ChatArguments(model=str(folder), temperature=0.0, system_prompt=system))
    said = []
    for question in ("And a river?", "Where does a lake begin?", "Water?"):
        said.append(question)
        served = completions(asked(*said, system=system), max_tokens=128).choices[0].message.content
        assert served == chat.reply(question, lambda text: None)
        said.append(served)


def test_the_chat_client_of_transformers_gets_the_reply(address, folder, tmp_path):
    words = transformers_command("chat", folder, address, "do_sample=False", "max_new_tokens=64")
    # The client refuses any address offline; it asks the server alone.
    environment = stranger_environment(tmp_path) | {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    with Terminal(words, cwd=tmp_path, environment=environment) as terminal:
        terminal.until("!exit")
        terminal.until(">:")
        terminal.type(QUESTIONS[0] + "\n")
        terminal.until(ANSWERS[QUESTIONS[0]])
        terminal.until(">:")
        terminal.type("!exit\n")
        code, _ = terminal.ended()
    assert code == 0
