"""Downloads the E2E NLG Challenge's data (Novikova et al. 2017) from its authors' repository."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from typing import Final, NamedTuple

from ..data.readers import SEPARATOR
from ..errors import DataError, OutputError, list_faults
from ..files import write_text
from .published import read_e2e_csv

__all__ = ["SOURCE", "fetch_e2e"]

SOURCE: Final = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master"


class _File(NamedTuple):
    name: str
    sha256: str
    size: int
    rows: int


# Sizes, hashes and row counts as recorded for these files by the Hub's `datasets` library (Apache-2.0).
_FILES: Final = {
    "train.txt": _File(
        "trainset.csv", "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6", 9_340_189, 42_061
    ),
    "valid.txt": _File(
        "devset.csv", "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9", 1_161_305, 4_672
    ),
    "test.txt": _File(
        "testset_w_refs.csv", "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd", 1_310_822, 4_693
    ),
}

_NOTICE: Final = """\
train.txt, valid.txt and test.txt hold the E2E NLG Challenge's data in the form `meaning representation||text`.

Source: https://github.com/tuetschek/e2e-dataset (trainset.csv, devset.csv, testset_w_refs.csv)
Authors: Jekaterina Novikova, Ondrej Dusek and Verena Rieser
Licence: Creative Commons Attribution-ShareAlike 4.0, https://creativecommons.org/licenses/by-sa/4.0/
Paper: The E2E Dataset: New Challenges for End-to-End Generation, SIGDIAL 2017, https://arxiv.org/abs/1706.09254
Changed: one line per text, attributes written `name : X | Type : pub | ...`; no text was omitted.
"""


def fetch_e2e(directory: str | Path, *, source: str = SOURCE, overwrite: bool = False) -> list[Path]:
    """Downloads, checks and converts the full E2E data; writes nothing until everything has been checked.

    Args:
        directory: where to write train.txt, valid.txt, test.txt and SOURCE.txt (authors and licence).
        source: a web address or directory with trainset.csv, devset.csv and testset_w_refs.csv.
        overwrite: replace existing files of these names.

    Returns:
        The paths of the data files.

    Raises:
        DataError: a file cannot be downloaded, or its SHA-256 is not the published one.
        OutputError: the directory already has such files, or cannot be written.
    """
    directory = Path(directory)
    existing = [str(directory / name) for name in _FILES if (directory / name).exists()]
    if existing and not overwrite:
        fix = "Choose another directory, or pass --overwrite to replace them."
        raise OutputError(list_faults("these files already exist", existing, fix))
    texts = {}
    for name, file in _FILES.items():
        raw = _fetch(source, file)
        digest = hashlib.sha256(raw).hexdigest()
        if digest != file.sha256:
            raise DataError(
                f"{source}/{file.name} has SHA-256 {digest}, expected {file.sha256}: it was changed or truncated "
                f"({len(raw):,} bytes, expected {file.size:,}). Download it again, or from another source."
            )
        rows = read_e2e_csv(raw.decode("utf-8-sig"), file.name)
        if len(rows) != file.rows:
            raise DataError(f"{file.name} gave {len(rows):,} texts, expected {file.rows:,}. Please report this.")
        texts[name] = "".join(f"{row.context}{SEPARATOR}{' '.join(row.completion.split())}\n" for row in rows)
    for name, text in texts.items():
        write_text(directory / name, text)
    write_text(directory / "SOURCE.txt", _NOTICE)
    return [directory / name for name in texts]


def _fetch(source: str, file: _File) -> bytes:
    by_hand = (
        f"Check the network and its proxy (HTTPS_PROXY), or get {', '.join(f.name for f in _FILES.values())} some "
        "other way and pass their directory as --source."
    )
    if not source.startswith(("https://", "http://")):
        try:
            return (Path(source) / file.name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {Path(source) / file.name}: {error.strerror}. {by_hand}") from None
    try:
        with urllib.request.urlopen(f"{source}/{file.name}", timeout=30) as answer:
            return bytes(answer.read(file.size + 1))  # one extra byte reveals a longer, thus different, file
    except (OSError, ValueError) as error:  # URLError, timeouts and broken connections are OSErrors
        reason = getattr(error, "reason", None) or error
        raise DataError(f"cannot download {source}/{file.name}: {reason}. {by_hand}") from None
