"""The tables of the family pages say what the code says."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from hf_models import ConvNextV2FcmaeConfig, LlamaStyleConfig
from hf_models.bpe_tokenizer import SPLIT_PATTERNS, train_bpe
from hf_models.bpe_tokenizer.special_tokens import ADDED_TOKENS
from hf_models.convnextv2_fcmae import checkpoints as convnextv2_checkpoints
from hf_models.convnextv2_fcmae.configuration_convnextv2_fcmae import AUTO_MAP as CONVNEXTV2_AUTO_MAP
from hf_models.convnextv2_fcmae.sizes import SIZES as CONVNEXTV2_SIZES
from hf_models.llama_style import checkpoints as llama_checkpoints
from hf_models.llama_style.configuration_llama_style import AUTO_MAP as LLAMA_AUTO_MAP
from hf_models.llama_style.sizes import SIZES as LLAMA_SIZES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"convnextv2_fcmae": ConvNextV2FcmaeConfig, "llama_style": LlamaStyleConfig}
# Asked for by the Auto class that opens custom code in `transformers serve`; nobody calls it by name.
UNNAMED_AUTO_CLASSES = {"AutoModelForDecision"}


def table(page, first_column):
    """The rows of the table whose header begins with `first_column`, as lists of cells without their code marks."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    body = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    rows = []
    for line in body.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip("|"))
        rows.append([cell.replace("\\|", "|").strip().strip("`") for cell in cells])
    return rows


@pytest.mark.parametrize(("page", "config"), PAGES.items(), ids=PAGES)
def test_fields_and_their_defaults(page, config):
    own = {name for name in config.__annotations__ if not name.startswith("_")}
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name in own}
    assert {name: ast.literal_eval(default) for name, _, default in table(page, "field")} == defaults


@pytest.mark.parametrize(
    ("page", "auto_map"),
    [("convnextv2_fcmae", CONVNEXTV2_AUTO_MAP), ("llama_style", LLAMA_AUTO_MAP)],
)
def test_auto_classes(page, auto_map):
    """With the config's, which the page names in its text."""
    config = auto_map["AutoConfig"].split(".")[-1]
    documented = {auto_class: model for model, auto_class, _ in table(page, "class")} | {"AutoConfig": config}
    expected = {auto: name.split(".")[-1] for auto, name in auto_map.items() if auto not in UNNAMED_AUTO_CLASSES}
    assert {auto.strip("`"): model for auto, model in documented.items()} == expected
    assert f"`{config}`" in (DOCS / f"{page}.md").read_text(encoding="utf-8")


def numbers(cell):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?<!,)", cell)]


def test_sizes_of_convnext():
    """`Size.parameters` is compared with timm's models in test_convnextv2_fcmae.py."""
    documented = {name: rest for name, *rest in table("convnextv2_fcmae", "size")}
    assert documented.keys() == CONVNEXTV2_SIZES.keys()
    for name, (blocks, widths, parameters) in documented.items():
        size = CONVNEXTV2_SIZES[name]
        assert [int(number) for number in blocks.split(", ")] == size.config["depths"]
        assert [int(number) for number in widths.split(", ")] == size.config["hidden_sizes"]
        assert numbers(parameters) == [size.parameters]


def test_sizes_of_the_language_model():
    """`Size.parameters` is compared with models on the meta device in test_llama_style.py."""
    documented = {name: rest for name, *rest in table("llama_style", "size")}
    assert documented.keys() == LLAMA_SIZES.keys()
    for name, (*counts, tied) in documented.items():
        size = LLAMA_SIZES[name]
        config = LlamaStyleConfig(**size.config)
        assert [number for count in counts for number in numbers(count)] == [
            size.parameters,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
            config.max_position_embeddings,
        ]
        assert tied == ("yes" if config.tie_word_embeddings else "no")


def test_layouts():
    """Every layout that a family writes has a row."""
    for page, layouts in (
        ("convnextv2_fcmae", convnextv2_checkpoints.LAYOUTS),
        ("llama_style", llama_checkpoints.ARCHITECTURES),
    ):
        assert set(layouts) <= {row[0] for row in table(page, "layout")}


def test_arguments_of_the_tokenizers_training():
    parameters = inspect.signature(train_bpe).parameters.values()
    expected = {p.name: "" if p.default is p.empty else repr(p.default) for p in parameters}
    assert {name: default for name, _, default in table("bpe_tokenizer", "argument")} == expected


def test_special_tokens_and_their_order():
    documented = [name for name, _ in table("bpe_tokenizer", "token")]
    assert documented == [token.content for token in ADDED_TOKENS]


def test_split_patterns():
    """The most digits that a pattern leaves together, of a number of five."""
    longest = {}
    for name, pattern in SPLIT_PATTERNS.items():
        pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str("12345")
        longest[name] = max(len(piece) for piece, _ in pieces)
    documented = {
        name: {"no limit": 5}.get(digits) or int(digits) for name, digits, _ in table("bpe_tokenizer", "`pattern`")
    }
    assert documented == longest
