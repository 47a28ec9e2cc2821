"""Hostile and broken files: each loads to exactly the tensors it states, or raises the library's own error.

A byte mutator damages small valid files of every format, 20,000 each; hypothesis makes headers and settings that are
well-formed and mean nonsense.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import re
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loralib as lora
from loralib.adapter import Adapter, adapter_of, apply_adapter
from loralib.config import LoraConfig, matches
from loralib.errors import AdapterError, ConfigError, FormatError, LoraError
from loralib.formats import (
    export,
    make_portable,
    read_adapter,
    read_microsoft,
    read_peft,
    write_microsoft,
    write_peft,
)
from loralib.formats.gguf import parse_gguf
from loralib.formats.mlx import parse_settings
from loralib.formats.tensors import (
    parse_json,
    parse_pickle,
    parse_safetensors,
    parsed,
    read_pickle,
    read_safetensors,
)
from loralib.injection import adapted_layers, remove
from loralib.inspection import inspect_adapter

FILES = 20_000
LONGEST = 2.0  # seconds for one file, on a busy machine

NUMBERS = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]
WORDS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\\",
    b"\x00",
    b"-1",
    b"1e999",
    b"NaN",
    b"9999999999999",
    b"null",
    b"../",
]


def mutate(data: bytes, luck: random.Random) -> bytes:
    """Damages a file in one to four ways."""
    broken = bytearray(data)
    for _ in range(luck.choice((1, 1, 1, 2, 4))):
        at = luck.randrange(len(broken) + 1)
        # Beginnings hold the numbers that steer a reader.
        at = luck.choice((at, at, min(at, luck.randrange(256))))
        match luck.randrange(9):
            case 0:
                broken[at : at + 1] = bytes([luck.randrange(256)])
            case 1:
                broken[at : at + 1] = bytes([(broken[at : at + 1] or b"\0")[0] ^ (1 << luck.randrange(8))])
            case 2:
                del broken[at:]
            case 3:
                del broken[at : at + luck.randrange(1, 32)]
            case 4:
                broken[at:at] = luck.randbytes(luck.randrange(1, 16))
            case 5:
                start = luck.randrange(len(broken) + 1)
                broken[at:at] = broken[start : start + luck.randrange(1, 64)]
            case 6:
                broken[at : at + 8] = struct.pack("<Q", luck.choice(NUMBERS))
            case 7:
                broken[at : at + 4] = struct.pack("<I", luck.choice(NUMBERS) % 2**32)
            case 8:
                word = luck.choice(WORDS)
                broken[at : at + luck.choice((0, len(word)))] = word
    return bytes(broken)


def peak_memory() -> int:
    """The peak memory of this process in bytes; 0 if the system does not report it."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(
    seeds: list[bytes], load: Callable[[bytes], Any], check: Callable[[bytes, Any], None], seed: int, files: int = FILES
) -> None:
    """Loads mutated files; a load must end soon, with the library's own error or with what `check` finds right."""
    luck = random.Random(seed)
    for data in seeds:
        check(data, load(data))
    memory, loaded, refused = peak_memory(), 0, 0
    for number in range(files):
        data = mutate(luck.choice(seeds), luck)
        started = time.perf_counter()
        try:
            value = load(data)
        except LoraError:
            refused += 1
        else:
            check(data, value)
            loaded += 1
        assert time.perf_counter() - started < LONGEST, (number, data)
    # The mutator must reach both sides, or it shows nothing.
    assert loaded > files // 100
    assert refused > files // 10
    assert peak_memory() - memory < 300e6


def small_adapters() -> list[Adapter]:
    torch.manual_seed(0)
    plain = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "embed"], rank_pattern={"up": 1})
    return [
        Adapter(
            plain,
            {
                "layers.0.q_proj.lora_A": torch.randn(2, 3),
                "layers.0.q_proj.lora_B": torch.randn(4, 2),
                "embed.lora_embedding_A": torch.randn(2, 5).half(),
                "embed.lora_embedding_B": torch.randn(3, 2).bfloat16(),
            },
            {"loralib.base": "0123:4567"},
        ),
        Adapter(
            LoraConfig(r=1, lora_alpha=2, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]}),
            {"h.0.c_attn.lora_A": torch.randn(2, 3), "h.0.c_attn.lora_B": torch.randn(4, 1)},
        ),
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def numbers(tensors: Iterable[Tensor]) -> Counter[Any]:
    """Values that are invariant to transposing a tensor and reordering its rows."""
    each = ((tensor.dtype, tensor.element_size(), bits(tensor)) for tensor in tensors)
    return Counter((kind, *sorted(data[i : i + size] for i in range(0, len(data), size))) for kind, size, data in each)


