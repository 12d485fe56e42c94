"""Rules for LaTeX: what is cut, and that macros become what TeX would put in their place."""

import itertools

import pytest
from datatrove.data import Document

from training.text_pipeline.latex_rules import LatexRules, Macros, body, remove_comments, take_definitions

PAPER = r"""
\documentclass{article} % the class
\newcommand{\R}{\mathbb{R}}
\newcommand{\norm}[2][2]{\left\lVert #2 \right\rVert_{#1}}
\def\eg{e.g.\xspace}
\title{A title}
\begin{document}
\begin{abstract} Not a section. \end{abstract}
\section{Introduction} \label{sec:intro}
In $\R^n$ we measure $\norm{x}$ and $\norm[1]{\frac{a}{b}}$, \eg in 5\% of cases. % not here
% nor here
\bibliographystyle{plain}
\bibliography{papers}
\appendix
\section{Proof}
It is $x$.
\section*{References}
\begin{thebibliography}{9} \bibitem{a} A. \end{thebibliography}
\end{document}
Notes.
"""
CLEAN = r"""\section{Introduction} \label{sec:intro}
In $\mathbb{R}^n$ we measure $\left\lVert x \right\rVert_{2}$ and $\left\lVert \frac{a}{b} \right\rVert_{1}$, e.g. in 5\% of cases.

\appendix
\section{Proof}
It is $x$."""  # noqa: E501


def run(text):
    stage = LatexRules()
    kept = list(stage.run([Document(text=text, id="0")]))
    return kept[0].text if kept else next(iter(stage.tally.dropped)), stage.tally


def expanded(text):
    text, definitions = take_definitions(text)
    return Macros(definitions, budget=100_000).expand(text)


def test_a_paper():
    text, tally = run(PAPER)
    assert text.split() == CLEAN.split()
    assert tally.counts["macros expanded"] == 4
    assert tally.counts["with \\input"] == 0


def test_a_clean_paper_stays_as_it_is():
    assert run(CLEAN)[0] == CLEAN


def test_a_paper_without_a_section_is_dropped():
    assert run("\\documentclass{article}\\begin{document}Only text.\\end{document}")[0] == "no section"
    assert run("")[0] == "no section"
    assert body("\\newcommand{\\part{}}\\begin{document}\\chapter[short]{Long}") == "\\chapter[short]{Long}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a % b\nc", "a c"),
        ("a%b\n  c", "ac"),
        ("a\n  % b\nc", "a\nc"),
        ("a % b\n\nc", "a \n\nc"),
        ("a % b\n% c\nd", "a d"),
        ("5\\% % b", "5\\% "),
        ("a\\\\% b\nc", "a\\\\c"),
        ("\\verb|%| \\url{http://a/%20b}", None),
        ("\\begin{verbatim}\n% a\n\\end{verbatim}% b", "\\begin{verbatim}\n% a\n\\end{verbatim}"),
        ("a\\begin{comment}\nb\n\\end{comment}c", "ac"),
        ("a\\iffalse b\\fi c", "a c"),
        ("a\\iffalsehood b\\fi c", None),
        ("%", ""),
    ],
)
def test_comments(text, expected):
    assert remove_comments(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\newcommand{\a}{\alpha}$\a x\a$", r"$\alpha x\alpha$"),
        (r"\newcommand\a{b}\a\a{}\a c", r"bbb c"),
        (r"\renewcommand*{\vec}[1]{\mathbf{#1}}$\vec{x}\vec y\vec\beta$", r"$\mathbf{x}\mathbf{y}\mathbf{\beta}$"),
        (r"\newcommand{\pair}[2]{(#1,#2)}\pair{\pair{a}{b}}{c}", r"((a,b),c)"),
        (r"\newcommand{\p}[2][z]{#1-#2}\p{a}\p[{[b]}]{c}", r"z-a{[b]}-c"),
        (r"\def\x#1#2{#2#1}\x ab\x{1}{2}", r"ba21"),
        (r"\newcommand{\d}[1]{\partial#1}\d y", r"\partial y"),
        (r"\newcommand{\y}{y}\alpha\y", r"\alpha y"),
        (r"\DeclareMathOperator*{\argmin}{arg\,min}\argmin_x", r"\operatorname{arg\,min}_x"),
        (r"\newcommand{\a}{\b c}\newcommand{\b}{d}\a", r"d c"),
        (r"\newcommand{\a}{1}\renewcommand{\a}{2}\providecommand{\a}{3}\a", r"2"),
        (r"\newcommand{\ab}{1}\newcommand{\a}{2}\ab\a\abc", r"12\abc"),
        (r"\newcommand{\c}{\{a\}}\c", r"\{a\}"),
        (r"\newcommand{\a}{b}\verb|\a|\a", r"\verb|\a|b"),
    ],
)
def test_macros_are_expanded(text, expected):
    assert expanded(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\def\a#1.{b}\a c.", None),
        (r"\newcommand{\a}{\@b}\a", r"\a"),
        (r"\newcommand{\a}{\ifx b\fi}\a", r"\a"),
        (r"\newcommand{\a}[1]{#2}\a{b}", r"\a{b}"),
        (r"\newcommand{\a}[2]{#1#2}{\a b}", r"{\a b}"),
        (r"\newcommand{\a}{b", None),
        (r"\newcommand{\a}[1]{(#1)}\a{b", r"\a{b"),
    ],
)
def test_what_cannot_be_expanded_stays(text, expected):
    assert expanded(text) == (text if expected is None else expected)


def test_macros_that_name_themselves_end():
    assert expanded(r"\newcommand{\a}{x\a}\a") == r"x\a"
    assert expanded(r"\newcommand{\a}{x\b}\newcommand{\b}{y\a}\a") == r"xy\a"
    names = ["\\" + "".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    chain = "".join(f"\\def{name}{{{further}}}" for name, further in itertools.pairwise(names))
    assert expanded(chain + names[0]) in names


def test_macros_that_explode_drop_the_paper():
    """Each doubles the one before: 2^25 characters from a few hundred."""
    names = "abcdefghijklmnopqrstuvwxyz"
    doubling = "".join(f"\\def\\{a * 2}{{\\{b * 2}\\{b * 2}}}" for a, b in itertools.pairwise(names))
    assert run(f"{doubling}\\def\\zz{{x}}\\section{{A}}\\aa")[0] == "macros expand without end"


def test_odd_sources_end():
    deep = "\\newcommand{\\b}[1]{(#1)}\\section{A}" + "\\b{" * 5000 + "x" + "}" * 5000
    opened = "\\newcommand{\\b}[1]{(#1)}\\section{A}" + "\\b{" * 5000
    for text in (
        deep,
        opened,
        "\\section{A}\0\ud800",
        "\\begin{verbatim}" * 20_000,
        "\\newcommand{\\a}{" * 300,
        "\\" * 9999,
    ):
        assert run(text)[0]


def test_papers_that_name_further_files_are_counted():
    assert run("\\section{A}\\input{method}")[1].counts["with \\input"] == 1
