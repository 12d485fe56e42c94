"""The stages of one source in their order, and the phases that they run in.

    extract                read, extract, hash_lines; a task for each file, or for some small ones together
    check_reading          stops the run where too much could not be read
    find_duplicate_lines   in all of the input
    filter                 line_dedup, language, quick rules, reference, rules by words, perplexity, pii,
                           decontamination, sign_documents
    find_near_duplicates, cluster_near_duplicates, measure_cutoffs
    write                  near_duplicates, bucket, documents/*.parquet

The filters are in CCNet's order but for one: the reference classifier, which CCNet does not have, comes before what
takes longer and drops less, the rules that look at every word and perplexity. So cut-offs that are measured are
percentiles of the documents that the classifier left.

A phase that has nothing to do is left out: where neither near-duplicates nor cut-offs are asked for, `filter` writes.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from .code_rules import CodeArguments
from .decontamination import Decontaminate, DecontaminationArguments
from .document_files import DocumentReader, DocumentWriter, ParquetDocuments
from .execution import Phase
from .extraction import ExtractionArguments, ExtractText
from .language_id import IdentifyLanguage, LanguageArguments
from .line_dedup import DropDuplicateLines, FindDuplicateLines, HashLines, LineDedupArguments
from .near_duplicates import (
    ClusterNearDuplicates,
    DropNearDuplicates,
    FindNearDuplicates,
    NearDuplicateArguments,
    SignDocuments,
)
from .perplexity import AssignBucket, MeasureCutoffs, PerplexityArguments, ScorePerplexity
from .perplexity_model import find_models, only_language
from .pii import MaskPii, PiiArguments
from .quality_rules import RULES_BY_WORDS, QualityRuleArguments
from .reading import ReadArguments, ReadDocuments, check_bad_share
from .reference_classifier import ReferenceArguments, ScoreReference
from .report import TALLIES
from .source_rules import SourceKindArguments, source_rules
from .stage import DocumentStage, FolderStage, TalliedStep
from .tally import Tally
from .token_files import TokeniseDocuments

CONTAMINATED = "contaminated"  # of the working folder: what `decontamination.found_items` reads
# What the report says of each stage, in the order in which documents pass.
WHAT = {
    "read": "Reads the files; what cannot be read is counted and skipped.",
    "check_reading": "Stops the run where too much could not be read.",
    "extract": "Finds the main text of a page, its title, and the language that it says it is in.",
    "hash_lines": "Hashes every line, for the lines that occur more than once.",
    "write_extracted": "Writes documents for the filters.",
    "find_duplicate_lines": "Finds the lines that occur more than once in the whole input.",
    "read_extracted": "Reads them.",
    "line_dedup": "Drops lines that occurred before, and documents of which too little is left.",
    "language": "Names the language, and drops the others and what is too uncertain.",
    "fineweb": "FineWeb's rules of quality.",
    "c4": "C4's rules, by lines and by documents.",
    "reference": "Drops what a classifier tells from pages that references point to.",
    "gopher_quality": "Gopher's rules of quality.",
    "gopher_repetition": "Gopher's rules of repetition.",
    "code_license": "Drops source code under other licences than those to keep.",
    "code_quality": "Drops minified and generated code, and data that looks like code.",
    "code_headers": "Removes notices of licence and copyright from the head of a file.",
    "latex": "Removes comments, preamble and bibliography of papers, and writes their macros out.",
    "perplexity": "Scores documents by an n-gram model of reference text.",
    "perplexity_cutoffs": "Measures at which perplexities the buckets end.",
    "pii": "Masks e-mail and IP addresses.",
    "decontamination": "Drops what shares n-grams with the evaluation sets.",
    "sign_documents": "Computes the MinHash signatures by which near-duplicates are found.",
    "write_filtered": "Writes documents for the last phase.",
    "find_near_duplicates": "Finds pairs of documents with a part of their signatures in common.",
    "cluster_near_duplicates": "Joins the pairs to groups, of which the first document is kept.",
    "read_filtered": "Reads them.",
    "near_duplicates": "Drops all but one of documents that are nearly the same.",
    "bucket": "Sorts documents into head, middle and tail by their perplexity.",
    "write": "Writes what is left.",
    "tokenise": "Turns documents into tokens.",
    "plan_mixture": "Settles how much each source gives.",
    "token_shards": "Writes the tokens in a random order of documents.",
}


# A dataclass has the fields of its last base first: `--help` lists them in the order of the stages.
@dataclass
class SourceArguments(
    NearDuplicateArguments,
    DecontaminationArguments,
    PiiArguments,
    ReferenceArguments,
    PerplexityArguments,
    CodeArguments,
    QualityRuleArguments,
    LanguageArguments,
    LineDedupArguments,
    ExtractionArguments,
    SourceKindArguments,
    ReadArguments,
):
    """All that decides which documents come out of one source; checks of each part are its own."""

    def __post_init__(self):
        # A recipe says `languages: en` as well as `[en]`; False is what YAML makes of off.
        for item in fields(self):
            value = getattr(self, item.name)
            if str(item.type).startswith("list[") and not (value is None or value is False or isinstance(value, list)):
                setattr(self, item.name, [value])
        for part in reversed(type(self).__mro__[1:]):
            if "__post_init__" in vars(part):
                part.__post_init__(self)
        if self.source_kind != "web" and self.line_dedup != "off":
            raise ValueError(
                f"--source_kind {self.source_kind} with --line_dedup {self.line_dedup} would drop lines that many "
                "files have, such as `}` or `import os`: add --line_dedup off."
            )


def source_phases(arguments: SourceArguments, tasks: list[list[str]], work: Path, documents: Path) -> list[Phase]:
    """The phases that turn the files of `tasks` into `documents/*.parquet`, with what is in between in `work`.

    Cut-offs of perplexity that are measured are written beside `documents`.
    """
    count = len(tasks)
    extracted, filtered, lines = work / "extracted", work / "filtered", work / "lines"
    dedups_lines = arguments.line_dedup != "off"
    extract = [ReadDocuments(tasks, arguments), ExtractText(arguments)]
    if dedups_lines:
        extract.append(HashLines(lines))
    phases = [
        Phase("extract", [*extract, DocumentWriter("write_extracted", extracted)], count),
        Phase("check_reading", [CheckReading(work / TALLIES, arguments.max_bad_share)], 1),
    ]
    filters: list[PipelineStep] = [DocumentReader("read_extracted", extracted)]
    if dedups_lines:
        find = FindDuplicateLines(lines, count, arguments.line_dedup)
        phases.append(Phase("find_duplicate_lines", [find], arguments.line_dedup_partitions))
        filters.append(DropDuplicateLines(lines, arguments.line_dedup_partitions, arguments.min_document_characters))
    filters += document_filters(arguments, work)
    cutoffs = documents.with_name("cutoffs.json")  # stays, for later runs
    writes = [*bucket_stages(arguments, cutoffs), ParquetDocuments(documents)]
    between = global_phases(arguments, count, work, cutoffs)
    if not between:
        return [*phases, Phase("filter", [*filters, *writes], count)]
    if arguments.near_duplicates:
        filters.append(SignDocuments(work / "near_duplicates", arguments.config))
        writes.insert(0, DropNearDuplicates(work / "near_duplicates"))
    filter_phase = Phase("filter", [*filters, DocumentWriter("write_filtered", filtered)], count)
    return [
        *phases,
        filter_phase,
        *between,
        Phase("write", [DocumentReader("read_filtered", filtered), *writes], count),
    ]


class CheckReading(FolderStage):
    """Stops the run, with BadInputError, where in all tasks together too much could not be read."""

    name = "check_reading"

    def __init__(self, tallies: Path, max_bad_share: float):
        super().__init__()
        self.tallies, self.max_bad_share = tallies, max_bad_share

    def work(self, rank: int, world_size: int) -> None:
        files = sorted((self.tallies / ReadDocuments.name).glob("*.json"))
        check_bad_share(map(Tally.load, files), self.max_bad_share)


def document_filters(arguments: SourceArguments, work: Path) -> list[DocumentStage]:
    """The stages that judge a document by itself; the cheap ones first, as far as CCNet's order allows."""
    stages: list[DocumentStage] = []
    if arguments.language_model:
        stages.append(IdentifyLanguage(arguments))
    rules = source_rules(arguments.source_kind, arguments, arguments)
    stages += [rule for rule in rules if rule.name not in RULES_BY_WORDS]
    if arguments.reference_model:
        stages.append(ScoreReference(arguments))
    stages += [rule for rule in rules if rule.name in RULES_BY_WORDS]
    if arguments.perplexity_models:
        stages.append(ScorePerplexity(arguments.perplexity_models, work / "perplexities"))
    if arguments.mask_emails or arguments.mask_ips:
        stages.append(MaskPii(arguments))
    if arguments.decontaminate:
        stages.append(Decontaminate(arguments, work / CONTAMINATED))
    return stages


