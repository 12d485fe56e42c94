"""Formulas: equal ones are found, and no text, however built, runs, lasts, or takes the process that asked with it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from training import symbolic_answer
from training.symbolic_answer import is_formula, symbolically_equal


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("(x+1)^2", "x^2+2x+1"),
        ("x**2", "x^2"),
        ("x^{10}", "x**10"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("sqrt(8)", r"2\sqrt{2}"),
        ("$x = 2y$", "2y"),
        ("3, 2", "2, 3"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("sin(x)", r"\sin x"),
        ("2π", r"2\pi"),
        (r"\boxed{2x}", "x × 2"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}"),
    ],
)
def test_equal_formulas(given, expected):
    assert symbolically_equal(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("x^2", "x^3"),
        ("2, 3", "2"),
        (r"2 \text{ or } 3", "2x"),
        (r"\boxed{1}\boxed{x^2}", "x^2"),
        ("1}+x^2{", "x^2"),
        ("tac-1", "cat-1"),  # words are no products of letters
        ("on", "no"),
        ("", "x^2"),
        ("[1,2)", "(1,2]"),
    ],
)
def test_other_formulas(given, expected):
    assert not symbolically_equal(given, expected)


@pytest.mark.parametrize(
    "text", ["the cat", '__import__("os")', "9" * 61, "x" * 301, "{" * 20 + "}" * 20, "}{", "", "x'"]
)
def test_what_is_no_formula(text):
    assert not is_formula(text)
    assert not symbolically_equal(text, "x^2")


def test_hostile_formulas_end_in_time_and_the_next_question_is_answered():
    hostile = [
        "9^{9^{9}}",
        "9**9**9",
        "99999999!",
        "(x+1)^{99999}",
        "((((((((x))))))))",
        "{" * 8 + "2" + "}" * 8,
        "9" * 10**6,
    ]
    hostile += ["(" * 10**5, r"\sum_{i=1}^{10^{9}} i^{i}", r"\sqrt" * 50, "(1+x)(" * 40]
    for text in hostile:
        begun = time.monotonic()
        symbolically_equal(text, "x^2+7", timeout=0.3)
        assert time.monotonic() - begun < 8, text[:20]  # a start of the process takes its second
    assert symbolically_equal("x+x", "2x")


def test_what_took_all_of_its_time_is_not_tried_again():
    begun = time.monotonic()
    for _ in range(50):
        assert not symbolically_equal("7^{9^{9}}", "x^2+7", timeout=0.3)
    assert time.monotonic() - begun < 8


def test_the_process_may_die_at_any_time():
    assert symbolically_equal("z+z", "2z")
    worker = symbolic_answer._worker._process
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert symbolically_equal("y+y", "2y")
    assert symbolic_answer._worker._process.pid != worker.pid


ATTEMPTS = """
import importlib.util, os, socket, subprocess, sys
import sympy.parsing.sympy_parser
spec = importlib.util.spec_from_file_location("symbolic_answer", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sympy.parsing.sympy_parser.parse_expr = module._read_literal
written = compile("1 + 1", "<string>", "eval")
attempts = {
    "eval": lambda: eval("1 + 1"),
    "exec": lambda: exec("x = 1"),
    "compile": lambda: compile("1", "file.py", "eval"),
    "code": lambda: eval(written),
    "sympify": lambda: sympy.sympify("x + 1"),
    "open": lambda: open("written", "w"),
    "system": lambda: os.system("touch written"),
    "run": lambda: subprocess.run(["touch", "written"]),
    "remove": lambda: os.remove("nothing"),
    "connect": lambda: socket.socket().connect(("127.0.0.1", 9)),
}
sys.addaudithook(module._refuse)
for name, attempt in attempts.items():
    try:
        attempt()
    except (PermissionError, ValueError):
        print(name)
"""


def test_in_the_process_nothing_is_executed_started_or_written(tmp_path):
    command = [sys.executable, "-c", ATTEMPTS, symbolic_answer.__file__]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == re.findall(r'^    "(\w+)":', ATTEMPTS, flags=re.MULTILINE)
    assert not list(tmp_path.iterdir())
