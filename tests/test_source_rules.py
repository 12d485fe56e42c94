"""Each kind of source has its own rules."""

import pytest

from training.text_pipeline.code_rules import CodeArguments
from training.text_pipeline.quality_rules import QualityRuleArguments
from training.text_pipeline.source_rules import SourceArguments, source_rules


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("web", ["c4", "gopher_quality", "gopher_repetition"]),
        ("code", ["code_license", "code_quality", "code_headers"]),
        ("latex", ["latex"]),
    ],
)
def test_stages_of_a_kind(kind, stages):
    arguments = SourceArguments(source_kind=kind)
    rules = source_rules(arguments.source_kind, QualityRuleArguments(), CodeArguments())
    assert [stage.name for stage in rules] == stages


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="source_kind is 'books': take web, code, latex"):
        SourceArguments(source_kind="books")
