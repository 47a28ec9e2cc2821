"""Training speed and memory compared with PEFT: a process each, step by step in turn, on the same examples.

python benchmarks/train.py speed          time per step, and fraction of the machine's GEMM rate; half an hour
                                          with --rounds 3 --steps 2; the defaults take far longer
python benchmarks/train.py memory         peak memory at 8 sequences of 512 tokens
python benchmarks/train.py loss           wall time to PEFT's validation loss after an epoch; an hour
                                          (--examples 400 --seeds 1 for a quick look; --keep DIR keeps the adapters)

Results go to benchmarks/train_<what>.json; those of `speed` replace earlier results of the same cases.  Peers train as
in normal use, with a uniform shuffle and padding to the longest of a batch: "peft fp32" as it comes, "peft autocast"
and "peft bf16" with the fastest settings on a CPU.  A step is faster if glibc keeps freed memory, so `speed` and `loss`
configure it to, for peers and for us; `memory` leaves peers the default, which needs the least.  "unsloth" is Unsloth's
CPU path, compiled, with its own settings.  It requires other versions of many packages, so it needs a separate
environment: --unsloth_python names its Python; without that flag, Unsloth is left out.

A step is forward, backward, clipping and fused AdamW.
"ours" uses the defaults, with a uniform shuffle; "ours, nothing shared" computes each example separately; "ours, 4
siblings" puts up to four examples of a prompt into a step, which computes the prompt once; `loss` measures both.
Machines are shared, so the figures are minima, and medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if "UNSLOTH_CPU_COMPILE" in os.environ:
    sys.path[:0] = site.getsitepackages()  # multiprocessing passes on the parent's path, which lacks Unsloth
    import unsloth  # before transformers, which it patches

import torch
import transformers
from machine import machine
from memory_use import peak_bytes
from tables import in_place
from torch import nn

import loralib as lora
from loralib.allocator import keep_freed_memory
from loralib.console import say
from loralib.data import TokenExample, encode, read_examples
from loralib.data.packing import epoch_order, pack
from loralib.training.memory import freeze_objects
from loralib.training.step import make_step

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "examples" / "NLG" / "data" / "e2e"
SEED = 0
UNSLOTH: Path | None = None  # the Python that has it installed
LR = 5e-4
SIBLINGS = lora.TrainConfig().max_siblings
MOST_SIBLINGS = 4  # examples of one prompt in a batch, where sharing is tested
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The equivalent of `keep_freed_memory`, for processes configured from outside, before they start.
KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
TARGETS: dict[str, dict[str, Any]] = {
    "smollm2": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "gpt2": {"r": 4, "lora_alpha": 32, "target_modules": ["c_attn"]},
}


# What is trained.


def base(name: str, dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M, or GPT-2 124M's shape with random weights, which take the same time."""
    if name == "smollm2":
        model, _ = lora.load_base("smollm2-135m", dtype=dtype)
        return model
    torch.manual_seed(SEED)
    config = transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def ours(name: str) -> nn.Module:
    model = base(name, torch.bfloat16)
    lora.inject(model, lora.LoraConfig(**TARGETS[name]))
    return model.train()


def peers(name: str, dtype: torch.dtype) -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **TARGETS[name])
    return peft.get_peft_model(base(name, dtype), config).train()


