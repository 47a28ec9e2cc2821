"""Write text with a base model and, if given, an adapter.

  loralib generate "name : The Tall Fiddler | Type : pub | area : riverside" --adapter lora_model
  loralib generate --input test.txt --adapter lora_model --output texts.jsonl --num_beams 10
  echo "Once upon a time" | loralib generate --temperature 0.8 --top_p 0.9

Prompts come from the command line, from a file (E2E lines, .jsonl, DART or WebNLG) or from standard input, one a line.
With --output, every text is one JSON line; a run that was killed goes on behind the last whole line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..console import progress, say
from ..errors import ConfigError, DataError, OutputError
from . import add_fields, from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prompts, the model, and a flag for every setting of `Sampling`."""
    from ..generate import Sampling

    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to continue; default: standard input")
    parser.add_argument("--input", metavar="FILE", help="a file of prompts; each different prompt is written once")
    parser.add_argument("--format", default="auto", help="of the file: auto, e2e, jsonl, dart or webnlg (default auto)")
    parser.add_argument("--output", metavar="FILE.jsonl", help="where the texts go, one JSON line each")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter to put on the base model")
    parser.add_argument("--model", help="base model (default: the adapter's, else smollm2-135m)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="prompts at once (default 16)")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: bf16 where it is fast)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the fastest there is)")
    add_fields(parser, Sampling)


def run(args: argparse.Namespace) -> None:
    """Writes texts to the terminal, or to a file."""
    from ..generate import Sampling

    if args.batch < 1:
        raise ConfigError(f"--batch is {args.batch}, expected at least 1")
    sampling = from_args(Sampling, args)
    prompts = _prompts(args)
    if args.output is None:
        model, tokenizer = load(args)
        for number, prompt in enumerate(prompts):
            if number:
                say()
            _print(model, tokenizer, prompt, sampling)
        return
    done = _resume(Path(args.output), prompts)
    if done:
        say(f"{args.output} has {done} of {len(prompts)} texts already; going on behind them")
    if done < len(prompts):
        model, tokenizer = load(args)
        _write(model, tokenizer, prompts, done, sampling, args)
    say(f"{len(prompts)} texts in {args.output}")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Loads the base model and puts the adapter on it, as the flags say."""
    from ..adapter import apply_adapter
    from ..base import DEFAULT_BASE, load_base
    from ..formats import read_adapter
    from ..inject import merge

    adapter = read_adapter(args.adapter) if args.adapter else None
    name = args.model or (adapter.config.base_model_name_or_path if adapter else None) or DEFAULT_BASE
    model, tokenizer = load_base(name, dtype=args.dtype, device=args.device)
    if adapter is not None:
        apply_adapter(model, adapter)
        if args.merge:
            merge(model)
    return model.eval(), tokenizer


def _prompts(args: argparse.Namespace) -> list[str]:
    from ..data import group_by_prompt, read_examples

    if args.input is not None:
        if args.prompts:
            raise ConfigError("give prompts or --input FILE, not both")
        return [example.prompt for example in group_by_prompt(read_examples(args.input, args.format))]
    prompts = args.prompts or ([] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines())
    prompts = [_as_trained(prompt) for prompt in prompts if prompt.strip()]
    if not prompts:
        raise DataError("no prompt given: write it behind the command, name --input FILE, or pipe lines in")
    return prompts


def _as_trained(prompt: str) -> str:
    """A meaning representation ends with a line break, as in training; other text is continued as it is."""
    return prompt + "\n" if " : " in prompt and not prompt.endswith("\n") else prompt


def _print(model: Any, tokenizer: Any, prompt: str, sampling: Any) -> None:
    """Prints a continuation as it comes."""
    from ..data import prompt_ids
    from ..generate import stream

    for piece in stream(model, tokenizer, [prompt_ids(prompt, tokenizer)], sampling):
        say(piece.text, end="")
    say()


def _resume(path: Path, prompts: Sequence[str]) -> int:
    """Counts the texts that an earlier run finished; a last line that it left half-written is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    try:
        earlier = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is there and was not written by this command; choose another --output") from error
    if earlier != list(prompts[: len(earlier)]):
        raise OutputError(f"{path} holds texts for other prompts; remove it or choose another --output")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return len(earlier)


def _write(
    model: Any, tokenizer: Any, prompts: Sequence[str], done: int, sampling: Any, args: argparse.Namespace
) -> None:
    from dataclasses import replace

    from ..data import prompt_ids
    from ..generate import generate

    with _append(Path(args.output)) as file, progress(total=len(prompts), description="writing", unit="text") as bar:
        bar.update(done)
        for at in range(done, len(prompts), args.batch):
            part = prompts[at : at + args.batch]
            # Prompt i gets the seed of prompt i, wherever the run was taken up.
            own = replace(sampling, seed=sampling.seed + at)
            for prompt, text in zip(
                part, generate(model, tokenizer, [prompt_ids(p, tokenizer) for p in part], own), strict=True
            ):
                line = {"prompt": prompt, "text": text.text, "finish_reason": text.finish_reason}
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(part))


@contextmanager
def _append(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for appending, with an error that a user understands."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield file
