"""Generate text with a base model and, if given, an adapter.

loralib generate "name : The Tall Fiddler | Type : pub | area : riverside" --adapter lora_model
loralib generate --input test.txt --adapter lora_model --output texts.jsonl --num_beams 10
loralib generate "The harbour" --adapter calm=out/calm --adapter bold=out/bold
loralib generate --input test.jsonl --adapter calm=out/calm --adapter bold=out/bold --adapter_column style
echo "Once upon a time" | loralib generate --temperature 0.8 --top_p 0.9

Prompts come from the command line, from standard input (one per line), or from a file: lines of text, E2E lines with or
without a text after ``||``, or any format that training accepts.  An adapter that was trained on chats gets each prompt
as a user's turn, in its chat template.
Named adapters (NAME=ADAPTER) share one base in memory.  Each prompt is continued with each of them, side by side; or,
with --adapter_column, which names a field of the records in --input, with the adapter that its record names there, and
with the base alone if that field is empty or "base".
With --output, every text becomes a JSON line that records its settings; a run that was killed continues after the last
complete line, provided that prompts and settings are the same.

In --dtype fp32, a seed gives the same samples with any --batch_size; in bf16, rounding depends on the batch size.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..bases import base_of, common_base, load_base, tokenizer_for, trained_on_chats
from ..console import counted, progress, say
from ..data import Example, prompt_ids
from ..data.examples import chat_of
from ..data.lines import is_text, split_lines
from ..data.readers import as_prompt, read_prompts, read_prompts_with
from ..engine.bank import Bank
from ..errors import AdapterError, ConfigError, DataError, LoraError, OutputError, did_you_mean, list_faults
from ..files import append_lines, hold_file, resume_lines
from ..formats import is_read_with_base, locate_adapter, read_adapter
from ..generation import Generation, Sampling, generate, stream
from ..generation.streaming import encode_prompts
from ..generation.text import end_with_turns
from ..training.ranks import Ranks, joined
from ._adapters import add_model_arguments, add_reading, load_on
from ._flags import add_fields, add_flag, from_args

JOINS_RANKS = True
# The files in an adapter's directory that the texts depend on.
_DECISIVE: Final = ("adapter*.*", "chat_template*", "tokenizer*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prompts, the model, and a flag for every setting of `Sampling`."""
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to continue (default: read from standard input)"
    )
    parser.add_argument("--input", metavar="FILE", help="a file of prompts; each distinct prompt is used once")
    add_reading(parser, "format of the file")
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", help="file for the texts, one JSON line per text")
    add_model_arguments(parser, several=True)
    parser.add_argument(
        "--adapter_column", metavar="FIELD", help="field of the records in --input that names each prompt's adapter"
    )
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument("--as_chat", action="store_true", help="format prompts with the chat template, as a user's turn")
    chat.add_argument(
        "--raw", action="store_true", help="continue prompts as they are, even where the adapter was trained on chats"
    )
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    add_flag(
        parser,
        "--batch_size",
        "--batch",
        type=int,
        default=32,
        metavar="N",
        help="prompts to process at once (default 32)",
    )
    add_fields(parser, Sampling)


def run(args: argparse.Namespace) -> None:
    """Prints the texts, or writes them to a file."""
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size is {args.batch_size}, expected at least 1")
    sampling = from_args(Sampling, args)
    _sort_adapters(args)
    if args.merge and args.adapter is None:
        raise ConfigError(
            "--merge takes a single adapter, but several were given: leave out --merge, or give one adapter"
            if args.adapters
            else "--merge needs an adapter to merge: give --adapter DIR"
        )
    with joined() as ranks:
        if args.adapters:
            _run_named(args, sampling, ranks)
            return
        prompts = ranks.on_first_rank(lambda: _as_turns(args, _prompts(args)))
        if args.output is None:
            _print(*_load(args, prompts, ranks), sampling, args.batch_size, ranks)
            return
        with _held(args.output, ranks):
            _write(args, prompts, sampling, ranks)
        say(f"{counted(len(prompts), 'text')} in {args.output}")


@contextlib.contextmanager
def _held(output: str, ranks: Ranks) -> Iterator[None]:
    """Locks the output file on the rank that writes it."""
    with contextlib.ExitStack() as stack:
        ranks.on_first_rank(lambda: stack.enter_context(hold_file(output, "--output")))
        yield


