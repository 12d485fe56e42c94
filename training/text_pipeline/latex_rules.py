r"""Rules for LaTeX sources of papers, as LLaMA's for arXiv (arXiv 2302.13971, section 2.1, after Minerva, 2206.14858).

Comments, what is before the first section and the bibliography are removed; macros that the authors defined are
expanded where they are used, those with arguments too; mathematics stays. A paper without a section is dropped, and so
is one whose macros expand to many times its length.

Not expanded are macros that TeX must run to know: with `@` or `\if` in their body, with delimited parameters, by `\let`
or `\newenvironment`. The last definition of a name counts for the whole paper. What `\input` names is not read: a paper
of several files is joined before, and `with \input` counts those that are not.
"""

import re
import string
from dataclasses import dataclass

from datatrove.data import Document

from .stage import DocumentStage

# Bounds on what a hostile or broken source costs.
LONGEST_GROUP = 20_000  # characters between braces
MOST_UNCLOSED = 100  # definitions whose braces do not close within that
DEEPEST = 40  # macros in macros, or in arguments
GROWTH = 10  # times the source's length that expansions may write, beside so many characters:
ALWAYS_ALLOWED = 300_000

NAME = r"\\(?:[A-Za-z@]+|[^A-Za-z@\s])"
# In these a % or a macro is text. One that is not closed goes to the end, so that each is searched for once.
VERBATIM = (
    r"\\begin\{(?P<verbatim>verbatim\*?|Verbatim|lstlisting|minted)\}(?s:.*?)(?:\\end\{(?P=verbatim)\}|\Z)"
    r"|\\verb\*?(?P<mark>[^A-Za-z*\s]).*?(?:(?P=mark)|$)"
    r"|\\(?:url|path|href)\s*\{[^{}\n]*\}"
)
COMMENT = re.compile(
    r"(?P<comment>\\begin\{comment\}(?s:.*?)(?:\\end\{comment\}|\Z)"
    r"|\\iffalse(?![A-Za-z])(?s:.*?)(?:\\fi(?![A-Za-z])|\Z)"
    r"|^[ \t]*%.*\n?"  # a line of its own goes with its end
    r"|%.*(?:\n[ \t]*(?=[^ \t\n]))?)"  # as in TeX, the next line goes on where the comment began
    rf"|{VERBATIM}|\\(?s:.)",
    re.MULTILINE,
)
DEFINITION = re.compile(
    rf"""\\(?P<command>newcommand|renewcommand|providecommand|DeclareRobustCommand|DeclareMathOperator)\*?
            \s*(?:\{{\s*(?P<braced>{NAME})\s*\}}|(?P<bare>{NAME}))
            \s*(?:\[(?P<parameters>\d)\]\s*(?:\[(?P<default>[^\[\]]*)\]\s*)?)?(?=\{{)
       | (?:\\long\s*)?\\g?def\s*(?P<defined>{NAME})(?P<marks>(?:\#\d)*)\s*(?=\{{)""",
    re.VERBOSE,
)
MACRO_USE = re.compile(rf"{VERBATIM}|\\(?:[A-Za-z]+|(?s:.))", re.MULTILINE)
LINE_END = re.compile(r"[ \t]*\n")
BRACE = re.compile(r"\\(?s:.)|[{}]")
OPTIONAL_ARGUMENT = re.compile(r"\s*\[((?:[^\[\]{}]|\{[^{}]*\})*)\]")
PARAMETER = re.compile(r"#(\d)")
UNEXPANDABLE = re.compile(r"@|##|\\if|\\futurelet|\\expandafter|\\csname")
SECTION = re.compile(r"\\(?:part|chapter|section)\*?\s*[\[{]")
BIBLIOGRAPHY = re.compile(
    r"(?:\\(?:section|chapter)\*?\s*\{\s*(?:references|bibliography)\s*\}\s*)?"
    r"(?:\\begin\{(?P<name>thebibliography|references)\}(?s:.*?)(?:\\end\{(?P=name)\}|\Z)"
    r"|\\bibliography\s*\{[^{}]*\}|\\printbibliography(?:\[[^\[\]]*\])?)"
    r"|\\bibliographystyle\s*\{[^{}]*\}",
    re.IGNORECASE,
)
INPUT = re.compile(r"\\(?:input|include|subfile)\s*\{")


class LatexRules(DocumentStage):
    """Turns the source of a paper into the text that LLaMA was trained on."""

    name = "latex"

    def process(self, document: Document) -> str | None:
        text, definitions = take_definitions(remove_comments(document.text))
        macros = Macros(definitions, budget=GROWTH * len(text) + ALWAYS_ALLOWED)
        try:
            text = macros.expand(text)
        except BudgetExceeded:
            return "macros expand without end"
        text = body(text)
        if text is None:
            return "no section"
        self.tally.counts["macros expanded"] += macros.uses
        self.tally.counts["with \\input"] += bool(INPUT.search(text))
        document.text = text
        return None


def remove_comments(text: str) -> str:
    r"""Without what TeX does not read: `%` (not `\%`), the `comment` environment, `\iffalse` to `\fi` (not nested)."""
    return COMMENT.sub(lambda found: "" if found["comment"] is not None else found[0], text)


def body(text: str) -> str | None:
    """From the first section on, without the bibliography; an appendix behind it stays. None without a section."""
    begin = text.find("\\begin{document}")
    section = SECTION.search(text, max(begin, 0))
    if section is None:
        return None
    end = text.find("\\end{document}", section.start())
    text = BIBLIOGRAPHY.sub("", text[section.start() : end if end != -1 else None])
    return re.sub(r"\n[ \t]*\n\s*\n", "\n\n", text).strip()


