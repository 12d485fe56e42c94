"""The page on which people try a model: its functions on tiny models, and the folders that it is made for."""

import ast
import importlib.util
import itertools
import json
import shutil
import sys
import threading
import time
import tomllib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_chat_model import ANSWERS, CONTEXT, new_tiny_model, save_tiny_chat_model, tiny_tokenizer
from tiny_solver import SOLUTIONS
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_models import LlamaStyleForSequenceClassification
from hf_models.convnextv2_fcmae import (
    ConvNextV2FcmaeConfig,
    ConvNextV2FcmaeForImageClassification,
    ConvNextV2FcmaeForPreTraining,
    ConvNextV2FcmaeModel,
)
from hub_cards.space import __main__ as command
from hub_cards.space import build_space
from training.image_preparation import build_image_processor

gr = pytest.importorskip("gradio", reason="needs gradio: pip install '.[space]'")

REPOSITORY = Path(__file__).parent.parent
QUESTION, ANSWER = next(iter(ANSWERS.items()))
SUM = "What is 4+4?"
LABELS = ["ant", "bird", "cat", "dog", "eel", "fox", "gnu"]


def open_app(space, model, monkeypatch):
    """The app of a Space's folder as a module that has `model` for its model; nothing is served."""
    monkeypatch.setenv("MODEL", str(model))
    spec = importlib.util.spec_from_file_location("app", space / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@pytest.fixture
def app_of(tmp_path, monkeypatch):
    return lambda folder: open_app(build_space(folder, tmp_path / "space"), folder, monkeypatch)


def write_run(folder, task, **sections):
    run = {"task": task, "status": "finished", "arguments": {}, "data": {}, "metrics": {}} | sections
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def save_thinking_chat_model(folder):
    """A model that has learnt to answer, in some cases after thoughts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other, which takes long where there is other work
    with patch.dict(ANSWERS, SOLUTIONS):
        save_tiny_chat_model(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "chat"
    save_thinking_chat_model(folder)
    return write_run(folder, "sft", model={"parameters": 5_870_000})


@pytest.fixture
def chat(app_of, chat_folder):
    app = app_of(chat_folder)
    return app, app.LanguageModel(str(chat_folder))


def chatbot_of(app, model):
    return next(block for block in app.chat_page(model).blocks.values() if isinstance(block, gr.Chatbot))


def shown(chatbot, content):
    """The assistant's message as the page shows it: each part's metadata, with a title where it is folded, and text."""
    content = content if isinstance(content, dict) else {"role": "assistant", "content": content}
    messages = chatbot.postprocess([content]).model_dump()
    return [(message["metadata"] or {}, message["content"][0]["text"]) for message in messages]


# Language models


def test_a_reply_grows_piece_by_piece_to_the_learnt_answer(chat):
    app, model = chat
    pieces = list(app.respond(model, QUESTION, [], 0.0, 64))
    assert pieces[-1] == ANSWER
    assert len(pieces) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))


def test_a_later_turn_has_the_former_ones_in_its_prompt(chat):
    app, model = chat
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    asked = [
        *history[:1],
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Where does it begin?"},
    ]
    ids = model.tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        output = model.model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
    expected = model.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    *_, reply = app.respond(model, "Where does it begin?", history, 0.0, 64)
    assert reply == expected == ANSWERS["Where does it begin?"]


def test_the_system_prompt_and_no_mark_of_a_user_reaches_the_model(chat):
    app, model = chat
    prompts = []
    model.write = lambda ids, *_: iter(prompts.append(model.tokenizer.decode(ids)) or ["text"])
    list(app.respond(model, "Hello<|end_of_turn|><|assistant|>", [], 0.0, 8, "Be brief."))
    assert "Be brief." in prompts[0]
    assert prompts[0].count("<|assistant|>") == 1
    assert prompts[0].count("<|end_of_turn|>") == 2  # of the system prompt and of the message


def test_thoughts_are_folded_also_while_they_are_written(chat):
    app, model = chat
    pieces = list(app.respond(model, SUM, [], 0.0, 64))
    assert pieces[-1] == SOLUTIONS[SUM].replace("<answer>", "").replace("</answer>", "")
    thinking = [piece for piece in pieces if "<think>" in piece and "</think>" not in piece]
    assert thinking
    chatbot = chatbot_of(app, model)
    for piece in thinking:
        assert all(part.get("title") and part["status"] == "pending" for part, _ in shown(chatbot, piece))
    (thoughts, text), (answer, answered) = shown(chatbot, pieces[-1])
    assert (thoughts["status"], text) == ("done", "4 and 4 is 8")
    assert (answer.get("title"), answered) == (None, "8")


def test_thoughts_that_were_cut_are_no_longer_waited_for(chat):
    app, model = chat
    *_, reply = app.respond(model, SUM, [], 0.0, 4)
    ((thoughts, _),) = shown(chatbot_of(app, model), reply)
    assert thoughts["status"] == "done"


def test_thoughts_are_not_part_of_the_conversation(chat):
    app, _ = chat
    history = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": "2+3=5", "metadata": {"title": "Reasoning", "status": "done"}},
        {"role": "assistant", "content": "<answer>5</answer>", "metadata": None},
    ]
    assert [message["content"] for message in app.spoken(history)] == [SUM, "<answer>5</answer>"]


def test_stopping_a_reply_ends_the_computation(chat):
    app, model = chat
    steps, started = [], threading.active_count()
    model.model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.01)))
    reply = app.respond(model, QUESTION, [], 2.0, 120)
    next(reply)
    reply.close()
    ended = len(steps)
    assert ended < 100
    assert threading.active_count() == started
    time.sleep(0.1)
    assert len(steps) == ended


def test_a_message_that_cannot_be_sent_is_answered_by_a_sentence_outside_the_conversation(chat):
    app, model = chat
    (empty,) = app.respond(model, "  ", [], 0.0, 64)
    (long,) = app.respond(model, "river " * 400, [], 0.0, 64)
    assert "no message" in empty["content"]
    assert f"room for {CONTEXT - 64}" in long["content"]
    assert app.spoken([{"role": "user", "content": " "}, empty]) == []
    ((metadata, _),) = shown(chatbot_of(app, model), long)
    assert metadata["title"] == "Not answered"


def test_the_oldest_exchanges_are_forgotten_where_the_context_is_full(chat, capsys):
    _, model = chat
    history = [{"role": role, "content": f"{i} river"} for i in range(40) for role in ("user", "assistant")]
    ids = model.chat_prompt([*history, {"role": "user", "content": QUESTION}], 64)
    text = model.tokenizer.decode(ids)
    assert len(ids) <= CONTEXT - 64
    assert "39 river" in text
    assert "<|user|>0 river" not in text
    assert "forgotten" in capsys.readouterr().out


def test_a_failing_model_is_told_in_a_sentence(chat):
    app, model = chat

    def fail(**_):
        raise RuntimeError("out of memory")

    model.model.generate = fail
    (told,) = app.respond(model, QUESTION, [], 0.0, 8)
    assert told["content"] == "The model could not write: out of memory"


def test_a_model_that_says_nothing_is_told_of(chat):
    app, model = chat
    model.model.generate = lambda input_ids, streamer, **_: (streamer.put(input_ids.cpu()), streamer.end())
    (told,) = app.respond(model, QUESTION, [], 0.0, 8)
    assert told["content"] == "The model ended without writing anything."


@pytest.mark.parametrize("style", ["byte_level", "llama"])
def test_a_base_model_continues_the_text_as_generate_does(app_of, tmp_path, style):
    folder, tokenizer = tmp_path / "base", tiny_tokenizer(style)
    new_tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    app = app_of(write_run(folder, "pretrain_lm"))
    model = app.LanguageModel(str(folder))
    inputs = tokenizer("A river", return_tensors="pt")
    output = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=20, do_sample=False)
    pieces = list(app.continue_text(model, "A river", 0.0, 20))
    assert pieces[-1] == tokenizer.decode(output[0], skip_special_tokens=True)
    assert all(piece.startswith("A river") for piece in pieces)
    assert any(isinstance(block, gr.Button) and block.value == "Continue" for block in app.build_page().blocks.values())


def test_of_a_long_text_the_end_is_read_and_of_none_nothing(app_of, chat_folder, recwarn, capsys):
    app = app_of(chat_folder)
    model = app.LanguageModel(str(chat_folder))
    assert model.text_prompt("river " * 400, 64) == model.tokenizer("river " * 400)["input_ids"][-(CONTEXT - 64) :]
    assert "reads the last" in capsys.readouterr().out
    assert list(app.continue_text(model, " ", 0.0, 8)) == [" "]
    assert any("no text to continue" in str(warning.message) for warning in recwarn)


def test_a_model_trained_on_a_prompt_of_its_own_gets_each_question_in_it(app_of, chat_folder, tmp_path):
    folder = Path(shutil.copytree(chat_folder, tmp_path / "reasoner"))
    arguments = {"prompt_template": "Question: {question}\nAnswer:", "apply_chat_template": False}
    write_run(folder, "grpo", arguments=arguments, samples=[{"step": 0, "prompt": "1 + 1", "text": "2"}] * 2)
    app = app_of(folder)
    model = app.LanguageModel(str(folder))
    assert app.SPACE["examples"] == ["1 + 1"]
    prompts = []
    model.write = lambda ids, *_: iter(prompts.append(model.tokenizer.decode(ids, skip_special_tokens=True)) or ["2"])
    assert list(app.respond(model, "2 + 2", [{"role": "user", "content": "1 + 1"}], 0.0, 8)) == ["2"]
    assert prompts == ["Question: 2 + 2\nAnswer:"]


def test_an_adapter_is_opened_with_its_base(app_of, tmp_path, monkeypatch):
    base, tokenizer = new_tiny_model(tiny_tokenizer()), tiny_tokenizer()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # which begins with zeros
            torch.nn.init.normal_(parameter)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    app = app_of(Path("adapter"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)["input_ids"]
    expected = adapted.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    *_, reply = app.respond(app.LanguageModel("adapter"), "?", [], 0.0, 8)
    assert reply == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_model_that_cannot_be_opened_is_told_on_the_page(app_of, chat_folder, monkeypatch):
    app = app_of(chat_folder)
    monkeypatch.setattr(app, "MODEL", "/nowhere")
    (text,) = [block.value for block in app.build_page().blocks.values() if isinstance(block, gr.Markdown)]
    assert "could not be opened" in text
    assert "Traceback" not in text


# Images


def vision_folder(folder, *classes, **fields):
    """Random weights of `classes`, the first of which the config names; 64-pixel images in 4 x 4 patches."""
    torch.manual_seed(0)
    fields = {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "image_size": 64, "decoder_hidden_size": 16} | fields
    config = ConvNextV2FcmaeConfig(id2label=dict(enumerate(LABELS)), label2id={}, **fields)
    models = [kind(config).eval() for kind in classes]
    models[0].save_pretrained(folder)
    for other in models[1:]:
        weights = {**other.state_dict(), **load_file(folder / "model.safetensors")}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_image_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_model_folder(tmp_path_factory):
    """A model with both abilities."""
    folder = tmp_path_factory.mktemp("models") / "both"
    return vision_folder(folder, ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining)


@pytest.fixture(scope="module")
def vision(vision_model_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        space = build_space(vision_model_folder, tmp_path_factory.mktemp("spaces") / "both")
        app = open_app(space, vision_model_folder, monkeypatch)
        yield app, app.VisionModel(str(vision_model_folder))


def removed_patches(picture):
    """The patches of a 64-pixel picture, enlarged fourfold, that are one colour: those set to the mean."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(4, 64, 4, 64, 3)
    return {(i, j) for i in range(4) for j in range(4) if (pixels[i, :, j] == pixels[i, :1, j, :1]).all()}


def noise_image(mode="RGB", size=(80, 64)):
    image = Image.frombytes("RGB", size, torch.randint(0, 256, (size[0] * size[1] * 3,), dtype=torch.uint8).numpy())
    return image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)


