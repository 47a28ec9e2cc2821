"""One training step on a batch: loss and gradients exactly as with padding, computed without it.

`make_step` looks at the model once and chooses the fastest way that is exact for it:

- packed: the batch is one row (`loralib.data.packing`), each layer's attention follows the pack (`attention.py`), and
  the head runs at trained positions only, in chunks (`loss.py`);
- padded: where the model cannot be packed, because it is not built like transformers' models or because the check on
  random tokens shows that its examples would influence each other.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from ..data.packing import Pack, pack, pad
from ..data.tokens import TokenExample
from ..engine.attention import Plan, using
from ..engine.linears import Linears
from ..engine.loss import head_loss
from ..engine.operators import Operators
from ..errors import ConfigError, TrainingError

__all__ = ["Step", "StepStats", "evaluate_loss", "make_step"]


@dataclass(frozen=True)
class StepStats:
    """What one step did.

    Attributes:
        loss_sum: sum of the losses of the trained tokens, in nats.
        trained_tokens: how many tokens that sum is over.
        tokens: tokens of the batch, without padding.
        processed_tokens: tokens that the model computed (fewer where beginnings are shared, more with padding).
    """

    loss_sum: float
    trained_tokens: int
    tokens: int
    processed_tokens: int


class Step:
    """Computes losses and gradients of batches for one model; made by `make_step`.

    Attributes:
        packing: whether batches are packed.
        share_prompts: whether common beginnings are computed once.
        note: why batches are padded although packing was asked for, for the user; else "".
    """

    def __init__(
        self, model: nn.Module, *, packing: bool, share_prompts: bool, label_smoothing: float, chunk_tokens: int
    ) -> None:
        self._model = model
        self._label_smoothing = label_smoothing
        self._chunk = chunk_tokens
        self.packing = False
        self.share_prompts = False
        self.note = ""
        self._linears, self._operators = Linears(model), Operators.of(model)
        with self._linears.learning():
            self._split = _is_head_on_body(model)
        if packing:
            self.note = self._why_not_packed()
            self.packing = not self.note
            self.share_prompts = share_prompts and self.packing

    def forward_backward(self, batch: Sequence[TokenExample], *, loss_scale: float) -> StepStats:
        """Adds the gradient of ``loss_scale * (sum of the token losses)`` to the `grad` of the trained parameters.

        Args:
            batch: the examples of the step, or of one part of it where gradients are accumulated.
            loss_scale: usually 1 / the trained tokens of the whole step, so that the split does not matter.

        Returns:
            The loss before scaling, and counts.
        """
        return self._run(self._lay_out(batch), loss_scale)

    def loss(self, batch: Sequence[TokenExample]) -> StepStats:
        """Returns the loss of a batch without computing gradients.  The model's mode (train, eval) is the caller's."""
        return self._run(self._lay_out(batch), None)

    def unsmoothed(self) -> Step:
        """Returns the same step without label smoothing: of losses to compare, and whose exp is a perplexity."""
        twin = copy.copy(self)
        twin._label_smoothing = 0.0
        return twin

    def _lay_out(self, batch: Sequence[TokenExample]) -> Pack:
        laid = pack(batch, share=self.share_prompts) if self.packing else pad(batch)
        return laid.to(_device(self._model))

    def _run(self, laid: Pack, scale: float | None) -> StepStats:
        loss = 0.0
        if len(laid.states):
            # Around the backward pass too: checkpointed layers run again there.
            with self._attention_for(laid), self._linears.together(), self._operators.shorter():
                loss = self._compute(laid, scale)
        return StepStats(loss, laid.trained_tokens, laid.tokens, laid.processed_tokens)

    def _compute(self, laid: Pack, scale: float | None) -> float:
        with torch.set_grad_enabled(scale is not None):
            if self._split:
                hidden = self._hidden(laid)
                head: Callable[[Tensor], Tensor] = lambda chunk: _head(self._model, chunk)  # noqa: E731
            else:  # the model gives logits only: they take the place of hidden states, under a head that does nothing
                hidden, head = _logits(self._model(laid.ids)), lambda chunk: chunk
            states = hidden.flatten(0, 1)[laid.states]
        loss, gradient = head_loss(
            head, states, laid, gradient_scale=scale, label_smoothing=self._label_smoothing, chunk=self._chunk
        )
        if gradient is not None:
            states.backward(gradient)
        return loss

    def _hidden(self, laid: Pack) -> Tensor:
        """The last hidden states (B, T, D), after the final norm."""
        body = cast(nn.Module, self._model.base_model)
        if laid.ends is None:
            out = body(input_ids=laid.ids, attention_mask=laid.mask, use_cache=False)
        else:
            out = body(input_ids=laid.ids, position_ids=laid.positions, use_cache=False, plan=Plan.of(laid))
        return cast(Tensor, out.last_hidden_state)

    def _attention_for(self, laid: Pack) -> AbstractContextManager[None]:
        return nullcontext() if laid.ends is None else using(self._model.config)

    # The check at the start.

    def _why_not_packed(self) -> str:
        """Packs three short examples of random tokens; returns what goes wrong with it, or ""."""
        if not self._split:
            return f"{type(self._model).__name__} is not built like transformers' causal language models"
        with _evaluating(self._model), torch.no_grad():
            try:
                return self._packing_fault()
            except TrainingError as error:
                return str(error)
            except Exception as error:  # whatever a model does that packing did not think of, padding remains
                return f"{type(self._model).__name__} fails on a packed row: {type(error).__name__}: {error}"

    def _packing_fault(self) -> str:
        vocabulary = int(cast(Any, self._model).get_input_embeddings().weight.shape[0])
        rng = random.Random(0)

        def some(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(vocabulary) for _ in range(count))

        start = some(5)
        examples = [start + some(4), start + some(7), some(6)]
        packed = self._packed_logits(examples)
        alone = [self._model(torch.tensor([ids], device=_device(self._model)), use_cache=False) for ids in examples]
        single = [_logits(output)[0] for output in alone]
        size = max(float(logits.float().std()) for logits in single)
        tolerance = max(1e-4, 8 * torch.finfo(single[0].dtype).eps)
        for number, ids in enumerate(examples):
            others = list(range(len(examples)))
            others.remove(number)
            changed = self._packed_logits([*examples[:number], ids[:-3] + some(3), *examples[number + 1 :]])
            moved = max(float((changed[other] - packed[other]).abs().max()) for other in others)
            if not moved <= tolerance * size:
                return f"in a packed row, the logits of one example move by {moved:.2g} when another one changes"
        for ids, ours, theirs in zip(examples, packed, single, strict=True):
            targets = torch.tensor(some(len(ids)), device=theirs.device)
            apart = float((_losses(ours, targets) - _losses(theirs, targets)).abs().mean())
            if not apart <= tolerance * max(size, 1.0):
                return f"in a packed row, the loss of an example is off by {apart:.2g} from its loss alone"
        return ""

    def _packed_logits(self, examples: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The logits (T, V) of each example, from one packed row with shared beginnings."""
        # One more token, never computed: packing leaves out the last one.
        whole = [TokenExample((*ids, 0), (False, *[True] * len(ids))) for ids in examples]
        laid = pack(whole).to(_device(self._model))
        with self._attention_for(laid):
            logits = _head(self._model, self._hidden(laid)[0])
        return [logits[_places(laid, ids)] for ids in examples]