@dataclass
class Macro:
    """`default` is the first parameter's, where that is optional."""

    text: str
    parameters: int
    default: str | None = None


def take_definitions(text: str) -> tuple[str, dict[str, Macro]]:
    """The text without the definitions of macros, and those that can be expanded, by name (`\\R`)."""
    macros: dict[str, Macro] = {}
    parts, end, position, unclosed = [], 0, 0, 0
    while unclosed < MOST_UNCLOSED and (found := DEFINITION.search(text, position)):
        close = closing_brace(text, found.end())
        if close is None:
            position = found.end()
            unclosed += 1
            continue
        name = found["braced"] or found["bare"] or found["defined"]
        if found["command"] != "providecommand" or name not in macros:
            _define(macros, name, found, text[found.end() + 1 : close])
        parts.append(text[end : found.start()])
        position = end = close + 1
        if text.endswith("\n", 0, found.start()) and (rest_of_line := LINE_END.match(text, end)):
            position = end = rest_of_line.end()
    return "".join([*parts, text[end:]]), macros


def _define(macros: dict[str, Macro], name: str, found: re.Match, text: str) -> None:
    macros.pop(name, None)
    marks = PARAMETER.findall(found["marks"] or "")
    parameters = int(found["parameters"] or len(marks))
    if (
        UNEXPANDABLE.search(text)
        or "@" in name
        or marks != [str(number) for number in range(1, len(marks) + 1)]
        or any(not 1 <= int(number) <= parameters for number in PARAMETER.findall(text))
    ):
        return
    if found["command"] == "DeclareMathOperator":
        text = f"\\operatorname{{{text}}}"
    macros[name] = Macro(re.sub(r"\\xspace(?![A-Za-z])", "", text).strip(), parameters, found["default"])


class BudgetExceeded(Exception):
    """Expanding wrote more characters than allowed."""


class Macros:
    """Expands macros where they are used, and counts the uses.

    Args:
        definitions: by name, with its backslash.
        budget: characters that all expansions together may write.
    """

    def __init__(self, definitions: dict[str, Macro], budget: int):
        self.definitions = definitions
        self.budget = budget
        self.uses = 0

    def expand(self, text: str, active: frozenset[str] = frozenset(), depth: int = 0) -> str:
        """The text with its macros expanded; `active` are those that it comes from, which stay, or they never end.

        Raises:
            BudgetExceeded: the expansions grow too long.
        """
        if not self.definitions or depth > DEEPEST:
            return text
        pieces, end, position = [], 0, 0
        while used := MACRO_USE.search(text, position):
            position = used.end()
            macro = self.definitions.get(used[0]) if used[0] not in active else None
            if macro is None:
                continue
            found = read_arguments(text, position, macro)
            if found is None:
                self._spend(LONGEST_GROUP)  # which may have been searched
                continue
            arguments, position = found
            arguments = [self.expand(argument, active, depth + 1) for argument in arguments]
            expansion = _substitute(macro.text, arguments)
            self.uses += 1
            self._spend(len(expansion) + 1)
            pieces += text[end : used.start()], self.expand(expansion, active | {used[0]}, depth + 1)
            end = position
        return _join([*pieces, text[end:]]) if pieces else text

    def _spend(self, characters: int) -> None:
        self.budget -= characters
        if self.budget < 0:
            raise BudgetExceeded


def read_arguments(text: str, position: int, macro: Macro) -> tuple[list[str], int] | None:
    """The arguments of a macro used just before `position`, and where they end; None where they are not all there."""
    if macro.parameters == 0:
        return [], position + 2 * text.startswith("{}", position)
    arguments = []
    if macro.default is not None:
        given = OPTIONAL_ARGUMENT.match(text, position, position + LONGEST_GROUP)
        arguments.append(given[1] if given else macro.default)
        position = given.end() if given else position
    while len(arguments) < macro.parameters:
        while position < len(text) and text[position].isspace():
            position += 1
        if text.startswith("{", position):
            close = closing_brace(text, position)
            if close is None:
                return None
            arguments.append(text[position + 1 : close])
            position = close + 1
        elif position < len(text) and text[position] not in "}$&":
            token = MACRO_USE.match(text, position)
            arguments.append(token[0] if token else text[position])
            position += len(arguments[-1])
        else:
            return None
    return arguments, position


def closing_brace(text: str, opening: int) -> int | None:
    """Where the group that opens at `opening` closes; None where it does not within `LONGEST_GROUP` characters."""
    depth = 0
    for brace in BRACE.finditer(text, opening, opening + LONGEST_GROUP):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return brace.start()
    return None


def _substitute(text: str, arguments: list[str]) -> str:
    parts = PARAMETER.split(text)  # text and parameter numbers in turn
    return _join([arguments[int(part) - 1] if number % 2 else part for number, part in enumerate(parts)])


def _join(parts: list[str]) -> str:
    r"""Joins with a space where `\alpha` and `x` would become another macro."""
    joined: list[str] = []
    for part in filter(None, parts):
        if joined and part[0] in string.ascii_letters and _ends_in_name(joined[-1]):
            joined.append(" ")
        joined.append(part)
    return "".join(joined)


def _ends_in_name(text: str) -> bool:
    before = text.rstrip(string.ascii_letters)
    backslashes = len(before) - len(before.rstrip("\\"))
    return len(before) < len(text) and backslashes % 2 == 1
