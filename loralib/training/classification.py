"""Training text classifiers: cross-entropy over the labels, or squared error for regression, averaged over examples.

Decoders run on packed rows, in which a prefix shared by several texts appears once; encoders run on padded batches of
texts of similar length.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases.classifiers import class_names, labels_in, name_classes, own_classes
from ..data import ClassRow, Labels, Source, TokenExample, read_sources
from ..data.packing import Pack, pack
from ..engine.classifier import ClassifierForward
from ..engine.half import computes_in_half, scaled_backward
from ..engine.limits import table_rows, text_config
from ..engine.placement import engine_mode
from ..engine.transfer import to_device
from ..errors import ConfigError
from ..formats import read_adapter
from ..modes import evaluating
from .class_metrics import class_figures, confusion, moments, number_figures
from .config import TrainConfig
from .objective import StepStats, differentiate
from .plan import how_to_read, is_tokens

__all__ = ["ClassificationStep", "by_length", "labels_for", "prepare_classifier"]

_LEAST_USED = 0.85  # minimum share of text in a padded batch; batches with more padding are split by length
_FEWEST = 4  # minimum number of rows that justifies a separate pass


class _Padded(NamedTuple):
    """Texts as a padded batch: ids (B, T), mask (B, T), and the token types (B, T), if any."""

    ids: Tensor
    mask: Tensor
    kinds: Tensor | None


def labels_for(config: TrainConfig, train: Sequence[Source], valid: Sequence[Source] | None) -> Labels:
    """Returns the labels of a run's classifier, before a model is loaded.

    Raises:
        DataError: the labels are unusable, or the validation data have different ones.
        ConfigError: the base, or the adapter to continue from, has a head without these labels; or best_metric does not
            suit this kind of labels.
    """
    if config.from_adapter is not None:
        own: Sequence[str] | None = labels_in(read_adapter(config.from_adapter))
        return _fitted(config, train, valid, own, config.from_adapter)
    name = config.model
    return _fitted(config, train, valid, own_classes(name), name)


def prepare_classifier(model: nn.Module, config: TrainConfig, tokenizer: Any, data: Any, valid: Any) -> tuple[Any, Any]:
    """Gives a classifier the labels found in the data, and a padding token; returns the data after reading them.

    Raises:
        ConfigError: the model is not a classifier, its head has other labels, or no padding token is known.
        DataError: see `labels_for`; or the data cannot be read.
    """
    own, settings = class_names(model), text_config(model)
    if settings.pad_token_id is None:
        if tokenizer is None or tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the config of the {type(model).__name__} has no pad_token_id, which is needed to find the last "
                "token of a text, and no tokenizer provides it. Set tokenizer.pad_token = tokenizer.eos_token, and "
                "pass tokenizer=."
            )
        settings.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if is_tokens(data):
        _require_fitting(config, Labels(own))
        return data, valid
    kinds = how_to_read(config)
    sources = read_sources(data, **kinds, name="training data")
    apart = None if valid is None or is_tokens(valid) else read_sources(valid, **kinds, name="validation data")
    labels = _fitted(config, sources, apart, own, f"the {type(model).__name__}")
    name_classes(model, labels.names)
    return sources, valid if apart is None else apart


def _fitted(
    config: TrainConfig,
    train: Sequence[Source],
    valid: Sequence[Source] | None,
    own: Sequence[str] | None,
    name: str,
) -> Labels:
    examples = [example for source in train for example in source.examples]
    apart = [example for source in valid or () for example in source.examples]
    if own is None:
        labels = Labels.of(examples, apart)
    else:
        way = (
            "Give the model as it was before it became a classifier (without a head; one is then made for these labels)"
            if config.from_adapter is None
            else "Leave out --from_adapter to make a new head for these labels"
        )
        labels = Labels.of(examples).fit_into(Labels(tuple(own)), name, way)
        labels.check(apart, "validation", " that the model does not have")
    _require_fitting(config, labels)
    return labels


def _require_fitting(config: TrainConfig, labels: Labels) -> None:
    of_them = ("pearson",) if labels.are_numbers else ("accuracy", "f1", "macro_f1", "matthews")
    fitting = ["loss", *(name for name in of_them if name != "f1" or len(labels.names) == 2)]
    if config.best_metric not in fitting:
        what = "numbers" if labels.are_numbers else f"{len(labels.names)} labels"
        raise ConfigError(f"best_metric is {config.best_metric!r}, expected one of {', '.join(fitting)} for {what}")
    if labels.are_numbers and config.label_smoothing:
        raise ConfigError(f"label_smoothing is {config.label_smoothing:g}, but the labels are numbers: leave it out")


class ClassificationStep:
    """Computes losses and gradients of batches for one classifier: a `loralib.training.objective.TrainingStep`.

    Args:
        model: a text classifier with the interface of transformers.
        labels: its labels.
        packing: whether to pack texts into one row, if the model is a decoder.
        share_prompts: whether to compute a prefix that packed texts share only once.
        label_smoothing: share of the target probability that is spread over all labels.
    """

    unit = "row"

    def __init__(
        self,
        model: nn.Module,
        labels: Labels,
        *,
        packing: bool = True,
        share_prompts: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        self._model, self.labels = model, labels
        self._label_smoothing = label_smoothing
        self._forward = ClassifierForward(model)
        self._half = computes_in_half(model)
        self._run = ExitStack()
        classes = len(labels.names)
        self.width = 2 + (classes * classes or 5)
        self.shown: tuple[str, ...] = ("pearson",) if labels.are_numbers else ("accuracy", "macro_f1")
        self.note = ""
        self.packing = False
        if packing and self._forward.splits and engine_mode() != "off":
            self.packing = True
            self.note = self._why_not_packed()
            self.packing = not self.note
        self._forward.has_layouts = self.packing
        self._pads = self.packing or self._ignores_padding()
        self.share_prompts = share_prompts and self.packing

    def __enter__(self) -> ClassificationStep:
        self._run.enter_context(self._forward.hold_model("training"))
        return self

    def __exit__(self, *error: object) -> None:
        self._run.close()

    def count(self, examples: Sequence[TokenExample]) -> int:
        """Returns the number of terms that the loss of these examples averages over: the number of examples."""
        return len(examples)

    def scales(self, batches: Sequence[Sequence[TokenExample]], *, paper_accum: int | None = None) -> list[float]:
        """Returns the `loss_scale` of each batch of an update: examples weigh the same, however it is split."""
        assert paper_accum is None, "TrainConfig refuses it"
        return [1 / max(1, sum(map(len, batches)))] * len(batches)

    def forward_backward(self, batch: Sequence[TokenExample], *, loss_scale: float) -> StepStats:
        """Adds the gradient of ``loss_scale * (sum of the rows' losses)`` to the `grad` of the trained parameters."""
        return self._compute(batch, loss_scale, "training")

    def loss(self, batch: Sequence[TokenExample]) -> StepStats:
        """Returns the loss of a batch without computing gradients."""
        return self._compute(batch, None, "inference")

    def logits(self, batch: Sequence[TokenExample]) -> Tensor:
        """Returns the logits (B, C) of texts in fp32, without computing gradients."""
        parts = self._parts(batch)
        with self._forward.computing("inference", gradient=False):
            rows = torch.cat([self._logits([batch[number] for number in part])[0] for part in parts])
        order = torch.tensor([number for part in parts for number in part], device=rows.device)
        return rows[order.argsort()]

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the average loss per example, and metrics of the predictions."""
        loss, rows, *rest = sums
        classes = len(self.labels.names)
        more = class_figures(rest, classes) if classes else number_figures(rest, rows)
        return {"loss": loss / max(1.0, rows), **more}

    def passes(self, batch: Sequence[TokenExample]) -> list[list[TokenExample]]:
        """Splits a batch into the parts that go through the model one after another: padded ones by length."""
        return [[batch[number] for number in part] for part in self._parts(batch)]

    def _parts(self, batch: Sequence[TokenExample]) -> list[list[int]]:
        """Returns the numbers of the texts that go through the model together."""
        if self.packing or not batch:
            return [list(range(len(batch)))]
        return by_length(batch, least_used=_LEAST_USED if self._pads else 1.0, fewest=_FEWEST if self._pads else 1)

    def idle(self, *, backward: bool) -> None:
        """Does nothing: the weights of a classifier are never sharded."""

    def unsmoothed(self) -> ClassificationStep:
        """Returns the same step without label smoothing, for comparable losses."""
        twin = copy.copy(self)
        twin._label_smoothing = 0.0
        return twin

    def _compute(
        self, batch: Sequence[TokenExample], scale: float | None, use: Literal["training", "inference"]
    ) -> StepStats:
        done = [self._compute_part(part, scale, use) for part in self.passes(batch) if part]
        if not done:
            nothing = torch.zeros(self.width, device=self._forward.device)
            return StepStats(nothing, nothing[0], 0, 0, 0)
        sums = torch.stack([sums for sums, _ in done]).sum(0)
        loss = sums[0]
        objective = loss if scale is None else loss * scale
        return StepStats(sums, objective, len(batch), sum(map(len, batch)), sum(tokens for _, tokens in done))

    def _compute_part(
        self, batch: Sequence[TokenExample], scale: float | None, use: Literal["training", "inference"]
    ) -> tuple[Tensor, int]:
        made = list[tuple[Tensor, int]]()

        def compute(factor: float | None) -> Tensor:
            logits, tokens = self._logits(batch)
            losses, sums = self._sums(logits, cast("Sequence[ClassRow]", batch))
            if factor is not None:
                differentiate(losses * factor)
            made[:] = [(sums, tokens)]
            return losses.detach()

        with self._forward.computing(use, gradient=scale is not None):
            if scale is not None and self._half:
                trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
                scaled_backward(compute, trained, scale)
            else:
                compute(scale)
        return made[0]

    def _sums(self, logits: Tensor, batch: Sequence[ClassRow]) -> tuple[Tensor, Tensor]:
        """Returns the summed loss () with its autograd graph, and the sums (`width`,) for `StepStats`."""
        wanted = [row.label for row in batch]
        if self.labels.are_numbers:
            targets = torch.tensor(wanted, dtype=torch.float32, device=logits.device)
            loss = F.mse_loss(logits[:, 0], targets, reduction="sum")
            more = moments(targets, logits.detach()[:, 0])
        else:
            classes = torch.tensor(wanted, device=logits.device)
            loss = F.cross_entropy(logits, classes, reduction="sum", label_smoothing=self._label_smoothing)
            more = confusion(classes, logits.detach().argmax(-1), len(self.labels.names))
        head = torch.stack([loss.detach(), loss.detach().new_tensor(float(len(batch)))])
        return loss, torch.cat([head, more.to(head)])

    def _logits(self, batch: Sequence[TokenExample]) -> tuple[Tensor, int]:
        """Returns the logits (B, C) of texts in fp32, and the number of tokens computed."""
        if not self.packing:
            padded = self._padded(batch)
            return self._forward.classes(*padded).float(), padded.ids.numel()
        row = self._packed(batch)
        forward = self._forward
        assert row.ends is not None
        hidden = forward.packed_hidden(row.ids, row.positions, row.ends)[0]
        last = to_device(torch.tensor([path[-1] for path in row.paths]), forward.device)
        return forward.head(hidden[last]).float(), row.processed_tokens

    def _packed(self, batch: Sequence[TokenExample], share: bool | None = None) -> Pack:
        # Appends a dummy token: packing does not compute the last token, which is normally only a target.
        ids = [self._until_padding(text.ids) for text in batch]
        rows = [TokenExample((*each, 0), (*[False] * len(each), True)) for each in ids]
        return pack(rows, share=self.share_prompts if share is None else share)

    def _until_padding(self, ids: Sequence[int]) -> Sequence[int]:
        """Returns a text without padding tokens at its end, before which the model's own forward ends it.

        A tokenizer's end token may be its padding token.
        """
        end = max((number for number, each in enumerate(ids) if each != self._forward.pad), default=0)
        return ids[: end + 1]

    def _padded(self, batch: Sequence[TokenExample]) -> _Padded:
        longest, pad = max(map(len, batch)), int(self._forward.pad or 0)
        kinds = [getattr(text, "kinds", ()) for text in batch]

        def tensor(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            filled = [[*row, *[fill] * (longest - len(row))] for row in rows]
            return to_device(torch.tensor(filled), self._forward.device)

        ids, mask = tensor([text.ids for text in batch], pad), tensor([[1] * len(text) for text in batch], 0)
        return _Padded(ids, mask, tensor(kinds, 0) if all(kinds) else None)

    def _ignores_padding(self) -> bool:
        """Whether a text's logits stay the same beside a longer one; XLNet pads on the left, FNet has no mask."""
        batch = self._random_texts()
        with torch.no_grad(), evaluating(self._model.modules()), self._forward.computing("inference", gradient=False):
            together = self._forward.classes(*self._padded(batch)).float()
        single = self._one_by_one(batch)
        return float((together - single).abs().max()) <= self._tolerance * float(single.abs().max())

    def _why_not_packed(self) -> str:
        """Packs three random texts; returns why the model cannot be packed, or "" if it can."""
        batch, name = self._random_texts(), type(self._model).__name__
        self.share_prompts = True
        with torch.no_grad(), evaluating(self._model.modules()), self._forward.computing("inference", gradient=False):
            try:
                packed = self._logits(batch)[0]
            except Exception as error:  # a model can fail in any way on packed rows; fall back to padding
                return f"{name} fails on a packed row: {type(error).__name__}: {error}"
        single = self._one_by_one(batch)
        off = float((packed - single).abs().max())
        return (
            ""
            if off <= self._tolerance * float(single.abs().max())
            else f"in a packed row, the logits of {name} are off by {off:.2g}"
        )

    def _random_texts(self) -> list[TokenExample]:
        """Returns three texts of different lengths, two of which start alike; T5 and BART need their end tokens."""
        rng, rows = random.Random(0), table_rows(self._model) or 8
        special = [self._forward.pad, getattr(text_config(self._model), "eos_token_id", None)]
        ids = [number for number in range(rows) if number not in special]
        end = (special[1],) if special[1] in range(rows) and special[1] != special[0] else ()
        start = tuple(rng.choices(ids, k=5))
        texts = [(*more, *rng.choices(ids, k=n), *end) for more, n in ((start, 4), (start, 7), ((), 6))]
        return [TokenExample(text, (False,) * len(text)) for text in texts]

    def _one_by_one(self, batch: Sequence[TokenExample]) -> Tensor:
        """Returns the logits (B, C) of texts in fp32, of which each has a pass of its own."""
        device = self._forward.device
        with torch.no_grad(), evaluating(self._model.modules()), self._forward.computing("inference", gradient=False):
            return torch.stack(
                [self._forward.classes(torch.tensor([text.ids], device=device))[0].float() for text in batch]
            )

    @property
    def _tolerance(self) -> float:
        """Allows for rounding: a few units in the last place of the model's dtype, as from another summation order."""
        return max(1e-4, 16 * torch.finfo(next(self._model.parameters()).dtype).eps)


def by_length(batch: Sequence[Any], least_used: float = _LEAST_USED, fewest: int = _FEWEST) -> list[list[int]]:
    """Splits texts into batches of similar length, to limit padding; returns their indices.

    Args:
        batch: the texts.
        least_used: minimum share of text in a batch; 1: only texts of the same length share one.
        fewest: minimum number of texts in a batch.

    >>> by_length(["a" * length for length in (9, 1, 8, 1, 9, 1, 9, 1)])
    [[1, 3, 5, 7], [0, 2, 4, 6]]
    >>> by_length(["aa", "aaa"])
    [[0, 1]]
    """
    order = sorted(range(len(batch)), key=lambda number: (len(batch[number]), number))
    parts = list[list[int]]()
    while order:
        longest, size = len(batch[order[-1]]), len(order)
        start, used = size, 0
        while start and used + len(batch[order[start - 1]]) >= least_used * longest * (size - start + 1):
            start -= 1
            used += len(batch[order[start]])
        start = max(0, min(start, size - fewest))
        start = start if start >= fewest else 0
        parts.insert(0, sorted(order[start:]))
        del order[start:]
    return parts
