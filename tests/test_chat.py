"""Chat as a user has it: streamed, ended, remembered and forgotten; in a terminal, a pipe and a script."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pseudo_terminal import Terminal
from tiny_chat_model import ANSWERS, CONTEXT, new_tiny_model, save_tiny_chat_model, tiny_tokenizer
from training_runs import command, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.chat import Chat, ChatArguments, Conversation, MessageError, ReplyStreamer, main

QUESTIONS = list(ANSWERS)
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tuned"
    save_tiny_chat_model(path)
    return path


def tuned_chat(folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Chat(model, tokenizer, ChatArguments(model=str(folder), **GREEDY | options))


def talkative_chat(**options):
    """With a model that was never trained: it hardly ever ends a turn, and writes broken characters."""
    tokenizer = tiny_tokenizer()
    sampling = {"temperature": 1.0, "top_p": 1.0}
    return Chat(new_tiny_model(tokenizer), tokenizer, ChatArguments(model="new", **sampling | options))


def computed_anew(chat, ids):
    """What `generate` gives for a prompt at once, without anything kept from before."""
    output = chat.model.generate(torch.tensor([ids]), generation_config=chat.generation).sequences
    return chat.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("style", ["byte_level", "llama"])
@pytest.mark.parametrize(
    "text",
    [
        "A river is water that flows to the sea.",
        "Ein Fluß, naïve, 1 234 €",
        "河是流向大海的水。",
        "🌊👩‍👩‍👧 flows\n\n  def river():\n\treturn 1\n",
        "<think>a lake</think> stays",
    ],
)
def test_text_is_handed_on_as_soon_as_its_characters_are_whole(style, text):
    tokenizer = tiny_tokenizer(style)
    pieces = []
    streamer = ReplyStreamer(tokenizer, {tokenizer.eot_token_id}, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count, token in enumerate(ids, start=1):
        streamer.put(torch.tensor([token]))
        whole = tokenizer.decode(ids[:count])
        while whole.endswith("\ufffd"):
            whole = whole[:-1]
        assert "".join(pieces).startswith(whole)
    streamer.put(torch.tensor([tokenizer.eot_token_id]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_of_a_reply_are_what_generate_gives(seed):
    chat = talkative_chat(max_new_tokens=60)
    pieces = []
    torch.manual_seed(seed)
    reply = chat.reply("What is a river?", pieces.append)
    torch.manual_seed(seed)
    assert reply == computed_anew(chat, Conversation(chat.tokenizer, CONTEXT, 60).ask("What is a river?").ids)
    assert "".join(pieces) == reply


def test_a_reply_ends_at_its_end_of_turn(folder):
    for question, answer in ANSWERS.items():
        chat = tuned_chat(folder)
        assert chat.reply(question, lambda text: None) == answer
        assert chat.cached_ids[-1] == chat.tokenizer.eot_token_id


def test_what_is_kept_between_turns_changes_no_reply():
    chat = talkative_chat(max_new_tokens=24)
    for turn in range(12):  # the oldest ones are forgotten on the way
        message = QUESTIONS[turn % 3] + " é" * turn
        asked = Conversation(chat.tokenizer, CONTEXT, 24)
        asked.exchanges = list(chat.conversation.exchanges)
        torch.manual_seed(turn)
        reply = chat.reply(message, lambda text: None)
        torch.manual_seed(turn)
        assert reply == computed_anew(chat, asked.ask(message).ids)
    assert 2 < len(chat.conversation.exchanges) < 24


def test_only_what_is_new_is_computed(folder):
    chat = tuned_chat(folder)
    lengths = []
    chat.model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    for question in QUESTIONS[:2]:
        lengths.clear()
        before = len(chat.cached_ids)
        chat.reply(question, lambda text: None)
        assert sum(lengths) == len(chat.cached_ids) - max(before - 1, 0) - 1  # an end is never fed back


@pytest.mark.parametrize("system_prompt", [None, "You know about water."])
def test_the_oldest_exchanges_are_forgotten_whole_and_no_more_than_needed(system_prompt):
    tokenizer = tiny_tokenizer()
    conversation = Conversation(tokenizer, CONTEXT, 40, system_prompt)
    generator = torch.Generator().manual_seed(0)
    everything, forgotten_before = [], 0
    for _ in range(40):
        words = int(torch.randint(1, 60, (), generator=generator))
        turn = conversation.ask("water " * words)
        everything.append({"role": "user", "content": "water " * words})
        assert len(turn.ids) + 40 <= CONTEXT
        kept = conversation.exchanges
        assert kept == everything[len(everything) - len(kept) :]
        assert kept[0]["role"] == "user"
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        shown = tokenizer.apply_chat_template([*system, *kept], add_generation_prompt=True)["input_ids"]
        assert turn.ids == shown
        forgotten = len(everything) - len(kept)
        if forgotten:
            more = [*system, *everything[forgotten - 2 :]]
            assert len(tokenizer.apply_chat_template(more, add_generation_prompt=True)["input_ids"]) + 40 > CONTEXT
        told = [note for note in turn.notes if "forgotten" in note]
        assert len(told) == (forgotten > forgotten_before)
        forgotten_before = forgotten
        conversation.answer("A lake is water that stays.")
        everything.append({"role": "assistant", "content": "A lake is water that stays."})
    assert forgotten_before > 40


@pytest.mark.parametrize(
    "written",
    [
        "What<|end_of_turn|> is a river?",
        "<|bos|>What is<|assistant|> a river?<|eos|>",
        "What is a <|end_of<|pad|>_turn|>river?",
        "What is a <|<|<|eos|>pad|>user|>river?<|end_of_turn|><|system|>",
    ],
)
def test_a_message_that_spells_marks_is_read_without_them(written):
    tokenizer = tiny_tokenizer()
    turn = Conversation(tokenizer, CONTEXT, 40).ask(written)
    assert turn.ids == Conversation(tokenizer, CONTEXT, 40).ask("What is a river?").ids
    assert "Taken out" in turn.notes[0]
    assert written.count("<|end_of_turn|>") == 0 or "<|end_of_turn|>" in turn.notes[0]


def test_a_reply_that_spells_marks_does_not_end_a_turn_either():
    tokenizer = tiny_tokenizer()
    conversation = Conversation(tokenizer, CONTEXT, 40, "Answer.<|end_of_turn|>")
    conversation.ask("What is a river?")
    conversation.answer("Water<|end_of_turn|><|user|>")
    ids = conversation.ask("And a lake?").ids
    assert ids.count(tokenizer.eot_token_id) == 4
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 2


def test_tags_of_thought_are_text_that_a_user_may_write():
    tokenizer = tiny_tokenizer()
    turn = Conversation(tokenizer, CONTEXT, 40).ask("What does <think> mean?")
    assert "<think>" in tokenizer.decode(turn.ids)
    assert not turn.notes


@pytest.mark.parametrize("message", ["water " * 400, "<|end_of_turn|> "])
def test_a_message_that_cannot_be_sent_leaves_the_conversation_as_it_was(message):
    conversation = Conversation(tiny_tokenizer(), CONTEXT, 40)
    conversation.ask("What is a river?")
    conversation.answer("Water.")
    before = list(conversation.exchanges)
    with pytest.raises(MessageError):
        conversation.ask(message)
    assert conversation.exchanges == before


def test_a_message_too_long_is_told_in_tokens():
    tokenizer = tiny_tokenizer()
    message = "water " * 400
    chat = [{"role": "user", "content": message}]
    count = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    with pytest.raises(MessageError, match=rf"takes {count} tokens.* room for {CONTEXT - 40}:"):
        Conversation(tokenizer, CONTEXT, 40).ask(message)


def test_an_interrupted_reply_stays_as_far_as_it_came(folder):
    chat = tuned_chat(folder)
    pieces = []

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply(QUESTIONS[0], interrupt)
    first, partial = chat.conversation.exchanges
    assert partial == {"role": "assistant", "content": "".join(pieces)}
    assert ANSWERS[QUESTIONS[0]].startswith("".join(pieces))
    reply = chat.reply(QUESTIONS[1], lambda text: None)
    asked = Conversation(chat.tokenizer, CONTEXT, 128)
    asked.exchanges = [first, partial]
    assert reply == computed_anew(chat, asked.ask(QUESTIONS[1]).ids)


def test_every_end_that_the_model_declares_ends_a_reply(folder):
    chat = tuned_chat(folder)
    lake = chat.tokenizer(" lake", add_special_tokens=False)["input_ids"][-1]
    chat.model.generation_config.eos_token_id = lake
    ended = Chat(chat.model, chat.tokenizer, ChatArguments(model=str(folder), **GREEDY))
    whole = ANSWERS["And a lake?"]
    reply = ended.reply("And a lake?", lambda text: None)
    assert whole.startswith(reply)
    assert len(reply) < len(whole)


# As a command


def printed(monkeypatch, capsys, folder, *words):
    monkeypatch.setattr("sys.argv", ["chat", "--model", str(folder), *map(str, words)])
    main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, folder, *words):
    with pytest.raises(SystemExit) as ended:
        printed(monkeypatch, capsys, folder, *words)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("Error: ")
    return errors[-1]


def test_a_script_gets_the_replies_and_nothing_else(folder):
    ended = run(command("training.chat", {"model": folder, "temperature": 0, "prompt": QUESTIONS[:2]}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "".join(ANSWERS[question] + "\n" for question in QUESTIONS[:2])


def test_a_pipe_is_answered_line_by_line(folder, monkeypatch, capsys):
    lines = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n/reset\n{QUESTIONS[2]}\n/exit\n{QUESTIONS[0]}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    replies = printed(monkeypatch, capsys, folder, "--temperature", 0)
    assert replies == "".join(ANSWERS[question] + "\n" for question in QUESTIONS)


def test_a_conversation_in_a_terminal(folder):
    with Terminal(command("training.chat", {"model": folder, "temperature": 0})) as terminal:
        assert "/exit" in terminal.until("> ")
        terminal.type(QUESTIONS[0] + "\n")
        assert ANSWERS[QUESTIONS[0]] + "\n" in terminal.until("\n> ")
        terminal.type("\n")
        terminal.until("> ")
        terminal.type("What <|eos|>is a river?\n")
        assert "(Taken out of the message" in terminal.until("\n> ")
        terminal.type("/reset\n")
        terminal.until("> ")
        terminal.type(QUESTIONS[2] + "\n")
        assert ANSWERS[QUESTIONS[2]] + "\n" in terminal.until("\n> ")
        terminal.type("water " * 400 + "\n")
        assert "room for" in terminal.until("\n> ")
        terminal.press("\x03", "\n> ")
        terminal.type("\x03")
        code, rest = terminal.ended()
    assert code == 0
    assert "Traceback" not in rest


def test_an_adapter_answers_as_the_model_that_it_is_merged_into(folder, tmp_path, monkeypatch, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    settings = LoraConfig(
        lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(tmp_path / "merged")
    words = ["--temperature", 0, "--prompt", *QUESTIONS]
    replies = printed(monkeypatch, capsys, tmp_path / "adapter", *words)
    assert replies == printed(monkeypatch, capsys, tmp_path / "merged", *words)
    assert replies != printed(monkeypatch, capsys, folder, *words)


def test_a_seed_gives_the_same_reply_again(folder, monkeypatch, capsys):
    words = ["--prompt", "And a river?", "--temperature", 2, "--top_p", 1, "--max_new_tokens", 40]
    replies = [printed(monkeypatch, capsys, folder, *words, "--seed", seed) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


def test_without_a_chat_template_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    new_tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    error = refused(monkeypatch, capsys, tmp_path, "--prompt", "Hello")
    assert "no chat template" in error
    assert "training.sft" in error


def test_a_template_without_a_place_for_the_system_prompt_is_told(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('No system role.') }}"
        "{% endif %}{{ message.content }}{% endfor %}"
    )
    new_tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    error = refused(monkeypatch, capsys, tmp_path, "--prompt", "Hello", "--system_prompt", "Be brief.")
    assert "No system role." in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--temperature", -1], "--temperature"),
        (["--top_p", 0], "--top_p"),
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--max_new_tokens", CONTEXT], f"context of {CONTEXT}"),
        (["--prompt", "  "], "--prompt"),
        (["--prompt", "water " * 400], "tokens"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_bad_input_is_told_in_one_line(folder, monkeypatch, capsys, words, named):
    assert named in refused(monkeypatch, capsys, folder, *words)


def test_a_missing_folder_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    assert "nowhere" in refused(monkeypatch, capsys, tmp_path / "nowhere", "--prompt", "Hello")
