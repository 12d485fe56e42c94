"""Which rules a source goes through: the web, code and papers have each their own (arXiv 2302.13971, section 2.1)."""

from dataclasses import dataclass, field

from .code_rules import CodeArguments, code_rules
from .latex_rules import LatexRules
from .quality_rules import QualityRuleArguments, quality_rules
from .stage import DocumentStage

SOURCE_KINDS = ("web", "code", "latex")


@dataclass
class SourceArguments:
    source_kind: str = field(
        default="web",
        metadata={"help": "What the documents are: web (or any prose), code (a file each) or latex (a paper each)."},
    )

    def __post_init__(self):
        if self.source_kind not in SOURCE_KINDS:
            raise ValueError(f"--source_kind is {self.source_kind!r}: take {', '.join(SOURCE_KINDS)}.")


def source_rules(source_kind: str, quality: QualityRuleArguments, code: CodeArguments) -> list[DocumentStage]:
    """The stages for one of `SOURCE_KINDS`, in their order."""
    if source_kind == "web":
        return quality_rules(quality)
    return code_rules(code) if source_kind == "code" else [LatexRules()]