# Byte by byte.


def test_safetensors(tmp_path: Path) -> None:
    seeds = []
    for number, adapter in enumerate(small_adapters()):
        write_peft(adapter, tmp_path / str(number))
        seeds.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())

    def load(data: bytes) -> dict[str, Tensor]:
        return parsed(data, parse_safetensors, "x")[0]

    def check(data: bytes, tensors: dict[str, Tensor]) -> None:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        assert set(header) == set(tensors)
        for name, stated in header.items():
            begin, end = stated["data_offsets"]
            assert list(tensors[name].shape) == stated["shape"]
            assert bits(tensors[name]) == data[8 + length + begin : 8 + length + end]

    fuzz(seeds, load, check, 1)


def test_peft_settings(tmp_path: Path) -> None:
    write_peft(small_adapters()[0], tmp_path)
    seeds = [
        (tmp_path / "adapter_config.json").read_bytes(),
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": "q_(proj|x)", "alpha_pattern": {"up": 3}}).encode(),
    ]

    def load(data: bytes) -> LoraConfig:
        values = parsed(data, parse_json, "x")
        if not isinstance(values, dict):
            raise FormatError("read_peft refuses it")
        return LoraConfig.from_dict(values)

    def check(data: bytes, config: LoraConfig) -> None:
        stated = json.loads(data)
        assert config.r == stated.get("r", 8)
        assert config.lora_alpha == stated.get("lora_alpha", 8)
        assert config.rank_of("layers.0.up") in {config.r, *config.rank_pattern.values()}
        assert LoraConfig.from_dict(config.to_dict()) == config

    fuzz(seeds, load, check, 2)


def test_mlx_settings() -> None:
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    whole = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, "model": "some/model"}
    seeds = [json.dumps(whole, indent=4).encode(), json.dumps({"lora_parameters": {"scale": 2}}).encode()]

    def check(data: bytes, read: tuple[bool, float, str | None]) -> None:
        stated = json.loads(data)
        assert read[0] is (stated.get("fine_tune_type") == "dora")
        assert read[1] == stated["lora_parameters"]["scale"]

    fuzz(seeds, lambda data: parsed(data, parse_settings, "x"), check, 7)


class Careless(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """A second reader of pickles; it may trust them, since they have been checked."""

    # torch takes no notice of which protocol is announced.
    dispatch = pickle._Unpickler.dispatch | {pickle.PROTO[0]: lambda self: self.read(1)}  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "OrderedDict": dict,
            "_rebuild_tensor_v2": lambda *parts: parts,
            "_rebuild_tensor": lambda *parts: parts,
        }
        return known.get(name, name)

    def persistent_load(self, saved: Any) -> Any:
        return saved


def stated_in_old_form(data: bytes) -> dict[Any, Any]:
    """The mapping in a file of torch.save's form before zip archives: five pickles, then the numbers."""
    stream = io.BytesIO(data)
    *_, value, keys = (Careless(stream).load() for _ in range(5))
    if not isinstance(value, dict):  # a mutation has made it something else
        return {}
    stored = {}
    sizes = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64}
    kinds = {part[0][2]: sizes[part[0][1]] for part in value.values() if isinstance(part, tuple)}
    for key in keys:
        count = struct.unpack("<q", stream.read(8))[0]
        content = bytearray(stream.read(count * kinds[key].itemsize))
        stored[key] = torch.frombuffer(content, dtype=kinds[key])
    return {
        name: stored[part[0][2]].as_strided(part[2], part[3], part[1]) if isinstance(part, tuple) else part
        for name, part in value.items()
    }


