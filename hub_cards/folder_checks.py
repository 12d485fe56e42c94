"""What may go to the Hub: which files of a run folder are published, and what in them forbids it.

Nothing is opened here but headers and text, and no code of the folder's runs; `stranger.py` does that, afterwards.
Every problem is one sentence that begins with the file and, in text, the line.
"""

import ast
import json
import os
import pickletools
import re
import socket
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

# What training leaves in a folder for itself, by the pattern of its place, and why it stays here.
LEFT_OUT = {
    "checkpoint-*/": "for resuming",
    "checkpoint_partial/": "an unfinished checkpoint",
    "adapter_initial/": "the adapter's beginning",
    "completions/": "what was sampled in training; the card shows some",
    "evaluations/": "the card shows them",
    "reconstructions/": "the card shows the last one",
    "runs/": "TensorBoard's log",
    ".cache/": "huggingface_hub's own",
    ".git/": "git's own",
    "__pycache__/": "Python's own",
    "*.partial": "an unfinished file",
    ".DS_Store": "the file manager's own",
    ".gitignore": "git's own",
}
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".onnx_data")
TEXTS = (".json", ".jsonl", ".py", ".md", ".jinja", ".txt", ".yaml", ".yml", ".toml", ".csv", ".svg", ".html")
PICTURES = {".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".jpeg": b"\xff\xd8", ".gif": b"GIF8", ".webp": b"RIFF"}
TOKENIZER_MODELS = (".model",)  # SentencePiece's
NAMED_TEXTS = ("LICENSE", "LICENCE", "NOTICE", ".gitattributes")
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
# A token may be spelled like a path or a key: of these files only what is this machine's own is looked for.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
OF_AN_OPTIMIZER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "absmax1", "state1", "state2")
STATES = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|trainer_state|training_args)\..+")

# Modules that the code beside the weights may import; the standard library's but for those that open pickles.
ALLOWED_MODULES = {"torch", "transformers", "huggingface_hub"}
PICKLE_MODULES = {"pickle", "_pickle", "marshal", "shelve", "dbm", "copyreg", "runpy"}
# Which run text as code, and so import whatever it says.
RUN_TEXT = {"exec", "eval", "compile", "__import__"}

# Folders that stand at the root of somebody's machine, with something below them.
_ROOTS = (
    "afs|cluster|content|data|dev/shm|efs|export|fsx|gpfs|home|kaggle|lustre|media|mnt|nfs|nvme\\w*|opt|private|project|"
    "projects|raid|root|scratch\\d*|srv|storage|teamspace|tmp|users|Users|var|Volumes|work|workdir|workspace"
)
MACHINE_PATH = re.compile(rf"(?<![\w:/.~<>\-])/(?:{_ROOTS})/[\w.+@\-]+|(?<!\w)[A-Za-z]:\\\w[\w .\-]*\\|file://+\S+")
# Of such a spelling that no text has them by chance: looked for in every file.
TOKENS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,})\b"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Google API key": re.compile(r"\bAIza[0-9A-Za-z_\-]{35}\b"),
    "a JSON web token": re.compile(r"\beyJ[\w\-]{10,}\.eyJ[\w\-]{10,}\.[\w\-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
SECRETS = TOKENS | {
    "an API key": re.compile(r"(?<![\w\-])sk-(?=\S*\d)(?=\S*[A-Z])(?:[a-z]+-)*[A-Za-z0-9_\-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[0-9A-Za-z\-]{10,}"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.\-]*://[^\s/:@\"'<>{}]+:[^\s/:@\"'<>{}]+@"),
    "a value that is called a secret": re.compile(
        r"(?i)[\"']?\b\w*(?:api_?key|secret|passw(?:or)?d|hub_token|auth_token|access_token)[\"']?\s*[:=]\s*"
        r"(?:[\"'][^\"'\s$<{]{8,}[\"']|\w{20,})"
    ),
}
# What documentation puts in the place of a secret.
_PLACEHOLDER = re.compile(r"(?i)your|example|x{4,}|(\w)\1{7,}")
# Keys under which what a model wrote stands: a path there is no place of this machine.
WRITTEN_BY_A_MODEL = {"samples", "example", "examples"}
# Of a file of weights, so much of its beginning is searched: there the metadata is.
HEAD_BYTES = 2**24
_SECRET_VARIABLE = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key)(_|$)")
# A variable's value is looked for in every file if it is long enough not to be met by chance.
SHORTEST_SECRET = 12


