"""Preference learning: DPO and ORPO, whose losses are functions of the log-probabilities of whole answers.

The two rows of a pair are packed like any examples with a common prefix, so their prompt is computed once.  The head
yields each token's log-probability, and its gradient, in a single pass (`engine/loss.py`); the rest of the objective is
a few lines of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..console import progress
from ..data import PreferencePair, TokenExample
from ..data.packing import Pack, pad
from ..engine.half import scaled_backward
from ..engine.loss import head_log_probs
from ..engine.transfer import to_device
from ..errors import UnsupportedModelError
from ..modes import evaluating
from ..wrapping import is_spread
from .objective import StepStats, differentiate, in_batches
from .ranks import ALONE, Ranks
from .shares import deal
from .step import Step

__all__ = ["PREFERENCE_STEPS", "DPOStep", "ORPOStep", "PreferenceStep", "dpo_losses", "log_odds_ratio", "reference_of"]

_NOTHING = PreferencePair((0, 0), (False, True), TokenExample((0, 0), (False, True)), (0.0, 0.0))


def dpo_losses(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the losses (B,) of pairs for direct preference optimisation (Rafailov et al. 2023, equation 7).

        -(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin)

    Args:
        margins: (B,) reward of the chosen answer minus that of the rejected one; a reward is
            ``beta * (log p of the answer - that under the reference)``.
        label_smoothing: e, the share of pairs assumed to have swapped labels (conservative DPO, Mitchell 2023, equation
            3).
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Returns log(odds of chosen / odds of rejected) (B,), where odds = p / (1 - p) (Hong et al. 2024, equation 4).

    Args:
        chosen: (B,) log p of the chosen answers, averaged over their tokens.
        rejected: (B,), the same for the rejected answers.
    """
    return (chosen - _log_1_minus_exp(chosen)) - (rejected - _log_1_minus_exp(rejected))


def _log_1_minus_exp(x: Tensor) -> Tensor:
    """Returns log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012); finite even if p rounds to 1."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    # `where` also differentiates the branch not taken, so each branch gets only inputs that are valid for it.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(x)))


class Answers(NamedTuple):
    """Log-probabilities of the answers in B pairs.

    Attributes:
        chosen, rejected: (B,) log-probabilities, summed over the tokens of each answer.
        chosen_tokens, rejected_tokens: (B,) number of these tokens.
        prompts: () sum of the log-probabilities of the prompts' tokens, if requested.
        prompt_tokens: number of these tokens.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    prompts: Tensor
    prompt_tokens: int