def test_microsoft_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"layers.0.q.lora_A": torch.randn(2, 3), "layers.0.q.lora_B": torch.randn(4, 2)}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q"])
    write_microsoft(Adapter(config, tensors), tmp_path / "flat.bin")
    whole, old = io.BytesIO(), io.BytesIO()
    torch.save({"model_state_dict": {f"module.{name}": t for name, t in tensors.items()}}, whole)
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    seeds = [(tmp_path / "flat.bin").read_bytes(), whole.getvalue(), old.getvalue()]
    path = tmp_path / "fuzzed.bin"

    def load(data: bytes) -> Any:
        return parsed(data, parse_pickle, "x")

    def load_whole(data: bytes) -> dict[str, Tensor]:
        path.write_bytes(data)
        return dict(read_microsoft(path, config).tensors)

    def check(data: bytes, read: Any) -> None:
        zipped = zipfile.is_zipfile(io.BytesIO(data))
        # Archives have checksums: whatever loads is what was saved.
        stated = tensors if zipped else stated_in_old_form(data)
        read = read if isinstance(read, dict) else {}
        read = {str(n).removeprefix("module."): t for n, t in read.get("model_state_dict", read).items()}
        assert set(read) == {str(name) for name in stated}
        for name, tensor in stated.items():
            if isinstance(tensor, Tensor):
                assert read[str(name)].shape == tensor.shape
                assert read[str(name)].dtype == tensor.dtype
                assert bits(read[str(name)]) == bits(tensor)

    fuzz(seeds, load, check, 3)
    fuzz(
        seeds,
        load_whole,
        lambda data, read: check(data, read) if zipfile.is_zipfile(io.BytesIO(data)) else None,
        6,
        500,
    )


def gguf_seed(version: int, tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF file, written by the rules of its specification."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.type") + struct.pack("<I", 8) + text("adapter"),
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("adapter.lora.alpha") + struct.pack("<If", 6, 4.0),
        text("some.list") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<3I", 1, 2, 3),
        text("some.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
    ]
    infos, data = b"", b""
    for name, (shape, kind, content) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + infos
    return head + bytes(-len(head) % 32) + data


def test_gguf() -> None:
    torch.manual_seed(0)
    a, b, h = torch.randn(2, 8), torch.randn(4, 2), torch.randn(3, 4).half()
    seeds = [
        gguf_seed(3, {"a.lora_a": ((2, 8), 0, bits(a)), "a.lora_b": ((4, 2), 0, bits(b))}),
        gguf_seed(2, {"h.lora_a": ((3, 4), 1, bits(h)), "q.lora_b": ((1, 32), 8, bytes(range(34)))}),
    ]

    def load(data: bytes) -> dict[str, Tensor]:
        return parsed(data, parse_gguf, "x")[1]

    def check(data: bytes, tensors: dict[str, Tensor]) -> None:
        # A second, careless reader: it may trust the numbers, since they have been checked.
        at = 24
        keys = struct.unpack_from("<Q", data, 16)[0]

        def take(form: str) -> Any:
            nonlocal at
            at += struct.calcsize(form)
            return struct.unpack_from(form, data, at - struct.calcsize(form))[0]

        def skip(kind: int) -> Any:
            nonlocal at
            if kind == 8:
                length = take("<Q")
                at += length
                return data[at - length : at]
            if kind == 9:
                inner, number = take("<I"), take("<Q")
                return [skip(inner) for _ in range(number)]
            return take(
                {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q"}.get(
                    kind, "<d"
                )
            )

        fields = {skip(8): skip(take("<I")) for _ in range(keys)}
        align = fields.get(b"general.alignment", 32)
        infos = []
        for _ in range(struct.unpack_from("<Q", data, 8)[0]):
            name, axes = skip(8), take("<I")
            infos.append((name.decode(), tuple(take("<Q") for _ in range(axes))[::-1], take("<I"), take("<Q")))
        assert {name for name, *_ in infos} == set(tensors)
        start = -(-at // align) * align
        for name, shape, kind, offset in infos:
            assert tuple(tensors[name].shape) == shape
            if kind in (0, 1, 30):
                content = bits(tensors[name])
                assert content == data[start + offset : start + offset + len(content)]

    fuzz(seeds, load, check, 4)


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        ("peft", "adapter_model.safetensors"),
        ("peft", "adapter_config.json"),
        ("mlx", "adapters.safetensors"),
        ("mlx", "adapter_config.json"),
        ("llamacpp", "adapter.gguf"),
    ],
)
def test_whole_readers(tmp_path: Path, kind: str, damaged: str) -> None:
    """Reading to the end, and looking at what was read, in the same way."""
    import transformers

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    base = transformers.LlamaForCausalLM(config)
    lora.inject(model := copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    path = tmp_path / "adapter.gguf" if kind == "llamacpp" else tmp_path
    export(make_portable(adapter_of(model), "peft", base), kind, path, base)
    file = tmp_path / damaged

    whole = file.read_bytes()
    tensor_file = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}.get(kind, damaged)
    sound = (tmp_path / tensor_file).read_bytes()

    def load(data: bytes) -> Adapter:
        file.write_bytes(data)
        return read_adapter(path, model=base)

    def check(data: bytes, adapter: Adapter) -> None:
        """The parsers are compared with what files state above; what the readers make of it has the same numbers."""
        parse: Any = parse_gguf if kind == "llamacpp" else lambda data: parse_safetensors(data)[::-1]
        stated = parse(data if damaged == tensor_file else sound)[1]
        assert numbers(adapter.tensors.values()) == numbers(stated.values())
        assert str(inspect_adapter(adapter))

    fuzz([whole], load, check, 5, files=1_000)