class Listing(NamedTuple):
    """Files of a folder by their path in it: those to publish, and those that stay, with the reason."""

    files: list[str]
    left_out: dict[str, str]


def list_files(folder: Path) -> Listing:
    """Which files of `folder` go to the Hub. A folder that stays is one entry, with a slash at its end."""
    files: list[str] = []
    left_out: dict[str, str] = {}

    def walk(directory: Path) -> None:
        for entry in sorted(directory.iterdir()):
            name = entry.relative_to(folder).as_posix()
            is_folder = entry.is_dir() and not entry.is_symlink()
            # A weights file may end in anything that the patterns of folders do.
            reason = next(
                (
                    why
                    for pattern, why in LEFT_OUT.items()
                    if pattern.endswith("/") == is_folder and entry.match(pattern.rstrip("/"))
                ),
                None,
            )
            if reason:
                left_out[name + "/" * is_folder] = reason
            elif is_folder:
                walk(entry)
            else:
                files.append(name)

    walk(folder)
    return Listing(files, left_out)


def problems_of(folder: Path, files: list[str], own: Path) -> Iterator[str]:
    """Why `files` of `folder` may not be published, each a sentence.

    Args:
        own: the run folder as the user names it, whose absolute path is looked for beside the usual ones.
    """
    secrets, places = _own_secrets(), _own_places(own)
    for name in files:
        file = folder / name
        for what in _found(name, secrets, places, TOKENS):
            yield f"{name}: its name holds {what}: rename it."
        problem = _problem_of_kind(file)
        if problem:
            yield f"{name}: {problem}"
        elif file.suffix == ".safetensors":
            yield from _of_safetensors(file, name, secrets, places)
        elif file.suffix in TEXTS or file.name in NAMED_TEXTS:
            yield from _of_text(file, name, secrets, places)
        else:
            for what in _found(_head(file, HEAD_BYTES).decode("latin-1"), secrets, places, TOKENS):
                yield f"{name}: holds {what}: save it without that."
    yield from _of_config(folder, files)
    yield from _of_index(folder, files)


def _problem_of_kind(file: Path) -> str | None:
    if not file.is_file():
        return "is a link to nothing, or no file: remove it."
    if STATES.fullmatch(file.name):
        return "is a state of the training, not of the model: remove it, or keep it in a checkpoint-N folder."
    if file.suffix in PICKLES or _is_pickle(file):
        return "is a pickle, which can run code where it is opened: save weights as safetensors, and remove it."
    if file.suffix in PICTURES:
        with file.open("rb") as opened:
            if not opened.read(8).startswith(PICTURES[file.suffix]):
                return f"is no picture, whatever its name says: restore it as {file.suffix}, or remove it."
        return None
    known = (*WEIGHTS, *TEXTS, *TOKENIZER_MODELS)
    if not file.name.endswith(known) and file.name not in NAMED_TEXTS:
        return "is of no kind that a published model has: move it out of the folder."
    if file.stat().st_size == 0:
        return "is empty: restore it, or remove it."
    if file.suffix == ".gguf" and _head(file, 4) != b"GGUF":
        return "is no GGUF file, whatever its name says: restore it, or remove it."
    return None


