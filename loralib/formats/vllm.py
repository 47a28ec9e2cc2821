"""What vLLM accepts in an adapter, by the base model's class, according to the source code of vLLM 0.33.

It loads adapters of linear layers for most models, for some models none, and for others also those of embeddings and
heads.  A classifier's head may be trained in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..adapter import Adapter
from ..config import LoraConfig
from ..errors import AdapterError
from ..wrapping import output_head
from . import experts

__all__ = ["accepted_ranks", "head_faults", "load_faults", "takes_adapters", "tensor_faults", "with_experts"]

accepted_ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank

_HEADS = ("classifier", "score")  # allowed in modules_to_save, if it is a single linear layer
# Kinds of models by their class names in transformers, without suffixes such as ForCausalLM.
_NO_ADAPTERS = frozenset(
    """bloom codegen cohere2moe cpmant ctrl dbrx falcon falconmamba gemma3n gpt2 gptj gptneo mamba mamba2 moonshine mpt
    olmo openaigpt persimmon rwkv stablelm xglm xlnet zamba zamba2""".split()
)
_EMBEDDING_AND_HEAD = frozenset(
    """apertus deci ernie4_5 exaone4 exaonemoe falconh1 granite granitemoe granitemoehybrid granitemoeshared
    hyperclovax jamba lfm2 lfm2moe llama llama4 minicpm minicpm3 mixtral nemotron nemotronh phi3 phimoe qwen3 qwen3moe
    qwen3_5 qwen3_5moe solar""".split()
)
# From arcee on, these run in vLLM's transformers backend.
_EMBEDDING = frozenset(
    """cohere cohere2 arcee cwm flexolmo glm hunyuandensev1 jais2 olmo2 olmo3 phi seedoss smollm3 starcoder2
    vaultgemma""".split()
)
# These have one module in transformers where vLLM's loader wants to find two.
_SPLIT = {("glm4", "gate_up_proj"): "gate_proj and up_proj"}
_CLASS = re.compile(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


def takes_adapters(model: nn.Module) -> bool:
    """Tells whether vLLM loads any adapters for this kind of model."""
    return _kind_of(model) not in _NO_ADAPTERS


def load_faults(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Returns which adapted modules of a base model vLLM rejects, with reasons.

    Args:
        model: the base model.
        modules: names and modules.
    """
    kind = _kind_of(model)
    both = kind in _EMBEDDING_AND_HEAD
    accepted = {"embed_tokens", "lm_head"} if both else {"embed_tokens"} if kind in _EMBEDDING else set()
    faults = []
    head = output_head(model)
    for name, module in modules:
        leaf = name.rpartition(".")[2]
        if leaf not in accepted and (isinstance(module, nn.Embedding) or module is head):
            which = "embeddings" if isinstance(module, nn.Embedding) else "the head"
            faults.append(f"{name}: vLLM does not load adapters for {which} of {type(model).__name__}")
        elif parts := _SPLIT.get((kind, leaf)):
            faults.append(f"{name}: vLLM only loads adapters for {parts} of {type(model).__name__}, which is one here")
    return faults


def head_faults(config: LoraConfig, model: nn.Module | None) -> list[str]:
    """Returns why modules trained in full do not load in vLLM, which accepts only a classifier's head.

    Args:
        config: only `modules_to_save` matters.
        model: the base model; None: only check the names.
    """
    names = list(config.modules_to_save or ())
    if any(name not in _HEADS for name in names) or len(names) > 1:
        return [
            f"modules_to_save {names}: of the modules trained in full, vLLM loads only the head of a classifier, "
            f"called {' or '.join(_HEADS)}"
        ]
    if model is None or not names:
        return []
    heads = [(name, module) for name, module in model.named_modules() if config.saves(name)]
    is_classifier = type(model).__name__.endswith("Classification")
    return [
        f"{name} is {'not a classifier' if not is_classifier else type(module).__name__}: of the modules trained in "
        "full, vLLM loads only the head of a classifier, if it is a single linear layer"
        for name, module in heads
        if not is_classifier or name != names[0] or not isinstance(module, nn.Linear)
    ]


def tensor_faults(names: Iterable[str]) -> list[str]:
    """Returns which tensors of an adapter vLLM does not load; of modules trained in full it loads single linear layers.

    Args:
        names: names of the tensors.

    >>> tensor_faults(["model.layers.0.q_proj.lora_A", "score.weight", "classifier.dense.weight"])
    ['classifier.dense.weight: of the modules trained in full, vLLM loads only a linear score or classifier']
    """
    in_full = [name.split(".") for name in names if ".lora_" not in name]
    return [
        f"{'.'.join(parts)}: of the modules trained in full, vLLM loads only a linear score or classifier"
        for parts in in_full
        if parts[-2:-1] not in (["score"], ["classifier"])
    ]


# Classes for which vLLM reads experts' adapters in PEFT's layout, and in no other.
_EXPERTS_IN_ONE = frozenset(
    """GptOssForCausalLM InternS1ProForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration""".split()
)


def with_experts(adapter: Adapter, model: nn.Module | None) -> tuple[Adapter, str]:
    """Converts an adapter of experts to the form that vLLM reads; returns it, and a note on what was done.

    For some classes of models this is PEFT's layout, with both weights of a layer; for all others, one module per
    expert and projection, named as in checkpoints, with all three projections of each expert.

    Args:
        adapter: portable.
        model: the base model.

    Raises:
        AdapterError: no model is given, or the names of its experts are unknown.
    """
    if model is None:
        raise AdapterError(
            "vLLM identifies adapters of experts by their names in checkpoints; give the base model (--model)"
        )
    if type(model).__name__ not in _EXPERTS_IN_ONE:
        return experts.unstack_experts(adapter, model), "each expert now has its own modules, as vLLM expects (exact)"
    return experts.with_both(adapter, model), "the experts stay in one tensor, as vLLM expects for this model"


def _kind_of(model: nn.Module) -> str:
    """Returns a model's kind in the form used in the tables above.

    >>> class Qwen2ForCausalLM(nn.Module): ...
    >>> _kind_of(Qwen2ForCausalLM())
    'qwen2'
    """
    return _CLASS.sub("", type(model).__name__).lower()