class PreferenceStep(Step):
    """A step on `PreferencePair`s; subclasses define the loss.

    Args:
        beta: weight of an answer's reward.
        options: see `make_step`.
    """

    unit = "pair"
    shown: tuple[str, ...] = ("accuracy", "margin")
    reads_prompts = False  # whether the loss also depends on the prompts' tokens

    def __init__(self, model: nn.Module, *, beta: float, **options: Any) -> None:
        super().__init__(model, **options)
        self.beta = beta

    def losses(self, answers: Answers, pairs: Sequence[PreferencePair], scale: Any) -> tuple[Tensor, Tensor]:
        """Returns the scaled loss (), and detached sums (`width`,); if `scale` is None, the loss is ignored."""
        raise NotImplementedError

    def count(self, examples: Sequence[TokenExample]) -> int:
        """Returns the number of terms in the loss of these examples: the number of pairs."""
        return len(examples)

    def scales(self, batches: Sequence[Sequence[TokenExample]], *, paper_accum: int | None = None) -> list[Any]:
        """Returns each batch's `loss_scale` in an update, weighting every pair equally, however the update is split."""
        assert paper_accum is None, "TrainConfig refuses it"
        return [1 / max(1, sum(map(len, batches)))] * len(batches)

    def answers(self, batch: Sequence[PreferencePair]) -> Answers:
        """Returns the log-probabilities of the answers in pairs, without computing gradients."""
        laid = self._lay(batch)
        with self._computing("inference", gradient=False):
            return self._answers(laid, batch)

    def passes(self, batch: Sequence[TokenExample]) -> list[list[TokenExample]]:
        """Splits a batch of pairs into the parts that go through the model one after another.

        Raises:
            UnsupportedModelError: the two rows of a pair would have to be computed separately.
        """
        if self._rope_limit is None:
            return [list(batch)]
        limit = self._rope_limit
        sizes = [{max(len(row) - 1, limit) for row in pair.rows} for pair in batch]
        if any(len(each) > 1 for each in sizes):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} encodes positions differently beyond {limit:,} tokens, so the two "
                f"answers of a longer pair cannot be computed together: give --seq_len {limit:,}"
            )
        groups: dict[int, list[TokenExample]] = {}
        for pair, (size,) in zip(batch, sizes, strict=True):
            groups.setdefault(size, []).append(pair)
        return [groups[size] for size in sorted(groups)] or [list(batch)]

    def idle(self, *, backward: bool) -> None:
        """Runs a dummy pass with no effect on the loss: with sharded weights, all ranks must run equally many."""
        if backward:
            self.forward_backward([_NOTHING], loss_scale=self._nothing)
        else:
            self.loss([_NOTHING])

    @property
    def _nothing(self) -> Any:
        return 0.0

    def _compute(self, batch: Sequence[TokenExample], scale: Any, use: Literal["training", "inference"]) -> StepStats:
        if not batch:
            if self._is_spread:
                self.idle(backward=scale is not None)
            nothing = torch.zeros(self.width, device=self._forward.device)
            return StepStats(nothing, nothing[0], 0, 0, 0)
        done = [self._compute_pairs(cast("list[PreferencePair]", part), scale, use) for part in self.passes(batch)]
        laid = [laid for _, _, laid in done]
        return StepStats(
            torch.stack([sums for sums, _, _ in done]).sum(0),
            torch.stack([objective for _, objective, _ in done]).sum(),
            sum(pair.trained_tokens for pair in batch),
            sum(each.tokens for each in laid),
            sum(each.processed_tokens for each in laid),
        )

    def _compute_pairs(
        self, pairs: Sequence[PreferencePair], scale: Any, use: Literal["training", "inference"]
    ) -> tuple[Tensor, Tensor, Pack]:
        laid, made = self._lay(pairs), list[tuple[Tensor, Tensor]]()

        def compute(factor: float) -> Tensor:
            objective, sums = self.losses(self._answers(laid, pairs), pairs, scale)
            made[:] = [(sums, objective.detach())]
            if scale is not None:
                differentiate(objective * factor)
            return objective.detach()

        with self._computing(use, gradient=scale is not None):
            if scale is not None and self._half:
                scaled_backward(lambda factor: compute(factor * len(pairs)), self._trained(), 1 / len(pairs))
            else:
                compute(1.0)
        return *made[0], laid

    def _lay(self, pairs: Sequence[PreferencePair]) -> Pack:
        rows = [row for pair in pairs for row in pair.rows]
        return self._packed(rows) if self.packing else pad(rows)

    def _answers(self, laid: Pack, pairs: Sequence[PreferencePair]) -> Answers:
        # [ predictions of the answers' tokens, row by row | if needed, those of the chosen rows' prompts ]
        places, targets, owners = list[int](), list[int](), list[int]()
        rows = [row for pair in pairs for row in pair.rows]
        for number, (row, path) in enumerate(zip(rows, laid.paths, strict=True)):
            of_row = [at for at, trained in enumerate(row.trained) if trained]
            places += [path[at - 1] for at in of_row]
            targets += [row.ids[at] for at in of_row]
            owners += [number] * len(of_row)
        if self.reads_prompts:
            for row, path in zip(rows[::2], laid.paths[::2], strict=True):
                of_row = [at for at in range(1, len(path) + 1) if not row.trained[at]]
                places += [path[at - 1] for at in of_row]
                targets += [row.ids[at] for at in of_row]
        device = self._forward.device
        wanted, of = to_device(torch.tensor(targets), device), to_device(torch.tensor(owners), device)
        states, head = self._states(laid, torch.tensor(places))
        log_p = head_log_probs(head, states, wanted, chunk=self._chunk)
        sums = log_p.new_zeros(len(rows)).index_add(0, of, log_p[: len(owners)])
        tokens = torch.bincount(torch.tensor(owners), minlength=len(rows)).to(sums.dtype)
        tokens = to_device(tokens, device)
        prompts = log_p[len(owners) :].sum()
        return Answers(sums[::2], sums[1::2], tokens[::2], tokens[1::2], prompts, len(places) - len(owners))


