"""How to use an exported adapter in its target tool."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from ..config import HUB_NAMES
from ..console import counted
from . import vllm

__all__ = ["how_to_run", "modelfile"]

_GREETING = [{"role": "user", "content": "QUESTION"}]
_TALK = [
    {"role": "system", "content": "RULES"},
    {"role": "user", "content": "ONE"},
    {"role": "assistant", "content": "TWO"},
    {"role": "user", "content": "THREE"},
]


# The classes of transformers that hold a model for one of PEFT's tasks; for others it is AutoModelForCausalLM.
_CLASSES = {
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def how_to_run(
    target: str,
    path: str | os.PathLike[str],
    base: str | None,
    r: int,
    task_type: str | None = None,
    labels: int | None = None,
) -> list[str]:
    """Returns the lines to type in order to use an adapter in a tool.

    Args:
        target: one of `loralib.formats.portable.TARGETS`.
        path: path of the exported adapter.
        base: the name of its base model, if known.
        r: its largest rank.
        task_type: PEFT's name for its task.
        labels: the number of outputs of a classifier's head.

    >>> print(*how_to_run("vllm", "out/lora", "Qwen/Qwen2.5-0.5B", 9))
    vllm serve Qwen/Qwen2.5-0.5B --enable-lora --max-lora-rank 16 --lora-modules lora=out/lora
    """
    path, base = os.fspath(path), HUB_NAMES.get(base or "", base or "BASE")
    if target == "vllm":
        rank = next((limit for limit in vllm.accepted_ranks if limit >= r), r)
        name = Path(path).resolve().name
        flags = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={path}"]
        if labels is None:
            return [_command("vllm", "serve", base, *flags)]
        classify = _command("vllm", "serve", base, "--runner", "pooling", "--convert", "classify", *flags)
        return [f"{classify}   ({base} needs a head with {counted(labels, 'output')}, too)"]
    if target == "llamacpp":
        return [_command("llama-cli", "-m", "BASE.gguf", "--lora", path) + f"   (BASE.gguf: {base} as GGUF)"]
    if target == "mlx":
        return [_command("mlx_lm.generate", "--model", base, "--adapter-path", path, "--prompt", "TEXT")]
    head = "" if labels is None else f", num_labels={labels}"
    return [
        f"model = transformers.{_CLASSES.get(task_type or '', 'AutoModelForCausalLM')}.from_pretrained({base!r}{head})",
        f"model = peft.PeftModel.from_pretrained(model, {path!r})",
    ]


def _command(*words: str) -> str:
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def modelfile(path: str | os.PathLike[str], tokenizer: Any) -> str:
    """Returns a Modelfile for Ollama: base, adapter, and the chat template in Ollama's syntax.

    The template is included only if it is ChatML; otherwise Ollama uses the one in the base's file.

    Args:
        path: path of the adapter, a GGUF file.
        tokenizer: has the chat template that the adapter was trained with.
    """
    lines = ["FROM ./BASE.gguf", f"ADAPTER {Path(path).resolve().as_posix()}"]
    turn, end = "<|im_start|>{}\n{}{}\n", "<|im_end|>"

    def rendered(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def chatml(messages: list[dict[str, str]]) -> str:
        turns = [turn.format(each["role"], each["content"], end) for each in messages]
        return "".join(turns) + "<|im_start|>assistant\n"

    try:
        fits, greeting = rendered(_TALK) == chatml(_TALK), rendered(_GREETING)
    except Exception:  # there is no template, or it rejects such a conversation
        return "\n".join(lines) + "\n"
    if fits:
        start, middle, rest = greeting.partition(chatml(_GREETING))
        rules = start.removeprefix("<|im_start|>system\n").removesuffix(f"{end}\n")
        if middle and not rest and start == (turn.format("system", rules, end) if start else ""):
            turns = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
            lines += [f'SYSTEM """{rules}"""'] if start else []
            lines += [f'TEMPLATE """{turns}<|im_start|>assistant\n"""', f'PARAMETER stop "{end}"']
    return "\n".join(lines) + "\n"