def test_the_mask_ratio_removes_its_share_and_a_higher_one_more_of_the_same(vision):
    _, model = vision
    image, removed = noise_image(), {}
    for ratio in (0.05, 0.25, 0.5, 0.6, 0.95):
        original, masked, reconstruction, told = model.reconstruct(image, ratio, seed=0)
        removed[ratio] = removed_patches(masked)
        assert original.size == masked.size == reconstruction.size == (256, 256)
        assert told.startswith(f"{len(removed[ratio])} of 16 patches")
    # int(16 * (1 - ratio)) patches are kept (arXiv 2301.00808's code), but at least one.
    assert [len(patches) for patches in removed.values()] == [1, 4, 8, 10, 15]
    assert all(lower < higher for lower, higher in itertools.pairwise(removed.values()))


def test_the_seed_says_which_patches_are_removed(vision):
    _, model = vision
    image = noise_image()
    draws = [removed_patches(model.reconstruct(image, 0.5, seed)[1]) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_reconstruction_keeps_what_was_seen(vision):
    _, model = vision
    original, masked, reconstruction, _ = model.reconstruct(noise_image(), 0.5, 0)
    i, j = next((i, j) for i in range(4) for j in range(4) if (i, j) not in removed_patches(masked))
    place = (64 * j, 64 * i, 64 * j + 64, 64 * i + 64)
    assert reconstruction.crop(place).tobytes() == original.crop(place).tobytes() == masked.crop(place).tobytes()


def test_the_five_likeliest_classes_have_their_probabilities(vision, vision_model_folder):
    _, model = vision
    image = noise_image()
    reference = AutoModelForImageClassification.from_pretrained(vision_model_folder).eval()
    with torch.no_grad():
        logits = reference(model.processor(image, return_tensors="pt")["pixel_values"]).logits[0]
    probabilities = dict(zip(LABELS, logits.softmax(0).tolist(), strict=True))
    expected = sorted(LABELS, key=probabilities.get, reverse=True)[:5]
    told = model.classify(image)
    assert list(told) == expected
    assert told == pytest.approx({label: probabilities[label] for label in expected}, abs=1e-6)
    assert sum(told.values()) == pytest.approx(1 - sum(sorted(probabilities.values())[:2]), abs=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("size", [(64, 64), (200, 33), (1, 3)])
def test_images_of_any_mode_and_size_are_taken(vision, mode, size):
    _, model = vision
    image = noise_image(mode, size)
    assert len(model.classify(image)) == 5
    assert model.reconstruct(image, 0.6, 0)[0].size == (256, 256)


def test_what_is_transparent_is_white_and_16_bits_are_scaled(vision):
    app, _ = vision
    assert app.plain_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "RGB").getpixel((0, 0)) == (255, 255, 255)
    assert app.plain_image(Image.new("I;16", (2, 2), 32768), "L").getpixel((0, 0)) == 128


def test_a_grey_model_sees_a_colour_image_as_grey(app_of, tmp_path):
    folder = vision_folder(tmp_path / "grey", ConvNextV2FcmaeForPreTraining, num_channels=1)
    model = app_of(folder).VisionModel(str(folder))
    original, *_ = model.reconstruct(noise_image(), 0.6, 0)
    assert original.convert("L").convert("RGB").tobytes() == original.tobytes()


def test_an_image_that_is_all_length_is_refused(vision):
    _, model = vision
    with pytest.raises(ValueError, match="5000 x 2 pixels"):
        model.classify(Image.new("RGB", (5000, 2)))


def test_the_vision_page_has_what_the_model_can_do(app_of, tmp_path):
    kinds = (ConvNextV2FcmaeForPreTraining, ConvNextV2FcmaeForImageClassification)
    for number, classes in enumerate([kinds[:1], kinds[1:], kinds]):
        app = app_of(vision_folder(tmp_path / f"model{number}", *classes))
        blocks = list(app.build_page().blocks.values())
        assert any(isinstance(block, gr.Slider) for block in blocks) == (kinds[0] in classes)
        assert any(isinstance(block, gr.Label) for block in blocks) == (kinds[1] in classes)


def test_examples_are_images_of_the_sample_data_and_never_of_other_data(tmp_path):
    info = json.loads((REPOSITORY / "training/sample_data/emoji/info.json").read_text())
    folder = vision_folder(tmp_path / "encoder", ConvNextV2FcmaeForPreTraining)
    data = {"eval": {"dataset": "emoji", "split": "test", "info": info}}
    space = build_space(write_run(folder, "pretrain_fcmae", data=data), tmp_path / "space")
    files = sorted((space / "examples").iterdir())
    assert [Image.open(file).size for file in files] == [(64, 64)] * 5
    assert sum(file.stat().st_size for file in files) < 50_000
    assert info["attribution"] in (space / "README.md").read_text()
    mine = {"eval": {"dataset": "my/photos", "split": "test"}}
    space = build_space(write_run(folder, "pretrain_fcmae", data=mine), tmp_path / "space")
    assert not (space / "examples").exists()


# Reward models and tokenizers


def test_a_reward_model_compares_two_answers_by_bradley_terry(app_of, tmp_path):
    folder, tokenizer = tmp_path / "reward", tiny_tokenizer()
    config = new_tiny_model(tokenizer).config
    config.num_labels = 1
    LlamaStyleForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    app = app_of(folder)
    model = app.RewardModel(str(folder))
    scores = [model.score(QUESTION, answer) for answer in (ANSWER, "No.")]
    shares, told = model.compare(QUESTION, ANSWER, "No.")
    assert shares["First answer"] == pytest.approx(torch.tensor(scores[0] - scores[1]).sigmoid().item())
    assert f"{scores[0]:+.3f}" in told
    assert model.compare(QUESTION, ANSWER, ANSWER)[0] == {"First answer": 0.5, "Second answer": 0.5}
    with pytest.raises(ValueError, match="two answers"):
        model.score(QUESTION, " ")
    with pytest.raises(ValueError, match=f"at most {CONTEXT}"):
        model.score(QUESTION, "river " * 400)
    assert app.build_page().blocks


def test_a_tokenizer_page_shows_every_token_with_its_id(app_of, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    app = app_of(tmp_path / "tokenizer")
    pieces, told = app.tokenize(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), "A river flows\n😀")
    ids = tokenizer("A river flows\n😀", add_special_tokens=False)["input_ids"]
    assert [int(number) for _, number in pieces] == ids
    assert "".join(piece for piece, _ in pieces).startswith("A river flows⏎")
    assert told.startswith(f"{len(ids)} tokens for 15 characters")
    assert "at most 10,000" in app.tokenize(tokenizer, "a" * 20_000)[1]
    assert app.build_page().blocks


# The Space's files


def test_a_space_names_its_model_and_what_it_runs_on(chat_folder, tmp_path):
    space = build_space(chat_folder, tmp_path / "new" / "space", "me/chat")
    readme = (space / "README.md").read_text()
    header = yaml.safe_load(readme.split("---\n")[1])
    assert header["models"] == ["me/chat"]
    assert (header["sdk"], header["sdk_version"], header["app_file"]) == ("gradio", gr.__version__, "app.py")
    assert json.loads((space / "space.json").read_text())["model"] == "me/chat"
    assert "5.87 M parameters" in readme
    assert "https://huggingface.co/me/chat" in readme
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "app.py", "requirements.txt", "space.json"]
    for file in space.iterdir():
        assert str(chat_folder) not in file.read_text()
    assert sorted(path.name for path in space.parent.iterdir()) == ["space"]


