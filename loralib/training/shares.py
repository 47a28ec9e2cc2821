"""Distributes examples over ranks: similar numbers of tokens on each, and prompts computed once where that is faster.

The result depends only on the examples, so every rank can compute the shares of all.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from ..data import TokenExample

__all__ = ["deal", "shares"]

_SEEN = 8  # number of parts with the same prompt to consider: enough even if hundreds have it


def shares(examples: Sequence[TokenExample], parts: int, *, share_prompts: bool) -> list[list[int]]:
    """Splits examples into parts with similar numbers of tokens, and returns their indices; a part may be empty.

    With `share_prompts`, a prompt counts once in each part that contains examples with it.  Two ways are tried: all
    examples with a prompt in one part, or each where it finishes soonest.  The one with the smaller maximum is used.

    Args:
        examples: the examples of one update.
        parts: number of parts.
        share_prompts: whether a prompt is computed once for all examples of a part that begin with it.

    >>> rows = [TokenExample((7, 7, 7, n), (False, False, False, True)) for n in (1, 2)]
    >>> rows += [TokenExample((8, 8, 8, n), (False, False, False, True)) for n in (1, 2)]
    >>> shares(rows, 2, share_prompts=True)
    [[0, 1], [2, 3]]
    """
    if parts == 1:
        return [list(range(len(examples)))]
    prompts = [example.prompt if share_prompts else () for example in examples]
    rests = [len(example) - len(prompt) for example, prompt in zip(examples, prompts, strict=True)]
    apart = _soonest(prompts, rests, parts)
    if not share_prompts:
        return apart
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[prompt].append(number)
    costs = [len(prompt) + sum(rests[number] for number in group) for prompt, group in groups.items()]
    members = list(groups.values())
    together = [sorted(n for group in part for n in members[group]) for part in deal(costs, parts)]
    return min(together, apart, key=lambda dealt: _costs(dealt, prompts, rests))


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Splits items of known cost into parts of similar cost, and returns their indices; the costliest come first.

    >>> deal([3, 1, 1, 1], 2)
    [[0], [1, 2, 3]]
    """
    return _soonest([()] * len(costs), costs, parts)


def _soonest(prompts: Sequence[tuple[int, ...]], rests: Sequence[int], parts: int) -> list[list[int]]:
    """Assigns examples, longest first, each to the part with the fewest tokens after adding it."""
    loads = [0] * parts
    queue = [(0, part) for part in range(parts)]  # entries with an outdated load are skipped
    having: dict[tuple[int, ...], list[int]] = defaultdict(list)  # the parts that contain a prompt, latest last
    result: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(rests)), key=lambda n: (-len(prompts[n]) - rests[n], n)):
        prompt, rest = prompts[number], rests[number]
        while queue[0][0] != loads[queue[0][1]]:
            heapq.heappop(queue)
        candidates = {part: loads[part] + rest for part in having[prompt][-_SEEN:]}
        candidates.setdefault(queue[0][1], queue[0][0] + len(prompt) + rest)
        part = min(candidates, key=lambda part: (candidates[part], part))
        if prompt and part not in having[prompt][-_SEEN:]:
            having[prompt].append(part)
        loads[part] = candidates[part]
        heapq.heappush(queue, (loads[part], part))
        result[part].append(number)
    return [sorted(part) for part in result]


def _costs(dealt: Sequence[Sequence[int]], prompts: Sequence[tuple[int, ...]], rests: Sequence[int]) -> tuple[int, int]:
    """Returns the number of tokens in the largest part, and in all parts."""
    costs = [sum(map(len, {prompts[n] for n in part})) + sum(rests[n] for n in part) for part in dealt]
    return max(costs), sum(costs)