def make_step(
    model: nn.Module,
    *,
    packing: bool = True,
    share_prompts: bool = True,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 256,
) -> Step:
    """Looks at a model and returns the step that is fastest for it and exact.

    Args:
        model: a causal language model; its parameters with ``requires_grad`` are trained.  transformers' models can be
            packed; any other module that maps ids (B, T) to logits (B, T, V), or to an object with such `logits`, is
            padded.
        packing: pack each batch into one row without padding.
        share_prompts: compute beginnings that examples have in common once.  Exact without dropout; with dropout, the
            examples that share a beginning share its mask.
        label_smoothing: see `loralib.engine.loss.head_loss`.
        chunk_tokens: how many trained positions go through the head at once: memory against speed.

    Returns:
        The step; its `note` says why batches are padded, if they are although packing was asked for.

    Raises:
        ConfigError: label_smoothing or chunk_tokens is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing is {label_smoothing!r}, expected a number from 0 to below 1 (0.1 is usual)")
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens!r}, expected a positive number (256 is the default)")
    return Step(
        model,
        packing=packing,
        share_prompts=share_prompts,
        label_smoothing=label_smoothing,
        chunk_tokens=chunk_tokens,
    )


@overload
def evaluate_loss(
    step: Step, model: nn.Module, examples: Sequence[TokenExample], *, max_tokens: int = ...
) -> float: ...


@overload
def evaluate_loss(
    step: Step, model: nn.Module, examples: Sequence[TokenExample], *, max_tokens: int = ..., stop: Callable[[], bool]
) -> float | None: ...


def evaluate_loss(
    step: Step,
    model: nn.Module,
    examples: Sequence[TokenExample],
    *,
    max_tokens: int = 8192,
    stop: Callable[[], bool] | None = None,
) -> float | None:
    """Returns the average loss of the trained tokens, in nats; ``exp`` of it is the perplexity.

    Args:
        step: made by `make_step` for the model.
        model: switched to eval mode meanwhile.
        examples: what to measure on.
        max_tokens: tokens of the examples that are computed at once, at least one example's.
        stop: asked between batches; once it returns True, the result is None.
    """
    was_training = model.training
    model.eval()
    done = []
    try:
        for batch in _batches(examples, max_tokens):
            if stop is not None and stop():
                return None
            done.append(step.loss(batch))
    finally:
        model.train(was_training)
    return sum(s.loss_sum for s in done) / max(1, sum(s.trained_tokens for s in done))


def _batches(examples: Sequence[TokenExample], max_tokens: int, most: int = 16) -> Iterator[list[TokenExample]]:
    batch: list[TokenExample] = []
    for example in sorted(examples, key=lambda example: example.ids):  # neighbours share their prompts
        if batch and (len(batch) == most or sum(map(len, batch)) + len(example) > max_tokens):
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _is_head_on_body(model: nn.Module) -> bool:
    """Whether the model is a head on a body, as most of transformers' causal language models are."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if not isinstance(body, nn.Module) or not hasattr(model, "config"):
        return False
    ids = torch.arange(4, device=_device(model))[None]
    with _evaluating(model), torch.no_grad():
        whole = _logits(model(ids))
        try:
            apart = _head(model, body(input_ids=ids, use_cache=False).last_hidden_state[0])
        except (AttributeError, TypeError):  # its forward reaches into the body, or takes other arguments
            return False
    spread = float(whole.float().std())
    return spread < float("inf") and torch.allclose(apart, whole[0], rtol=1e-3, atol=1e-3 * spread)


