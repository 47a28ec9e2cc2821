"""Which examples each rank computes: about as many tokens on each, and prompts computed once where that is faster.

All of it follows from the examples, so that each rank knows the shares of all.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from ..data import TokenExample

__all__ = ["deal", "shares"]


def shares(examples: Sequence[TokenExample], parts: int, *, share_prompts: bool) -> list[list[int]]:
    """Splits examples into parts of about as many tokens, and returns their indices.

    The largest come first, each to the part that ends up with the fewest tokens.  With `share_prompts` an example whose
    prompt a part has already costs only the tokens after it there; so it joins its siblings unless another part would
    be done sooner.  A part may be empty.

    Args:
        examples: those of one update.
        parts: how many.
        share_prompts: whether a prompt is computed once for the examples of a part that begin with it.

    >>> rows = [TokenExample((7, 7, 7, n), (False, False, False, True)) for n in (1, 2)]
    >>> rows += [TokenExample((8, 8, 8, n), (False, False, False, True)) for n in (1, 2)]
    >>> shares(rows, 2, share_prompts=True)
    [[0, 1], [2, 3]]
    """
    if parts == 1:
        return [list(range(len(examples)))]
    prompts = [_prompt(example) if share_prompts else () for example in examples]
    of_prompt: dict[tuple[int, ...], int] = defaultdict(int)
    for example, prompt in zip(examples, prompts, strict=True):
        of_prompt[prompt] += len(example) - len(prompt)
    size = {prompt: len(prompt) + rest if prompt else 0 for prompt, rest in of_prompt.items()}
    order = sorted(range(len(examples)), key=lambda n: (-size[prompts[n]], prompts[n], -len(examples[n]), n))
    loads = [0] * parts
    queue = [(0, part) for part in range(parts)]  # an entry counts while its load is the part's
    having: dict[tuple[int, ...], list[int]] = defaultdict(list)
    result: list[list[int]] = [[] for _ in range(parts)]
    for number in order:
        prompt, rest = prompts[number], len(examples[number]) - len(prompts[number])
        while queue[0][0] != loads[queue[0][1]]:
            heapq.heappop(queue)
        load, part = min([(loads[p] + rest, p) for p in having[prompt]], default=(0, -1))
        if part < 0 or queue[0][0] + len(prompt) + rest < load:
            load, part = queue[0][0] + len(prompt) + rest, queue[0][1]
            if prompt:
                having[prompt].append(part)
        loads[part] = load
        heapq.heappush(queue, (load, part))
        result[part].append(number)
    return [sorted(part) for part in result]


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Splits things of known cost into parts of about the same cost, and returns their indices.

    >>> deal([3, 1, 1, 1], 2)
    [[0], [1, 2, 3]]
    """
    queue = [(0, part) for part in range(parts)]
    result: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        load, part = heapq.heappop(queue)
        heapq.heappush(queue, (load + costs[number], part))
        result[part].append(number)
    return [sorted(part) for part in result]


def _prompt(example: TokenExample) -> tuple[int, ...]:
    return example.ids[: example.trained.index(True)] if True in example.trained else example.ids
