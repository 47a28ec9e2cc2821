"""The LoRA paper's file formats: writes formatted and encoded JSONL, reads predicted token ids and references.

Hu et al. 2021 trained GPT-2 on E2E, DART and WebNLG with files in these formats; the functions write the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict, TypeVar

from ..data.lines import do_not_match, is_text, read_lines, shown
from ..errors import DataError, list_faults
from .published import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "Decoded",
    "EncodedRow",
    "PredictedIds",
    "decode_predictions",
    "encode_rows",
    "format_encoded",
    "format_rows",
    "load_bpe",
    "read_formatted",
    "read_predictions",
]

_END: Final = "<|endoftext|>"

Record = TypeVar("Record")


class EncodedRow(TypedDict):
    """One row as token ids."""

    context: list[int]
    completion: list[int]


class PredictedIds(NamedTuple):
    """The token ids that a model generated for one row of the input file."""

    id: int
    predict: list[int]


def format_rows(rows: Iterable[Row]) -> str:
    r"""Writes rows as JSONL: ``context``, ``completion``, and for WebNLG ``cate`` (whether its category was seen).

    >>> format_rows([Row("name : Café", "It is a café.")])
    '{"context": "name : Caf\\u00e9", "completion": "It is a caf\\u00e9."}\n'
    """
    lines = []
    for row in rows:
        record: dict[str, Any] = {"context": row.context, "completion": row.completion}
        if row.seen is not None:
            record["cate"] = row.seen
        lines.append(json.dumps(record))
    return "".join(f"{line}\n" for line in lines)


def read_formatted(path: str | Path) -> list[Row]:
    """Reads a file that `format_rows` wrote.

    Raises:
        DataError: the file cannot be read, or lines have another form; all such lines are listed.
    """

    def parse(record: Any) -> Row:
        row = Row(record["context"], record["completion"], record.get("cate"))
        if not (is_text(row.context) and is_text(row.completion)):
            raise TypeError
        return row

    form = '{"context": text, "completion": text}'
    return _read_records(path, parse, form, "Make the file with `loralib data convert`.")


def load_bpe(directory: str | Path) -> Tokenizer:
    """Loads GPT-2's byte-pair encoding from its two files, without special tokens: all text is encoded as plain text.

    Args:
        directory: holds vocab.json and merges.txt (or encoder.json and vocab.bpe, as Microsoft names them).

    Raises:
        DataError: the files are missing, or are not a byte-level vocabulary with an end token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = Path(directory)
    pairs = [(directory / v, directory / m) for v, m in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))]
    pair = next(((vocab, merges) for vocab, merges in pairs if vocab.is_file() and merges.is_file()), None)
    if pair is None:
        raise DataError(
            f"{directory} has neither vocab.json and merges.txt nor encoder.json and vocab.bpe. Give the directory "
            "with GPT-2's vocabulary, for instance a copy of gpt2 from the hub."
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, pair)))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{pair[0]} and {pair[1]} are not a BPE vocabulary: {error}. Download them again.") from None
    if tokenizer.token_to_id(_END) is None:
        raise DataError(f"{pair[0]} has no token {_END!r}, so it is not GPT-2's vocabulary. Choose another directory.")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode_rows(
    rows: Sequence[Row], bpe: Tokenizer, *, add_bos: bool = False, add_eos: bool = False
) -> list[EncodedRow]:
    """Encodes rows as the paper did.

    Args:
        rows: the rows to encode.
        bpe: from `load_bpe`.
        add_bos: end the context with the end-of-text token, which tells the model to start writing.
        add_eos: end the completion with the end-of-text token.

    Returns:
        The token ids of each row; a completion begins with a space.
    """
    end = bpe.token_to_id(_END) or 0  # load_bpe has checked that it exists
    contexts = bpe.encode_batch([row.context for row in rows])
    completions = bpe.encode_batch([f" {row.completion}" for row in rows])
    return [
        {"context": context.ids + [end] * add_bos, "completion": completion.ids + [end] * add_eos}
        for context, completion in zip(contexts, completions, strict=True)
    ]