def _load(args: argparse.Namespace, prompts: Sequence[Example], ranks: Ranks) -> tuple[Any, Any, list[list[int]]]:
    """Returns the model, the tokenizer and the prompts' token ids, checked before anything is generated."""
    model, tokenizer = load_on(ranks, args, merged=args.merge)
    if any(prompt.messages for prompt in prompts):
        end_with_turns(model, tokenizer)
    return model, tokenizer, encode_prompts(model, tokenizer, [prompt_ids(prompt, tokenizer) for prompt in prompts])


# Prompts.


def _prompts(args: argparse.Namespace) -> list[Example]:
    if args.columns and args.input is None:
        raise ConfigError("--columns names fields of a file, but no file is given: add --input FILE")
    if args.input is not None:
        if args.prompts:
            raise ConfigError("prompts and --input are both given: leave one of them out")
        return read_prompts(args.input, args.data_format, columns=args.columns)
    if args.prompts:
        faults = [f"prompt {number} is empty" for number, prompt in enumerate(args.prompts, 1) if not prompt.strip()]
        faults += [
            f"prompt {number} is not text in the encoding of this terminal"
            for number, prompt in enumerate(args.prompts, 1)
            if not is_text(prompt)
        ]
        if faults:
            raise DataError(
                list_faults("these prompts cannot be continued", faults, "Give them some text, or leave them out.")
            )
        return [Example.of(as_prompt(prompt), "") for prompt in args.prompts]
    prompts = [Example.of(as_prompt(line), "") for line in _standard_input() if line.strip()]
    if not prompts:
        raise DataError("no prompt given: write one after the command, give --input FILE, or pipe in lines of text")
    return prompts


def _as_turns(args: argparse.Namespace, prompts: list[Example], adapter: str | None = None) -> list[Example]:
    """Wraps each prompt as a user turn of a chat if --as_chat asks for it or the adapter was trained on chats."""
    adapter = adapter or args.adapter
    trained_on = trained_on_chats(adapter) if adapter else None
    if args.raw or not (args.as_chat or trained_on):
        if trained_on:
            say(
                "note: the adapter was trained on chats, but prompts are continued as they are (--raw)", file=sys.stderr
            )
        return prompts
    if not args.as_chat:
        say(
            "The adapter was trained on chats: each prompt is treated as a user's turn (--raw turns this off)",
            file=sys.stderr,
        )
    return [prompt if prompt.messages else chat_of(prompt) for prompt in prompts]


# Named adapters.