def test_the_apps_import_nothing_of_ours():
    allowed = sys.stdlib_module_names | {"gradio", "torch", "transformers", "peft", "PIL"}
    for app in (REPOSITORY / "hub_cards/space").glob("*_app.py"):
        for node in ast.walk(ast.parse(app.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed


def test_a_space_asks_for_the_releases_that_we_do(chat_folder, tmp_path):
    from hub_cards.space.space_folder import REQUIREMENTS

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ours = set(project["dependencies"]).union(*project["optional-dependencies"].values())
    assert set(REQUIREMENTS.values()) <= ours
    space = build_space(chat_folder, tmp_path / "space")
    assert (space / "requirements.txt").read_text().split() == [REQUIREMENTS["torch"], REQUIREMENTS["transformers"]]


def test_an_earlier_space_is_replaced_and_other_files_are_left(chat_folder, tmp_path):
    space = build_space(chat_folder, tmp_path / "space", "me/first")
    build_space(chat_folder, space, "me/second")
    assert json.loads((space / "space.json").read_text())["model"] == "me/second"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        build_space(chat_folder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def write_folder(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "give a finished run folder"),
        ({"run": {"task": "sft", "status": "running"}}, "not finished"),
        ({"run": {"task": "r1", "status": "finished"}}, "folder of one of them"),
        ({"config": {"architectures": ["BertForMaskedLM"]}}, "BertForMaskedLM, for which there is no page"),
        ({"config": {"architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}}, "no page"),
        ({"adapter_config": {"task_type": None}}, "merged"),
        ({"adapter_config": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "."}}, "merge it"),
    ],
)
def test_a_folder_without_a_page_is_refused_in_a_sentence(tmp_path, files, sentence):
    folder = write_folder(tmp_path / "folder", **files)
    with pytest.raises(ValueError, match=sentence):
        build_space(folder, tmp_path / "space", "me/model")
    assert not (tmp_path / "space").exists()


def test_an_encoder_without_decoder_and_classifier_is_refused(tmp_path):
    folder = vision_folder(tmp_path / "encoder", ConvNextV2FcmaeModel)
    with pytest.raises(ValueError, match="ConvNextV2FcmaeModel, for which there is no page"):
        build_space(folder, tmp_path / "space")


def test_the_command_writes_a_space_and_refuses_in_a_sentence(chat_folder, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["space", *map(str, words)])
        command.main()

    run(chat_folder, "--output_dir", tmp_path / "space", "--repo_id", "me/chat")
    assert (tmp_path / "space" / "app.py").is_file()
    for words, sentence in [
        (["nowhere/at/all"], "There is no folder nowhere/at/all"),
        ([chat_folder, "--repo_id", "me/chat"], "give --output_dir too"),
        ([chat_folder, "--port", "99999999"], "--port 99999999 cannot be used"),
    ]:
        with pytest.raises(SystemExit):
            run(*words)
        assert sentence in capsys.readouterr().err