def global_phases(arguments: SourceArguments, count: int, work: Path, cutoffs: Path) -> list[Phase]:
    """What needs all documents that the filters left, and comes before they are written."""
    phases = []
    if arguments.near_duplicates:
        folder, config = work / "near_duplicates", arguments.config
        phases += [
            Phase("find_near_duplicates", [FindNearDuplicates(folder, config)], config.num_buckets),
            Phase("cluster_near_duplicates", [ClusterNearDuplicates(folder, count, config)], 1),
        ]
    if measures_cutoffs(arguments):
        measure = MeasureCutoffs(work / "perplexities", count, arguments.perplexity_percentiles, cutoffs)
        phases.append(Phase("measure_cutoffs", [measure], 1))
    return phases


def measures_cutoffs(arguments: SourceArguments) -> bool:
    return bool(arguments.perplexity_models) and arguments.given_cutoffs() is None


def bucket_stages(arguments: SourceArguments, cutoffs: Path) -> list[DocumentStage]:
    if not arguments.perplexity_models:
        return []
    default_language = only_language(find_models(arguments.perplexity_models))
    return [AssignBucket(arguments.given_cutoffs() or cutoffs, arguments.keep_buckets, default_language)]


def describe_stages(phases: list[Phase]) -> list[dict[str, str]]:
    """What the report is told of the stages: see `report.WriteReport`."""
    return [
        {
            "stage": step.name,
            "phase": phase.name,
            "kind": "documents" if is_document_stage(step) else "work",
            "what": WHAT.get(step.name, ""),
        }
        for phase in phases
        for step in phase.steps
    ]


def is_document_stage(step: TalliedStep) -> bool:
    """Whether documents pass through it that it can drop: what the report's funnel shows."""
    passes_all = isinstance(step, HashLines | SignDocuments)
    return isinstance(step, DocumentStage | ReadDocuments | ParquetDocuments | TokeniseDocuments) and not passes_all