class DPOStep(PreferenceStep):
    """Direct preference optimisation (arXiv:2305.18290): no reward model; the reference is computed in advance."""

    width = 5

    def losses(self, answers: Answers, pairs: Sequence[PreferencePair], scale: Any) -> tuple[Tensor, Tensor]:
        """See `dpo_losses`."""
        assert all(pair.reference is not None for pair in pairs), "see reference_of"
        reference = torch.tensor([pair.reference for pair in pairs], dtype=torch.float64)
        reference = to_device(reference.float(), answers.chosen.device)
        chosen = self.beta * (answers.chosen - reference[:, 0])
        rejected = self.beta * (answers.rejected - reference[:, 1])
        loss = dpo_losses(chosen - rejected, self._label_smoothing).sum()
        sums = torch.stack([loss, *_told(chosen, rejected)]).detach()
        return loss if scale is None else loss * scale, sums

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns averages over pairs: the loss, the share of pairs ranked correctly, and rewards."""
        loss, *told = sums
        return {"loss": loss / max(1.0, told[0]), **_averages(told)}


class ORPOStep(PreferenceStep):
    """Odds-ratio preference optimisation (arXiv:2403.07691): no reference; also learns the chosen text.

    The loss combines two averages: one over the tokens of prompts and chosen answers, and one over pairs.
    """

    width = 7
    reads_prompts = True

    def scales(self, batches: Sequence[Sequence[TokenExample]], *, paper_accum: int | None = None) -> list[Any]:
        """Returns the factors for the two parts of the loss in each batch of an update."""
        tokens = sum(_last_trained(pair) for batch in batches for pair in batch)
        return [(1 / max(1, tokens), 1 / max(1, sum(map(len, batches))))] * len(batches)

    @property
    def _nothing(self) -> Any:
        return 0.0, 0.0

    def losses(self, answers: Answers, pairs: Sequence[PreferencePair], scale: Any) -> tuple[Tensor, Tensor]:
        """Adds beta times the odds ratio to the usual loss on the chosen text, see equations 6 and 7 of the paper."""
        nll = -(answers.chosen.sum() + answers.prompts)
        tokens = answers.chosen_tokens.sum() + answers.prompt_tokens
        chosen, rejected = answers.chosen / answers.chosen_tokens, answers.rejected / answers.rejected_tokens
        ratio = -logsigmoid(log_odds_ratio(chosen, rejected)).sum()
        told = _told(self.beta * chosen, self.beta * rejected)
        sums = torch.stack([nll, tokens, ratio, *told]).detach()
        per_token, per_pair = scale or (1.0, 1.0)
        return nll * per_token + self.beta * ratio * per_pair, sums

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the loss, its two parts, the share of pairs ranked correctly, and rewards."""
        nll, tokens, ratio, *told = sums
        parts = {"nll": nll / max(1.0, tokens), "odds_ratio_loss": ratio / max(1.0, told[0])}
        return {"loss": parts["nll"] + self.beta * parts["odds_ratio_loss"], **_averages(told), **parts}


PREFERENCE_STEPS: Final[Mapping[str, type[PreferenceStep]]] = {"dpo": DPOStep, "orpo": ORPOStep}


def _told(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
    """Returns statistics of pairs from rewards (B,): number of pairs, number ranked correctly, sums of rewards."""
    right = ((chosen > rejected).float() + (chosen == rejected).float() / 2).sum()  # a tie counts as half
    return torch.full_like(right, len(chosen)), right, chosen.sum(), rejected.sum()


def _averages(told: Sequence[float]) -> dict[str, float]:
    pairs, right, chosen, rejected = told
    chosen, rejected = chosen / max(1.0, pairs), rejected / max(1.0, pairs)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    return dict(zip(names, (right / max(1.0, pairs), chosen - rejected, chosen, rejected), strict=True))


def _last_trained(example: TokenExample) -> int:
    return max(at for at, trained in enumerate(example.trained) if trained)


def reference_of(
    step: PreferenceStep,
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    *,
    max_tokens: int = 8192,
    check_stop: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    show: bool = False,
) -> Tensor:
    """Returns the log-probabilities (N, 2) of the answers in pairs under the model in its current state, in float64.

    The batches do not depend on the number of ranks, so the results do not either.

    Args:
        step: made for the model.
        model: put in eval mode for the duration.
        pairs: without duplicates.
        max_tokens: see `evaluate`.
        check_stop: called between batches, equally often on all ranks; may raise.
        ranks: the ranks that share the work.
        show: whether to draw a progress bar, if the output is a terminal.
    """
    numbers = {pair: number for number, pair in enumerate(pairs)}
    batches = [part for batch in in_batches(pairs, max_tokens) for part in step.passes(batch)]
    dealt = deal([sum(map(len, batch)) for batch in batches], ranks.size)
    mine, result = dealt[ranks.rank], torch.zeros(len(pairs), 2, dtype=torch.float64)
    turns: Any = range(max(map(len, dealt)))
    with evaluating(model.modules()):
        for number in progress(turns, description="reference", unit="batch") if show else turns:
            check_stop()
            if number < len(mine):
                batch = cast("list[PreferencePair]", batches[mine[number]])
                answers = step.answers(batch)
                both = torch.stack([answers.chosen, answers.rejected], dim=1)
                result[[numbers[pair] for pair in batch]] = both.double().cpu()
            elif is_spread(model):
                step.idle(backward=False)
    return ranks.sum(result)
