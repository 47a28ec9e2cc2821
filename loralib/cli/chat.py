"""Chat with a base model and, if given, an adapter.

loralib chat --adapter lora_model
loralib chat --model ./my-model --system "Answer in one sentence." --temperature 0

Turns are formatted with the model's chat template, or, with --plain, as simple text for a model without one.  When the
conversation outgrows the model's context, its oldest turns are dropped, with a message.  Ctrl-C stops an answer; /exit
or the end of the input quits.  Lines may also be piped in; each gets an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Final

from ..console import say
from ..data import prompt_ids
from ..engine.limits import context_length
from ..errors import ConfigError, DataError, did_you_mean
from ..generation import Sampling, stream
from ..generation.text import end_with_turns
from ..training.ranks import ALONE
from ._adapters import add_model_arguments, load_on
from ._flags import add_fields, from_args

_DEFAULTS: Final = {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9}
_COMMANDS: Final = {
    "/reset": "start a new conversation",
    "/retry": "answer the last message again",
    "/help": "show these commands",
    "/exit": "leave",
}
# The share of the context reserved for an answer, unless max_new_tokens is smaller.
_ANSWER_SHARE: Final = 1 / 4

Turn = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the system prompt, and a flag for every setting of `Sampling`."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt: instructions given to the model first")
    parser.add_argument(
        "--plain", action="store_true", help="format turns as 'User: ...' instead of with a chat template"
    )
    add_fields(parser, Sampling, _DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Reads the input line by line and answers each line."""
    sampling = from_args(Sampling, args, _DEFAULTS)
    if sampling.num_beams > 1:
        raise ConfigError(
            "--num_beams was given, but chat prints text as it is generated, which beam search cannot do; leave it "
            "out, or use loralib generate"
        )
    model, tokenizer = load_on(ALONE, args, merged=True)
    if not args.plain and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so the model is not a chat model. "
            "Choose an instruct model, add --plain to format turns as simple text, or use loralib generate."
        )
    if not args.plain:
        end_with_turns(model, tokenizer)
    conversation = Conversation(model, tokenizer, sampling, system=args.system, plain=args.plain)
    watched = sys.stdin is not None and sys.stdin.isatty()
    with contextlib.suppress(AttributeError, OSError):  # the stream may have been replaced, or already read from
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if watched:
        say("Ctrl-C stops an answer, /help lists commands, /exit quits.", file=sys.stderr)
    while True:
        try:
            line = _read_line(watched)
            if line is None or line in ("/exit", "/quit"):
                return
            _react(conversation, line)
        except KeyboardInterrupt:
            say("\n(/exit quits)", file=sys.stderr)


def _react(conversation: Conversation, line: str) -> None:
    """Runs a slash command, or answers a question."""
    if line == "/reset":
        conversation.turns = []
        say("(new conversation)", file=sys.stderr)
    elif line == "/help":
        for name, about in _COMMANDS.items():
            say(f"{name:<8} {about}", file=sys.stderr)
    elif line == "/retry":
        question = conversation.take_back()
        if question is None:
            say("(nothing has been asked yet)", file=sys.stderr)
        else:
            conversation.answer(question)
    elif line.startswith("/"):
        say(
            f"There is no command {line.split()[0]!r}.{did_you_mean(line, _COMMANDS)} /help lists them all.",
            file=sys.stderr,
        )
    elif line:
        conversation.answer(line)


def _read_line(watched: bool) -> str | None:
    """Returns the next line, stripped, or None at the end of the input."""
    if sys.stdin is None:
        return None
    if watched:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing
        try:
            return input("> ").strip()
        except EOFError:
            say()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


class Conversation:
    """A conversation with a model.

    Answer i uses the seed ``seed + i``. With `plain`, turns are formatted as simple text rather than with the
    tokenizer's chat template.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Any, system: str | None = None, plain: bool = False
    ) -> None:
        self._model, self._tokenizer, self._plain = model, tokenizer, plain
        self._sampling = dataclasses.replace(sampling, stop=(*sampling.stop, "\nUser:")) if plain else sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self._answers = 0
        self.turns: list[Turn] = []

    def take_back(self) -> str | None:
        """Removes the last question and its answer; returns the question."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        return question

    def answer(self, question: str) -> None:
        """Prints an answer as it is generated and adds it to the turns; Ctrl-C ends it early."""
        asked = [*self.turns, {"role": "user", "content": question}]
        try:
            asked, ids = self._fit(asked)
        except DataError as error:
            say(str(error), file=sys.stderr)
            return
        own = dataclasses.replace(self._sampling, seed=self._sampling.seed + self._answers)
        self._answers += 1
        said: list[str] = []
        try:
            for chunk in stream(self._model, self._tokenizer, [ids], own):
                # The model itself generates the space after "Assistant:".
                text = chunk.text if said or not self._plain else chunk.text.lstrip()
                if text:
                    said.append(text)
                    say(text, end="")
        except KeyboardInterrupt:
            say(" ...", end="")
        say()
        self.turns = [*asked, {"role": "assistant", "content": "".join(said)}]

    def _fit(self, turns: Sequence[Turn]) -> tuple[list[Turn], list[int]]:
        """Returns the newest turns that fit the context, and their token ids.

        Raises:
            DataError: not even the last turn fits, or the chat template rejects the turns.
        """
        turns, dropped = list(turns), 0
        ids = self._ids(turns)
        limit = context_length(self._model)
        room = 0 if limit is None else min(self._sampling.max_new_tokens, int(limit * _ANSWER_SHARE))
        while limit is not None and len(ids) + room > limit and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 2  # drop a question with its answer
            ids = self._ids(turns)
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"That message has {len(ids):,} tokens, but the model's context has {limit:,}. It was ignored; use "
                "fewer words."
            )
        if dropped:
            say(
                f"(The oldest {dropped} turns were dropped: the model's context has {limit:,} tokens.)",
                file=sys.stderr,
            )
        return turns, ids

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        said = [*self._system, *turns]
        if self._plain:
            names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
            text = "\n".join(names[turn["role"]] + turn["content"].strip() for turn in said) + "\nAssistant:"
            return prompt_ids(text, self._tokenizer)
        try:
            text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs and can raise any error
            raise DataError(f"The model's chat template rejects this conversation: {error}") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # the template adds the start token
