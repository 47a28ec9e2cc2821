"""METEOR 1.5 (Denkowski and Lavie 2014) by its authors' program, which COCO's and E2E's scorers run too.

The program is written in Java, under the LGPL 2.1; the package pycocoevalcap contains its jar and paraphrase table.
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
    """Corpus METEOR for English: words are aligned if they match exactly, by stem, by WordNet synset or by paraphrase.

    The value is computed from the summed statistics of all hypotheses; it is not the mean of their scores.

    Args:
        references: the references of each hypothesis; the best one counts.
        hypotheses: the texts to score.

    Returns:
        The score, from 0 to 1, with that of each hypothesis.

    Raises:
        DataError: as for `check`.
        MissingDependencyError: Java or pycocoevalcap is not installed.
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
    return " ".join(words).replace("|||", "")  # it would end a field of the program's input


def _run(questions: Sequence[str]) -> list[float]:
    """Returns the score of each question, then that of their summed statistics."""
    java, jar = shutil.which("java"), _jar()
    if java is None:
        raise MissingDependencyError(f"{_NEEDS}; there is no program `java` on the PATH.")
    command = [java, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as complaints,  # not a pipe, which could fill up and block the program
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
            with contextlib.suppress(OSError):  # the program has ended: reading the answer fails too
                stdin.write(f"{question}\n")

        try:
            statistics = []
            for question in questions:
                ask(f"SCORE ||| {question}")
                statistics.append(answer().strip())
            ask(" ||| ".join(["EVAL", *statistics]))
            return [float(answer()) for _ in range(len(questions) + 1)]
        finally:
            process.kill()  # it would wait for more input
            with contextlib.suppress(OSError):  # unwritten data can no longer be flushed
                stdin.close()


def _jar() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    for directory in (found.submodule_search_locations or ()) if found else ():
        jar = Path(directory) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise MissingDependencyError(f"{_NEEDS}; the package pycocoevalcap is not installed.")
