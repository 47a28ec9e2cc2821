"""The LoRA paper's data files, byte for byte: what Microsoft's converters, encoder and decoder wrote."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pytest

from loralib.cli import data as command

pytestmark = pytest.mark.golden


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def dataset_of(name: str) -> str:
    return next(dataset for dataset in ("e2e", "dart", "webnlg") if dataset in name)


def test_converted_files_are_the_same(golden_dir: Path, tmp_path: Path) -> None:
    folder = golden_dir / "convert"
    expected = json.loads((folder / "full_output_sha256.json").read_text(encoding="utf-8"))
    assert expected
    for name, wanted in expected.items():
        output = tmp_path / name
        ids = ["--vocab", golden_dir / "gpt2_bpe", "--add_bos", "--add_eos"] if "encoded" in name else []
        run("convert", golden_dir / wanted["source"], output, "--format", dataset_of(name), *ids)
        raw = output.read_bytes()
        first = folder / "edge" / name.removeprefix("edge_") if name.startswith("edge_") else folder / name
        if first.exists():  # the first rows, which show where the two part
            rows = first.read_text(encoding="utf-8").split("\n")[:-1]
            assert raw.decode("utf-8").split("\n")[: len(rows)] == rows, name
        assert raw.count(b"\n") == wanted["rows"], name
        assert hashlib.sha256(raw).hexdigest() == wanted["sha256"], name


def test_formatted_files_encode_like_published_ones(golden_dir: Path, tmp_path: Path) -> None:
    folder = golden_dir / "convert"
    for formatted in sorted(folder.rglob("*_formatted.jsonl")):
        encoded = formatted.with_name(formatted.name.replace("formatted", "encoded"))
        if formatted.parent.name.startswith("decode") or not encoded.exists():
            continue
        output = tmp_path / "out.jsonl"
        run("convert", formatted, output, "--vocab", golden_dir / "gpt2_bpe", "--add_bos", "--add_eos")
        assert output.read_text(encoding="utf-8") == encoded.read_text(encoding="utf-8"), formatted


def test_decoded_files_are_the_same(golden_dir: Path, tmp_path: Path) -> None:
    folders = sorted((golden_dir / "convert").glob("decode_*"))
    assert folders
    for folder in folders:
        arguments = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
        references = folder / ("references" if (folder / "references").is_dir() else "refs.txt")
        out = tmp_path / folder.name
        run(
            *("decode", "--vocab", golden_dir / "gpt2_bpe"),
            *("--sample_file", folder / "samples.jsonl", "--input_file", folder / "input_formatted.jsonl"),
            *("--output_pred_file", out / "preds.txt", "--output_ref_file", out / references.name),
            *arguments,
        )
        assert (out / "preds.txt").read_bytes() == (folder / "preds.txt").read_bytes(), folder.name
        files = sorted(references.iterdir()) if references.is_dir() else [references]
        for file in files:
            assert (out / file.relative_to(folder)).read_bytes() == file.read_bytes(), file
        written = (out / references.name).iterdir() if references.is_dir() else [out / references.name]
        assert sorted(path.name for path in written) == [path.name for path in files]
