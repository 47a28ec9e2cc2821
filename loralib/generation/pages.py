"""Ownership of the cache's pages, and the prefixes that are kept for reuse by other texts.

A page holds the keys and values of 16 consecutive tokens.  The pages of a sequence (`SequencePages`) begin with those
of its prefix that it shares with others, followed by its own.  Kept pages form a tree: each node is a page, and its
children are the pages that may follow, indexed by their tokens; a path from a root to a node thus spells out the prefix
of a text.  Each root stands for one way of computing, for example with one adapter; the creator of the roots must
ensure this.

The most pages that a sequence may need are reserved for it when it begins, so that none fails halfway.  Kept pages that
are not in use are evicted when room is needed, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["PAGE", "Node", "Pages", "SequencePages", "pages_of"]

PAGE: Final = 16


@dataclass(eq=False)
class Node:
    """A kept page, or a root, which has no page.

    Attributes:
        page: its number.
        parent: the preceding node; None: it is a root, or was evicted.
        tokens: its tokens.
        children: nodes that may follow.
        users: number of sequences whose path contains it.
    """

    page: int = 0
    parent: Node | None = None
    tokens: tuple[int, ...] = ()
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0


@dataclass(eq=False)
class SequencePages:
    """The pages of one sequence.

    Attributes:
        root: where its path through the kept pages begins; None: it shares nothing.
        nodes: the path.
        pages: all of its pages, in order; those that are not on the path are its own.
        promised: number of pages of its own that it has or may still need.
    """

    root: Node | None
    nodes: list[Node]
    pages: list[int]
    promised: int


def pages_of(tokens: int) -> int:
    """Returns the number of pages that this many tokens need.

    >>> pages_of(0), pages_of(16), pages_of(17)
    (0, 1, 2)
    """
    return -(-tokens // PAGE)


class Pages:
    """All pages of a cache.

    Args:
        budget: maximum number of pages; None: unlimited.

    Attributes:
        count: number of existing pages.  Page 0 is never assigned.
        promised: number of pages that belong to a single sequence, or are reserved for one.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.count, self.promised = budget, 1, 0
        self._free: list[int] = []
        self._locked = 0  # kept pages in use
        # Kept pages not in use, the least recently used first; a page comes before its parent.
        self._idle: dict[Node, None] = {}

    @property
    def used(self) -> int:
        """Number of pages that are kept or reserved."""
        return self.promised + self._locked + len(self._idle)

    def kept(self, root: Node | None, tokens: Sequence[int]) -> list[Node]:
        """Returns the path through kept pages that matches the beginning of a text."""
        nodes: list[Node] = []
        node = root
        for at in range(0, len(tokens) - PAGE + 1, PAGE):
            node = node.children.get(tuple(tokens[at : at + PAGE])) if node is not None else None
            if node is None:
                break
            nodes.append(node)
        return nodes

    def reserve(self, prompt: Sequence[int], tokens: int, root: Node | None = None) -> SequencePages | None:
        """Reserves the pages that a sequence needs, or returns None if there are not enough at the moment.

        Args:
            prompt: its beginning; the last token is never shared, since at least one has to be computed.
            tokens: maximum number of tokens that it may store.
            root: where to look for kept pages with the same prefix.
        """
        nodes = self.kept(root, prompt[: len(prompt) - 1])
        promised = pages_of(tokens) - len(nodes)
        woken = sum(not node.users for node in nodes)
        if self.budget is not None and self.promised + promised + self._locked + woken > self.budget:
            return None
        for node in nodes:
            self._lock(node)
        self.promised += promised
        while self.budget is not None and self.used > self.budget:
            self._give_up(next(iter(self._idle)))
        return SequencePages(root, nodes, [node.page for node in nodes], promised)

    def extend(self, sequence: SequencePages, count: int) -> None:
        """Adds pages to a sequence until it has `count` of them."""
        more = count - len(sequence.pages)
        if more <= 0:
            return
        if len(self._free) < more:
            count = max(self.count + more - len(self._free), self.count * 3 // 2)
            if self.budget is not None:
                count = min(count, self.budget + 1)
            self._free = [*range(count - 1, self.count - 1, -1), *self._free]
            self.count = count
        sequence.pages += reversed(self._free[-more:])
        del self._free[-more:]

    def share(self, sequence: SequencePages, tokens: Sequence[int]) -> None:
        """Keeps the full pages that a sequence has stored, for reuse by others."""
        if sequence.root is None:
            return
        node = sequence.nodes[-1] if sequence.nodes else sequence.root
        for number in range(len(sequence.nodes), len(tokens) // PAGE):
            own = tuple(tokens[number * PAGE : (number + 1) * PAGE])
            child = node.children.get(own)
            if child is None:
                child = node.children[own] = Node(sequence.pages[number], node, own)
                self.promised -= 1
                sequence.promised -= 1
            self._lock(child)
            sequence.nodes.append(child)
            node = child

    def release(self, sequence: SequencePages) -> None:
        """Takes back the pages of a sequence."""
        self.promised -= sequence.promised
        shared = {node.page for node in sequence.nodes}
        self._free += [page for page in reversed(sequence.pages) if page not in shared]
        for node in reversed(sequence.nodes):
            node.users -= 1
            if not node.users:
                self._locked -= 1
                self._idle[node] = None
        sequence.nodes, sequence.pages, sequence.promised = [], [], 0

    def clear(self) -> None:
        """Evicts all kept pages that are not in use."""
        for node in list(self._idle):
            self._give_up(node)

    def _lock(self, node: Node) -> None:
        if not node.users:
            self._idle.pop(node, None)
            self._locked += 1
        node.users += 1

    def _give_up(self, node: Node) -> None:
        del self._idle[node]
        self._free.append(node.page)
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.tokens]
        node.parent = None
