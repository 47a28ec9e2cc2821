"""Who owns which pages of the cache, and which texts' beginnings are kept for others that begin alike.

A page holds the keys and values of 16 tokens in a row.  A sequence has a `Lease`: pages that it shares with others at
its beginning, then its own.  Kept pages form a tree: a node is a page, its children are the pages that may follow, by
their tokens; so the way from a root to a node is the beginning of a text, exactly.  A root belongs to one way of
computing, as to one adapter: whoever makes the roots sees to that.

What a sequence may need at most is promised to it when it begins, so that none fails half way.  Kept pages that nobody
uses are given up as room is needed, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["PAGE", "Lease", "Node", "Pages", "pages_of"]

PAGE: Final = 16


@dataclass(eq=False)
class Node:
    """A kept page, or a root, which has none.

    Attributes:
        page: its number.
        parent: what comes before it; None: it is a root, or was given up.
        tokens: what it holds.
        children: what may come after it.
        users: leases that go through it.
    """

    page: int = 0
    parent: Node | None = None
    tokens: tuple[int, ...] = ()
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0


@dataclass(eq=False)
class Lease:
    """The pages of one sequence.

    Attributes:
        root: where its way through the kept pages begins; None: it shares nothing.
        nodes: the way.
        pages: all its pages, in order; where they are not those of the way, they are its own.
        promised: how many pages of its own it has or may still need.
    """

    root: Node | None
    nodes: list[Node]
    pages: list[int]
    promised: int


def pages_of(tokens: int) -> int:
    """Returns how many pages this many tokens need.

    >>> pages_of(0), pages_of(16), pages_of(17)
    (0, 1, 2)
    """
    return -(-tokens // PAGE)


class Pages:
    """All pages.

    Args:
        budget: how many there may be; None: any number.

    Attributes:
        count: how many exist.  Page 0 is nobody's.
        promised: how many are some sequence's own, or may yet be.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.count, self.promised = budget, 1, 0
        self._free: list[int] = []
        self._locked = 0  # kept ones that are in use
        # Kept ones that nobody uses, the least recently used first; a page comes before the one that it follows.
        self._idle: dict[Node, None] = {}

    @property
    def used(self) -> int:
        """How many are promised or kept."""
        return self.promised + self._locked + len(self._idle)

    def kept(self, root: Node | None, tokens: Sequence[int]) -> list[Node]:
        """Returns the way through kept pages that a text begins with."""
        nodes: list[Node] = []
        node = root
        for at in range(0, len(tokens) - PAGE + 1, PAGE):
            node = node.children.get(tuple(tokens[at : at + PAGE])) if node is not None else None
            if node is None:
                break
            nodes.append(node)
        return nodes

    def lease(self, prompt: Sequence[int], tokens: int, root: Node | None = None) -> Lease | None:
        """Gives a sequence what it needs, or returns None while there is not enough.

        Args:
            prompt: what it begins with; the last token is always its own, since something has to be computed.
            tokens: how many it may store in all.
            root: where to look for pages of others that begin alike.
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
        return Lease(root, nodes, [node.page for node in nodes], promised)

    def extend(self, lease: Lease, count: int) -> None:
        """Gives a sequence pages until it has this many."""
        more = count - len(lease.pages)
        if more <= 0:
            return
        if len(self._free) < more:
            count = max(self.count + more - len(self._free), self.count * 3 // 2)
            if self.budget is not None:
                count = min(count, self.budget + 1)
            self._free = [*range(count - 1, self.count - 1, -1), *self._free]
            self.count = count
        lease.pages += reversed(self._free[-more:])
        del self._free[-more:]

    def share(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Keeps the full pages of what a sequence has stored, for others."""
        if lease.root is None:
            return
        node = lease.nodes[-1] if lease.nodes else lease.root
        for number in range(len(lease.nodes), len(tokens) // PAGE):
            own = tuple(tokens[number * PAGE : (number + 1) * PAGE])
            child = node.children.get(own)
            if child is None:
                child = node.children[own] = Node(lease.pages[number], node, own)
                self.promised -= 1
                lease.promised -= 1
            self._lock(child)
            lease.nodes.append(child)
            node = child

    def release(self, lease: Lease) -> None:
        """Takes a sequence's pages back."""
        self.promised -= lease.promised
        shared = {node.page for node in lease.nodes}
        self._free += [page for page in reversed(lease.pages) if page not in shared]
        for node in reversed(lease.nodes):
            node.users -= 1
            if not node.users:
                self._locked -= 1
                self._idle[node] = None
        lease.nodes, lease.pages, lease.promised = [], [], 0

    def clear(self) -> None:
        """Gives up all kept pages that nobody uses."""
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