def format_encoded(rows: Iterable[EncodedRow]) -> str:
    """Writes rows of ids as JSONL with ``context`` and ``completion``."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@dataclass(frozen=True)
class Decoded:
    """Predictions and their references, one entry per distinct context; the properties return contents of files."""

    predictions: list[str]
    references: list[list[str]]

    @property
    def prediction_file(self) -> str:
        """One prediction per line (a prediction with a line break takes two lines, as in the paper's files)."""
        return "".join(f"{text}\n" for text in self.predictions)

    @property
    def reference_file(self) -> str:
        """E2E's layout: one reference per line, and a blank line after the references of each context."""
        return "".join("".join(f"{text}\n" for text in texts) + "\n" for texts in self.references)

    def reference_columns(self, count: int) -> list[str]:
        """The layout of DART and WebNLG: ``count`` files (reference0, ...) with one line per context.

        A context with fewer references repeats its first one.

        >>> Decoded(["-", "-"], [["a", "b"], ["c"]]).reference_columns(2)
        ['a\\nc\\n', 'b\\nc\\n']
        """
        return [
            "".join(f"{texts[column] if column < len(texts) else texts[0]}\n" for texts in self.references)
            for column in range(count)
        ]


def read_predictions(path: str | Path) -> list[PredictedIds]:
    """Reads the token ids that a beam search wrote: JSONL with ``id`` and ``predict``.

    Raises:
        DataError: the file cannot be read, or lines have another form; all such lines are listed.
    """

    def parse(record: Any) -> PredictedIds:
        ids = record["predict"]
        if type(record["id"]) is not int or not all(type(token) is int and token >= 0 for token in ids):
            raise TypeError
        return PredictedIds(record["id"], list(ids))

    return _read_records(path, parse, '{"id": number, "predict": [numbers]}', "Make it with a beam search.")


def decode_predictions(
    rows: Sequence[Row],
    predictions: Iterable[PredictedIds],
    bpe: Tokenizer,
    *,
    tokenize: bool = False,
    lower: bool = False,
    filter: str = "all",
) -> Decoded:
    """Decodes predicted token ids, and collects the references of each context.

    A text ends at the end-of-text token or a blank line; contexts are in order of first appearance.

    Args:
        rows: the formatted input that was decoded.
        predictions: in any order; ``id`` is a row's index, and the last prediction for a context counts.
        bpe: from `load_bpe`.
        tokenize: split at every character other than letters, digits and underscores.
        lower: convert to lower case.
        filter: "all", or only the rows of WebNLG's "seen" or "unseen" categories.

    Raises:
        DataError: an id is not in the input, a context has no prediction, or rows to be filtered have no ``cate``.
    """
    if filter != "all" and any(row.seen is None for row in rows):
        raise DataError(f"filter {filter!r} needs rows with 'cate', which only WebNLG's have. Use filter 'all'.")
    references: dict[str, list[str]] = {}
    for row in rows:
        if filter == "all" or row.seen == (filter == "seen"):
            references.setdefault(row.context, []).append(row.completion)
    ids: dict[str, list[int]] = {}
    faults = []
    for prediction in predictions:
        unknown = [token for token in prediction.predict if token >= bpe.get_vocab_size()]
        if not 0 <= prediction.id < len(rows):
            faults.append(f"id {prediction.id}: the input only has rows 0 to {len(rows) - 1}")
        elif unknown:
            faults.append(f"id {prediction.id}: token {unknown[0]} in a vocabulary of {bpe.get_vocab_size()}")
        else:
            ids[rows[prediction.id].context] = prediction.predict
    if faults:
        fix = "Give the input file and the vocabulary that were used for decoding."
        raise DataError(list_faults("predictions do not belong to this input", faults, fix))
    missing = [shown(context) for context in references if context not in ids]
    if missing:
        raise DataError(list_faults("no prediction for these contexts", missing, "Decode the whole input file."))

    def clean(text: str) -> str:
        text = text.split(_END)[0].split("\n\n")[0].strip()
        text = text.lower() if lower else text
        return " ".join(" ".join(re.split(r"(\W)", text)).split()) if tokenize else text

    texts = bpe.decode_batch([ids[context] for context in references], skip_special_tokens=False)
    return Decoded([clean(text) for text in texts], [[clean(text) for text in group] for group in references.values()])


def _read_records(path: str | Path, parse: Callable[[Any], Record], form: str, fix: str) -> list[Record]:
    records, faults = [], []
    for number, line in enumerate(read_lines(path), 1):
        try:
            records.append(parse(json.loads(line)))
        except (KeyError, RecursionError, TypeError, ValueError):
            faults.append(f"{path}:{number}: {shown(line)}")
    if faults:
        heading = f"expected {form} on each line, but {do_not_match(len(faults))}"
        raise DataError(list_faults(heading, faults, fix))
    return records