def unsloth(name: str) -> nn.Module:
    """Unsloth's CPU path as in its notebooks; only for SmolLM2, since it does not support GPT-2."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as directory:
        model, words = lora.load_base("smollm2-135m", dtype="bf16")
        model.save_pretrained(directory)
        words.save_pretrained(directory)
        model, _ = FastLanguageModel.from_pretrained(directory, dtype=torch.bfloat16, load_in_4bit=False)
    settings = {**TARGETS[name], "target_modules": LLAMA_LINEARS}
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False, **settings)
    trained: nn.Module = FastLanguageModel.for_training(model)
    return trained


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)


def apply(model: nn.Module, steps: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    steps.step()
    steps.zero_grad()


def collate(batch: Sequence[TokenExample]) -> dict[str, torch.Tensor]:
    """Pads to the longest example, like transformers' collators."""
    width = max(len(example) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        count = len(example)
        ids[row, :count] = torch.tensor(example.ids)
        mask[row, :count] = 1
        labels[row, :count] = torch.where(torch.tensor(example.trained), ids[row, :count], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peer_step(model: nn.Module, steps: torch.optim.Optimizer, autocast: bool) -> Callable[[list[TokenExample]], None]:
    def step(batch: list[TokenExample]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**collate(batch)).loss
        loss.backward()
        apply(model, steps)

    return step


def our_step(model: nn.Module, steps: torch.optim.Optimizer, share: bool) -> Callable[[list[TokenExample]], None]:
    engine = make_step(model, share_prompts=share)
    assert engine.packing, engine.note

    def step(batch: list[TokenExample]) -> None:
        trained = sum(sum(example.trained) for example in batch)
        engine.forward_backward(batch, loss_scale=1 / trained)
        apply(model, steps)

    return step


# A process for each contender, so that none is affected by another's memory or allocator.


class Contender:
    """One way of training, in a separate process, which waits while others train."""

    def __init__(self, way: str, model: str, seed: int = SEED) -> None:
        self.way = way
        context = multiprocessing.get_context("spawn")
        context.set_executable(str(UNSLOTH) if way == "unsloth" else sys.executable)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, way, model, seed), daemon=True)
        with environment(way):
            self._process.start()
        theirs.close()  # so that we do not wait for a contender that dies, e.g. for lack of memory

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # it has died
            self._pipe.send(None)
        self._process.join()

    def ask(self, what: str, given: Any = None) -> Any:
        """Sends it a request, and returns the result."""
        try:
            self._pipe.send((what, given))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise SystemExit(f"{self.way!r} died over {what!r}; if the system was out of memory, free some") from error

    def step(self, batch: list[TokenExample]) -> float:
        """Takes a step; returns its duration in seconds."""
        return float(self.ask("step", batch))