def _head(file: Path, size: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(size)


def _is_pickle(file: Path) -> bool:
    head = _head(file, 4)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head == b"PK\x03\x04" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(member.endswith((".pkl", ".pickle")) for member in archive.namelist())
    if file.name.endswith((*TOKENIZER_MODELS, ".onnx")) and file.stat().st_size <= HEAD_BYTES:
        content = file.read_bytes()  # the old protocols have no mark at the beginning: one that can be read to its end
        try:
            *_, (last, _, place) = pickletools.genops(content)
        except Exception:
            return False
        return last.name == "STOP" and place == len(content) - 1
    return False


def _of_safetensors(file: Path, name: str, secrets: dict[str, str], places: list[str]) -> Iterator[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors, metadata = list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        yield f"{name}: cannot be read as safetensors ({error}): save the model again."
        return
    for tensor in tensors:
        if tensor.rsplit(".", 1)[-1] in OF_AN_OPTIMIZER or tensor.startswith(("optimizer.", "state.")):
            yield f"{name}: holds {tensor}, which is a state of an optimizer: save the model alone."
            break
    header = "\n".join((*metadata.keys(), *metadata.values(), *tensors))
    for what in _found(header, secrets, places, SECRETS, MACHINE_PATH):
        yield f"{name}: its header holds {what}: save it without that."


def _of_text(file: Path, name: str, secrets: dict[str, str], places: list[str]) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield f"{name}: is not UTF-8 at byte {error.start}: restore it, or remove it."
        return
    if file.suffix == ".json":
        yield from _of_json(text, file, name, secrets, places)
        return
    vocabulary = file.name in VOCABULARIES
    in_sample = False
    for number, line in enumerate(text.splitlines(), start=1):
        if file.suffix == ".md" and line.startswith("```"):
            in_sample = line.startswith("```text") and not in_sample  # as cards show what a model wrote
        paths = None if vocabulary or in_sample else MACHINE_PATH
        for what in _found(line, secrets, places, TOKENS if vocabulary else SECRETS, paths):
            yield f"{name}, line {number}: holds {what}: remove it."
    if file.suffix == ".py":
        yield from _of_code(text, file, name)


def _of_json(text: str, file: Path, name: str, secrets: dict[str, str], places: list[str]) -> Iterator[str]:
    """Every string as it is meant, whatever escapes spell it, with the line on which it begins."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        yield f"{name}, line {error.lineno}: is no JSON ({error.msg}): restore it."
        return
    vocabulary = file.name in VOCABULARIES
    strings = list(_strings(content))
    whole = "\n".join(string if key is None else f'{key} = "{string}"' for key, string, _ in strings)
    if next(_found(whole, secrets, places, TOKENS if vocabulary else SECRETS, MACHINE_PATH), None) is None:
        return
    lines = text.splitlines()
    told = set()
    for key, string, by_a_model in strings:
        paths = None if vocabulary or by_a_model else MACHINE_PATH
        # A key says what the value is.
        searched = string if key is None else f'{key} = "{string}"'
        for what in _found(searched, secrets, places, TOKENS if vocabulary else SECRETS, paths):
            spelled = (json.dumps(string, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
            found = (i for spelling in spelled for i, line in enumerate(lines, start=1) if spelling in line)
            number = next(found, None)
            problem = f"{name}, line {number}: holds {what}" if number else f"{name}: {key} holds {what}"
            if problem not in told:
                told.add(problem)
                yield f"{problem}: remove it."


def _strings(content: Any, key: str | None = None, by_a_model: bool = False) -> Iterator[tuple[str | None, str, bool]]:
    """Every string of a JSON value with the key it stands under, and whether a model wrote it; keys themselves too."""
    if isinstance(content, dict):
        for name, item in content.items():
            yield None, name, by_a_model
            yield from _strings(item, name, by_a_model or name in WRITTEN_BY_A_MODEL)
    elif isinstance(content, list):
        for item in content:
            yield from _strings(item, key, by_a_model)
    elif isinstance(content, str):
        yield key, content, by_a_model


def _found(
    text: str,
    secrets: dict[str, str],
    places: list[str],
    patterns: dict[str, re.Pattern],
    paths: re.Pattern | None = None,
) -> Iterator[str]:
    """What of a machine or of its user stands in `text`; a secret is named and never shown."""
    for variable, value in secrets.items():
        if value in text:
            yield f"the value of {variable}"
    own = next((place for place in places if re.search(rf"{re.escape(place)}(?![\w\-])", text)), None)
    if own:
        yield f"a path of this machine, {own}"
    elif paths and (found := paths.search(text)):
        yield f"a machine's path, {found[0]}"
    for what, pattern in patterns.items():
        if any(not _PLACEHOLDER.search(found[0]) for found in pattern.finditer(text)):
            yield what


def _own_secrets() -> dict[str, str]:
    """Environment variable (or what else holds it) -> the secret."""
    found = {
        name: value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_SECRET and not os.path.isabs(value)
    }
    token = get_token()
    if token and len(token) >= SHORTEST_SECRET and token not in found.values():
        found["your Hugging Face token"] = token
    return found


def _own_places(own: Path) -> list[str]:
    """This machine's folders, and its name, that no published text names; the longest first."""
    places = {own.resolve(), Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)}
    if own.parent != Path("."):
        places.add(own.resolve().parent)
    # A child of the root, such as /srv, says nothing, and may be a token of a vocabulary.
    spelled = {str(place) for place in places if len(place.parts) > 2}
    host = socket.gethostname()
    # A short or plain name (localhost, pod, 4f2c) is met by chance.
    if len(host) >= 8 and host != "localhost" and re.search(r"[\d.\-]", host):
        spelled.add(host)
    return sorted(spelled - {"/"}, key=len, reverse=True)


def _of_code(text: str, file: Path, name: str) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        yield f"{name}, line {getattr(error, 'lineno', None) or 1}: is no Python ({error}): restore it."
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _of_sibling(node, file, name)
            continue
        if hidden := _hidden_import(node):
            yield f"{name}, line {node.lineno}: {hidden}: do without it."
        for module in _imported(node):
            top = module.split(".")[0]
            if top in PICKLE_MODULES:
                yield f"{name}, line {node.lineno}: imports {module}, which opens pickles: do without it."
            elif top not in ALLOWED_MODULES and top not in sys.stdlib_module_names:
                yield (
                    f"{name}, line {node.lineno}: imports {module}; code beside a model may import torch, "
                    "transformers, huggingface_hub and the standard library only: remove it."
                )


def _of_sibling(node: ast.ImportFrom, file: Path, name: str) -> Iterator[str]:
    """transformers fetches flat siblings that `from .name import` names, and nothing else."""
    if node.level > 1 or not node.module or "." in node.module:
        yield f"{name}, line {node.lineno}: a relative import must read `from .name import`, of a file beside it."
    elif not (file.parent / f"{node.module}.py").is_file():
        yield f"{name}, line {node.lineno}: imports .{node.module}, and there is no {node.module}.py beside it: add it."


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if _called(node) == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
        return [str(node.args[0].value)]
    return []


def _hidden_import(node: ast.AST) -> str | None:
    """What in the code could import a module without naming it, or open a pickle."""
    called = _called(node)
    if called in RUN_TEXT and isinstance(node.func, ast.Name):
        return f"calls {called}, which runs what no one can check"
    if called == "import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        return "imports a module that it does not name"
    if isinstance(node, ast.ImportFrom) and node.module == "importlib":
        return "takes import_module under a name of its own"
    if called == "load" and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch":
        safe = any(word.arg == "weights_only" and getattr(word.value, "value", 0) is True for word in node.keywords)
        return None if safe else "calls torch.load without weights_only=True, which opens pickles"
    return None


def _called(node: ast.AST) -> str | None:
    """The name of the function that `node` calls."""
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def _of_config(folder: Path, files: list[str]) -> Iterator[str]:
    """What the configs name as code beside them is there."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if name not in files:
            continue
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
        except (ValueError, AttributeError):
            continue  # told above
        for auto_class, reference in auto_map.items() if isinstance(auto_map, dict) else ():
            for target in reference if isinstance(reference, list) else [reference]:
                if not isinstance(target, str):
                    continue
                repo, _, local = target.rpartition("--")
                module = f"{local.split('.')[0]}.py"
                if repo:
                    yield f"{name}: {auto_class} is code of another repo, {repo}: copy it beside the weights."
                elif module not in files:
                    yield f"{name}: {auto_class} is in {module}, which is not there: add it, or save the model again."


def _of_index(folder: Path, files: list[str]) -> Iterator[str]:
    for name in files:
        if not name.endswith(".safetensors.index.json"):
            continue
        try:
            shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            yield f"{name}: is no index of shards: save the model again."
            continue
        for shard in sorted(map(str, shards)):
            if shard not in files:
                yield f"{name}: names {shard}, which is not there: the model is incomplete."
