"""METEOR 1.5 (Denkowski and Lavie 2014) by its authors' program, the same that COCO's and E2E's scorers run.

The program is Java, under the LGPL 2.1; the jar and the paraphrase table come inside the package pycocoevalcap.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import MissingDependencyError
from .ptb import ptb_instances
from .score import References, Score, check, signature

__all__ = ["meteor"]

_NEEDS = "METEOR needs a Java runtime (8 or newer), and pip install 'loralib[meteor]'"


def meteor(references: References, hypotheses: Sequence[str]) -> Score:
    """METEOR for English, of the whole corpus: words aligned exactly, by stem, by WordNet synset and by paraphrase.

    The value is the score of all hypotheses' summed statistics, not the mean of theirs.

    Args:
        references: for each hypothesis its references; the best counts.
        hypotheses: one text each.

    Returns:
        The score, from 0 to 1, with each hypothesis's own.

    Raises:
        DataError: as `check`.
        MissingDependencyError: there is no Java, or pycocoevalcap is not installed.
    """
    check(references, hypotheses)
    instances = [
        (_field(hypothesis), [_field(text) for text in texts])
        for hypothesis, texts in ptb_instances(references, hypotheses)
    ]
    *scores, value = _run([" ||| ".join([*texts, text]) for text, texts in instances])
    made = signature(references, case="lc", tok="ptb-3.4.1", program="meteor-1.5", args="-l_en_-norm")
    return Score("METEOR", value, made, tuple(scores))


def _field(words: Iterable[str]) -> str:
    return " ".join(words).replace("|||", "")  # which would end a field of the program's input


def _run(questions: Sequence[str]) -> list[float]:
    """Returns the scores of all questions, and last the one of their summed statistics."""
    java, jar = shutil.which("java"), _jar()
    if java is None:
        raise MissingDependencyError(f"{_NEEDS}; there is no program `java` on the PATH.")
    command = [java, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as complaints,  # not a pipe, which could fill up unread
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8", bufsize=1
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def answer() -> str:
            line = stdout.readline()
            if not line:
                complaints.seek(0)
                reason = complaints.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no reason given"]
                raise MissingDependencyError(f"{_NEEDS}; the program stopped: {reason[0]}")
            return line

        def ask(question: str) -> None:
            with contextlib.suppress(OSError):  # the program is gone: then there is no answer either
                stdin.write(f"{question}\n")

        try:
            statistics = []
            for question in questions:
                ask(f"SCORE ||| {question}")
                statistics.append(answer().strip())
            ask(" ||| ".join(["EVAL", *statistics]))
            return [float(answer()) for _ in range(len(questions) + 1)]
        finally:
            process.kill()  # it waits for more input
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                stdin.close()


def _jar() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    for directory in (found.submodule_search_locations or ()) if found else ():
        jar = Path(directory) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise MissingDependencyError(f"{_NEEDS}; the package pycocoevalcap is not installed.")