# Well-formed nonsense.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*LoraConfig.__dataclass_fields__, "peft_type", "inference_mode", "layer_replication"]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
@settings(max_examples=400, deadline=None)
def test_settings_of_any_type(values: dict[str, Any]) -> None:
    try:
        config = LoraConfig.from_dict(values)
    except (AdapterError, ConfigError):
        pass
    else:
        assert LoraConfig.from_dict(config.to_dict()) == config
        config.rank_of("model.layers.0.q_proj")


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**62, -1]), max_size=5)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "BOOL", "Q4", "", 3]),
        "shape": SHAPES,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 48, 2**40, 2**63, -4]), min_size=1, max_size=3),
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", "../../etc/passwd", "C:\\x", "\x00", "é"]), ENTRY, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_headers_that_lie(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    try:
        tensors, _ = read_safetensors(path)
    except FormatError:
        pass
    else:
        for name, tensor in tensors.items():
            assert list(tensor.shape) == header[name]["shape"]
            assert tensor.numel() * tensor.element_size() <= 48
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


# One by one.


class Opener:
    """Unpickled by an ordinary pickle, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("new", [True, False])
def test_code_in_pickles_is_not_run(tmp_path: Path, new: bool) -> None:
    trap, path = tmp_path / "ran", tmp_path / "x.bin"
    torch.save({"q.lora_A": Opener(trap)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(FormatError, match="would run as code"):
        read_pickle(path)
    assert not trap.exists()


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "strides.bin")
    with pytest.raises(FormatError, match="larger than the data stored"):
        read_pickle(tmp_path / "strides.bin")
    torch.save({"q.lora_A": torch.zeros(2**20)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as source, zipfile.ZipFile(tmp_path / "zip.bin", "w", 8) as bomb:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "zip.bin").stat().st_size < 2**16
    with pytest.raises(FormatError, match="compressed"):
        read_pickle(tmp_path / "zip.bin")


def test_tensors_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.empty(2**40, device="meta")}, tmp_path / "meta.bin")
    with pytest.raises(FormatError, match="_rebuild_meta_tensor"):
        read_pickle(tmp_path / "meta.bin")


def archive(program: bytes) -> bytes:
    """A file in torch.save's format with a given pickle program."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, part in {"data.pkl": program, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", part)
    return content.getvalue()


