"""llama.cpp's server (from the wheel xllamacpp) with the benchmarks' base and adapters, in a separate process."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import torch

from loralib import Adapter, load_base
from loralib.bases.loading import _bundled_file
from loralib.formats import export, make_portable


def write(root: Path, adapters: Mapping[str, Adapter]) -> None:
    """Writes the default base and its adapters as GGUF, in bf16."""
    model, _ = load_base("smollm2-135m", dtype="bf16")
    for name, adapter in adapters.items():
        export(make_portable(adapter, "llamacpp", model), "llamacpp", root / f"{name}.gguf", model)
    write_base(root / "base.gguf")


def write_base(path: Path) -> None:
    """Writes the default base as loaded by our `load_base`: its 4-bit weights, as bf16."""
    reader = gguf.GGUFReader(str(_bundled_file().locate()))
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def serving(root: Path, places: int) -> Iterator[str]:
    """Serves root/base.gguf with the adapters root/a0.gguf, a1.gguf, ..., each at scale 0; yields the address."""
    with started([str(Path(__file__)), str(root), str(places)], r"address (\S+)") as address:
        yield address


def serve(root: Path, places: int) -> None:
    """Runs the server until its input ends."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(root / "base.gguf")
    settings.n_parallel, settings.n_ctx = places, places * 256
    settings.fit_params, settings.verbosity, settings.port = False, -1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    paths = sorted(root.glob("a*.gguf"), key=lambda path: int(path.stem[1:]))
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in paths]
    server = xllamacpp.Server(settings)
    print(f"address {server.listening_address}", flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def started(arguments: list[str], pattern: str) -> Iterator[str]:
    """Starts a server, and yields its address once it prints it."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(pattern, line):
                yield found[1]
                return
        raise SystemExit(f"{arguments} did not start")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
