"""What the documentation says can be typed: modules, fields, recipes, files and links exist. `test_documented_runs.py`
runs the commands.
"""

import importlib.util
import re
from functools import cache

import pytest
from documented_commands import (
    MARKDOWN,
    PACKAGES,
    ROOT,
    code_spans,
    documented_commands,
    expand,
    fields_of,
    markdown_blocks,
    parse,
)

COMMANDS = documented_commands()
# Numbers and choices that a page leaves open.
OPEN_VALUES = {"N": "2", "LAYOUT": "hf_models"}
# Of argparse, TrlParser, launchers and servers; the last is convert's, for GGUF.
OTHERS_OPTIONS = {"help", "config", "config_file", "nproc_per_node", "trust-remote-code", "outtype"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
RECIPES = re.compile(r"[Rr]ecipes?(?: the)? ((?:`[\w{},…]+`(?:, (?:and )?| and (?:the )?)?)+)")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.module], ids=lambda c: c.text)
def test_its_module_takes_its_arguments(command):
    if command.module == "training.NAME":
        return
    assert importlib.util.find_spec(command.module), f"{command.place} names {command.module}, which there is not"
    arguments = [OPEN_VALUES.get(word, word) for word in command.arguments]
    if arguments[-1:] == ["--config"]:  # of a recipe that a docstring leaves open
        del arguments[-1]
    try:
        parse(command.module, arguments)
    except ValueError as error:
        pytest.fail(f"{command.place}: {command.text}: {error}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=lambda c: c.text)
def test_make_has_its_targets(command):
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(command.words[1:]) <= {target for rule in rules for target in rule.split()}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--config_file" in c.words], ids=lambda c: c.text)
def test_its_launcher_has_its_configuration(command):
    assert (ROOT / command.words[command.words.index("--config_file") + 1]).is_file()


@cache
def known_fields():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if "\ndef main()" in file.read_text(encoding="utf-8")
    ]
    return set().union(*map(fields_of, modules))


def spans_of_ours(file):
    """The code spans of a page, without the first column of the migration page's tables: others' settings."""
    if file.name != "migration.md":
        return code_spans(file)
    kept = re.sub(r"^\|[^|]*\|", "|", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.findall(r"`([^`]+)`", kept)


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_fields_that_are_named_alone_exist(file):
    named = {re.match(r"--([\w-]+)", span)[1] for span in spans_of_ours(file) if re.match(r"--\w", span)}
    assert named - known_fields() - OTHERS_OPTIONS == set()


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_recipes_that_are_named_exist(file):
    prose = " ".join(file.read_text(encoding="utf-8").split())
    for names in RECIPES.findall(prose):
        for name in re.findall(r"`([^`]+)`", names):
            for recipe in expand(name):
                assert recipe.endswith("_") or list((ROOT / "training/recipes").rglob(f"{recipe}.yaml")), recipe


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_paths_that_are_named_exist(file):
    places = tuple(f"{folder}/" for folder in (*PACKAGES, "benchmarks", "tests", "docs"))
    for span in code_spans(file):
        if span.startswith(places) and not re.search(r"[\s…*]|[A-Z]{3}", span):
            for path in expand(span):
                assert (ROOT / path).exists(), path


def anchor(heading):
    """GitHub's: lower case, without punctuation, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    for link in LINK.findall(file.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name} links to {link}"
        if heading:
            headings = map(anchor, HEADING.findall(target.read_text(encoding="utf-8")))
            assert heading in headings, f"{file.name} links to {link}, a heading that is not there"


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_python_compiles(file):
    for block in markdown_blocks(file):
        if block.language == "python":
            compile(block.text, f"{file.name}: a block of Python", "exec")


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("training.sft", ["--lern_rate", "1"], "Unknown field 'lern_rate'"),
        ("training.sft", ["--max_steps", "many"], "invalid int value"),
        ("training.sft", ["--config", "training/recipes/none.yaml"], "none.yaml"),
        ("hub_cards.build_card", ["one", "two"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_seen(module, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(module, arguments)