def text_op(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number_op(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little")


# {"q.lora_A": <these>}, in the language of pickles
BOMBS = {
    "bytearray of 1 TB": b"cbuiltins\nbytearray\n" + number_op(2**40) + b"\x85R",
    "storage of 1 TB": b"ctorch.storage\nUntypedStorage\n" + number_op(2**40) + b"\x85R",
    "tensor of 4 TB": b"ctorch\nFloatTensor\n" + number_op(2**40) + b"\x85R",
    "text of 2**60 letters": b"c_codecs\nencode\n" * 60
    + (text_op("a") + text_op("utf-16") + b"\x86R")
    + (text_op("hex") + b"\x86R") * 59,
    "key that takes 2**100 steps to hash": b"}K\x00\x85q\x00"
    + b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(100))
    + b"Ns",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_never_end(bomb: str) -> None:
    data = archive(b"\x80\x02}" + text_op("q.lora_A") + BOMBS[bomb] + b"s.")
    memory, started = peak_memory(), time.perf_counter()
    with pytest.raises(FormatError):
        parse_pickle(data)
    assert time.perf_counter() - started < LONGEST
    assert peak_memory() - memory < 100e6


def test_an_archive_behind_a_file_of_the_old_form_is_not_checked_in_its_place(tmp_path: Path) -> None:
    old, new = io.BytesIO(), io.BytesIO()
    torch.save({"q.lora_A": Opener(tmp_path / "ran")}, old, _use_new_zipfile_serialization=False)
    torch.save({"q.lora_A": torch.zeros(1)}, new)
    data = old.getvalue() + new.getvalue()
    assert zipfile.is_zipfile(io.BytesIO(data))
    with pytest.raises(FormatError, match=r"would run as code.*open"):
        parse_pickle(data)


def test_mappings_that_hold_themselves(tmp_path: Path) -> None:
    """Each tensor is checked once, although 100**8 paths lead to it."""
    inner: dict[str, Any] = {"q.lora_A": torch.zeros(1)}
    for _ in range(8):
        inner = {str(number): inner for number in range(100)}
    inner["again"] = inner
    torch.save({"q.lora_A": torch.zeros(2, 3), "q.lora_B": torch.zeros(4, 2), "rest": inner}, tmp_path / "x.bin")
    config = LoraConfig(r=2, target_modules=["q"])
    assert set(read_microsoft(tmp_path / "x.bin", config).tensors) == {"q.lora_A", "q.lora_B"}


def test_a_checksum_that_does_not_fit(tmp_path: Path) -> None:
    tensor = torch.arange(64.0)
    torch.save({"q.lora_A": tensor}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    at = data.index(bits(tensor))
    (tmp_path / "x.bin").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(FormatError, match="checksum"):
        read_pickle(tmp_path / "x.bin")


def test_headers_that_claim_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**44) + b"{}")
    with pytest.raises(FormatError, match="claims 17,592,186,044,416 bytes"):
        read_safetensors(path)
    for data in (
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**62),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**62),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0),
    ):
        with pytest.raises(FormatError):
            parse_gguf(data)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_fused_blocks_without_one_factor(tmp_path: Path, half: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    write_peft(small_adapters()[1], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    save_file({name: t for name, t in load_file(file).items() if half not in name}, file, metadata)
    with pytest.raises(FormatError, match=r"(?s)factors are missing.*h\.0\.c_attn"):
        read_peft(tmp_path)


def test_fused_blocks_beside_an_embedding(tmp_path: Path) -> None:
    fused = small_adapters()[1]
    table = {"wte.lora_embedding_A": torch.randn(1, 5), "wte.lora_embedding_B": torch.randn(3, 1)}
    both = Adapter(fused.config.replace(target_modules=["c_attn", "wte"]), {**fused.tensors, **table})
    write_peft(both, tmp_path)
    back = read_peft(tmp_path)
    assert set(back.tensors) == set(both.tensors)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in both.tensors.items())


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loralib.formats import tensors

    monkeypatch.setattr(tensors, "_MAX_FILE", 1000)
    (tmp_path / "x.gguf").write_bytes(bytes(1001))
    for read in (read_safetensors, read_pickle):
        with pytest.raises(FormatError, match="has 1,001 bytes, expected at most 1,000"):
            read(tmp_path / "x.gguf")


def test_names_and_numbers_that_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(FormatError, match="'a' occurs twice"):
        read_safetensors(path)
    with pytest.raises(FormatError, match="'r' occurs twice"):
        parse_json('{"r": 8, "lora_alpha": 16, "r": 16}')
    for text in ("NaN", "[1e999]", "[" * 100_000, "{" * 5, '"\ud800', "9" * 5000):
        with pytest.raises(FormatError):
            parse_json(text.encode("utf-8", "surrogatepass"))
    one = ((1, 8), 0, bytes(32))
    with pytest.raises(FormatError, match="overlap"):
        parse_gguf(gguf_seed(3, {"a": one, "b": one}).replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 0, 0)))
    write_peft(small_adapters()[0], tmp_path / "both")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "both" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.layers.0.q_proj.lora_A.weight"
    save_file(tensors | {name.replace(".weight", ".default.weight"): tensors[name] + 1}, file)
    with pytest.raises(FormatError, match="under both an old and a new name"):
        read_peft(tmp_path / "both")