@contextlib.contextmanager
def environment(way: str) -> Iterator[None]:
    """Sets the environment variables with which a contender's process starts; ours needs none."""
    before = dict(os.environ)
    if not way.startswith("ours"):
        os.environ.update(KEEP_FREED_MEMORY)
    if way == "unsloth":
        os.environ.update(UNSLOTH_CPU_COMPILE="1", PYTHONPATH=str(HERE.parent), HF_HUB_OFFLINE="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(pipe: Connection, way: str, name: str, seed: int) -> None:
    """The main loop of a contender's process."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    with ExitStack() as stack:
        if way.startswith("ours"):
            stack.enter_context(keep_freed_memory())
            model = ours(name)
            step = our_step(model, optimizer(model), "nothing shared" not in way)
            stack.enter_context(freeze_objects())
        else:
            dtype = torch.bfloat16 if way == "peft bf16" else torch.float32
            model = unsloth(name) if way == "unsloth" else peers(name, dtype)
            step = peer_step(model, optimizer(model), way == "peft autocast")
        while (asked := pipe.recv()) is not None:
            what, given = asked
            answer: Any = None
            if what == "step":
                start = time.perf_counter()
                step(given)
                answer = time.perf_counter() - start
            elif what == "loss":
                answer = validation_loss(model, given) if way.startswith("ours") else peer_validation_loss(model, given)
            elif what == "save":
                save(model, given)
            elif what == "gemm":
                answer = gemm_rate(model, given)
            elif what == "flops":
                answer = flops(model, given, "nothing shared" not in way)
            pipe.send(answer)


def save(model: Any, directory: Path) -> None:
    """Writes a PEFT directory, which both sides support."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(directory)
    else:
        lora.save_adapter(model, directory)


# The data.


def tokenizer() -> Any:
    return lora.load_base("smollm2-135m")[1]


def e2e(split: str, count: int | None = None, data: Path = DATA) -> list[TokenExample]:
    return list(encode(read_examples(data / f"{split}.txt"), tokenizer(), 1024, "clm").examples)[:count]


def mixed_lengths(count: int) -> list[TokenExample]:
    """Examples of 32 to 1,024 tokens without a shared prefix, half of each trained; short ones are more common."""
    rng = random.Random(SEED)
    examples = []
    for _ in range(count):
        length = int(32 * 32 ** rng.random())
        ids = tuple(rng.randrange(49152) for _ in range(length))
        examples.append(TokenExample(ids, tuple(place >= length // 2 for place in range(length))))
    return examples


def batches(examples: list[TokenExample], size: int, siblings: int, epoch: int = 0) -> list[list[TokenExample]]:
    order = epoch_order(examples, size, seed=SEED, epoch=epoch, max_siblings=siblings)
    return [[examples[index] for index in batch] for batch in order if len(batch) == size]


# The machine's capability, and a step's demand.


def linears(model: nn.Module) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of every linear layer of the body."""
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding) and name != "lm_head":
            transposed = type(module).__mro__[-2].__name__ == "Conv1D" or hasattr(module, "nf")
            found.append((name, *(weight.shape if transposed else weight.shape[::-1])))
    return found


def flops(model: nn.Module, batch: list[TokenExample], share: bool) -> float:
    """Twice the number of multiply-adds in the base's linear layers, for the tokens that a step processes.

    Forward and the gradient of inputs: no weight gradients, since weights are frozen, and no gradient of the first
    layer's inputs, below which nothing is trained.  LoRA's own products and attention are excluded.
    """
    row = pack(batch, share=share)
    shapes = linears(model)
    first = min(name.split(".")[2] for name, _, _ in shapes)
    attention = [
        i * o
        for name, i, o in shapes
        if f".{first}." in name and name.endswith(("q_proj", "k_proj", "v_proj", "c_attn"))
    ]
    body = sum(i * o for _, i, o in shapes)
    vocabulary, width = model.get_output_embeddings().weight.shape
    return 2.0 * row.processed_tokens * (2 * body - sum(attention)) + 4.0 * len(row.states) * vocabulary * width


def gemm_rate(model: nn.Module, tokens: int) -> float:
    """The highest FLOP/s of plain bf16 products: 2048 cubed, and the model's own shapes."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    shapes = {(2048, 2048, 2048), (tokens, width, vocabulary), *((tokens, i, o) for _, i, o in linears(model))}
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        for _ in range(10):
            start = time.perf_counter()
            nn.functional.linear(a, b)
            best = max(best, 2.0 * m * k * n / (time.perf_counter() - start))
    return best


# Measurements.


def interleaved(
    contenders: Sequence[Contender], work: dict[str, list[list[TokenExample]]], rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of every step, [method][round][step]; in each round every contender takes all its steps."""
    seconds: dict[str, list[list[float]]] = {each.way: [] for each in contenders}
    for number in range(rounds + 1):
        for each in contenders:
            taken = [each.step(batch) for batch in work[each.way]]
            if number:  # the first round warms up
                seconds[each.way].append(taken)
    return seconds


def best_step(rounds: list[list[float]]) -> float:
    """The mean over a contender's batches of each batch's fastest round."""
    return statistics.mean(min(times) for times in zip(*rounds, strict=True))


def median_ratio(a: list[list[float]], b: list[list[float]]) -> float:
    """The median over rounds of how many times longer a took than b."""
    return statistics.median(sum(x) / sum(y) for x, y in zip(a, b, strict=True))


def tokens(work: list[list[TokenExample]]) -> int:
    """The number of tokens of the examples, without padding."""
    return sum(len(example) for batch in work for example in batch)


def speed(rounds: int, steps: int, models: Sequence[str], sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    examples, mixed = e2e("train"), mixed_lengths(200)
    for name in models:
        for data, size in [*(("e2e", size) for size in sizes), ("mixed", 4)]:
            source = examples if data == "e2e" else mixed
            count = max(1, steps * 8 // size)
            plain = batches(source, size, 1)[:count]
            work = {
                "ours": batches(source, size, SIBLINGS)[:count],
                "peft bf16": plain,
                "peft autocast": plain,
            }
            if data == "e2e":
                shared = batches(source, size, MOST_SIBLINGS)[:count]
                work = {f"ours, {MOST_SIBLINGS} siblings": shared, "ours, nothing shared": plain, **work}
            # All are in memory at once, and keep freed memory.  What would not fit beside the others is left out.
            if data == "mixed" and name == "smollm2":
                del work["peft bf16"]  # the slower one
            if data == "e2e" and size <= 8:
                work["peft fp32"] = plain
            if UNSLOTH is not None and name == "smollm2" and size <= 8:
                work["unsloth"] = plain
            with ExitStack() as stack:
                contenders = [stack.enter_context(Contender(way, name)) for way in work]
                seconds = interleaved(contenders, work, rounds)
                of = {each.way: each for each in contenders}
                rate = of["ours"].ask("gemm", 512)
                needed = {
                    way: statistics.mean(of[way].ask("flops", batch) for batch in work[way])
                    for way in work
                    if way.startswith("ours")
                }
            best_peer = min(
                (peer for peer in ("peft bf16", "peft autocast") if peer in work),
                key=lambda peer: best_step(seconds[peer]),
            )
            for way in needed:
                # Sharing puts other examples into a batch, so the time for the same number of tokens is compared.
                longer = tokens(work[way]) / tokens(plain)
                yield {
                    "model": name,
                    "data": data,
                    "batch": size,
                    "way": way,
                    "step_s": {k: best_step(v) for k, v in seconds.items()},
                    "median_step_s": {k: statistics.median(sum(r) / len(r) for r in v) for k, v in seconds.items()},
                    "best_tuned": best_peer,
                    # How many times longer a peer's step takes: for the fastest rounds, and the median over rounds.
                    "times": {
                        peer: [
                            longer * best_step(seconds[peer]) / best_step(seconds[way]),
                            longer * median_ratio(seconds[peer], seconds[way]),
                        ]
                        for peer in seconds
                        if peer not in needed
                    },
                    "gemm_flops": rate,
                    "share_of_gemm_rate": needed[way] / best_step(seconds[way]) / rate,
                }


def memory_of(way: str, name: str) -> int:
    """Peak bytes of this process after three steps on 8 sequences of 512 tokens, half of each trained."""
    rng = random.Random(SEED)
    flags = tuple(place >= 256 for place in range(512))
    batch = [TokenExample(tuple(rng.randrange(49152) for _ in flags), flags) for _ in range(8)]
    with ExitStack() as stack:
        if way == "ours":
            stack.enter_context(keep_freed_memory())
            model = ours(name)
            step = our_step(model, optimizer(model), True)
        else:
            dtype = torch.float32 if way != "peft bf16" else torch.bfloat16
            model = unsloth(name) if way == "unsloth" else peers(name, dtype)
            step = peer_step(model, optimizer(model), way == "peft autocast")
        for _ in range(3):
            step(batch)
    return peak_bytes()


def memory(models: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in models:
        peak = {}
        also = ["unsloth"] if UNSLOTH is not None and name == "smollm2" else []
        for contender in ("ours", "peft fp32", "peft bf16", "peft autocast", *also):
            python = str(UNSLOTH) if contender == "unsloth" else sys.executable
            command = [python, __file__, "memory", "--of", contender, "--models", name]
            with environment(contender):
                own = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
            done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=own)
            peak[contender] = int(done.stdout.split()[-1])
        best = min(peak["peft bf16"], peak["peft autocast"])
        yield {"model": name, "peak_bytes": peak, "share_of_best_tuned": peak["ours"] / best}


def validation_loss(model: nn.Module, examples: list[TokenExample]) -> float:
    engine = make_step(model)
    model.eval()
    done = [engine.loss(examples[at : at + 16]) for at in range(0, len(examples), 16)]
    model.train()
    return float(sum(stats.loss_sum for stats in done)) / sum(stats.trained_tokens for stats in done)


def peer_validation_loss(model: nn.Module, examples: list[TokenExample]) -> float:
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for at in range(0, len(examples), 16):
            padded = collate(examples[at : at + 16])
            trained = int((padded["labels"][:, 1:] != -100).sum())
            total += model(**padded).loss.item() * trained
            count += trained
    model.train()
    return total / count


def to_loss(size: int, seeds: int, count: int | None, data: Path, keep: Path | None) -> Iterator[dict[str, Any]]:
    """Each trains for an epoch, taking steps in turn; when do we reach the final loss of the best-tuned PEFT?

    Validation is not timed.  If one epoch is not enough for us, a second one follows.
    """
    examples, valid = e2e("train", count, data), e2e("valid", None, data)[::2][:200]
    way = best_peer(batches(examples, size, 1)[:3])
    drawn = {"ours": SIBLINGS, "siblings": MOST_SIBLINGS}  # maximum number of examples of a prompt in a batch
    often = max(1, 32 // size)
    for seed in range(seeds):
        theirs = batches(examples, size, 1, epoch=seed)
        steps = len(theirs)
        with ExitStack() as stack:
            peer = Run(stack.enter_context(Contender(way, "smollm2", seed)), theirs)
            us = {
                name: Run(
                    stack.enter_context(Contender("ours", "smollm2", seed)),
                    [batch for part in (seed, seed + seeds) for batch in batches(examples, size, siblings, epoch=part)],
                )
                for name, siblings in drawn.items()
            }
            for number in range(1, 2 * steps + 1):
                if number <= steps:
                    peer.step(valid if number % 50 == 0 or number == steps else None)
                going = [run for run in us.values() if number <= steps or not run.reached(peer.loss)]
                for run in going:
                    every = often if number > 0.7 * steps else 50
                    run.step(valid if number % every == 0 or number == steps else None)
                if number == steps and keep is not None:
                    peer.contender.ask("save", keep / f"seed{seed}" / "peft")
                    us["ours"].contender.ask("save", keep / f"seed{seed}" / "ours")
                if number >= steps and not going:
                    break
        runs = {"peft": peer, **us}
        row = {
            "batch": size,
            "seed": seed,
            "peft": peer.contender.way,
            "goal": peer.loss,
            "steps": steps,
            "peft_s": sum(peer.seconds),
            "step_s": {
                name: {"min": min(run.seconds), "median": statistics.median(run.seconds)} for name, run in runs.items()
            },
            "curves": {name: run.curve for name, run in runs.items()},
        }
        for name in us:
            reached = runs[name].reached(peer.loss)
            row |= {
                f"{name}_s": sum(runs[name].seconds[:steps]),
                f"{name}_loss": next(loss for step, _, loss in runs[name].curve if step == steps),
                f"{name}_to_goal_steps": reached and reached[0],
                f"{name}_to_goal_s": reached and reached[1],
            }
            after = f"reached after {reached[1]:.0f} s" if reached else "not reached"
            say(
                f"batch {size}, seed {seed}: {peer.contender.way} {peer.loss:.4f} in {row['peft_s']:.0f} s; {name} "
                f"{row[f'{name}_loss']:.4f} in {row[f'{name}_s']:.0f} s, {peer.loss:.4f} {after}"
            )
        yield row


class Run:
    """A contender's progress through its batches.

    Attributes:
        seconds: duration of each step.
        curve: step, seconds until then, and validation loss.
    """

    def __init__(self, contender: Contender, work: list[list[TokenExample]]) -> None:
        self.contender, self.work = contender, work
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = []

    def step(self, valid: list[TokenExample] | None) -> None:
        """Trains on the next batch; then measures the validation loss, if `valid` is given."""
        self.seconds.append(self.contender.step(self.work[len(self.seconds)]))
        if valid is not None:
            self.curve.append((len(self.seconds), sum(self.seconds), self.contender.ask("loss", valid)))

    @property
    def loss(self) -> float:
        """The last validation loss measured."""
        return self.curve[-1][2]

    def reached(self, goal: float) -> tuple[int, float, float] | None:
        """Returns the first point of the curve that reaches the goal."""
        return next((point for point in self.curve if point[2] <= goal), None)


def best_peer(work: list[list[TokenExample]]) -> str:
    """Determines whether a bf16 base or autocast is faster here."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(way, "smollm2")) for way in ("peft bf16", "peft autocast")]
        seconds = interleaved(contenders, {each.way: work for each in contenders}, 2)
    return min(seconds, key=lambda way: best_step(seconds[way]))


def find_unsloth(python: Path | None) -> None:
    """Makes Unsloth a peer if it is available; prints a note if not."""
    global UNSLOTH
    if python is None:
        return
    check = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('unsloth') is None)"]
    if subprocess.run(check).returncode:
        say(f"{python} has no Unsloth: it is left out")
    else:
        UNSLOTH = python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "loss"])
    parser.add_argument("--models", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="default: 8 and 32, or 8 (loss)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="different batches a contender takes in each round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="directory with train.txt and valid.txt (loss)")
    parser.add_argument("--keep", type=Path, help="where the adapters go (loss), for benchmarks/quality.py")
    parser.add_argument("--examples", type=int, help="train on fewer examples (loss)")
    parser.add_argument("--unsloth_python", type=Path, help="a Python that has Unsloth (speed, memory)")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where the results go")
    args = parser.parse_args()
    find_unsloth(args.unsloth_python)
    transformers.logging.set_verbosity_error()
    if args.of:
        say(str(memory_of(args.of, args.models[0])))
        return
    settings = {"examples": args.examples, "lr": LR, **TARGETS["smollm2"]}
    sizes = args.batch_sizes or ([8] if args.what == "loss" else [8, 32])
    out = args.out or HERE / f"train_{args.what}.json"
    report: dict[str, Any] = {"machine": machine("transformers", "peft"), "settings": settings, "results": []}
    measured = {
        "speed": lambda: speed(args.rounds, args.steps, args.models, sizes),
        "memory": lambda: memory(args.models),
        "loss": lambda: (
            row for size in sizes for row in to_loss(size, args.seeds, args.examples, args.data, args.keep)
        ),
    }
    for row in measured[args.what]():
        report["results"].append(row)
        if args.what == "speed":
            times = ", ".join(
                f"{best:.2f} ({median:.2f}) times {peer}" for peer, (best, median) in row["times"].items()
            )
            say(
                f"{row['model']} {row['data']} batch {row['batch']}, {row['way']}: {row['step_s'][row['way']]:.3f} s, "
                f"{times}, {row['share_of_gemm_rate']:.0%} of {row['gemm_flops'] / 1e9:.0f} GFLOP/s"
            )
        elif args.what == "memory":
            peaks = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in row["peak_bytes"].items())
            say(f"{row['model']}: {peaks}; ours is {row['share_of_best_tuned']:.2f} of the best-tuned")
        whole = report
        if args.what == "speed":
            whole = report | {"results": in_place(out, report["results"], "model", "data", "batch", "way")}
        for place in [out, *([args.keep / "train_loss.json"] if args.keep else [])]:
            # After each row, so that results are kept if the rest is aborted.
            place.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