def _head(model: nn.Module, states: Tensor) -> Tensor:
    """Runs what the model does after its body, whatever that is, on hidden states (R, D); returns logits (R, V).

    The model's own forward runs with the body replaced by one that has computed already, so that soft-capping, scaling
    and whatever else the model does to its logits stay its own.
    """
    name = cast(str, model.base_model_prefix)
    body = model._modules[name]
    model._modules[name] = _Done(states[None])
    try:
        return _logits(model(use_cache=False)).flatten(0, 1)
    finally:
        model._modules[name] = body


class _Done(nn.Module):
    """A body that has computed already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.output = _Output(states)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return self.output


class _Output:
    """What a body returns: the last hidden states, and None for all else that it may be asked for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TrainingError(
            f"the model returns {type(output).__name__}, expected logits of shape (batch, tokens, vocabulary), "
            "or an object that holds them as `logits`"
        )
    return logits


def _places(laid: Pack, ids: Sequence[int]) -> list[int]:
    """Finds the tokens of an example in a packed row."""
    assert laid.ends is not None
    row, ends = list(zip(laid.positions[0].tolist(), laid.ids[0].tolist(), strict=True)), laid.ends.tolist()
    places: list[int] = []
    for wanted in enumerate(ids):
        start, end = (places[-1] + 1, ends[places[-1]]) if places else (0, len(row))
        places.append(next(place for place in range(start, end) if row[place] == wanted))
    return places


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off, module by module back as it was: parts of a model may be in different modes."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
