"""Whether two formulas are equal, by math-verify and sympy, asked of a process that neither runs code nor lasts.

What a model writes may cost without end (`9^{9^{9}}`) or be meant to be run. So, in this order:
- only short text goes on, of the characters of formulas and with no word in it (`is_formula`): of words, which would be
  read as products of letters, "cat" and "tac" are equal;
- it is read by math-verify's grammar of LaTeX alone. Its other reader, of plain expressions, gives digits and
  operators to sympy's `parse_expr`, which evaluates text as Python; the grammar itself gives it every number.
  Here a reader of numbers and names stands in its place;
- that happens in a process of its own, whose memory, processor time, files and wall-clock time are bounded, and in
  which an audit hook refuses to compile or execute text, to start programs and to change files, whatever a library
  might try. One that dies is started again for the next question.
Equality is math-verify's: numbers are compared to 6 decimals, and `50\\%` equals both 0.5 and 50.
"""

import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

MAX_CHARACTERS = 300
MAX_DIGITS = 60  # of one number
MAX_DEPTH = 8  # of brackets: the grammar takes twice as long for each
MEMORY = 2**30  # bytes of address space; sympy takes 300 MB of it
START_SECONDS = 60

FORMULA = re.compile(r"[A-Za-z0-9\s+\-*/^()\[\]{}|=<>.,:;!%\\_&$]+")
WORD = re.compile(r"[A-Za-z]{3}")
COMMAND = re.compile(r"\\text\{[^{}]*\}|\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+")
LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
# As people type them; LaTeX would read `x**10` not at all, and `sin` as three letters.
PLAIN = {"−": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "}
POWER = re.compile(r"\*\*\s*(-?\d+)?")
FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|exp|log|ln|pi)(?![A-Za-z])")
# What an expected answer has besides letters: without, it is a name or a choice.
MATHEMATICAL = re.compile(r"[\d+\-*/^=<>\\]")
ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")


def is_formula(text: str) -> bool:
    """Whether the text is one to compare as mathematics: short, of LaTeX and arithmetic, without words."""
    text = _in_latex(text)
    return (
        0 < len(text) <= MAX_CHARACTERS
        and FORMULA.fullmatch(text) is not None
        and WORD.search(COMMAND.sub(" ", text)) is None
        and "__" not in text
        and LONG_NUMBER.search(text) is None
        and _depth(text) is not None
    )


# A model that is trained gives the same answer again and again: what takes all of its time is to do so once.
@functools.lru_cache(maxsize=10_000)
def symbolically_equal(given: str, expected: str, timeout: float = 2.0) -> bool:
    """Whether `given`, which a model wrote, is the same formula as `expected`; False where that is not found out.

    Args:
        timeout: seconds for the answer, besides the second in which the first question starts the process.

    Raises ImportError without math-verify, RuntimeError where its process does not start.
    """
    if not (is_formula(given) and is_formula(expected)):
        return False
    given, expected = _in_latex(given), _in_latex(expected)
    if MATHEMATICAL.search(expected) is None:
        return False
    return given == expected or _worker.ask(given, expected, timeout)


def _in_latex(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        return text
    for plain, latex in PLAIN.items():
        text = text.replace(plain, latex)
    text = re.sub(r"^\s*(?:\$+|\\[(\[])|(?:\$+|\\[)\]])\s*$", "", text).strip()
    text = POWER.sub(lambda power: f"^{{{power[1]}}}" if power[1] else "^", text)
    return FUNCTION.sub(r"\\\1 ", ROOT.sub(r"\\sqrt{\1}", text))


def _depth(text: str) -> int | None:
    """How deep the brackets are nested; None where that is too deep, or the braces do not match."""
    deepest = depth = braces = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        braces += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
        if braces < 0:
            return None
    return deepest if braces == 0 and deepest <= MAX_DEPTH else None


class _Worker:
    """The process that compares, started at the first question and again after its end."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, given: str, expected: str, timeout: float) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            question = json.dumps([given, expected, timeout]).encode() + b"\n"
            try:
                self._process.stdin.write(question)
                answer = self._read(timeout)
            except BrokenPipeError:
                answer = b""
            if answer not in (b"0", b"1"):
                self._end()
            return answer == b"1"

    def _start(self) -> None:
        if find_spec("math_verify") is None:
            raise ImportError("Symbolic answers need math-verify: pip install 'hf_models[train]'.")
        self._process = subprocess.Popen(
            # -P: beside this file lie modules whose names others have, too.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self._read(START_SECONDS) != b"r":
            self._end()
            raise RuntimeError(f"The process that compares formulas does not start: run `{sys.executable} {__file__}`.")

    def _read(self, seconds: float) -> bytes:
        """One byte; empty at the end of the time or of the process."""
        ready = select.poll()  # `select.select` fails in a process of many open files
        ready.register(self._process.stdout, select.POLLIN)
        return self._process.stdout.read(1) if ready.poll(seconds * 1000) else b""

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None


_worker = _Worker()


# Modules that execute text which they make of counts and of field names, never of what is compared.
CODE_WRITERS = {"collections", "dataclasses", "sympy.polys.monomials"}

# ---- in the process --------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Reads questions, one JSON line each, and answers each with one byte."""
    import logging
    import resource

    import sympy.parsing.sympy_parser

    # Before math-verify, which keeps the one that it finds. `sympy.sympify` of a text comes here, too.
    sympy.parsing.parse_expr = sympy.parsing.sympy_parser.parse_expr = _read_literal
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    latex = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]

    def read(text: str) -> list:
        # In a box, so that all of the text is the answer, and none is searched for in it.
        text = text if text.startswith(r"\boxed{") else rf"\boxed{{{text}}}"
        return parse(text, latex, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)

    answers.write(b"r")
    for line in questions:
        given, expected, timeout = json.loads(line)
        limit = int(time.process_time() + timeout) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            equal = verify(read(expected), read(given), timeout_seconds=None)
        except Exception:
            equal = False
        answers.write(b"1" if equal else b"0")


def _read_literal(text: str, *args, **kwargs):
    """A number or a name (sympy's own modules ask for those), without evaluation; ValueError for any other text."""
    import sympy

    if re.fullmatch(r"[-+]?\d+(?:/\d+)?", text):
        return sympy.Rational(text)
    if re.fullmatch(r"[-+]?\d*\.\d+|[-+]?\d+\.", text):
        return sympy.Float(text)
    if text.isidentifier():
        return sympy.Symbol(text)
    raise ValueError(f"{text!r} is no number.")


def _refuse(event: str, arguments: tuple) -> None:
    """An audit hook. Modules are executed, as an import does, and what `CODE_WRITERS` write; other text is not."""
    if event in ("compile", "exec"):
        name = str(arguments[1] if event == "compile" else arguments[0].co_filename)
        refused = not name.startswith(("/", "<frozen ")) and sys._getframe(1).f_globals["__name__"] not in CODE_WRITERS
    elif event == "open":
        refused = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    else:
        refused = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.")) and event not in (
            "os.listdir",
            "os.scandir",
        )
    if refused:
        raise PermissionError(event)


if __name__ == "__main__":
    _serve()
