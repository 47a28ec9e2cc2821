"""Servers for tests: tiny models with a real vocabulary, behind a real socket."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import openai
import torch
import transformers
import uvicorn

import loralib as lora
from loralib.bases import load_tokenizer
from loralib.cli.serve import open_port
from loralib.serve.app import create_app
from loralib.serve.server import Server, start
from loralib.serve.settings import ServeConfig
from loralib.serve.uploads import FileStore, UploadedFile

CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)


def tiny_base(directory: Path) -> Path:
    """A model of one layer with a real vocabulary."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def tiny_adapter(base: Path, directory: Path, seed: int, std: float = 0.3) -> Path:
    model, _ = lora.load_base(str(base), dtype="fp32")
    lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"]))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)
    lora.save_adapter(model, directory)
    return directory


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, config: ServeConfig) -> None:
        self.server: Server = start(config)
        self.socket = open_port("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        settings = uvicorn.Config(create_app(self.server), http="h11", log_level="critical", access_log=False)
        self._uvicorn = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self.socket]})
        self._thread.start()
        while not self._uvicorn.started:
            self._thread.join(0.01)

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self.server.close()
        self.socket.close()

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)


def upload(files: FileStore, name: str, content: bytes) -> UploadedFile:
    """Uploads a file of examples."""
    with contextlib.closing(files.begin(1 << 30)) as each:
        each.write(content)
        return files.finish(each, name, "fine-tune")


class FakeProcess:
    """A fake training process; the test decides what it writes and how it ends."""

    made: list[FakeProcess]

    def __init__(self, directory: Path) -> None:
        self.directory, self.code, self.is_asked = directory, None, threading.Event()
        (directory / "run").mkdir(exist_ok=True)
        self.made.append(self)

    def poll(self) -> int | None:
        return self.code

    def stop(self, kill_after: float | None = None) -> None:
        self.is_asked.set()

    leave = stop

    def train(self, *steps: int) -> None:
        """Writes the events of updates, as a running training does."""
        names = ("epoch", "lr", "examples", "tokens", "trained_tokens")
        with (self.directory / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for step in steps:
                event = {"event": "train", "step": step, "loss": 1 / step, "step_s": 0.5, **dict.fromkeys(names, step)}
                file.write(json.dumps(event) + "\n")

    def end(self, code: int, words: str = "") -> None:
        (self.directory / "errors.log").write_text(words, encoding="utf-8")
        self.code = code