def test_a_settings_file_without_end(tmp_path: Path) -> None:
    write_peft(small_adapters()[0], tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": ' + " " * 2_000_000 + "8}", encoding="utf-8")
    with pytest.raises(FormatError, match="2,000,008 bytes"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapters.safetensors")
    with pytest.raises(FormatError, match="2,000,008 bytes"):
        read_adapter(tmp_path, model=nn.Linear(1, 1))


def test_names_that_cannot_be_shown(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name in ("x" * 5_000_000, "\x1b[2Jq.lora_A", "q\n.lora_A"):
        save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
        torch.save({name: torch.ones(1)}, tmp_path / "x.bin")
        for read in (read_safetensors, read_pickle):
            with pytest.raises(FormatError, match="characters") as caught:
                read(tmp_path / ("x.bin" if read is read_pickle else "x.safetensors"))
            assert len(str(caught.value)) < 1000
            assert "\x1b" not in str(caught.value)
        with pytest.raises(FormatError, match="characters"):
            parse_gguf(gguf_seed(3, {name: ((1, 1), 0, bytes(4))}))
    save_file({"q.lora_A": torch.ones(1)}, tmp_path / "x.safetensors", {"loralib.base": "\x1b[2J"})
    with pytest.raises(FormatError, match="control characters"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        LoraConfig(base_model_name_or_path="\x1b[2J")


def test_files_that_are_longer_than_they_state_are_not_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"q.lora_A": torch.ones(1)}, tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2**28)
    memory = peak_memory()
    with pytest.raises(FormatError, match="its header declares 4 bytes"):
        read_safetensors(tmp_path / "x.safetensors")
    assert peak_memory() - memory < 100e6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits(dtype: torch.dtype) -> None:
    """PyTorch has no isfinite for them."""
    tensors = {"0.lora_A": torch.ones(2, 3).to(dtype), "0.lora_B": torch.full((4, 2), float("nan")).to(dtype)}
    inspection = inspect_adapter(Adapter(LoraConfig(r=2, target_modules=["0"]), tensors))
    assert "0.lora_B: holds NaN" in str(inspection)


def test_reports_on_many_faults_stay_short() -> None:
    tensors = {f"layers.{number}.q.lora_A": torch.ones(0) for number in range(5_000)}
    shown = str(inspect_adapter(Adapter(LoraConfig(r=2, target_modules=["q"]), tensors)))
    assert "more faults of this kind" in shown
    assert len(shown) < 10_000


def test_names_that_look_like_messages() -> None:
    """A colon in a module's name used to hide which modules are damaged."""
    tensors = {"a:b.lora_A": torch.ones(2, 3), "a:b.lora_embedding_B": torch.ones(4, 2)}
    assert "a:b: lora_B is missing" in str(inspect_adapter(Adapter(LoraConfig(r=2, target_modules=["b"]), tensors)))
    flat = {"conv.lora_A": torch.ones(2, 3, 3), "conv.lora_B": torch.ones(0, 2, 1)}
    assert "do not match each other" in str(inspect_adapter(Adapter(LoraConfig(r=2, target_modules=["conv"]), flat)))


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        r"(\w+\.)*q_proj",
        ".*.*.*.*.*.*x",
        "(?:(?:a*)b)*",
        "(?:..?)*x",
        "(?:.|..)*x",
        "(?:.{1,10}){1,10}x",
        ".?" * 40 + "x",
        r"[._\][](a+)+]",  # a set, whose end is easily mistaken, and a repeated repeat
        "(?i)(?:mo|MO)*x",
        "x*" * 10_000,
        "(" * 5_000,
    ],
)
def test_expressions_that_never_end(expression: str, tmp_path: Path) -> None:
    """A file's tensors say what is adapted, so such expressions are not matched; where they must be, they are named."""
    name = "model.layers.0.self_attn." + "a" * 40 + "_proj"
    model: nn.Module = nn.Linear(3, 4)
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    good = {"r": 2, "target_modules": [name.rpartition(".")[2]], "layers_to_transform": [0], "layers_pattern": "layers"}
    tensors = {f"{name}.lora_A": torch.ones(3, 3), f"{name}.lora_B": torch.ones(4, 3)}
    write_peft(Adapter(LoraConfig(r=3, target_modules=["x"]), tensors), tmp_path)
    started = time.perf_counter()
    for wrong in (
        {"target_modules": expression},
        {"exclude_modules": expression},
        {"layers_pattern": [expression]},
        {"rank_pattern": {expression: 3}},
        {"alpha_pattern": {expression: 3}},
    ):
        settings_ = {**good, "peft_type": "LORA", "rank_pattern": {"a" * 40 + "_proj": 3}, **wrong}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings_))
        if "alpha_pattern" in wrong or expression.startswith("(((("):
            with pytest.raises((AdapterError, ConfigError), match=re.escape(expression[:40])):
                read_adapter(tmp_path)
        else:
            apply_adapter(model, read_adapter(tmp_path))
            assert [name for name, _ in adapted_layers(model)] == [name]
            remove(model)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "expression",
    [
        r"model\.layers\.(1[0-9]|2[0-3]|[0-9])\.self_attn\.(q|k|v|o)_proj",
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*vision).*layers\.\d+\..*(q_proj|v_proj)$",
        r"(?:.*?(?:language|text).*?(?:attention|attn|mlp|ffn|dense).*?(?:q_proj|out_proj|o_proj|up_proj).*?)",
    ],
)
def test_expressions_that_people_use(expression: str) -> None:
    config = LoraConfig(target_modules=expression)
    started = time.perf_counter()
    for number in range(200):
        matches(config.target_modules, f"base.language_model.decoder.layers.{number}.attention.output.out_projection")
    assert time.perf_counter() - started < 20