def _sort_adapters(args: argparse.Namespace) -> None:
    """Sets `args.adapters` to the named adapters, and `args.adapter` to the unnamed one, if any.

    Raises:
        ConfigError: names are missing, invalid or repeated, or --adapter_column lacks what it needs.
    """
    given = args.adapter or []
    named = [pair for pair in given if "=" in pair and not Path(pair).exists()]
    pairs = [(name.strip(), path) for name, _, path in (pair.partition("=") for pair in named)]
    names = [name for name, _ in pairs]
    faults = [f"{pair}: expected NAME=ADAPTER, since several adapters are given" for pair in given if pair not in named]
    faults = faults if len(given) > 1 else []
    faults += [f"{name}: used twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    faults += [f"{name or path}: not a valid name" for name, path in pairs if name in ("", "base") or not path]
    if faults:
        raise ConfigError(list_faults("these adapters cannot be told apart", faults, "Give each one a different name."))
    args.adapters, args.adapter = dict(pairs), given[0] if given and not named else None
    if args.adapter_column and not (args.adapters and args.input):
        raise ConfigError("--adapter_column needs --input FILE and named adapters: --adapter NAME=ADAPTER")


def _run_named(args: argparse.Namespace, sampling: Sampling, ranks: Ranks) -> None:
    tasks = ranks.on_first_rank(lambda: _tasks(args))
    if args.output is None:
        texts = _named_texts(args, tasks, 0, sampling, ranks)
        for number, ((text, _), name) in enumerate(zip(texts, _names(tasks), strict=True)):
            say(("\n" if number else "") + f"[{name or 'base'}] {text}")
        return
    with _held(args.output, ranks):
        settings = made_with(args, sampling)
        prompts = [example.prompt for example, _ in tasks]
        done = ranks.on_first_rank(lambda: resume(Path(args.output), prompts, settings, _names(tasks)))
        if done < len(tasks):
            numbered = enumerate(_named_texts(args, tasks, done, sampling, ranks), done)
            lines = (
                {
                    "prompt": prompts[n],
                    "adapter": tasks[n][1],
                    "text": text,
                    "finish_reason": why,
                    "made_with": settings,
                }
                for n, (text, why) in numbered
            )
            _append(args.output, lines, done, len(tasks), ranks)
    say(f"{counted(len(tasks), 'text')} in {args.output}")


def _names(tasks: Sequence[tuple[Example, str | None]]) -> list[str | None]:
    return [name for _, name in tasks]


def _tasks(args: argparse.Namespace) -> list[tuple[Example, str | None]]:
    """Returns each prompt with the name of its adapter, None for the base."""
    if not args.adapter_column:
        pairs = [(prompt, name) for prompt in _prompts(args) for name in args.adapters]
    else:
        found = read_prompts_with(args.input, args.adapter_column, args.data_format, columns=args.columns)
        pairs = [(prompt, name or "base") for prompt, name in found]
        unknown = dict.fromkeys(name for _, name in pairs if name not in ("base", *args.adapters))
        if unknown:
            faults = [f"{name}.{did_you_mean(name, args.adapters)}" for name in unknown]
            fix = f"Given: {', '.join(args.adapters)}; base means the base model alone."
            raise DataError(list_faults(f"{args.input} names adapters that were not given", faults, fix))
    turns = {name: iter(_as_turns(args, [p for p, n in pairs if n == name], args.adapters.get(name)))
             for name in dict.fromkeys(name for _, name in pairs)}  # fmt: skip
    return [(next(turns[name]), None if name == "base" else name) for _, name in pairs]


def _named_texts(
    args: argparse.Namespace,
    tasks: Sequence[tuple[Example, str | None]],
    start: int,
    sampling: Sampling,
    ranks: Ranks,
) -> Iterator[tuple[str, str]]:
    """Yields text and finish_reason of each task from index `start` on, in order."""
    sources: dict[str, str] = args.adapters
    base, device = common_base(sources.items(), args.model), ranks.device(args.device)
    model, tokenizer = ranks.in_turn(lambda: load_base(base, dtype=args.dtype, device=device, quantize=args.quantize))
    bank, faults = Bank(model), []
    for name, path in sources.items():
        try:
            bank.load(name, path)
        except LoraError as error:
            faults.append(f"{name} ({path}): {error}".replace("\n", "\n    "))
    if faults:
        raise AdapterError(list_faults("these adapters cannot be used together", faults, "Leave them out."))
    tokenizers = {name: tokenizer_for(path, model, tokenizer) for name, path in sources.items()}
    # An adapter trained with a chat template of its own keeps it.
    own = {task: tokenizer if task is None else tokenizers[task] for task in _names(tasks)}
    rows = encode_prompts(model, tokenizer, [prompt_ids(example, own[task]) for example, task in tasks])
    for task in dict.fromkeys(task for example, task in tasks if example.messages):
        end_with_turns(model, own[task])

    def write(at: int) -> list[Generation]:
        part = slice(at, at + args.batch_size)
        own_seed = dataclasses.replace(sampling, seed=sampling.seed + at)
        return generate(bank, tokenizer, rows[part], own_seed, adapters=_names(tasks)[part])

    yield from _in_order(write, range(start, len(rows), args.batch_size), ranks)


def _standard_input() -> list[str]:
    """Returns the lines of a piped file, split as in a file of prompts: other separators may occur within a prompt."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    try:
        return split_lines(sys.stdin.read())
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise DataError(f"standard input is not UTF-8 text: {reason}. Pipe in UTF-8, or give --input FILE.") from error


# Texts.


def _texts(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], start: int, sampling: Any, batch: int, ranks: Ranks
) -> Iterator[tuple[int, str, str]]:
    """Generates in batches; yields index, text and finish_reason of each prompt from index `start` on, in order."""

    def write(at: int) -> list[Generation]:
        # Prompt i has the same seed wherever a run is resumed.
        own = dataclasses.replace(sampling, seed=sampling.seed + at)
        return generate(model, tokenizer, rows[at : at + batch], own)

    for number, (text, reason) in enumerate(_in_order(write, range(start, len(rows), batch), ranks), start):
        yield number, text, reason


def _in_order(
    write: Callable[[int], list[Generation]], starts: Sequence[int], ranks: Ranks
) -> Iterator[tuple[str, str]]:
    """Yields text and finish_reason of all batches in order; of n ranks, each generates every n-th batch."""
    for first in range(0, len(starts), ranks.size):
        mine = first + ranks.rank
        texts = [(each.text, each.finish_reason) for each in write(starts[mine])] if mine < len(starts) else []
        for part in ranks.gather(texts):
            yield from part


def _print(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], sampling: Any, batch: int, ranks: Ranks) -> None:
    """Prints the continuations separated by blank lines; on a terminal, each is streamed as it is generated."""
    if ranks.size > 1 or sys.stdout is None or not sys.stdout.isatty():
        for number, text, _ in _texts(model, tokenizer, rows, 0, sampling, batch, ranks):
            say(text if number == 0 else f"\n{text}")
        return
    for number, ids in enumerate(rows):
        if number:
            say()
        for chunk in stream(model, tokenizer, [ids], dataclasses.replace(sampling, seed=sampling.seed + number)):
            say(chunk.text, end="")
        say()


# The output file.


def _write(args: argparse.Namespace, prompts: Sequence[Example], sampling: Any, ranks: Ranks) -> None:
    """Appends the texts that the file does not contain yet."""
    settings = made_with(args, sampling)
    done = ranks.on_first_rank(lambda: resume(Path(args.output), [example.prompt for example in prompts], settings))
    if done:
        say(f"{args.output} already has {done} of {counted(len(prompts), 'text')}; continuing from there")
    if done == len(prompts):
        return
    model, tokenizer, rows = _load(args, prompts, ranks)
    lines = (
        {"prompt": prompts[number].prompt, "text": text, "finish_reason": reason, "made_with": settings}
        for number, text, reason in _texts(model, tokenizer, rows, done, sampling, args.batch_size, ranks)
    )
    _append(args.output, lines, done, len(prompts), ranks)


def _append(output: str, lines: Iterator[dict[str, Any]], done: int, total: int, ranks: Ranks) -> None:
    """Appends lines to the output on rank 0; other ranks only iterate, which generates the texts they send to it."""
    if not ranks.is_first:
        collections.deque(lines, maxlen=0)
        return
    with progress(total=total, description="generating", unit="text") as bar:
        bar.update(done)
        append_lines(Path(output), lines, bar.update)


def made_with(args: argparse.Namespace, sampling: Any) -> dict[str, Any]:
    """Returns what the texts depend on besides their prompts: model, adapter and non-default settings."""
    named = args.adapter and not is_read_with_base(args.adapter)
    result: dict[str, Any] = {"model": base_of(read_adapter(args.adapter) if named else None, args.model)}
    if args.adapter:
        result["adapter"] = _digest(args.adapter)
    if getattr(args, "adapters", None):
        result["model"] = common_base(args.adapters.items(), args.model)
        result["adapters"] = {name: _digest(path) for name, path in args.adapters.items()}
    result |= {name: getattr(args, name) for name in ("as_chat", "raw", "merge") if getattr(args, name)}
    defaults = {"dtype": "auto", "quantize": "none"}
    result |= {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}
    plain = dataclasses.asdict(Sampling())
    chosen = {name: value for name, value in dataclasses.asdict(sampling).items() if value != plain[name]}
    # As they are read back from JSON: lists for tuples, and strings for the ids of --logit_bias.
    settings: dict[str, Any] = json.loads(json.dumps(result | chosen))
    return settings


def _digest(adapter: str) -> str:
    path = locate_adapter(adapter)
    files = [path] if path.is_file() else sorted(file for kind in _DECISIVE for file in path.glob(kind))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def resume(
    path: Path, prompts: Sequence[str], settings: dict[str, Any], adapters: Sequence[str | None] | None = None
) -> int:
    """Counts the texts that an earlier run wrote to a file, if it exists; removes an incomplete last line.

    Raises:
        OutputError: the file holds something else, or texts made from other prompts, adapters or settings.
    """

    def check(lines: list[dict[str, Any]]) -> None:
        earlier = [(line["prompt"], line["made_with"]) for line in lines]
        if [prompt for prompt, _ in earlier] != list(prompts[: len(earlier)]):
            raise OutputError(f"{path} contains texts for other prompts; remove it or choose another --output")
        if adapters is not None and [line.get("adapter") for line in lines] != list(adapters[: len(lines)]):
            raise OutputError(f"{path} contains texts from other adapters; remove it or choose another --output")
        other = next((made for _, made in earlier if made != settings), None)
        if other is not None:
            names = [name for name in {**other, **settings} if other.get(name) != settings.get(name)]
            faults = [f"{n}: {other.get(n, 'the default')} there, {settings.get(n, 'the default')} now" for n in names]
            heading = f"{path} contains texts made with other settings"
            raise OutputError(list_faults(heading, faults, "Remove it or choose another --output."))

    return len(resume_lines(path, "prompt", check, "--output"))
