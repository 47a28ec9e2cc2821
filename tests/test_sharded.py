"""A base model sharded over processes: each reads its own rows, which together equal what load_base reads."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from loralib.bases import load_base, load_empty, sharded
from loralib.errors import BaseModelError, ConfigError
from loralib.wrapping import decoder_blocks

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked"),
    pytest.mark.distributed,
]
SIZE = 3  # which divides hardly any of the shapes below


@pytest.fixture(scope="module")
def together(load_file: Callable[[Path], ModuleType]) -> Any:
    """Runs an action in several connected processes (see test_ranks.py), given a mesh of them."""
    start = load_file(Path(__file__).with_name("test_ranks.py")).together

    def run(action: Callable[[Any], Any]) -> list[Any]:
        def joined(rank: int) -> Any:
            torch.set_num_threads(1)
            torch.distributed.init_process_group("gloo")
            try:
                mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (SIZE,))
                torch.distributed.barrier()  # one that leaves sooner would take with it where the others still join
                return action(mesh)
            finally:
                torch.distributed.destroy_process_group()

        return start(SIZE, joined)  # type: ignore[no-any-return]

    return run


def saved(directory: Path, kind: str, **settings: Any) -> str:
    """Saves a small model of a family with random weights, and a tokenizer."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    shape = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 10}
    if kind == "GPTNeoX":
        shape = {name: shape[name] for name in shape if "k" not in name and name != "head_dim"}
    if kind == "GPT2":
        shape = {"n_embd": 20, "n_layer": 2, "n_head": 2}
    dtype, body, split = (
        settings.pop(name, other) for name, other in [("dtype", "bfloat16"), ("body", 0), ("split", 0)]
    )
    config = getattr(transformers, f"{kind}Config")(**(shape | {"vocab_size": 49, "pad_token_id": 0} | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for parameter in model.parameters():  # norms and biases too
        nn.init.normal_(parameter, std=0.5)
    (model.base_model if body else model).save_pretrained(directory, **({"max_shard_size": "8KB"} if split else {}))
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(["<end>", *map(str, range(48))])}, "<end>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(directory)
    return str(directory)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "with a head of its own, in several files": ("Llama", {"tie_word_embeddings": False, "split": True}),
    "in another dtype": ("Qwen3", {"dtype": "float32", "tie_word_embeddings": True}),
    "the body alone, under other names": ("GPT2", {"body": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_shares_are_the_whole(name: str, together: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind, settings = MODELS[name]
    path = saved(tmp_path, kind, **settings)
    whole, tokenizer = load_base(path, dtype="bf16", device="cpu")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        logits = whole(ids).logits

    def faults(mesh: Any) -> list[str]:
        model, own = load_base(path, dtype="bf16", device="cpu", mesh=mesh)
        state = {key: value.full_tensor() for key, value in model.state_dict().items()}
        want = whole.state_dict()
        found = [key for key in want if not torch.equal(state[key], want[key]) or state[key].dtype != want[key].dtype]
        found += [key for key, value in model.named_buffers() if not torch.equal(value, whole.get_buffer(key))]
        found += [] if state.keys() == want.keys() else ["the names"]
        with torch.no_grad():
            found += [] if torch.equal(model(ids).logits, logits) else ["the logits"]
        found += [] if own.get_vocab() == tokenizer.get_vocab() else ["the tokenizer"]
        generation = [{k: v for k, v in each.generation_config.to_dict().items() if v} for each in (model, whole)]
        found += [] if generation[0] == generation[1] else ["the generation"]
        return found + ([] if model.name_or_path == path and not model.training else ["the rest"])

    assert together(faults) == [[]] * SIZE
    assert "note" not in capfd.readouterr().err


def test_each_number_is_read_by_one_process(together: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "Llama", tie_word_embeddings=True)
    read: list[int] = []
    fill = sharded._fill
    monkeypatch.setattr(sharded, "_fill", lambda value, *rest: (read.append(value.numel()), fill(value, *rest)))

    def numbers(mesh: Any) -> int:
        load_base(path, dtype="bf16", device="cpu", mesh=mesh)
        return sum(read)

    counts = together(numbers)
    assert sum(counts) == sum(p.numel() for p in load_empty(path, dtype="bf16").parameters())
    assert max(counts) < 1.1 * sum(counts) / SIZE  # but for rows that three do not divide


def test_what_cannot_be_read_apart_is_read_whole(
    together: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "GPTNeoX", tie_word_embeddings=False)  # whose head has another name in files
    want = load_base(path, dtype="bf16", device="cpu")[0].state_dict()

    def faults(mesh: Any) -> list[str]:
        state = load_base(path, dtype="bf16", device="cpu", mesh=mesh)[0].state_dict()
        return [key for key, value in state.items() if not torch.equal(value.full_tensor(), want[key])]

    assert together(faults) == [[]] * SIZE
    note = f"each process reads all of {path} before keeping its share, since lm_head.weight is missing from its files"
    assert capfd.readouterr().err.count(note) == 1


@pytest.mark.parametrize("name", ["a pretrained model", "scratch"])
def test_shards_in_fewer_bits_are_refused(name: str, together: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, "Llama") if name == "a pretrained model" else name
    errors = together(lambda mesh: load_base(path, device="cpu", quantize="nf4", mesh=mesh))
    assert [type(error) for error in errors] == [ConfigError] * SIZE
    words = r"quantize is 'nf4' and mesh is given, expected only one of them(.|\n)*leave out quantize"
    assert all(re.search(words, str(error)) for error in errors)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_ends_all_with_one_error(damage: str, together: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, "Llama", split=True)
    file = sorted(tmp_path.glob("model-*.safetensors"))[0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    errors = together(lambda mesh: load_base(path, dtype="bf16", device="cpu", mesh=mesh))
    assert [type(error) for error in errors] == [BaseModelError] * SIZE
    assert len({str(error) for error in errors}) == 1
    assert file.name in str(errors[0])


def test_a_model_without_weights_needs_its_config_alone(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "whole", "Llama", tie_word_embeddings=True))
    (tmp_path / "config").mkdir()
    shutil.copy(path / "config.json", tmp_path / "config")
    empty, whole = load_empty(tmp_path / "config", dtype="bf16"), load_base(path, dtype="bf16", device="cpu")[0]
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    assert len(decoder_blocks(empty)) == 2
