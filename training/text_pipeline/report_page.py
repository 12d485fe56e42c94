"""The pages of a report: `report.html`, one file that asks for no other, and `README.md`, the data set's card.

Both are made from `report.json`; the HTML page also shows the samples of each stage. Those are texts and addresses of
strangers: everything is escaped, no address is a link, and what would steer the page's text is shown as a symbol. The
card shows no sample, for those of early stages may hold personal data.
"""

import math
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCard, DatasetCardData
from markupsafe import Markup, escape

from hub_cards.build_card import cell, in_lines, inline_code, machine, plain
from hub_cards.metadata import HUB_LICENSES
from hub_cards.readable_numbers import count, duration, quantity

from .report_pictures import draw_pictures
from .tally import replace_file

WRITTEN = {"write": "documents/*.parquet", "token_shards": "tokens/*.parquet"}
TEMPLATES = Path(__file__).parent / "templates"
ASSETS = "card_assets"
# What a page is no place for more of; all are in report.json.
MOST_BINS = 40  # a histogram
MOST_HISTOGRAMS = 12  # a stage: the fullest, which are of the most frequent languages
MOST_LANGUAGES = 30
# The upper edges of the Hub's size categories: https://huggingface.co/docs/hub/datasets-cards
SIZE_CATEGORIES = (
    (1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (1e10, "1B<n<10B"), (1e11, "10B<n<100B"), (1e12, "100B<n<1T"),
    (math.inf, "n>1T"),
)  # fmt: skip
# Unicode's characters that overrule the direction of what follows them, and thereby may disguise it.
DIRECTION_CONTROLS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def write_page(file: Path, report: dict[str, Any], samples: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Writes the HTML page; `samples` is stage -> "kept" and "dropped" -> rows of `Tally.samples`."""
    page = environment().get_template("report.html.jinja").render(report, **figures(report), samples=samples)
    replace_file(file, page.encode("utf-8", "replace"))


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Writes `folder/README.md`, and its pictures in `folder/card_assets/`."""
    pictures = draw_pictures(funnel(report), histograms(report), folder / ASSETS)
    text = environment().get_template("dataset_card.md.jinja").render(
        report, **figures(report), pictures={name: f"{ASSETS}/{file}" for name, file in pictures.items()}
    )  # fmt: skip
    card = str(DatasetCard(f"---\n{card_metadata(report).to_yaml()}\n---\n\n{text}")).rstrip("\n") + "\n"
    replace_file(folder / "README.md", card.encode("utf-8", "replace"))


def card_metadata(report: dict[str, Any]) -> DatasetCardData:
    documents, license = report["documents_out"], report["license"]
    known = license in HUB_LICENSES
    kept = sorted(name for name, n in report["languages"].items() if n["kept"])
    return DatasetCardData(
        pretty_name=report["name"],
        # The Hub takes codes of two or three letters, and no other labels.
        language=[name for name in kept if re.fullmatch("[a-z]{2,3}", name)] or None,
        license=license if known else "other",
        license_name=None if known or license == "other" else re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-"),
        size_categories=[next(name for edge, name in SIZE_CATEGORIES if documents < edge)],
        task_categories=["text-generation"],
        tags=["datatrove", "pretraining"],
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": path}]}
            for name, path in zip(("default", "tokens"), data_files(report).values(), strict=False)
        ],
    )


def data_files(report: dict[str, Any]) -> dict[str, str]:
    """The stages that wrote files to load, and the pattern of their names: of documents, of tokens, or of both."""
    stages = {stage["stage"] for stage in report["stages"]}
    return {stage: pattern for stage, pattern in WRITTEN.items() if stage in stages}


def token_counts(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Source -> `documents` and `tokens` of the token shards; empty where none were made."""
    counts = next((stage["counts"] for stage in report["stages"] if stage["stage"] == "plan_mixture"), {})
    sources = [name.removeprefix("tokens: ") for name in counts if name.startswith("tokens: ")]
    return {source: {kind: counts[f"{kind}: {source}"] for kind in ("documents", "tokens")} for source in sources}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What both pages show that is not in the report as it stands."""
    languages = list(report["languages"].items())
    return {
        "funnel": funnel(report),
        "histograms": histograms(report),
        "data_files": data_files(report),
        "token_counts": token_counts(report),
        "shown_languages": languages[:MOST_LANGUAGES],
        "other_languages": languages[MOST_LANGUAGES:],
    }


def funnel(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was left after each stage that changed anything: `stage`, `documents`, `bytes`, the first one's included."""
    passed = [stage for stage in report["stages"] if stage["kind"] == "documents"]
    rows = []
    for i, stage in enumerate(passed):
        changed = stage["dropped"] or stage["bytes_out"] != stage["bytes_in"]
        if i == 0 or i == len(passed) - 1 or changed:
            rows.append({"stage": stage["stage"], "documents": stage["documents_out"], "bytes": stage["bytes_out"]})
    return rows


def histograms(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report's histograms to show: `title`, names of its `series`, and `rows` of `(bin, [documents a series])`."""
    passed = [stage for stage in report["stages"] if stage["kind"] == "documents"]
    # Of pages before they are extracted, the size is that of their HTML.
    texts = next((stage for stage in passed if stage["stage"] == "extract"), passed[0])
    last = next((stage for stage in reversed(passed) if "bytes_out" in stage["histograms"]), passed[-1])
    before, after = (stage["histograms"].get("bytes_out", {}) for stage in (texts, last))
    shown = [histogram("Length of documents, bytes", {f"after {texts['stage']}": before, "at the end": after})]
    for stage in report["stages"]:
        others = {
            name: bins
            for name, bins in stage["histograms"].items()
            if name not in ("bytes_in", "bytes_out") and not name.startswith("languages")
        }
        fullest = sorted(others, key=lambda name: (-sum(others[name].values()), name))[:MOST_HISTOGRAMS]
        for name in fullest:
            title = name if name.startswith(stage["stage"]) else f"{stage['stage']}: {name}"
            shown.append(histogram(title, {"documents": others[name]}))
    return [one for one in shown if one["rows"]]


def histogram(title: str, series: dict[str, dict[str, int]]) -> dict[str, Any]:
    bins = list(dict.fromkeys(name for one in series.values() for name in one))
    numeric = all(re.fullmatch(r"\d+(\.\d+)?", name) for name in bins)
    if numeric:
        bins = with_empty_bins(sorted(bins, key=float))
    left_out = bins[MOST_BINS:]
    return {
        "title": title,
        "series": list(series),
        "numeric": numeric,
        "rows": [(name, [one.get(name, 0) for one in series.values()]) for name in bins[:MOST_BINS]],
        "left_out": sum(one.get(name, 0) for one in series.values() for name in left_out),
    }


def with_empty_bins(edges: list[str]) -> list[str]:
    """The same with the powers of two that nothing fell into; other edges as they are."""
    whole = [int(edge) for edge in edges if edge.isdecimal()]
    if len(whole) < len(edges) or not edges or any(edge & (edge - 1) for edge in whole):
        return edges
    powers = [2**i for i in range(whole[-1].bit_length()) if 2**i >= (whole[0] or 1)]
    return ([str(0)] if whole[0] == 0 else []) + list(map(str, powers))


def visible(text: str) -> str:
    """`text` with a symbol for each character that is none itself or steers others: controls, turns of direction."""
    return "".join(map(_symbol, text)) if not text.isprintable() else text


@cache
def _symbol(character: str) -> str:
    if character in "\n\t":
        return character
    if character < " ":
        return chr(0x2400 + ord(character))  # its picture: ␀ to ␟
    category = unicodedata.category(character)
    return "\ufffd" if category in ("Cc", "Cs") or character in DIRECTION_CONTROLS else character


def setting(value: Any) -> str:
    """An argument as a table shows it: a list's items, a dictionary's entries."""
    if isinstance(value, dict):
        value = [f"{name}: {item}" for name, item in value.items()]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def breakable(name: str) -> Markup:
    """A stage's name that may be broken after its underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


@cache
def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "cell": cell,
        "count": count,
        "duration": duration,
        "in_lines": in_lines,
        "inline_code": inline_code,
        "machine": machine,
        "plain": plain,
        "quantity": quantity,
        "setting": setting,
        "visible": visible,
    }
    environment.globals["share"] = share
    return environment
