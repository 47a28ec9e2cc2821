"""One training step on a batch: exactly the loss and gradients of padded computation, but without the padding.

`make_step` inspects the model once and chooses the fastest method that is exact for it:

- packed: the batch is one row (`loralib.data.packing`), each layer's attention follows the structure of the pack
  (`engine/attention.py`), and the head runs only at trained positions, in chunks (`engine/loss.py`);
- padded: if the model cannot be packed, because it is not structured like transformers' models or because the check
  on random tokens shows that its examples would influence each other.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..allocator import keep_freed_memory
from ..data.packing import Pack, extended, pack, pad
from ..data.tokens import TokenExample
from ..engine.causal import require_causal
from ..engine.forward import Forward, device_of, why_not_compiled
from ..engine.half import computes_in_half, scaled_backward
from ..engine.loss import Predictions, head_loss
from ..engine.placement import engine_mode
from ..engine.rope import forget_length, remembers_length, rope_limit, split_by_length
from ..engine.transfer import to_device
from ..errors import ConfigError, UnsupportedModelError
from ..modes import evaluating
from ..wrapping import is_spread
from .objective import StepStats, differentiate

__all__ = ["Step", "make_step"]

_NOTHING = TokenExample((0, 0), (False, True))


class Step:
    """Computes losses and gradients of batches for one model, for the objectives clm and jlm; created by `make_step`.

    It is a `loralib.training.objective.TrainingStep`.  As a context manager it prepares the model for a whole run;
    otherwise each call does so itself.

    Attributes:
        packing: whether batches are packed.
        share_prompts: whether common prefixes are computed once.
        compiles: whether decoder blocks are compiled by torch.compile, on a GPU.
        note: why batches are padded although packing was requested, for the user; else "".
        prepacked_bytes: memory that prepacked copies of frozen weights will take.
    """

    unit = "token"
    shown: tuple[str, ...] = ()
    width = 2

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: bool,
        share_prompts: bool,
        label_smoothing: float,
        chunk_tokens: int,
        compiles: bool,
        twins: Sequence[nn.Module] = (),
    ) -> None:
        require_causal(model)
        self._model = model
        self._label_smoothing = label_smoothing
        self._chunk = chunk_tokens
        self._forward = Forward(model, compiles=compiles and packing, twins=twins)
        self._rope_limit, self._remembers = rope_limit(model), remembers_length(model)
        self._half = computes_in_half(model)
        self._is_spread = is_spread(model)
        self._run = ExitStack()
        self.prepacked_bytes = self._forward.prepacked_bytes
        self.note = self._why_not_packed() if packing else ""
        self.packing = packing and not self.note
        if self.note and self._forward.compiles:  # compilation is only for packed rows
            self._forward = Forward(model, compiles=False, twins=twins)
        self.compiles = self._forward.compiles
        self._forward.has_layouts = self.packing
        self._forward.compile_blocks()
        self.share_prompts = share_prompts and self.packing

    def __enter__(self) -> Step:
        self._run.enter_context(self._forward.hold_model("training"))
        return self

    def __exit__(self, *error: object) -> None:
        self._run.close()

    def forward_backward(self, batch: Sequence[TokenExample], *, loss_scale: float) -> StepStats:
        """Adds the gradient of ``loss_scale * (sum of the token losses)`` to the `grad` of the trained parameters.

        Args:
            batch: the examples of the step, or of one part of it if gradients are accumulated.
            loss_scale: usually 1 / number of trained tokens in the whole step, so that the split does not matter.

        Returns:
            The loss before scaling, and counts.

        Raises:
            BusyModelError: the model is currently generating or being trained elsewhere.
        """
        return self._compute(batch, loss_scale, "training")

    def loss(self, batch: Sequence[TokenExample]) -> StepStats:
        """Returns the loss of a batch without computing gradients.  The caller sets the model's mode (train or eval).

        Raises:
            BusyModelError: the model is currently being trained elsewhere.
        """
        return self._compute(batch, None, "inference")

    def passes(self, batch: Sequence[TokenExample]) -> list[list[TokenExample]]:
        """Splits a batch into the parts that go through the model one after another; usually just one."""
        return list(split_by_length(batch, self._rope_limit, _computed_tokens)) or [list(batch)]

    def count(self, examples: Sequence[TokenExample]) -> int:
        """Returns the number of terms in the loss of these examples: their trained tokens."""
        return sum(sum(example.trained) for example in examples)

    def scales(self, batches: Sequence[Sequence[TokenExample]], *, paper_accum: int | None = None) -> list[float]:
        """Returns the `loss_scale` of each batch of an update.

        Weighted by tokens, the loss does not depend on how an update is split into batches.  The paper's code averages
        over the `paper_accum` batches instead, and divides each batch by its tokens + 0.0001.
        """
        counts = [self.count(batch) for batch in batches]
        if paper_accum is not None:
            return [1 / ((count + 1e-4) * paper_accum) for count in counts]
        return [1 / max(1, sum(counts))] * len(batches)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the loss in nats per token, from the totals of `StepStats.sums`."""
        loss, trained = sums
        return {"loss": loss / max(1.0, trained)}

    def idle(self, *, backward: bool) -> None:
        """Runs a dummy pass with no effect on the loss: with sharded weights, all ranks must run equally many."""
        if backward:
            self.forward_backward([_NOTHING], loss_scale=0.0)
        else:
            self.loss([_NOTHING])

    def unsmoothed(self) -> Step:
        """Returns the same step without label smoothing, for comparable losses whose exp is a perplexity."""
        twin = copy.copy(self)
        twin._label_smoothing = 0.0
        return twin

    def _compute(
        self, batch: Sequence[TokenExample], scale: float | None, use: Literal["training", "inference"]
    ) -> StepStats:
        done = [self._compute_part(part, scale, use) for part in self.passes(batch)]
        loss = done[0][0] if len(done) == 1 else torch.stack([loss for loss, _ in done]).sum()
        laid = [laid for _, laid in done]
        trained = sum(each.trained_tokens for each in laid)
        return StepStats(
            nn.functional.pad(loss.reshape(1), (0, 1), value=float(trained)),
            loss if scale is None else loss * scale,
            trained,
            sum(each.tokens for each in laid),
            sum(each.processed_tokens for each in laid),
        )

    def _compute_part(
        self, batch: Sequence[TokenExample], scale: float | None, use: Literal["training", "inference"]
    ) -> tuple[Tensor, Pack]:
        laid = self._packed(batch) if self.packing else pad(batch)
        loss = torch.zeros((), device=self._forward.device)
        if not len(laid.states) and self._is_spread:
            self.idle(backward=scale is not None)
        elif len(laid.states):
            with self._computing(use, gradient=scale is not None):
                if scale is not None and self._half:
                    loss = scaled_backward(partial(self._loss, laid), self._trained(), scale)
                else:
                    loss = self._loss(laid, scale)
        return loss, laid

    def _computing(self, use: Literal["training", "inference"], *, gradient: bool) -> AbstractContextManager[None]:
        return self._forward.computing(use, gradient=gradient)

    def _packed(self, batch: Sequence[TokenExample], share: bool | None = None) -> Pack:
        row = pack(batch, share=self.share_prompts if share is None else share)
        return extended(row, self._forward.row_length(row.processed_tokens)) if len(row.states) else row

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _loss(self, laid: Pack, scale: float | None) -> Tensor:
        predictions = Predictions.of(laid.rows, laid.targets, laid.weights, len(laid.states), self._forward.device)
        states, head = self._states(laid, laid.states)
        options: dict[str, Any] = {"gradient_scale": scale, "label_smoothing": self._label_smoothing}
        liger = self._forward.liger
        if liger is not None and self._forward.splits and liger.is_usable():
            loss = liger(states, predictions, laid.trained_tokens, **options)
        else:
            loss = head_loss(head, states, predictions, chunk=self._chunk, **options)
        if scale is not None:
            differentiate(loss.objective)
        return loss.total

    def _states(self, laid: Pack, places: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Returns the last hidden states (R, D) at some places (R,) of a batch, and the head to apply to them."""
        device = self._forward.device
        if self._remembers:
            forget_length(self._model)
        places = to_device(places, device)
        if self._forward.splits:
            hidden = self._hidden(laid)
            head: Callable[[Tensor], Tensor] = self._forward.head
        else:  # the model yields only logits: they stand in for hidden states, with an identity head
            hidden, head = self._forward.logits(to_device(laid.ids, device)), lambda states: states
        return hidden.flatten(0, 1)[places], head

    def _hidden(self, laid: Pack) -> Tensor:
        """Returns the last hidden states (B, T, D), after the final norm."""
        device = self._forward.device
        if laid.ends is None:
            assert laid.mask is not None
            return self._forward.hidden(to_device(laid.ids, device), to_device(laid.mask, device))
        return self._forward.packed_hidden(laid.ids, laid.positions, laid.ends)

    # The check at startup.

    def _why_not_packed(self) -> str:
        """Packs three short random examples; returns why the model cannot be packed, or "" if it can."""
        if engine_mode() == "off":
            return "the environment variable LORALIB_ENGINE is off"
        if not self._forward.splits:
            return f"{type(self._model).__name__} is not built like transformers' causal language models"
        with torch.no_grad(), evaluating(self._model.modules()), self._forward.hold_model("inference"):
            try:
                return self._packing_fault()
            except UnsupportedModelError as error:
                return str(error)
            except Exception as error:  # a model can fail in any way on packed rows; fall back to padding
                return f"{type(self._model).__name__} fails on a packed row: {type(error).__name__}: {error}"

    def _packing_fault(self) -> str:
        vocabulary = int(cast(Any, self._model).get_input_embeddings().weight.shape[0])
        rng = random.Random(0)

        def some(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(vocabulary) for _ in range(count))

        start = some(5)
        examples = [start + some(4), start + some(7), some(6)]
        packed = self._packed_logits(examples)
        single = [self._forward.logits(torch.tensor([ids], device=self._forward.device))[0] for ids in examples]
        size = max(float(logits.float().std()) for logits in single)
        tolerance = max(1e-4, 8 * torch.finfo(single[0].dtype).eps)
        for number, ids in enumerate(examples):
            others = list(range(len(examples)))
            others.remove(number)
            changed = self._packed_logits([*examples[:number], ids[:-3] + some(3), *examples[number + 1 :]])
            moved = max(float((changed[other] - packed[other]).abs().max()) for other in others)
            if not moved <= tolerance * size:
                return f"in a packed row, the logits of one example change by {moved:.2g} when another example changes"
        for ids, ours, theirs in zip(examples, packed, single, strict=True):
            targets = torch.tensor(some(len(ids)), device=theirs.device)
            apart = float((_losses(ours, targets) - _losses(theirs, targets)).abs().mean())
            if not apart <= tolerance * max(size, 1.0):
                return f"in a packed row, the loss of an example differs by {apart:.2g} from its loss on its own"
        return ""

    def _packed_logits(self, examples: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Returns the logits (T, V) of each example, computed from one packed row with shared prefixes."""
        # Appends a dummy token: packing does not compute the last token.
        laid = self._packed([TokenExample((*ids, 0), (False, *[True] * len(ids))) for ids in examples], share=True)
        with self._forward.overriding():
            logits = self._forward.head(self._hidden(laid)[0])
        return [logits[list(path)] for path in laid.paths]


def make_step(
    model: nn.Module,
    *,
    packing: bool = True,
    share_prompts: bool = True,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    compiles: bool | None = None,
    kind: Callable[..., Step] = Step,
) -> Step:
    """Inspects a model and returns the fastest step that is exact for it.

    Args:
        model: a causal language model; its parameters with ``requires_grad`` are trained.  transformers' models can be
            packed; any other module that maps ids (B, T) to logits (B, T, V), or to an object with such `logits`, is
            padded.
        packing: whether to pack each batch into one row without padding.
        share_prompts: whether to compute prefixes that examples have in common only once.  Exact without dropout; with
            dropout, examples that share a prefix share its mask.
        label_smoothing: see `loralib.engine.loss.head_loss`.
        chunk_tokens: how many trained positions go through the head at once, trading memory for speed; None: 256 on a
            CPU, 1,024 elsewhere.
        compiles: whether torch.compile compiles decoder blocks; None: on a GPU, if possible.
        kind: the class of the step, for other objectives (`loralib.training.preferences`).

    Returns:
        The step; its `note` says why batches are padded although packing was requested, if they are.

    Raises:
        ConfigError: label_smoothing or chunk_tokens is out of range, or compilation is requested but impossible.
        UnsupportedModelError: the model is not causal.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(
            f"label_smoothing is {label_smoothing!r}, expected a number of at least 0 and below 1 (0.1 is usual)"
        )
    if chunk_tokens is None:
        chunk_tokens = 256 if device_of(model).type == "cpu" else 1024
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens!r}, expected a positive number (default 256)")
    with keep_freed_memory(lean=True):  # the check dequantises weights one at a time
        step = kind(
            model,
            packing=packing,
            share_prompts=share_prompts,
            label_smoothing=label_smoothing,
            chunk_tokens=chunk_tokens,
            compiles=compiles is not False,
        )
    if compiles and not step.compiles:
        why = why_not_compiled(step._forward.device) or f"batches are padded: {step.note or 'packing is off'}"
        raise ConfigError(f"compile is on, but {why}; leave it at auto, which compiles wherever that works")
    return step


def _computed_tokens(example: TokenExample) -> int:
    return max((place for place, trained in enumerate(example.trained) if trained), default=0)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