def test_more_patterns_than_any_model_has() -> None:
    for field, value in (
        ("target_modules", ["x"] * 20_001),
        ("rank_pattern", {f"x{n}": 2 for n in range(20_001)}),
        ("r", 10**400),
        ("rank_pattern", {"x": 10**400}),
    ):
        with pytest.raises(ConfigError) as caught:
            LoraConfig(**{field: value})
        assert len(str(caught.value)) < 10_000


def test_more_expressions_than_can_be_matched_in_time(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.q_proj.lora_A": torch.ones(2, 3) for n in range(100)}
    tensors |= {f"layers.{n}.q_proj.lora_B": torch.ones(3, 2) for n in range(100)}
    config = LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={f".*.*.*.*x{n}": 2 for n in range(100)})
    write_peft(Adapter(config, tensors), tmp_path)
    with pytest.raises(AdapterError, match="alpha_pattern with 100 modules could take forever"):
        read_adapter(tmp_path)


def test_many_patterns_are_matched_in_time() -> None:
    ranks = {f"model.layers.{number}.self_attn.q_proj": 2 for number in range(3_000)}
    config = LoraConfig(rank_pattern=ranks)
    started = time.perf_counter()
    assert [config.rank_of(name) for name in list(ranks)[-300:]] == [2] * 300
    assert time.perf_counter() - started < 20


def test_damaged_tensors_are_named_before_they_touch_a_model() -> None:
    from loralib.adapter import apply_adapter

    model = nn.Sequential(nn.Linear(3, 4))
    before = [p.clone() for p in model.parameters()]
    config = LoraConfig(r=2, target_modules=["0"])
    for A in (
        torch.full((2, 3), float("nan")),
        torch.full((2, 3), float("inf")),
        torch.ones(2, 3, dtype=torch.int8),
        torch.ones(0, 3),
    ):
        with pytest.raises(AdapterError):
            apply_adapter(model, Adapter(config, {"0.lora_A": A, "0.lora_B": torch.ones(4, 2)}))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
